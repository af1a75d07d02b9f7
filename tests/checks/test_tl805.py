"""TL805: updates that round away."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trainlint.checks.numerics.updates_lost_to_rounding import updates_lost_to_rounding
from trainlint.checks.optimizer.params_unmoved import params_unmoved

from tests.checks.judging import findings, only
from tests.support.build import Run, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.rounding import losses
from trainlint.recording.schema import Numerics, RoundedUpdates

ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def histogram(exponent: int, n: int = 1000) -> tuple[int, ...]:
    """All ``n`` elements between 2**exponent and twice that."""
    return tuple(n if k == exponent + 24 else 0 for k in range(32))


def record(exponent: int, index: int = 0, **fields: object) -> RoundedUpdates:
    """A step whose updates are about 2**exponent of what is needed."""
    lost = exponent < 0
    base = RoundedUpdates(
        0,
        0,
        index,
        "bfloat16",
        1e-5,
        "adam",
        elements=1000,
        unchanged=1000 if lost else 0,
        unchanged_power=1.0 if lost else 0.0,
        median_ratio=1.5 * 2.0**exponent,
        bins=histogram(exponent),
        power=tuple(n / 1000 for n in histogram(exponent)),
        small=1000 if lost else 0,
        small_expected=750 * 2.0**exponent if lost else 0.0,
        large=0 if lost else 1000,
        large_changed=0 if lost else 1000,
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def program(
    *, lr: float = 1e-5, defined_in: str = "torch.optim.adamw", dtype: str = "bfloat16", **module: object
) -> Run:
    run = Run()
    net = run.module("Net", {"body.weight": (64, 64), "head.weight": (8, 64)}, dtype=dtype)
    run.optimizer("AdamW", net, lr=lr, hyper=ADAM, defined_in=defined_in, compute_dtype=dtype)
    return run


def numerics(*records: RoundedUpdates) -> Numerics:
    return Numerics(rounding=records)


def three(run: Run) -> Run:
    for _ in range(3):
        run.batch().backward().step(0)
    return run


def test_lost_at_a_constant_rate_is_an_error() -> None:
    severity, finding = only(
        updates_lost_to_rounding, three(program()), numerics=numerics(*(record(-5, i) for i in range(3)))
    )
    assert severity == "error"
    assert finding.evidence["lost"] == 1.0
    assert "100%" in finding.message and "bfloat16" in finding.message
    assert finding.evidence["rate_that_moves_half"] == pytest.approx(1e-5 / (1.5 * 2**-5))


def test_updates_that_land_are_silent() -> None:
    assert not findings(updates_lost_to_rounding, three(program()), numerics=numerics(record(3)))


def test_the_planned_peak_decides() -> None:
    def watched(peak: float, exponent: int) -> Run:
        run = program(lr=peak)
        schedule = run.scheduler(0, linear(100, 1000), 1000, class_name="LambdaLR")
        for _ in range(3):
            run.batch().backward().step(0).sched(schedule)
        return run

    steps = [record(-5, i, rate=1e-2 * i / 100) for i in (1, 2)]
    assert not findings(updates_lost_to_rounding, watched(1e-2, -5), numerics=numerics(*steps))
    steps = [record(-12, i, rate=1e-2 * i / 100) for i in (1, 2)]
    severity, finding = only(updates_lost_to_rounding, watched(1e-2, -12), numerics=numerics(*steps))
    assert severity == "error"
    assert finding.evidence["peak_rate"] == pytest.approx(1e-2)
    assert "planned peak of 0.01" in finding.message


def test_a_rate_that_rises_to_nobody_knows_where_is_not_judged() -> None:
    run = program()
    for rate in (1e-6, 2e-6, 3e-6):
        run.rates[0] = [rate]
        run.batch().backward().step(0)
    steps = [record(-5, i, rate=1e-6 * (i + 1)) for i in range(3)]
    with pytest.raises(NotObserved):
        findings(updates_lost_to_rounding, run, numerics=numerics(*steps))


def test_most_elements_without_most_of_the_update_is_nothing() -> None:
    heavy = tuple(0.95 if k == 26 else 0.05 if k == 18 else 0.0 for k in range(32))
    bins = tuple(900 if k == 18 else 100 if k == 26 else 0 for k in range(32))
    one = record(-6, bins=bins, power=heavy, unchanged=900, unchanged_power=0.05, large=100, large_changed=100)
    assert not findings(updates_lost_to_rounding, three(program()), numerics=numerics(one))
    some = tuple(0.65 if k == 26 else 0.35 if k == 18 else 0.0 for k in range(32))
    one = replace(one, power=some, unchanged_power=0.35)
    assert only(updates_lost_to_rounding, three(program()), numerics=numerics(one))[0] == "warning"


def test_stochastic_rounding_is_known_by_what_changes() -> None:
    run = three(program(defined_in="torchao.optim.adam"))
    rounded = record(-5, small_expected=23.0, small_changed=20, unchanged=980)
    assert not findings(updates_lost_to_rounding, run, numerics=numerics(rounded))
    assert losses(run.recording(numerics=numerics(rounded)))[0].kept == "stochastic rounding"
    nearest = replace(rounded, small_changed=0, unchanged=1000)
    assert only(updates_lost_to_rounding, run, numerics=numerics(nearest))[0] == "error"


def test_too_few_expected_changes_prove_nothing_about_a_foreign_optimizer() -> None:
    run = three(program(defined_in="mine"))
    assert not findings(updates_lost_to_rounding, run, numerics=numerics(record(-12)))


def test_kept_elsewhere_is_silent_for_both_checks() -> None:
    run = program(defined_in="mine")
    for _ in range(3):
        run.batch().backward().step(0, moved=[0])
    kept = numerics(*(record(-5, i, kept_in="kahan_comp") for i in range(3)))
    assert not findings(updates_lost_to_rounding, run, numerics=kept)
    assert not findings(params_unmoved, run, numerics=kept)


def test_params_unmoved_leaves_rounding_to_this_check() -> None:
    run = program()
    for _ in range(3):
        run.batch().backward().step(0, moved=False)
    lost = numerics(*(record(-5, i) for i in range(3)))
    assert only(updates_lost_to_rounding, run, numerics=lost)[0] == "error"
    assert not findings(params_unmoved, run, numerics=lost)
    assert findings(params_unmoved, run)


def test_an_unknown_formula_needs_the_footprint_of_rounding() -> None:
    run = three(program(defined_in="bitsandbytes.optim"))
    weights = tuple(300 if 14 <= k <= 20 else 0 for k in range(32))
    sharp = tuple(300 if k in (14, 15) else 0 for k in range(32))
    one = RoundedUpdates(0, 0, 0, "bfloat16", 1e-5, elements=2100, unchanged=1500, weights=weights)
    assert only(updates_lost_to_rounding, run, numerics=numerics(replace(one, weights_changed=sharp)))[0] == "warning"
    halving = tuple(round(300 * 2.0 ** -max(0, k - 14)) if 14 <= k <= 20 else 0 for k in range(32))
    assert not findings(updates_lost_to_rounding, run, numerics=numerics(replace(one, weights_changed=halving)))


def test_momentum_that_is_still_growing_is_allowed_for() -> None:
    run = Run()
    net = run.module("Net", {"w": (64, 64)}, dtype="bfloat16")
    run.optimizer(
        "SGD", net, lr=0.1, hyper={"momentum": 0.9, "dampening": 0, "nesterov": False}, defined_in="torch.optim.sgd"
    )
    one = record(-2, rate=0.1, formula="sgd")
    assert not findings(updates_lost_to_rounding, three(run), numerics=numerics(one))


def test_without_half_precision_weights_the_question_does_not_arise() -> None:
    with pytest.raises(NotApplicable):
        findings(updates_lost_to_rounding, three(program(dtype="float32")))
    with pytest.raises(NotObserved):
        findings(updates_lost_to_rounding, three(program()))
