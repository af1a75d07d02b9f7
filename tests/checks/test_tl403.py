"""TL403: the configured rate against the band of a range test."""

from __future__ import annotations

import math
from typing import Any

import pytest
from trainlint.checks.schedule.lr_outside_productive_band import lr_outside_productive_band

from tests.checks.judging import findings, only
from tests.support.build import Run
from tests.support.experiments import sweep, valley
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.lr_band import NoBand, band
from trainlint.recording.schema import Experiment, Plan


def program(lr: float = 1e-3, **fields: Any) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", {"weight": (8, 8)}), lr=lr)
    for _ in range(3):
        run.batch().backward().step(adam).zero(adam)
    run.fields.update(fields)
    return run


def judged(lr: float, steps: int | None = None, **fields: Any) -> list[tuple[str, str]]:
    plan = Plan(optimizer_steps=steps, source="the test") if steps else Plan()
    made = sweep(valley, **{"configured_rate": lr, **fields})
    found = findings(lr_outside_productive_band, program(lr, plan=plan), experiments=(made,))
    return [(s, f.about) for s, f in found]


def test_the_band() -> None:
    seen = band(sweep(valley))
    assert 1e-3 < seen.begins < 4e-3
    assert seen.begins <= seen.steepest <= 0.1
    assert 0.03 < seen.ends < 0.8
    assert seen.diverges is not None
    assert 0.8 < seen.diverges < 1.5
    assert seen.loss_before == pytest.approx(2.3, abs=0.02)


def test_a_rate_in_the_band_or_a_little_beside_it() -> None:
    for lr in (1e-2, 1e-3, 3e-4, 1e-4):
        assert judged(lr) == []
        assert judged(lr, steps=1000) == []
    assert judged(0.5) == []


def test_a_rate_a_thousand_times_too_low() -> None:
    assert judged(1e-6, steps=1000) == [("warning", "below")]
    assert judged(1e-6) == [("warning", "below")]
    severity, finding = only(
        lr_outside_productive_band,
        program(1e-6, plan=Plan(optimizer_steps=1000, source="the test")),
        experiments=(sweep(valley, configured_rate=1e-6),),
    )
    assert severity == "warning"
    assert "of the planned 1,000" in finding.message
    assert finding.evidence["configured_rate"] == 1e-6


def test_a_small_rate_over_a_long_run_is_no_fault() -> None:
    assert judged(1e-5, steps=100_000) == []
    assert judged(1e-5, steps=500) == [("warning", "below")]


def test_a_rate_above_what_blows_up() -> None:
    assert judged(3.0) == [("warning", "above")]
    # Set by hand: what the optimizer was built with may never be used.
    assert judged(1e-3, configured_rate=None, program_rate=3.0) == []


def test_a_rate_set_by_hand_is_judged_by_what_the_program_gave() -> None:
    assert judged(1e-6, configured_rate=None, program_rate=1e-3) == []
    assert judged(1e-6, configured_rate=None, program_rate=1e-6) == [("warning", "below")]
    with pytest.raises(NotObserved, match="not known"):
        judged(1e-6, configured_rate=None)


def test_sweeps_that_show_nothing() -> None:
    for flat in (lambda rate: 2.3, lambda rate: 2.3 + 0.3 * math.sin(1e5 * math.log(rate)), lambda rate: 2.3 + rate):
        with pytest.raises(NoBand, match="noise"):
            band(sweep(flat))
        with pytest.raises(NotObserved, match="noise"):
            findings(lr_outside_productive_band, program(1e-9), experiments=(sweep(flat, configured_rate=1e-9),))
    with pytest.raises(NoBand, match="only 11 steps"):
        band(sweep(lambda rate: math.nan if rate > 7e-7 else 2.3))


def test_losses_below_zero() -> None:
    seen = band(sweep(lambda rate: valley(rate) - 5.0))
    assert 1e-3 < seen.begins < 4e-3


def test_why_nothing_can_be_said() -> None:
    with pytest.raises(NotObserved, match="--deep"):
        findings(lr_outside_productive_band, program())
    for made, error in (
        (Experiment("lr-range", "left-out", "LBFGS finds its own step sizes"), NotApplicable),
        (Experiment("lr-range", "left-out", "interrupted"), NotObserved),
        (Experiment("lr-range", "failed", "it died"), NotObserved),
    ):
        with pytest.raises(error):
            findings(lr_outside_productive_band, program(), experiments=(made,))
