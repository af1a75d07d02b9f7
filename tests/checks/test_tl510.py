"""TL510: labels shifted twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from trainlint.checks.loss.labels_shifted_twice import labels_shifted_twice

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import LossCall, TargetRows

TWICE = TargetRows(rows=4, length=16, beside=True, compared=56, same=(0.02, 0.05, 1.0), embedded=True)
ONCE = replace(TWICE, same=(0.02, 1.0, 0.05))


def program(*rows: TargetRows | None, backward: float = 2.0, **call: Any) -> Run:
    """Losses of value 2 at a line each, all in one backward, for two steps."""
    run = Run()
    held = run.module("Net", {"weight": (4, 4)})
    run.optimizer("AdamW", held)
    call = {"function": "cross_entropy", "reduction": "mean", "value": 2.0, **call}
    for _ in range(2):
        run.batch()
        for line, one in enumerate(rows):
            run._emit(LossCall, rows=one, at=at(7 + line), **call)
        run.backward(value=backward).step()
    return run


def test_the_token_after_the_next() -> None:
    severity, finding = only(labels_shifted_twice, program(TWICE))
    assert severity == "error"
    assert (
        "100% of 112 targets equal the ids that the model's embedding looked up two positions later" in finding.message
    )
    assert "labels=input_ids" in only(labels_shifted_twice, program(TWICE).framework("transformers"))[1].fix


@pytest.mark.parametrize(
    "rows",
    [
        ONCE,
        replace(TWICE, same=(1.0, 0.02, 0.05)),  # tagging, masked models
        replace(TWICE, same=(0.1, 0.9, 0.97)),  # a text that repeats itself
        replace(TWICE, same=(1.0, 0.0, 1.0)),  # period two
        replace(TWICE, same=(0.1, 0.1, 0.6)),
        replace(TWICE, compared=5),
    ],
)
def test_other_targets(rows: TargetRows) -> None:
    assert findings(labels_shifted_twice, program(rows)) == []


def test_a_head_that_looks_further_ahead() -> None:
    assert findings(labels_shifted_twice, program(ONCE, TWICE, backward=4.0)) == []


def test_weaker_proof() -> None:
    assert only(labels_shifted_twice, program(replace(TWICE, embedded=False)))[0] == "warning"
    assert only(labels_shifted_twice, program(TWICE, backward=7.0))[0] == "warning", "something else is in the loss"


def test_what_could_not_be_seen() -> None:
    with pytest.raises(NotObserved):
        findings(labels_shifted_twice, Run())
    with pytest.raises(NotObserved, match="were not seen"):
        findings(labels_shifted_twice, program(TargetRows(4, 16)))
    with pytest.raises(NotApplicable):
        findings(labels_shifted_twice, program(None))
    with pytest.raises(NotApplicable):
        findings(labels_shifted_twice, program(None, function="mse_loss"))
