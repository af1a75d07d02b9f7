"""TL504: padding in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from trainlint.checks.loss.padding_in_the_loss import padding_in_the_loss

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import BatchFetched, LossCall, LossGradient, TargetRows

#: 4 rows of 10 positions, 12 of them padding that counts.
ROWS = TargetRows(
    rows=4, length=10, beside=True, padding=12, padding_kind="ids", padding_value=0, padding_repeats=9,
    shown_by="input ids", padding_max=6, padded_rows=3, padding_supervised=12, padding_target=0, compared=20,
    same=(0.0, 1.0, 0.1), embedded=True,
)  # fmt: skip
FULL = LossGradient(total=1.0)


def program(calls: Sequence[tuple[TargetRows | None, LossGradient | None]], **call: Any) -> Run:
    run = Run()
    held = run.module("Net", {"weight": (4, 4)})
    run.optimizer("AdamW", held)
    call = {"function": "cross_entropy", "reduction": "mean", "value": 2.0, "at": at(7), **call}
    for rows, gradient in calls:
        run.batch()._emit(LossCall, rows=rows, gradient=gradient, **call)
        run.backward().step()
    return run


def rows(**fields: Any) -> TargetRows:
    return replace(ROWS, **fields)


def test_padding_that_counts() -> None:
    severity, finding = only(padding_in_the_loss, program([(ROWS, FULL)] * 3))
    assert severity == "error"
    assert finding.message.startswith(
        "30% of the targets that cross_entropy (train.py:7) counts are padding: 36 of 120"
    )
    assert "ignore_index in effect is -100" in finding.message
    assert finding.evidence["share"] == 0.3


@pytest.mark.parametrize(
    ("fields", "severity"),
    [
        ({"padding_kind": "mask", "padding_repeats": 0}, "error"),
        ({"padding_kind": "lengths"}, "error"),
        ({"padding_kind": "values", "classes": False}, "warning"),
        ({"padding_kind": "values", "confirmed_by": "mask (mask)", "classes": False}, "error"),
        ({"same": (1.0, 0.0, 0.0)}, "warning"),  # the target is the input: an autoencoder
        ({"padding_supervised": 0}, None),
        ({"padding_supervised": 3}, None),  # one a row: an end token with the id that pads
        ({"padding_supervised": 9, "left": True}, "error"),
        ({"padding_weightless": True}, None),
        ({"padding_min": 6}, None),  # every row ends in the same number of zeros
        ({"padding_repeats": 2}, None),
        ({"padded_rows": 0}, None),
        ({"padding": 0, "padding_supervised": 0}, None),
    ],
)
def test_how_well_it_is_shown(fields: dict[str, Any], severity: str | None) -> None:
    found = findings(padding_in_the_loss, program([(rows(**fields), FULL)] * 2))
    assert [s for s, _ in found] == ([severity] if severity else [])


def test_runs_of_several_values_are_no_padding() -> None:
    calls = [(rows(padding_value=v), FULL) for v in (0, 5)]
    assert findings(padding_in_the_loss, program(calls)) == []


def test_a_loss_that_is_only_looked_at() -> None:
    assert findings(padding_in_the_loss, program([(ROWS, None)] * 2)) == []


def gradient(nonzero: int, each: float, padding: int = 0) -> LossGradient:
    return LossGradient(each * nonzero, 40, nonzero, each, each, padding)


def test_unreduced_losses_by_what_comes_back() -> None:
    none = {"reduction": "none"}
    other = rows(padding=20, padding_supervised=20)
    right = [(ROWS, gradient(28, 1 / 28)), (other, gradient(20, 1 / 20))]
    assert findings(padding_in_the_loss, program(right, **none)) == []
    severity, finding = only(padding_in_the_loss, program([(ROWS, gradient(40, 1 / 40, 12))] * 2, **none))
    assert (severity, finding.evidence["padding"]) == ("error", 24)
    by_all = [(ROWS, gradient(28, 0.5 / 40)), (other, gradient(20, 0.5 / 40))]
    severity, finding = only(padding_in_the_loss, program(by_all, **none))
    assert severity == "warning"
    assert "is masked, but its sum is divided by all 80 positions" in finding.message
    assert "of which 48 count" in finding.message
    # One share of padding: the divisor must be one of the two exactly.
    assert findings(padding_in_the_loss, program([(ROWS, gradient(28, 0.5 / 40))] * 2, **none)) == []
    assert len(findings(padding_in_the_loss, program([(ROWS, gradient(28, 1 / 40))] * 2, **none))) == 1
    # A mean per row first: every row has a gradient of its own.
    per_row = replace(gradient(28, 1 / 40), smallest=1 / 80)
    assert findings(padding_in_the_loss, program([(ROWS, per_row)] * 2, **none)) == []


def test_ignored_positions_in_the_denominator() -> None:
    """reduction="none" gives 0 at ignored positions; mean() counts them."""
    one, two = (rows(padding_supervised=0, ignored=n) for n in (12, 20))
    calls = [(one, gradient(40, 1 / 40, 12)), (two, gradient(40, 1 / 40, 20))]
    severity, finding = only(padding_in_the_loss, program(calls, reduction="none"))
    assert (severity, finding.evidence["valid"]) == ("warning", 48)
    calls = [(one, gradient(40, 1 / 28, 12)), (two, gradient(40, 1 / 20, 20))]
    assert findings(padding_in_the_loss, program(calls, reduction="none")) == []


def test_in_the_words_of_the_framework() -> None:
    run = program([(ROWS, FULL)] * 2).framework("transformers")
    assert "attention_mask == 0, -100" in only(padding_in_the_loss, run)[1].fix
    regression = program([(rows(classes=False, confirmed_by="mask (mask)", padding_kind="values"), FULL)] * 2)
    assert "mask.sum()" in only(padding_in_the_loss, regression)[1].fix


def test_labels_of_the_batches_when_the_trainer_has_a_loss_of_its_own() -> None:
    run = program([])
    run.loader()
    for _ in range(2):
        run._emit(BatchFetched, loader=0, labels=ROWS)
        run.backward().step()
    with pytest.raises(NotObserved):
        findings(padding_in_the_loss, run)
    severity, finding = only(padding_in_the_loss, run.framework("transformers"))
    assert severity == "warning", "the loss itself was not seen"
    assert finding.message.startswith("30% of the targets that the trainer's own loss counts are padding")


def test_what_could_not_be_seen() -> None:
    with pytest.raises(NotObserved, match="--timeout"):
        findings(padding_in_the_loss, Run())
    with pytest.raises(NotApplicable, match="row of positions"):
        findings(padding_in_the_loss, program([(None, FULL)]))
    with pytest.raises(NotObserved, match="was not seen"):
        findings(padding_in_the_loss, program([(TargetRows(4, 10), FULL)]))
    with pytest.raises(NotApplicable):
        findings(padding_in_the_loss, program([(TargetRows(4, 10, classes=False), FULL)], function="mse_loss"))
    with pytest.raises(NotApplicable, match="target for each position"):
        findings(padding_in_the_loss, program([(None, FULL)], function="ctc_loss"))
