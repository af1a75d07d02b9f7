"""TL802: the loss scale over the watch, and in what was loaded."""

from __future__ import annotations

import pytest
from trainlint.checks.numerics.loss_scale_collapsing import loss_scale_collapsing

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Numerics, Scaler, ScalerState


def program(taken: list[bool], *, scale: float = 65536.0, grow_every: int = 10**6) -> Run:
    """One attempt per entry: taken or skipped."""
    run = Run()
    run.optimizer("AdamW", run.module("Net", {"w": (8, 8)}))
    good = 0
    for step_is_taken in taken:
        run.batch().scaler("scale", scale=scale, optimizer=None).backward(loss_scale=scale)
        if step_is_taken:
            run.step(0)
            good += 1
        run.scaler("step", skipped=not step_is_taken, scale=scale)
        scale = scale if step_is_taken else scale / 2
        if good == grow_every:
            scale, good = 2 * scale, 0
        run.scaler("update", scale=scale, optimizer=None)
    return run


def test_never_a_step() -> None:
    severity, finding = only(loss_scale_collapsing, program([False] * 60))
    assert severity == "error"
    assert "all of 60 steps" in finding.message and "Nothing is trained" in finding.message


def test_calibration_is_ordinary() -> None:
    assert not findings(loss_scale_collapsing, program([False] * 6 + [True] * 20))
    assert not findings(loss_scale_collapsing, program([False] * 20 + [True] * 20))


def test_falling_again_and_again() -> None:
    severity, finding = only(loss_scale_collapsing, program([False, False, *[True, True, False] * 6]))
    assert severity == "error"
    assert finding.evidence["falls_after_calibration"] == 6
    assert finding.evidence["calibration"] == 2


def test_single_skips_and_probing_are_ordinary() -> None:
    assert not findings(loss_scale_collapsing, program([True] * 8 + [False] + [True] * 8))
    assert not findings(loss_scale_collapsing, program([True, True, True, False] * 8, grow_every=3))


def test_below_one_by_falling() -> None:
    assert only(loss_scale_collapsing, program([*[True] * 10, False, True], scale=1.0))[0] == "error"
    assert not findings(loss_scale_collapsing, program([True] * 12, scale=0.25))


def test_the_usual_watch_shows_calibration_only() -> None:
    for taken in ([True] * 3, [False] * 4 + [True] * 3, [False] * 10):
        with pytest.raises(NotObserved, match="--steps"):
            findings(loss_scale_collapsing, program(taken))


def test_loaded_state() -> None:
    def loaded(scale: float) -> Numerics:
        return Numerics(scalers=(Scaler(),), scaler_states=(ScalerState(scale, 0, "/runs/last.pt"),))

    run = program([True] * 20)
    severity, finding = only(loss_scale_collapsing, run, numerics=loaded(1e-10))
    assert severity == "error" and "last.pt" in finding.message and "1e-10" in finding.message
    assert only(loss_scale_collapsing, run, numerics=loaded(0.25))[0] == "warning"
    assert only(loss_scale_collapsing, run, numerics=loaded(0.0))[0] == "error"
    assert not findings(loss_scale_collapsing, run, numerics=loaded(32.0))


def test_two_scalers_are_not_told_apart() -> None:
    with pytest.raises(NotObserved, match="2 scalers"):
        findings(loss_scale_collapsing, program([False] * 60), numerics=Numerics(scalers=(Scaler(), Scaler())))


def test_no_scaler() -> None:
    run = Run()
    run.optimizer("AdamW", run.module("Net", {"w": (8, 8)}))
    with pytest.raises(NotApplicable):
        findings(loss_scale_collapsing, run.batch().backward().step(0))
