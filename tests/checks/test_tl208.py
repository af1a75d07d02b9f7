"""TL208 half-precision-optimizer-math."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.optimizer.half_precision_optimizer_math import half_precision_optimizer_math as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import SecondMoment

NET = {"fc.weight": (8, 8)}


def trained(dtype: str, optimizer: str = "AdamW", state: str | None = None, **hyper: Any) -> Run:
    run = Run()
    net = run.module("Net", NET, dtype=dtype)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, **hyper} if optimizer != "SGD" else None
    number = run.optimizer(
        optimizer, net, compute_dtype=state or dtype, hyper=settings, state_dtypes={"exp_avg_sq": state or dtype}
    )
    return run.backward().step(number).backward().step(number)


def moment(dtype: str, **fields: Any) -> tuple[SecondMoment, ...]:
    return (SecondMoment(0, 0, dtype, eps=1e-8, beta2=0.999, elements=1000, **fields),)


def test_eps_rounds_to_zero_in_float16() -> None:
    severity, finding = only(check, trained("float16"), second_moments=moment("float16", eps_rounded=0.0, zero=40))
    assert severity == "error"
    assert "eps=1e-8 rounds to 0" in finding.message
    assert "4% of the sampled elements" in finding.message


def test_eps_of_zero_that_has_not_hurt_yet_is_a_warning() -> None:
    assert only(check, trained("float16"), second_moments=moment("float16", eps_rounded=0.0))[0] == "warning"


def test_a_second_moment_that_cannot_fall_in_bfloat16() -> None:
    moments = moment("bfloat16", eps_rounded=1.001e-8, stuck=990, step_ratio=0.37)
    severity, finding = only(check, trained("bfloat16"), second_moments=moments)
    assert severity == "error"
    assert "99% of 1,000 sampled elements" in finding.message
    assert "0.37 times that in float32" in finding.message


def test_how_many_elements_take_another_step_and_by_what_factor() -> None:
    moments = moment("bfloat16", eps_rounded=1.001e-8, stuck=990, step_ratio=0.99, affected=400, affected_ratio=0.37)
    _, finding = only(check, trained("bfloat16"), second_moments=moments)
    assert "For 40% of the sampled elements the step taken is 0.37 times that in float32" in finding.message


def test_fused_kernels_only_store_in_half_precision() -> None:
    moments = moment("bfloat16", eps_rounded=1e-8, stuck=990, implementation="fused")
    _, finding = only(check, trained("bfloat16", fused=True), second_moments=moments)
    assert "keeps its state in bfloat16" in finding.message


def test_a_faster_decay_does_not_stick() -> None:
    run = trained("bfloat16", betas=(0.9, 0.95))
    assert findings(check, run, second_moments=moment("bfloat16", eps_rounded=1.001e-8, stuck=0)) == []


def test_float32_weights_under_autocast_are_silent() -> None:
    assert findings(check, trained("float32")) == []


def test_float32_state_beside_half_precision_weights_is_silent() -> None:
    assert findings(check, trained("bfloat16", state="float32")) == []


def test_a_sane_eps_in_float16() -> None:
    assert findings(check, trained("float16"), second_moments=moment("float16", eps_rounded=1e-6)) == []


@pytest.mark.parametrize(("dtype", "word"), [("float16", "eps"), ("bfloat16", "cannot fall")])
def test_from_the_dtypes_alone_it_is_a_warning(dtype: str, word: str) -> None:
    severity, finding = only(check, trained(dtype))
    assert severity == "warning"
    assert word in finding.message


def test_fused_kernels_add_eps_in_float32() -> None:
    assert findings(check, trained("float16", fused=True)) == []


def test_sgd_does_not_apply() -> None:
    with pytest.raises(NotApplicable):
        findings(check, trained("bfloat16", "SGD"))


def test_without_a_step_it_is_not_observed() -> None:
    run = Run()
    run.optimizer("AdamW", run.module("Net", NET))
    with pytest.raises(NotObserved):
        findings(check, run)
