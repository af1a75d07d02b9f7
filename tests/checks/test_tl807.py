"""TL807: NaN and infinity that reach gradients or weights, and what made them."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import AutocastEntered, LossTarget, NonFinite, Producer, Recording, Replay, SecondMoment

check = import_module("trainlint.checks.numerics.non_finite").non_finite
NAN = math.nan


def program() -> tuple[Run, int, list[int]]:
    run = Run()
    net = run.module("Net", {"body.weight": (8, 8), "head.weight": (2, 8)})
    return run, run.optimizer("AdamW", net), net


def broken(value: float = NAN, before: int = 0, **fields: Any) -> Run:
    """A loss that is not finite at one step, and gradients with it."""
    run, adam, _ = program()
    for _ in range(before):
        run.batch().backward().step(adam)
    return run.batch().backward(value=value, **fields).step(adam, gradient=NAN)


def looked(**fields: Any) -> Replay:
    entry = {"when": "before-step", "forward": "Net", "outputs_finite": False, **fields}
    return Replay(non_finite=(NonFinite(**entry),))


def test_finite_runs_pass() -> None:
    run, adam, _ = program()
    for _ in range(3):
        run.batch().backward().step(adam)
    assert findings(check, run) == []


def test_nothing_measured() -> None:
    run, _, _ = program()
    with pytest.raises(NotObserved):
        findings(check, run)


def test_the_operation_is_named() -> None:
    made = Producer("softmax", "nan", "attention", "Attention", 12, 96, masked_rows=2, at=at(40))
    severity, found = only(check, broken(), replay=looked(producer=made))
    assert severity == "error"
    assert "softmax in attention (Attention)" in found.message
    assert "12 of 96" in found.message
    assert "every position is masked" in found.message
    assert found.at == at(40)
    assert "unmasked" in found.fix


def test_a_nan_of_infinities_names_what_made_them() -> None:
    made = Producer("mul", "nan", "", "Net", 4, 8, from_infinite=True, at=at(40))
    source = Producer("log", "inf", "gate", "Gate", 4, 8, at=at(30))
    _, found = only(check, broken(), replay=looked(producer=made, source=source))
    assert "log in gate (Gate)" in found.message
    assert found.at == at(30)
    assert "clamp" in found.fix


def test_float16_that_runs_over() -> None:
    made = Producer("mm", "inf", "body", "Linear", 4, 8, dtype="float16")
    _, found = only(check, broken(math.inf), replay=looked(producer=made))
    assert "float32" in found.fix


def test_a_batch_with_nan_is_the_data() -> None:
    made = Producer("addmm", "nan", "body", "Linear", 4, 8)
    _, found = only(check, broken(), replay=looked(inputs=("input 0",), producer=made))
    assert "the batch itself" in found.message


def test_inputs_with_nan_that_the_model_replaces_are_not_named() -> None:
    _, found = only(check, broken(), replay=looked(inputs=("input 0",), outputs_finite=True))
    assert "though the outputs of Net are finite" in found.message


def test_weights_before_the_first_step() -> None:
    run, adam, _ = program()
    run.batch().backward(value=NAN).step(adam, gradient=NAN, weight=NAN)
    _, found = only(check, run)
    assert "before the first step" in found.message


def test_the_backward_alone_names_where_it_begins() -> None:
    run, adam, net = program()
    run.batch().backward().step(adam, gradient={net[0]: NAN, net[1]: 1.0})
    _, found = only(check, run)
    assert "finite loss" in found.message
    assert "between the two" in found.message
    assert "body.weight" in found.message


def test_the_loss_that_made_it_is_named() -> None:
    run, adam, _ = program()
    run.batch().loss(NAN).backward(value=NAN).step(adam, gradient=NAN)
    _, found = only(check, run, replay=looked(outputs_finite=True))
    assert "cross_entropy made it so" in found.message


def test_only_the_first_step_is_reported() -> None:
    run = broken(before=1)
    run.batch().backward(value=NAN).step(0, gradient=NAN, weight=NAN)
    _, found = only(check, run)
    assert "optimizer step 2" in found.message


def test_batches_without_targets_are_another_checks() -> None:
    run, adam, _ = program()
    run.loss(NAN)
    call = run.events[-1]
    run.events[-1] = call.__class__(**{**vars(call), "target": LossTarget(positions=8, ignored=8)})
    run.backward(value=NAN).step(adam, gradient=NAN)
    with pytest.raises(NotApplicable, match="TL509"):
        findings(check, run)


def test_losses_that_lead_to_no_step_pass() -> None:
    run, adam, _ = program()
    run.batch().backward(value=NAN).zero(adam)
    run.batch().backward().step(adam)
    assert findings(check, run) == []


def test_scaled_losses_that_run_over_pass() -> None:
    run, adam, _ = program()
    run.batch().backward(value=math.inf, loss_scale=65536.0)
    run.batch().backward(loss_scale=32768.0).step(adam)
    assert findings(check, run) == []


def test_eps_that_rounds_away_is_another_checks() -> None:
    run, adam, _ = program()
    run.backward().step(adam)
    run.backward().step(adam, weight=NAN)
    moment = SecondMoment(adam, 0, "float16", eps=1e-8, eps_rounded=0.0)
    with pytest.raises(NotApplicable, match="TL208"):
        findings(check, run, second_moments=(moment,))
    assert "finite gradients" in only(check, run)[1].message


def test_weights_after_the_last_step() -> None:
    run, adam, _ = program()
    run.backward().step(adam)
    entry = NonFinite("replay", "Net", steps=1, weights=("head.weight",), outputs_finite=False)
    _, found = only(check, run, replay=Replay(non_finite=(entry,)))
    assert "head.weight" in found.message


def test_outputs_with_infinities_at_the_end_pass() -> None:
    run, adam, _ = program()
    run.backward().step(adam)
    assert findings(check, run, replay=Replay(non_finite=(NonFinite("replay", "Net", steps=1),))) == []
    assert isinstance(run.recording(), Recording)


def test_the_backward_in_float16() -> None:
    run, adam, net = program()
    run._emit(AutocastEntered, device="cuda", dtype="float16", enabled=True)
    run.batch().backward().step(adam, gradient={net[0]: NAN, net[1]: 1.0})
    assert "float16, which ends at 65504" in (only(check, run)[1].fix or "")
