"""TL806: gradients in float16 without a loss scale."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.numerics.fp16_without_scaler import fp16_without_scaler

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import AutocastEntered, HalfGradients, Numerics


def program(*, dtype: str = "float32", autocast: str | None = "float16", **backward: Any) -> Run:
    run = Run()
    run.optimizer("AdamW", run.module("Net", {"w": (64, 64), "b": (64,)}, dtype=dtype))
    if autocast:
        run._emit(AutocastEntered, device="cuda", dtype=autocast, enabled=True)
    run.batch().backward(**backward).step(0)
    return run


def seen(run: Run, *, subnormal: int = 300, half: int = 2, **fields: Any) -> dict[str, Any]:
    look = HalfGradients(len(run.events), 2, half, (0, 1), 1000, 100, subnormal, 0, True, **fields)
    return {"numerics": Numerics(half_gradients=(look,))}


def test_lost_digits_are_an_error() -> None:
    run = program()
    severity, finding = only(fp16_without_scaler, run, **seen(run))
    assert severity == "error"
    assert "33%" in finding.message and "10% are 0" in finding.message


def test_gradients_that_still_fit_are_a_warning() -> None:
    run = program()
    assert only(fp16_without_scaler, run, **seen(run, subnormal=2))[0] == "warning"
    run = program(divided_by=None)
    assert not findings(fp16_without_scaler, run, **seen(run, subnormal=2))
    assert only(fp16_without_scaler, run, **seen(run))[0] == "error"


@pytest.mark.parametrize("backward", [{"loss_scale": 65536.0}, {"divided_by": 1 / 1024}, {"gradient_argument": 1024.0}])
def test_scaled_losses_are_silent(backward: dict[str, Any]) -> None:
    run = program(**backward)
    assert not findings(fp16_without_scaler, run, **seen(run))


def test_accumulation_is_no_scale() -> None:
    run = program(divided_by=8.0)
    assert only(fp16_without_scaler, run, **seen(run))[0] == "error"


def test_a_disabled_scaler_is_named() -> None:
    run = program()
    run.events.insert(0, run.scaler("scale", scale=1.0).events.pop().__class__(1, 0.0, "scale", enabled=False))
    assert "GradScaler is disabled" in only(fp16_without_scaler, run, **seen(run))[1].message


def test_gradients_in_float32_are_silent() -> None:
    run = program()
    assert not findings(fp16_without_scaler, run, **seen(run, half=0))


def test_when_the_question_does_not_arise() -> None:
    with pytest.raises(NotApplicable):
        findings(fp16_without_scaler, program(autocast="bfloat16"))
    with pytest.raises(NotApplicable):
        findings(fp16_without_scaler, program(autocast=None))
    with pytest.raises(NotObserved):
        findings(fp16_without_scaler, program(autocast=None, dtype="float16"))


def test_a_sum_over_many_elements_is_a_scale_of_its_own() -> None:
    run = program(reduction="sum")
    assert not findings(fp16_without_scaler, run, **seen(run, subnormal=2))
    assert only(fp16_without_scaler, run, **seen(run))[0] == "error"
