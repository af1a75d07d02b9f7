"""TL502 sigmoid-before-bce."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loss.sigmoid_before_bce import sigmoid_before_bce as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import LABELS, trained
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved

SIGMOID = {"rows": 64, "minimum": 0.3, "maximum": 0.6, "mean": 0.45, "saturated": 0.0, "made_by": "sigmoid"}
LOGITS = "binary_cross_entropy_with_logits"
PLAIN = "binary_cross_entropy"


def test_a_second_sigmoid() -> None:
    severity, finding = only(check, trained(LOGITS, {**SIGMOID, "gradient_kept": 0.22}, LABELS))
    assert severity == "error"
    assert "22% reaches the logits" in finding.message
    assert "0.731" in finding.message
    assert only(check, trained("multilabel_soft_margin_loss", SIGMOID, LABELS))[0] == "error"


@pytest.mark.parametrize("made_by", ["", "relu", "linear"])
def test_values_between_0_and_1_are_no_sigmoid(made_by: str) -> None:
    assert findings(check, trained(LOGITS, {**SIGMOID, "made_by": made_by}, LABELS)) == []


def test_a_compiled_model_with_a_sigmoid() -> None:
    given = {**SIGMOID, "made_by": "", "node": "CompiledFunctionBackward"}
    assert findings(check, trained(LOGITS, given, LABELS)) == []
    run = Run()
    run.module("Net", {"fc.weight": (4, 1)}, classes={"act": "Sigmoid"}, n_trainable=4)
    assert only(check, trained(LOGITS, given, LABELS, run=run))[0] == "warning"


@pytest.mark.parametrize(
    ("vanished", "severity"), [(0, "warning"), (1, "error"), (20, "error")], ids=["none", "one of 64", "many"]
)
def test_how_close_to_saturation(vanished: int, severity: str) -> None:
    found, finding = only(check, trained(PLAIN, {**SIGMOID, "vanished": vanished}, LABELS))
    assert found == severity
    assert finding.evidence["stuck"] == vanished


def test_one_lost_gradient_of_many_is_a_warning() -> None:
    assert only(check, trained(PLAIN, {**SIGMOID, "rows": 6400, "vanished": 1}, LABELS))[0] == "warning"


def test_probabilities_that_no_sigmoid_made() -> None:
    assert findings(check, trained(PLAIN, {**SIGMOID, "made_by": ""}, LABELS)) == []


def gan(**figures: Any) -> Run:
    run = trained(PLAIN, {**SIGMOID, "vanished": 0}, {**LABELS, "minimum": 1.0}, line=8)
    return trained(PLAIN, {**SIGMOID, "vanished": 0, **figures}, {**LABELS, "maximum": 0.0}, line=9, run=run)


def test_a_discriminator() -> None:
    assert findings(check, gan()) == []
    assert only(check, gan(vanished=30))[0] == "error"


def test_pixels() -> None:
    assert findings(check, trained(PLAIN, {**SIGMOID, "vanished": 0}, {**LABELS, "integral": False})) == []


def test_torch_refuses_it_under_autocast() -> None:
    text = "RuntimeError: torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast."
    assert only(check, trained(PLAIN, SIGMOID, LABELS, raised=text))[0] == "error"


def test_what_was_not_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        findings(check, trained(LOGITS, None, LABELS))
    with pytest.raises(NotApplicable):
        findings(check, trained("cross_entropy"))
