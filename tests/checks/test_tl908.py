"""TL908: columns that the Trainer removes."""

from __future__ import annotations

import pytest
from judging import findings, only
from trainlint.checks.data.data_columns_dropped import data_columns_dropped

from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema.samples import Columns, DroppedColumn, Samples

KEPT = ("features", "labels")


def seen(*dropped: DroppedColumn) -> Samples:
    return Samples(columns=(Columns("WeightedTrainer", (*KEPT, "text", "weight"), KEPT, dropped, "Net"),))


def test_a_column_that_the_loss_takes() -> None:
    lost = DroppedColumn("weight", "compute_loss", at(12))
    severity, finding = only(data_columns_dropped, Run().framework("transformers"), samples=seen(lost))
    assert severity == "warning"
    assert "'weight'" in finding.message and "compute_loss (train.py:12)" in finding.message
    assert "Net.forward names: features, labels" in finding.message


def test_columns_that_nobody_asks_for() -> None:
    assert not findings(data_columns_dropped, Run().framework("transformers"), samples=seen())


def test_not_applicable_and_not_seen() -> None:
    with pytest.raises(NotApplicable):
        findings(data_columns_dropped, Run())
    with pytest.raises(NotApplicable, match="False"):
        findings(data_columns_dropped, Run().framework("transformers", remove_unused_columns=False), samples=seen())
    with pytest.raises(NotObserved):
        findings(data_columns_dropped, Run().framework("transformers"))
