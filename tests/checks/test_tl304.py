"""TL304 gradients-never-zeroed."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loop.gradients_never_zeroed import gradients_never_zeroed as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import CarriedGradients

NET = {"body.weight": (8, 8), "head.weight": (2, 8)}
CLEAN = CarriedGradients()


def train(carried: list[CarriedGradients | None], *, zero: bool = False, **framework: Any) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    if framework:
        run.framework(**framework)
    for each in carried:
        run.batch().backward().step(adam, carried=each)
        if zero:
            run.zero(adam)
    return run


def left(norm: float = 1.0, own: float = 0.5, parameters: tuple[int, ...] = (0, 1)) -> CarriedGradients:
    return CarriedGradients(parameters, len(parameters), norm, own)


def test_gradients_of_every_step_before_are_an_error_with_both_norms() -> None:
    severity, finding = only(check, train([None, left(0.8, 0.5), left(1.3, 0.5)]))
    assert severity == "error"
    assert "at all 2 steps after the first, its 2 gradients" in finding.message
    assert "Step 3: 1.3 left over, 0.5 of its own" in finding.message
    assert "never called" in finding.message
    assert finding.evidence["steps"] == 2


def test_two_steps_are_enough() -> None:
    assert only(check, train([None, left()]))[0] == "error"


def test_at_some_steps_only_is_a_warning() -> None:
    severity, finding = only(check, train([None, CLEAN, left()], zero=True))
    assert severity == "warning"
    assert "at 1 of 2 steps" in finding.message


def test_once_at_the_beginning_is_a_warm_up() -> None:
    assert not findings(check, train([None, left(), CLEAN]))


def test_what_the_loss_scale_divides_away_is_a_warning() -> None:
    severity, finding = only(check, train([None, left(0.4, 3e4), left(0.5, 3e4)]))
    assert severity == "warning"
    assert "loss scale" in finding.message


def test_the_module_that_was_cleared_instead_is_named() -> None:
    run = Run()
    net, centers = run.module("Net", NET), run.module("CenterLoss", {"centers": (4, 8), "scale": (1,)})
    adam = run.optimizer("AdamW", [*net, *centers])
    for carried in (None, left(parameters=(2, 3)), left(parameters=(2, 3))):
        run.zero(None, root=0).batch().backward().step(adam, carried=carried)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "2 of its 4 gradients (all of CenterLoss)" in finding.message
    assert "called on Net, which does not hold them" in finding.message
    assert "on this optimizer" in finding.fix
    assert finding.about == "CenterLoss"


def test_lightning_is_told_in_its_words() -> None:
    run = train([None, left(), left()], name="lightning", automatic_optimization=False)
    assert "opt.zero_grad()" in only(check, run)[1].fix


def test_cleared_gradients_pass() -> None:
    assert not findings(check, train([None, CLEAN, CLEAN], zero=True))


def test_one_step_shows_nothing() -> None:
    with pytest.raises(NotObserved, match="--steps"):
        findings(check, train([None]))
    with pytest.raises(NotObserved):
        findings(check, Run())


def test_steps_without_a_backward_of_their_own() -> None:
    with pytest.raises(NotApplicable):
        findings(check, train([None, None, None]))
