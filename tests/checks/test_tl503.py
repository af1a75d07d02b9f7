"""TL503 wrong-target-form."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loss.wrong_target_form import wrong_target_form as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import INDICES, LABELS, SCORES, trained
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved

SOFT = {"positions": 32, "minimum": 0.0, "maximum": 1.0, "integral": False, "row_sum_min": 1.0, "row_sum_max": 1.0}
BCE = "binary_cross_entropy_with_logits"


def test_labels_from_one() -> None:
    target = {**INDICES, "minimum": 1.0, "maximum": 4.0, "out_of_range": 7}
    severity, finding = only(check, trained("cross_entropy", SCORES, target, raised="IndexError: Target 4 is ..."))
    assert severity == "error"
    assert "7 of 32 are outside" in finding.message
    assert "the program stops there" in finding.message
    assert finding.fix == "Pass labels - 1."


def test_on_a_gpu_nothing_is_raised_at_the_loss() -> None:
    target = {**INDICES, "maximum": 9.0, "out_of_range": 3}
    assert "device-side assert" in only(check, trained("cross_entropy", SCORES, target))[1].message


def test_a_caught_refusal_is_a_warning() -> None:
    target = {**INDICES, "maximum": 9.0, "out_of_range": 3}
    run = trained("cross_entropy", SCORES, target, raised="IndexError: Target 9 is out of bounds.")
    adam = run.optimizer("AdamW", run.module("Net", {"w": (4, 4)}))
    run.backward().step(adam)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "loses the batch" in finding.message


@pytest.mark.parametrize(("low", "high", "word"), [(-1.0, 3.0, "ignore_index=-1"), (0.0, 255.0, "ignore_index=255")])
def test_marks_that_are_not_the_ignore_index(low: float, high: float, word: str) -> None:
    target = {**INDICES, "minimum": low, "maximum": high, "out_of_range": 5}
    assert word in only(check, trained("cross_entropy", SCORES, target))[1].fix


def test_indices_in_range() -> None:
    for low, high in ((0.0, 3.0), (1.0, 3.0), (2.0, 2.0)):
        assert findings(check, trained("cross_entropy", SCORES, {**INDICES, "minimum": low, "maximum": high})) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "given", "fix"),
    [
        ((32, 4), "int64", (32, 4), "target.float()"),
        ((32,), "float32", (32, 4), "target.long()"),
        ((32, 1), "int64", (32, 4), "squeeze(-1)"),
        ((32,), "int32", (32, 4), "target.long()"),
        ((8, 16), "int64", (8, 16, 4), "transpose(1, -1)"),
    ],
)
def test_what_torch_refuses_is_explained(shape: tuple[int, ...], dtype: str, given: tuple[int, ...], fix: str) -> None:
    run = trained("cross_entropy", input_shape=given, target_shape=shape, target_dtype=dtype, raised="RuntimeError: x")
    assert fix in only(check, run)[1].fix


def test_a_refusal_for_another_reason() -> None:
    run = trained("cross_entropy", SCORES, INDICES, raised="RuntimeError: weight tensor should be defined ...")
    assert findings(check, run) == []


def soft(**figures: Any) -> Run:
    return trained("cross_entropy", SCORES, {**SOFT, **figures}, target_shape=(32, 4), target_dtype="float32")


def test_soft_targets() -> None:
    assert findings(check, soft()) == []
    assert findings(check, soft(integral=True)) == []
    assert findings(check, soft(row_sum_min=0.0)) == [], "rows of zeros are masked positions"
    assert only(check, soft(row_sum_max=3.0, integral=True))[0] == "warning"
    assert only(check, soft(minimum=-2.0, row_sum_min=-4.0))[0] == "error"


def test_the_batch_is_taken_for_the_classes() -> None:
    target = {**SOFT, "integral": True, "positions": 1, "row_sum_min": 14.0, "row_sum_max": 17.0}
    run = trained("cross_entropy", SCORES, target, input_shape=(32,), target_shape=(32,), target_dtype="float32")
    severity, finding = only(check, run)
    assert severity == "error"
    assert "takes the batch for the classes" in finding.message


def test_one_class() -> None:
    shapes: dict[str, Any] = {"input_shape": (32, 1), "target_shape": (32, 1), "target_dtype": "float32"}
    target = {**SOFT, "integral": True, "row_sum_min": 0.0}
    assert "is 0 and trains nothing" in only(check, trained("cross_entropy", SCORES, target, **shapes))[1].message
    assert findings(check, trained("cross_entropy", SCORES, {**INDICES, "maximum": 0.0}, input_shape=(32, 1))) == []


def test_negatives_that_are_ignored() -> None:
    target = {**INDICES, "ignored": 15, "minimum": 1.0, "maximum": 1.0}
    shapes: dict[str, Any] = {"input_shape": (32, 2), "options": {"ignore_index": -1}}
    assert only(check, trained("cross_entropy", SCORES, target, **shapes))[0] == "warning"
    assert findings(check, trained("cross_entropy", SCORES, {**target, "minimum": 0.0}, **shapes)) == []
    assert findings(check, trained("cross_entropy", SCORES, {**target, "ignored": 2}, **shapes)) == []


def test_binary_targets_outside_0_and_1() -> None:
    severity, finding = only(check, trained(BCE, None, {**LABELS, "minimum": -1.0}))
    assert severity == "error"
    assert "(labels + 1) / 2" in finding.fix
    assert only(check, trained(BCE, None, {**LABELS, "maximum": 7.0}))[0] == "error"
    assert findings(check, trained(BCE, None, LABELS)) == []


def test_binary_targets_that_are_masked() -> None:
    missing = {**LABELS, "minimum": -1.0}
    assert findings(check, trained(BCE, None, missing, reduction="none")) == []
    assert findings(check, trained(BCE, None, missing, options={"weight": 32})) == []
    assert only(check, trained(BCE, None, {**LABELS, "maximum": 7.0}, reduction="none"))[0] == "warning"


def test_signs() -> None:
    assert only(check, trained("soft_margin_loss", None, LABELS))[0] == "error"
    assert findings(check, trained("soft_margin_loss", None, {**LABELS, "minimum": -1.0})) == []
    assert findings(check, trained("soft_margin_loss", None, {**LABELS, "minimum": 1.0})) == []


def test_what_was_not_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        findings(check, trained("cross_entropy", SCORES))
    with pytest.raises(NotApplicable):
        findings(check, trained("mse_loss"))
