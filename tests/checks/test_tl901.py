"""TL901: one batch, one order, sorted data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.data.repeated_batch import repeated_batch

from tests.support.build import Run, at
from trainlint.contract import NotApplicable
from trainlint.recording.schema.samples import BatchSamples, LabelOrder, LoaderData, LoaderPass, Samples


def train(prints: Any = ("a", "b", "c", "d"), **loader: Any) -> Run:
    run = Run()
    ids = run.module("Net", {"weight": (4, 4)})
    run.optimizer("SGD", ids)
    run.loader(**{"batches": 20, "samples": 160, "batch_size": 8, "shuffle": False, "at": at(20), **loader})
    for one in prints:
        run.batch(one).backward().step().zero(0)
    return run


def one_pass(number: int, first: int = 0, **fields: Any) -> LoaderPass:
    indices = tuple(tuple(range(first + 8 * b, first + 8 * b + 8)) for b in range(3))
    return LoaderPass(
        number, **{"loader": 0, "opened": number, "delivered": 4, "fed": True, "indices": indices, **fields}
    )


def data(sampler: str = "SequentialSampler", of_torch: bool = True) -> LoaderData:
    return LoaderData(0, 0, 0, sampler=sampler, sampler_of_torch=of_torch)


VARIED = tuple(f"h{i}" for i in range(8))


def test_the_first_batch_again_and_again() -> None:
    passes = tuple(one_pass(n, delivered=1) for n in range(4))
    seen = Samples(loaders=(data(),), passes=passes, batches=(BatchSamples(1, 0, 0, VARIED),))
    severity, finding = only(repeated_batch, train(("a",) * 4), samples=seen)
    assert severity == "warning"
    assert "4 times" in finding.message and "opens the loader anew" in finding.message


@pytest.mark.parametrize(
    ("run", "hashes"),
    [
        (train(("a",) * 4, batches=1, samples=8), VARIED),
        (train(("a",) * 4).framework("lightning", overfit_batches=1), VARIED),
        (train(("a",) * 4).framework("lightning", num_training_batches=1), VARIED),
        (train(("a",) * 4), ("h",) * 8),
        (train(("a", "a", "b", "b")), VARIED),
        (train(("a",)), VARIED),
        (train((None,) * 4), VARIED),
    ],
    ids=["full batch", "overfit_batches", "limited", "equal samples", "twice", "taken once", "unknown"],
)
def test_batches_that_may_repeat(run: Run, hashes: tuple[str, ...]) -> None:
    seen = Samples(loaders=(data(),), passes=(one_pass(0),), batches=(BatchSamples(1, 0, 0, hashes),))
    assert not findings(repeated_batch, run, samples=seen)


def test_samples_that_differ_where_the_fingerprints_do_not() -> None:
    batches = tuple(BatchSamples(n, 0, n, tuple(f"h{n}-{i}" for i in range(8))) for n in range(3))
    passes = (one_pass(0),)
    assert findings(repeated_batch, train(("a",) * 4), samples=Samples(passes=passes, batches=batches[:1]))
    assert not findings(repeated_batch, train(("a",) * 4), samples=Samples(passes=passes, batches=batches))


def test_the_same_order_in_every_epoch() -> None:
    passes = (one_pass(0, 5, epoch=0), one_pass(1, 5, epoch=0))
    seen = Samples(loaders=(data("DistributedSampler"),), passes=passes)
    severity, finding = only(repeated_batch, train(shuffle=True), samples=seen)
    assert severity == "warning"
    assert "set_epoch was not called" in finding.message and finding.evidence["equal_positions"] == 24


def test_a_generator_seeded_again() -> None:
    seen = Samples(loaders=(data("RandomSampler"),), passes=(one_pass(0, 5), one_pass(1, 5)))
    assert "same seed" in only(repeated_batch, train(shuffle=True), samples=seen)[1].message


@pytest.mark.parametrize(
    ("loader", "passes"),
    [
        (data("RandomSampler"), (one_pass(0, 5), one_pass(1, 6))),
        # Looked into before the training, at the same epoch of the sampler.
        (data("DistributedSampler"), (one_pass(0, 5, fed=False), one_pass(1, 5))),
        (data("Curriculum", of_torch=False), (one_pass(0, 5), one_pass(1, 5))),
        (data("RandomSampler"), (one_pass(0, indices=((1, 2, 3),)), one_pass(1, indices=((1, 2, 3),)))),
    ],
    ids=["other", "peeked", "own sampler", "few positions"],
)
def test_orders_that_are_right(loader: LoaderData, passes: tuple[LoaderPass, ...]) -> None:
    assert not findings(repeated_batch, train(shuffle=True), samples=Samples(loaders=(loader,), passes=passes))


def sorted_data(order: LabelOrder, labels: tuple[tuple[int, ...], ...]) -> Samples:
    batches = tuple(BatchSamples(i, 0, 0, VARIED, label) for i, label in enumerate(labels))
    return Samples(loaders=(data(),), passes=(one_pass(0),), batches=batches, labels=(order,))


def test_sorted_and_not_shuffled() -> None:
    seen = sorted_data(LabelOrder(0, 160, 4, 4, source="targets"), ((0,) * 8, (0,) * 8))
    severity, finding = only(repeated_batch, train(), samples=seen)
    assert severity == "warning"
    assert "4 runs of 4 classes" in finding.message and "1 class only" in finding.message


def test_a_loader_made_anew_for_every_epoch_is_said_once() -> None:
    run = train()
    run.loader(20, samples=160, batch_size=8, shuffle=False, at=at(20))
    one = sorted_data(LabelOrder(0, 160, 4, 4, source="targets"), ((0,) * 8, (0,) * 8))
    again = [dataclasses.replace(b, loader=1) for b in one.batches]
    both = dataclasses.replace(
        one,
        loaders=(data(), dataclasses.replace(data(), loader=1)),
        batches=(*one.batches, *again),
        labels=(*one.labels, dataclasses.replace(one.labels[0], loader=1)),
    )
    assert len(findings(repeated_batch, run, samples=both)) == 1


@pytest.mark.parametrize(
    "seen",
    [
        sorted_data(LabelOrder(0, 160, 90, 4), ((0, 1, 0, 2) * 2, (1, 0, 3, 0) * 2)),
        sorted_data(LabelOrder(0, 160, 1, 1), ((0,) * 8, (0,) * 8)),
        # Every sample a class of its own: numbers, not classes.
        sorted_data(LabelOrder(0, 160, 160, 160), (tuple(range(8)), tuple(range(8, 16)))),
        sorted_data(LabelOrder(0, 160, 40, 40), ((0,) * 4 + (1,) * 4, (2,) * 4 + (3,) * 4)),
        sorted_data(LabelOrder(0, 160, 4, 4), ()),
    ],
    ids=["mixed", "one class", "numbers", "short runs", "labels not in the batch"],
)
def test_not_sorted(seen: Samples) -> None:
    assert not findings(repeated_batch, train(), samples=seen)


def test_sorted_but_shuffled() -> None:
    seen = sorted_data(LabelOrder(0, 160, 4, 4), ((0, 1) * 4, (2, 3) * 4))
    assert not findings(repeated_batch, train(shuffle=True), samples=seen)


def test_without_a_loader() -> None:
    run = train()
    run.loaders.clear()
    with pytest.raises(NotApplicable):
        findings(repeated_batch, run, samples=Samples())
