"""TL509: batches, samples and ends without targets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from trainlint.checks.loss.no_supervised_targets import no_supervised_targets

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import BatchFetched, LossCall, LossGradient, LossTarget, TargetRows

SOME, NONE = LossTarget(positions=40, ignored=10), LossTarget(positions=40, ignored=40)
ROWS = TargetRows(rows=4, length=10, beside=True, ignored=10, compared=20, same=(0.0, 1.0, 0.1), embedded=True)
FULL = LossGradient(total=1.0)
NAN = math.nan


def program(*calls: dict[str, Any], backward: float = 2.0) -> Run:
    run = Run()
    held = run.module("Net", {"weight": (4, 4)})
    run.optimizer("AdamW", held)
    for call in calls:
        base = {"function": "cross_entropy", "reduction": "mean", "value": 2.0, "target": SOME, "gradient": FULL}
        run.batch()._emit(LossCall, at=at(7), **{**base, **call})
        run.backward(value=backward).step()
    return run


def test_a_batch_without_targets() -> None:
    severity, finding = only(no_supervised_targets, program({}, {"target": NONE, "value": NAN}))
    assert severity == "error"
    assert finding.message.startswith("1 batch of 2 had no target at all: each of the 40 targets")
    assert "0/0 = NaN" in finding.message


@pytest.mark.parametrize(
    ("call", "backward", "severity"),
    [
        ({"reduction": "sum", "value": 0.0}, NAN, "error"),  # divided by the number of targets later
        ({"reduction": "sum", "value": 0.0}, 0.0, "warning"),
        ({"value": NAN, "gradient": None}, 2.0, None),  # the batch is thrown away
    ],
)
def test_what_becomes_of_it(call: dict[str, Any], backward: float, severity: str | None) -> None:
    found = findings(no_supervised_targets, program({"target": NONE, **call}, backward=backward))
    assert [s for s, _ in found] == ([severity] if severity else [])


def test_samples_that_the_prompt_fills() -> None:
    some = {"rows": replace(ROWS, empty=2, empty_full=1)}
    severity, finding = only(no_supervised_targets, program(some, some, {"rows": ROWS}))
    assert severity == "warning"
    assert finding.message.startswith("2 of 12 samples carry no target")
    assert "75% of all positions are supervised" in finding.message
    many = replace(ROWS, rows=40, length=1, empty=1, empty_full=1)
    assert only(no_supervised_targets, program({"rows": many}))[0] == "info"


@pytest.mark.parametrize(
    "rows",
    [
        replace(ROWS, empty=2, empty_full=0),  # short rows
        replace(ROWS, empty=2, empty_full=2, same=(0.1, 0.0, 0.1)),  # masked language model
        replace(ROWS, empty=2, empty_full=2, same=(), compared=0),
        replace(ROWS, empty=2, empty_full=2, compared=2),
    ],
)
def test_rows_that_rightly_have_none(rows: TargetRows) -> None:
    assert findings(no_supervised_targets, program({"rows": rows})) == []


def test_ends_that_are_never_learned() -> None:
    rows = replace(ROWS, ends=3, ends_ignored=3, end_token=2)
    severity, finding = only(no_supervised_targets, program({"rows": rows}, {"rows": rows}))
    assert severity == "warning"
    assert finding.message.startswith("Token 2 ends 6 of 8 samples and is the padding as well")
    for other in (replace(rows, ends_ignored=2), replace(rows, end_token=3), replace(rows, same=(0.0, 0.0, 0.0))):
        assert findings(no_supervised_targets, program({"rows": rows}, {"rows": other})) == []


def test_labels_of_the_batches_when_the_trainer_has_a_loss_of_its_own() -> None:
    run = program().framework("transformers")
    run.loader()
    for rows in (ROWS, replace(ROWS, empty=1, empty_full=1)):
        run._emit(BatchFetched, loader=0, labels=rows)
        run.backward(value=1.0).step()
    severity, finding = only(no_supervised_targets, run)
    assert severity == "warning"
    assert finding.message.startswith("1 of 8 samples carry no target: the trainer's own loss ignores")
    run._emit(BatchFetched, loader=0, labels=replace(ROWS, ignored=40, empty=4))
    run.backward(value=NAN)
    assert only(no_supervised_targets, run)[0] == "error"


def test_what_could_not_be_seen() -> None:
    with pytest.raises(NotObserved):
        findings(no_supervised_targets, Run())
    with pytest.raises(NotApplicable, match="probabilities"):
        findings(no_supervised_targets, program({"target": LossTarget(positions=4)}))
    with pytest.raises(NotApplicable, match="ignore_index"):
        findings(no_supervised_targets, program({"function": "mse_loss"}))
