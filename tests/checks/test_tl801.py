"""TL801: the size of a step against the size of the weights."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.numerics.update_ratio_out_of_band import update_ratio_out_of_band

from tests.checks.judging import findings, only
from tests.support.build import Run, linear
from trainlint.contract import NotApplicable, NotObserved

SHAPES = {f"{name}.weight": (32, 32) for name in "abcdef"}
#: Norm of a matrix of these shapes whose root mean square is 0.1.
NORM = 0.1 * 32


def program(
    ratio: float, *, lr: float = 1e-3, name: str = "AdamW", steps: int = 3, weight: float = 0.1, **fields: Any
) -> Run:
    run = Run()
    run.optimizer(name, run.module("Net", {**SHAPES, "a.bias": (32,)}), lr=lr, **fields)
    for _ in range(steps):
        run.batch().backward().step(0, weight=weight, update=ratio * weight * 32)
    return run


def test_ordinary_ratios_are_silent() -> None:
    for ratio in (1e-5, 1e-3, 1e-2, 0.1, 0.3):
        assert not findings(update_ratio_out_of_band, program(ratio))


def test_too_large() -> None:
    severity, finding = only(update_ratio_out_of_band, program(1.5, lr=0.3))
    assert severity == "warning"
    assert finding.evidence["median_at_peak"] == pytest.approx(1.5)
    assert finding.evidence["matrices"] == 6


def test_too_small_counts_over_the_plan() -> None:
    severity, finding = only(update_ratio_out_of_band, program(2e-7).plan(optimizer_steps=1000))
    assert severity == "warning" and "1,000 steps change them by 0.02% at most" in finding.message
    assert not findings(update_ratio_out_of_band, program(2e-7).plan(optimizer_steps=1_000_000))
    assert findings(update_ratio_out_of_band, program(2e-7))
    assert not findings(update_ratio_out_of_band, program(5e-7, name="SGD"))


def warming(ratio: float, peak: float) -> Run:
    run = Run()
    run.optimizer("AdamW", run.module("Net", SHAPES), lr=peak)
    schedule = run.scheduler(0, linear(1000, 10_000), 10_000, class_name="LambdaLR")
    for n in range(3):
        run.batch().backward().step(0, weight=0.1, update=ratio * NORM * n / 1000).sched(schedule)
    return run


def test_warm_up_is_scaled_to_the_peak() -> None:
    assert not findings(update_ratio_out_of_band, warming(1e-3, 1e-3))
    _, finding = only(update_ratio_out_of_band, warming(2.0, 1.0))
    assert finding.evidence["median_at_peak"] == pytest.approx(2.0, rel=0.01)
    assert "planned peak" in finding.message


def test_rising_to_nobody_knows_where() -> None:
    run = Run()
    run.optimizer("AdamW", run.module("Net", SHAPES))
    for n in range(3):
        run.rates[0] = [1e-6 * (n + 1)]
        run.batch().backward().step(0, weight=0.1, update=1e-6)
    with pytest.raises(NotObserved):
        findings(update_ratio_out_of_band, run)


def test_one_layer_that_stands_out() -> None:
    run = Run()
    net = run.module("Net", SHAPES)
    run.optimizer("SGD", net)
    for _ in range(3):
        run.batch().backward().step(0, weight=0.1, update=1e-3 * NORM)
        columns = list(run.measured[-1].update_norm)
        columns[net[4]] = 0.3 * NORM
        run.measured[-1] = run.measured[-1].__class__(**{**vars(run.measured[-1]), "update_norm": tuple(columns)})
    _, finding = only(update_ratio_out_of_band, run)
    assert finding.about == "e.weight" and "e.weight" in finding.message


def test_what_is_left_out() -> None:
    with pytest.raises(NotApplicable):
        findings(update_ratio_out_of_band, program(2.0, name="LBFGS"))
    with pytest.raises(NotApplicable):
        findings(update_ratio_out_of_band, program(1e-9, hyper={"d": 1e-6, "betas": (0.9, 0.99)}))
    with pytest.raises(NotObserved):
        findings(update_ratio_out_of_band, program(2.0, weight=1e-3))
    run = Run()
    run.optimizer("Adam", run.module("Net", {"norm": (32,), "table.weight": (100, 8)}))
    run.change([1], kind="embedding")
    with pytest.raises(NotApplicable):
        findings(update_ratio_out_of_band, run.batch().backward().step(0, update=10.0))


def test_matrices_that_began_at_zero_stay_out_later() -> None:
    run = Run()
    run.optimizer("Adam", run.module("Net", SHAPES))
    for n in range(3):
        run.batch().backward().step(0, weight=1e-3 * n, update=0.032)
    with pytest.raises(NotApplicable):
        findings(update_ratio_out_of_band, run)


def test_the_tail_of_a_resumed_schedule_is_not_too_small() -> None:
    assert findings(update_ratio_out_of_band, program(1e-8, lr=1e-8))
    assert not findings(update_ratio_out_of_band, program(1e-8, lr=1e-8).loaded("scheduler"))
    assert not findings(update_ratio_out_of_band, program(1e-8, lr=1e-8, state_tensors_before=12))


def test_a_matrix_that_consists_of_its_steps_is_held_against_what_it_was() -> None:
    """AdamW at rate 20: from the second step on the step is half of the matrix, which the first one made."""
    run = Run()
    run.optimizer("AdamW", run.module("Net", SHAPES), lr=20.0)
    for weight, update in ((0.1, 20.0), (20.0, 9.6), (28.0, 4.6)):
        run.batch().backward().step(0, weight=weight, update=update * 32)
    _, finding = only(update_ratio_out_of_band, run)
    assert finding.evidence["median_at_peak"] == pytest.approx(96.0)
