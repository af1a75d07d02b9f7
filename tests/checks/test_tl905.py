"""TL905: samples on both sides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.data.train_validation_overlap import train_validation_overlap

from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema.samples import BatchSamples, LoaderData, Overlap, Samples


def train(others: int = 1) -> Run:
    run = Run()
    run.optimizer("SGD", run.module("Net", {"weight": (4, 4)}))
    run.loader(at=at(9))
    for n in range(others):
        number = run.loader(at=at(15 + n))
        run.loaders[number] = dataclasses.replace(run.loaders[number], training=False)
    return run.batch().backward().step()


def overlap(
    shared: int, *, other: int = 1, samples: int = 80, training: int = 320, by: str = "indices", **f: Any
) -> Any:
    return Overlap(0, other, by, training, samples, shared, **f)


def seen(*overlaps: Overlap, batches: tuple[BatchSamples, ...] = ()) -> Samples:
    data = tuple(LoaderData(n, n, n, class_name="Table") for n in range(3))
    return Samples(loaders=data, overlaps=overlaps, batches=batches)


def test_parts_of_one_dataset() -> None:
    severity, finding = only(train_validation_overlap, train(), samples=seen(overlap(66)))
    assert severity == "warning"
    assert "66 of the 80 samples of the evaluation (train.py:15)" in finding.message
    assert "same positions of one Table" in finding.message


def test_the_same_values() -> None:
    some = overlap(12, by="values", whole=False, repeated=1)
    assert "as far as samples were compared" in only(train_validation_overlap, train(), samples=seen(some))[1].message


@pytest.mark.parametrize(
    "one",
    [
        overlap(0),
        overlap(2),
        overlap(5, samples=4000, training=4000, by="values"),
        # A small world: a fifth of the training data repeats itself.
        overlap(30, by="values", repeated=64),
        # The training data itself, or another object with the same values: a measurement.
        overlap(320, samples=320),
        overlap(320, samples=320, by="values"),
    ],
    ids=["none", "two", "few", "small world", "same object", "same values"],
)
def test_silent(one: Overlap) -> None:
    assert not findings(train_validation_overlap, train(), samples=seen(one))


def test_training_and_held_out_accuracy() -> None:
    both = seen(overlap(80), overlap(0, other=2))
    assert not findings(train_validation_overlap, train(others=2), samples=both)


@pytest.mark.parametrize("by", ["indices", "values"])
def test_a_part_of_the_training_data(by: str) -> None:
    """It may be meant to be one."""
    severity, finding = only(train_validation_overlap, train(), samples=seen(overlap(80, by=by)))
    assert severity == "info" and "is a part of the training" in finding.message


def test_choosing_by_the_training_data() -> None:
    run = train().framework("lightning", callbacks=["EarlyStopping"])
    severity, finding = only(train_validation_overlap, run, samples=seen(overlap(320, samples=320)))
    assert severity == "info" and "EarlyStopping" in finding.message


def test_delivered_batches_where_nothing_can_be_drawn() -> None:
    rows = tuple(f"h{i}" for i in range(16))
    batches = (BatchSamples(1, 0, 0, rows), BatchSamples(2, 1, 1, (*rows[:8], *(f"v{i}" for i in range(8)))))
    finding = only(train_validation_overlap, train(), samples=seen(batches=batches))[1]
    assert finding.evidence["shared"] == 8 and finding.evidence["evaluation_samples"] == 16


def test_not_seen() -> None:
    with pytest.raises(NotObserved, match="no evaluation"):
        findings(train_validation_overlap, train(others=0), samples=seen())
    with pytest.raises(NotObserved, match="compared"):
        findings(train_validation_overlap, train(), samples=seen())
    with pytest.raises(NotApplicable):
        findings(train_validation_overlap, Run(), samples=seen())
