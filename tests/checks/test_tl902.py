"""TL902: workers and epochs that draw the same."""

from __future__ import annotations

import pytest
from judging import findings, only
from trainlint.checks.data.worker_rng_repeats import worker_rng_repeats

from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema.samples import Draws, LoaderData, Samples

STREAM = tuple(f"s{i}" for i in range(16))
OTHER = tuple(f"o{i}" for i in range(16))
FLIPS = ("a", "b", "b", "a", "b", "a", "a", "a", "b", "b", "a", "b", "a", "b", "b", "a")
TURNS = (("p", "q", "r", "s"), ("u", "v", "w", "x"))


def train(**loader: object) -> Run:
    run = Run()
    ids = run.module("Net", {"weight": (4, 4)})
    run.optimizer("SGD", ids)
    run.loader(workers=4, shuffle=True, at=at(20), **loader)
    for _ in range(3):
        run.batch().backward().step().zero(0)
    return run


def samples(*draws: Draws, **data: object) -> Samples:
    facts = LoaderData(0, 0, 0, class_name="Images", start_method="fork", **data)  # type: ignore[arg-type]
    return Samples(loaders=(facts,), draws=draws)


def drawn(first: tuple[str, ...], second: tuple[str, ...], when: str = "watch", turned: object = TURNS) -> Draws:
    return Draws(0, when, "7", (first, second), turned)  # type: ignore[arg-type]


def test_workers_that_share_their_randomness() -> None:
    seen = samples(drawn(STREAM, STREAM), generators=("dataset.rng (numpy Generator)",))
    severity, finding = only(worker_rng_repeats, train(), samples=seen)
    assert severity == "error"
    assert "The 4 workers" in finding.message and "dataset.rng (numpy Generator)" in finding.message
    assert finding.evidence["versions"] == 16 and finding.evidence["epochs_equal"] is False


def test_repeats_in_the_next_epoch_too() -> None:
    seen = samples(drawn(STREAM, STREAM), drawn(STREAM, STREAM, "next-epoch"))
    severity, finding = only(worker_rng_repeats, train(), samples=seen)
    assert severity == "error" and "next epoch" in finding.message


@pytest.mark.parametrize(
    ("shuffle", "init", "expected"), [(True, "", "warning"), (False, "seed", "warning"), (False, "", "error")]
)
def test_epochs_that_repeat(shuffle: bool, init: str, expected: str) -> None:
    """With another order the repeated numbers meet other samples."""
    run = train()
    run.loaders.clear()
    run.loader(workers=2, shuffle=shuffle, at=at(20))
    where = at(4) if init else None
    seen = samples(drawn(STREAM, OTHER), drawn(STREAM, OTHER, "next-epoch"), worker_init=init, worker_init_at=where)
    severity, finding = only(worker_rng_repeats, run, samples=seen)
    assert severity == expected
    assert ("worker_init_fn seed (train.py:4)" in finding.message) is bool(init)


def test_one_worker_repeats_its_epochs() -> None:
    first = Draws(0, "watch", "7", (STREAM,), (TURNS[0],))
    later = Draws(0, "next-epoch", "7", (STREAM,), (TURNS[0],))
    assert only(worker_rng_repeats, train(), samples=samples(first, later))[0] == "warning"


def test_flips_are_enough() -> None:
    """One bit of randomness in 16 draws: equal by chance less often than once in 10,000."""
    assert findings(worker_rng_repeats, train(), samples=samples(drawn(FLIPS, FLIPS)))


@pytest.mark.parametrize(
    "seen",
    [
        samples(drawn(STREAM, OTHER), drawn(OTHER, STREAM, "next-epoch")),
        samples(drawn(("a",) * 16, ("a",) * 16)),
        # One flip in 16 draws that lands alike is chance.
        samples(drawn(("a",) * 15 + ("b",), ("a",) * 15 + ("b",))),
        samples(drawn(FLIPS[:6], FLIPS[:6])),
        # It counts the draws of each sample: the randomness belongs to the sample.
        samples(drawn(STREAM, STREAM, turned=(TURNS[0], TURNS[0]))),
        samples(drawn(STREAM, OTHER), drawn(STREAM, OTHER, "next-epoch"), persistent_workers=True),
    ],
    ids=["own", "none", "chance", "few", "by sample", "persistent"],
)
def test_silent(seen: Samples) -> None:
    assert not findings(worker_rng_repeats, train(), samples=seen)


def test_what_could_not_be_seen() -> None:
    spawned = Draws(0, "watch", why="its workers are started by spawn")
    with pytest.raises(NotObserved, match="spawn"):
        findings(worker_rng_repeats, train(), samples=samples(spawned))
    with pytest.raises(NotObserved):
        findings(worker_rng_repeats, train())
    run = train()
    run.loaders.clear()
    run.loader(workers=0)
    with pytest.raises(NotApplicable):
        findings(worker_rng_repeats, run)
