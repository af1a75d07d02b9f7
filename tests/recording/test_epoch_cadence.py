"""How often a scheduler is called, where the end of an epoch was seen."""

from __future__ import annotations

import pytest

from tests.support.build import Run, at, cosine
from tests.support.epochs import Crossed
from trainlint.recording.boundary import text
from trainlint.recording.cadence import Cadence, cadence
from trainlint.recording.schema import Boundary, Loader, SourceFacts


def watched(steps: int = 3, per_step: bool = False, **scheduler: object) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", {"w": (4, 4)}))
    run.loader(50)
    run.scheduler(adam, cosine(10), 10, **scheduler)
    for _ in range(steps):
        run.batch().backward().step(adam)
        if per_step:
            run.sched()
    return run


def next_epoch(run: Run, crossed: Crossed, steps: int = 2, per_step: bool = False) -> None:
    crossed.next_epoch()
    for _ in range(steps):
        run.batch().backward().step()
        if per_step:
            run.sched()


def seen(crossed: Crossed, **fields: object) -> Cadence:
    recording = crossed.recording(**fields)
    return cadence(recording, recording.schedulers[0], 0)


def test_called_at_the_end_of_the_epoch() -> None:
    run = watched()
    crossed = Crossed(run)
    run.sched()
    next_epoch(run, crossed)
    found = seen(crossed)
    assert (found.kind, found.observed, found.distance) == ("epoch", True, 50)
    assert found.text == "called once per epoch (50 optimizer steps)"
    assert [found.calls_before(n) for n in (50, 51, 100, 101)] == [0, 1, 1, 2]


def test_called_twice_at_the_end_of_the_epoch() -> None:
    run = watched()
    crossed = Crossed(run)
    run.sched().sched()
    next_epoch(run, crossed)
    found = seen(crossed)
    assert found.text == "called 2 times per epoch (50 optimizer steps)"
    assert [found.calls_before(n) for n in (50, 51, 101)] == [0, 2, 4]


def test_not_called_at_all() -> None:
    run = watched()
    crossed = Crossed(run)
    next_epoch(run, crossed)
    only_the_optimizer = SourceFacts(step_calls=(at(12),))
    assert seen(crossed, source=only_the_optimizer).kind == "never"
    # A line that calls some step and was not seen to do so may be the scheduler's, every ten epochs.
    assert seen(crossed, source=SourceFacts(step_calls=(at(12), at(30)))).kind == "unknown"
    assert seen(crossed).kind == "unknown"


def test_called_at_every_step_and_at_the_end_of_the_epoch() -> None:
    run = watched(per_step=True)
    crossed = Crossed(run)
    run.sched()
    next_epoch(run, crossed, per_step=True)
    found = seen(crossed)
    assert (found.kind, found.calls_per_step) == ("step", pytest.approx(1 + 1 / 50))
    assert "once more at the end of each epoch" in found.text


def test_called_at_every_step_only() -> None:
    run = watched(per_step=True)
    crossed = Crossed(run)
    next_epoch(run, crossed, per_step=True)
    assert seen(crossed).text == "called once per optimizer step"


def test_the_call_of_a_step_left_over_is_no_call_of_the_epoch() -> None:
    run = watched(per_step=True)
    crossed = Crossed(run)
    run.backward().step().sched()  # on a batch that was read ahead
    next_epoch(run, crossed, per_step=True)
    assert seen(crossed).text == "called once per optimizer step"


@pytest.mark.parametrize("more", [0, 1])
def test_calls_before_the_steps_own_are_no_calls_of_the_epoch(more: int) -> None:
    run = watched(0)
    for _ in range(3):
        run.batch().backward().sched().step()
    crossed = Crossed(run)
    run.backward().sched().step()  # on a batch that was read ahead
    for _ in range(more):
        run.sched()
    crossed.next_epoch()
    for _ in range(2):
        run.batch().backward().sched().step()
    assert seen(crossed).calls_per_step == pytest.approx(1 + more / 50)


def test_every_fourth_step_falling_on_a_step_left_over_proves_nothing() -> None:
    run = watched()
    crossed = Crossed(run)
    run.backward().step().sched()
    next_epoch(run, crossed)
    found = seen(crossed)
    assert not found.observed


def test_after_a_step_left_over_and_an_evaluation() -> None:
    run = watched()
    crossed = Crossed(run)
    run.loaders[1] = Loader(1, batches=20)
    run.backward().step().batch(loader=1).sched()
    next_epoch(run, crossed)
    found = seen(crossed)
    assert (found.kind, found.observed) == ("epoch", True)


def test_stepped_only_from_the_second_epoch_on() -> None:
    run = watched()
    crossed = Crossed(run)
    next_epoch(run, crossed, per_step=True)
    found = seen(crossed)
    assert (found.kind, found.observed) == ("unknown", False)


def test_the_framework_says_it_and_it_was_seen() -> None:
    run = watched(interval="epoch", frequency=1)
    crossed = Crossed(run)
    run.sched()
    next_epoch(run, crossed)
    assert seen(crossed).observed


def test_an_end_that_was_not_crossed_changes_nothing() -> None:
    run = watched()
    crossed = Crossed(run, outcome="failed")
    run.sched()
    found = seen(crossed)
    assert (found.kind, found.observed) == ("epoch", False)


def test_in_words() -> None:
    run = watched()
    crossed = Crossed(run)
    run.loaders[1] = Loader(1, batches=20)
    run.batch(loader=1).batch(loader=1)
    next_epoch(run, crossed)
    boundary = crossed.recording().boundary
    assert boundary is not None
    assert text(boundary) == "crossed (evaluation of 2 batches; the next epoch's first 2 steps)"
    left_out = Boundary(reason="no DataLoader feeds the training")
    assert text(left_out) == "not crossed: no DataLoader feeds the training"
    failed = Boundary(outcome="failed", reason="the program raised ValueError: x", duration_s=0.5)
    assert text(failed) == ("not crossed: the program raised ValueError: x; the epoch was cut short, which may be why")
