"""TL501 double-softmax."""

from __future__ import annotations

import math

import pytest
from trainlint.checks.loss.double_softmax import double_softmax as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import INDICES, LOG_PROBABILITIES, PROBABILITIES, SCORES, trained
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import LossGradient

SOFTMAX = {**PROBABILITIES, "made_by": "softmax", "made_over": 1, "node": "SoftmaxBackward0", "gradient_kept": 0.25}
OPAQUE = {**PROBABILITIES, "node": "CompiledFunctionBackward"}


def test_softmax_before_cross_entropy() -> None:
    run = trained("cross_entropy", SOFTMAX, INDICES)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "25% reaches the logits" in finding.message
    assert finding.at == at(8)
    assert finding.evidence["loss_floor"] == pytest.approx(math.log(math.e + 3) - 1)


def test_the_module_is_named_when_there_is_one() -> None:
    run = Run()
    run.module("Net", {"fc.weight": (4, 4)}, classes={"fc": "Linear", "head.act": "Softmax"}, n_trainable=16)
    _, finding = only(check, trained("cross_entropy", SOFTMAX, INDICES, run=run))
    assert "Net.head.act" in finding.message
    assert "Net.head.act" in finding.fix


def test_the_repair_speaks_the_framework() -> None:
    run = trained("cross_entropy", SOFTMAX, INDICES).framework("lightning")
    assert "training_step" in only(check, run)[1].fix


def test_values_are_enough_where_the_graph_cannot_be_read() -> None:
    assert only(check, trained("cross_entropy", OPAQUE, INDICES))[0] == "error"


@pytest.mark.parametrize(
    "figures",
    [
        {"rows": 2},
        {"saturated": 1.0},
        {"minimum": 0.25, "maximum": 0.25},
        {"row_sum_max": 1.01},
        {"minimum": -0.01},
        {"classes": 1},
        {"made_by": "linear"},
    ],
    ids=str,
)
def test_values_that_only_look_like_probabilities(figures: dict[str, object]) -> None:
    assert findings(check, trained("cross_entropy", {**OPAQUE, **figures}, INDICES, calls=1)) == []


def test_a_softmax_over_another_dimension() -> None:
    given = {**SOFTMAX, "made_over": 0, "row_sum_min": 0.6, "row_sum_max": 1.4}
    _, finding = only(check, trained("cross_entropy", given, INDICES))
    assert "over dimension 0" in finding.message


def test_scores_of_a_sigmoid_are_a_warning() -> None:
    given = {**SCORES, "minimum": 0.3, "maximum": 0.7, "made_by": "sigmoid"}
    assert only(check, trained("cross_entropy", given, INDICES))[0] == "warning"


def test_log_probabilities_are_harmless() -> None:
    assert only(check, trained("cross_entropy", LOG_PROBABILITIES, INDICES))[0] == "info"
    assert findings(check, trained("cross_entropy", {**LOG_PROBABILITIES, "made_by": "log"}, INDICES)) == []


def test_log_softmax_over_the_batch() -> None:
    given = {**LOG_PROBABILITIES, "made_over": 0}
    assert only(check, trained("cross_entropy", given, INDICES))[0] == "warning"


def test_a_helper_that_serves_two_models() -> None:
    run = trained("cross_entropy", SCORES, INDICES)
    assert only(check, trained("cross_entropy", SOFTMAX, INDICES, run=run))[0] == "error"


def test_a_loss_that_is_only_looked_at() -> None:
    run = trained("cross_entropy", SOFTMAX, INDICES, line=8)
    trained("cross_entropy", SCORES, INDICES, line=9, gradient=LossGradient(total=1.0), run=run)
    assert findings(check, run) == []
    no_training = trained("cross_entropy", SOFTMAX, INDICES, grad_enabled=False)
    with pytest.raises(NotApplicable):
        findings(check, no_training)


def test_what_was_not_seen_is_said() -> None:
    with pytest.raises(NotObserved, match=r"torch\.compile"):
        findings(check, Run().backward())
    with pytest.raises(NotObserved, match="measured"):
        findings(check, trained("cross_entropy", None, INDICES))
    with pytest.raises(NotApplicable):
        findings(check, trained("mse_loss"))
