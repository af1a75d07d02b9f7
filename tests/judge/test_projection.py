"""The learning-rate curve over the planned run, from a few watched steps."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timelines import cosine, curve, loop, scheduler, warm_cosine

from trainlint.recording.projection import OWN_RATE, active_schedulers, planned_steps, projection
from trainlint.recording.schema import (
    BatchFetched,
    CurvePoint,
    Loader,
    Optimizer,
    OptimizerStep,
    Plan,
    RateAssignment,
    ScalerEvent,
    Scheduler,
    SourceFacts,
    SourceLine,
    StateLoaded,
)
from trainlint.recording.timeline import steps_per_epoch

PEAK = 1e-3


def rate_at(points: tuple[tuple[int, float], ...], step: int) -> float:
    return dict(points)[step]


def test_cosine_per_step_reaches_its_end_with_the_run() -> None:
    rate = cosine(PEAK, 100)
    run = loop(rate, schedulers=[scheduler(rate, 100)], plan=Plan(100, source="config max_steps"))
    seen = projection(run, 0)
    assert seen.cadence.kind == "step"
    assert seen.cadence.calls_per_step == 1
    assert seen.cadence.observed
    assert rate_at(seen.points, 1) == pytest.approx(PEAK)
    assert rate_at(seen.points, 51) == pytest.approx(PEAK / 2)
    assert seen.end_rate == pytest.approx(rate(99))
    assert seen.reaches_end_at_step == 101
    assert seen.warmup_steps == 0
    assert (seen.horizon_steps, seen.horizon_source) == (100, "config max_steps")
    assert seen.observed == ((1, rate(0)), (2, rate(1)), (3, rate(2)))


def test_micro_batch_stepping_finishes_early() -> None:
    rate = cosine(PEAK, 1000)
    run = loop(
        rate, accumulation=8, call_when=lambda m, s: 1, schedulers=[scheduler(rate, 1000)], plan=Plan(1000, source="x")
    )
    seen = projection(run, 0)
    assert seen.cadence.calls_per_step == 8
    assert seen.cadence.before_first == 7
    assert seen.reaches_end_at_step == 126
    # Past its end the schedule is not known: it may turn, stay or raise.
    assert seen.end_rate is None
    assert max(n for n, _ in seen.points) <= 126


def test_accumulation_stepped_per_optimizer_step() -> None:
    rate = cosine(PEAK, 1000)
    run = loop(rate, accumulation=8, schedulers=[scheduler(rate, 1000)], plan=Plan(1000, source="x"))
    seen = projection(run, 0)
    assert seen.cadence.calls_per_step == 1
    assert seen.reaches_end_at_step == 1001
    assert seen.end_rate == pytest.approx(rate(999))


def test_per_epoch_by_the_framework() -> None:
    rate = cosine(PEAK, 10)
    loader = Loader(0, batches=50, batch_size=8, training=True)
    run = loop(
        rate,
        call_when=lambda m, s: 0,
        schedulers=[scheduler(rate, 10, interval="epoch")],
        loaders=[loader],
        plan=Plan(500, source="x"),
    )
    seen = projection(run, 0)
    assert seen.cadence.kind == "epoch"
    assert not seen.cadence.observed
    assert rate_at(seen.points, 50) == pytest.approx(rate(0))
    assert rate_at(seen.points, 51) == pytest.approx(rate(1))
    assert seen.end_rate == pytest.approx(rate(9))
    assert seen.reaches_end_at_step == 501


def test_sized_in_steps_but_stepped_per_epoch_ends_far_beyond_the_run() -> None:
    rate = cosine(PEAK, 500)
    run = loop(
        rate,
        call_when=lambda m, s: 0,
        schedulers=[scheduler(rate, 500, interval="epoch")],
        loaders=[Loader(0, batches=50, training=True)],
        plan=Plan(500, source="x"),
    )
    seen = projection(run, 0)
    assert seen.reaches_end_at_step == 25_001
    assert seen.end_rate == pytest.approx(rate(9))


def test_not_called_is_taken_as_per_epoch_and_says_so() -> None:
    rate = cosine(PEAK, 10)
    run = loop(
        rate, call_when=lambda m, s: 0, schedulers=[scheduler(rate, 10)], loaders=[Loader(0, batches=40, training=True)]
    )
    seen = projection(run, 0)
    assert seen.cadence.kind == "epoch"
    assert "not called in the 3 watched steps" in seen.cadence.text
    assert (seen.horizon_steps, seen.horizon_source) == (400, "schedule")


def test_never_called_over_more_than_an_epoch() -> None:
    rate = cosine(PEAK, 10)
    run = loop(
        rate,
        steps=5,
        call_when=lambda m, s: 0,
        schedulers=[scheduler(rate, 10)],
        loaders=[Loader(0, batches=3, training=True)],
        plan=Plan(30, source="x"),
    )
    seen = projection(run, 0)
    assert seen.cadence.kind == "never"
    assert seen.end_rate == pytest.approx(PEAK)
    assert seen.reaches_end_at_step is None


def test_not_called_and_no_epoch_is_unknown() -> None:
    rate = cosine(PEAK, 10)
    run = loop(rate, call_when=lambda m, s: 0, schedulers=[scheduler(rate, 10)])
    seen = projection(run, 0)
    assert seen.points == ()
    assert seen.cadence.kind == "unknown"
    assert "not called" in seen.reason


@pytest.mark.parametrize("times", [2, 4])
def test_several_calls_per_step(times: int) -> None:
    rate = cosine(PEAK, 100)
    run = loop(rate, call_when=lambda m, s: times * s, schedulers=[scheduler(rate, 100)], plan=Plan(100, source="x"))
    seen = projection(run, 0)
    assert seen.cadence.calls_per_step == times
    assert seen.reaches_end_at_step == 100 // times + 1


def test_once_every_few_steps() -> None:
    rate = cosine(PEAK, 10)
    run = loop(
        rate,
        steps=9,
        call_when=lambda m, s: int(m % 4 == 0),
        schedulers=[scheduler(rate, 10)],
        plan=Plan(40, source="x"),
    )
    seen = projection(run, 0)
    assert (seen.cadence.kind, seen.cadence.distance) == ("every", 4)
    assert rate_at(seen.points, 4) == pytest.approx(rate(0))
    assert rate_at(seen.points, 5) == pytest.approx(rate(1))
    assert rate_at(seen.points, 40) == pytest.approx(rate(9))


def test_one_watched_step_does_not_tell_the_cadence() -> None:
    rate = cosine(PEAK, 100)
    seen = projection(loop(rate, steps=1, schedulers=[scheduler(rate, 100)]), 0)
    assert seen.points == ()
    assert "second optimizer step" in seen.reason


def test_skipped_steps_are_steps_of_the_cadence() -> None:
    rate = cosine(PEAK, 100)
    run = loop(rate, steps=4, schedulers=[scheduler(rate, 100)], plan=Plan(100, source="x"))
    first = next(e for e in run.events if type(e).__name__ == "OptimizerStep")
    skipped = ScalerEvent(first.seq, 0.0, "step", optimizer=0, skipped=True)
    events = tuple(skipped if e is first else e for e in run.events)
    seen = projection(dataclasses.replace(run, events=events), 0)
    assert seen.cadence.calls_per_step == 1


def test_sequential_warm_up_is_one_schedule() -> None:
    rate = warm_cosine(PEAK, 20, 100)
    parts = [
        Scheduler(1, "LinearLR", 0),
        Scheduler(2, "CosineAnnealingLR", 0),
        scheduler(rate, 100, id=3, class_name="SequentialLR", children=("LinearLR", "CosineAnnealingLR")),
    ]
    run = loop(rate, schedulers=parts, plan=Plan(100, source="x"))
    events = tuple(
        e if type(e).__name__ != "SchedulerStep" else type(e)(e.seq, 0.0, 3, e.rates_before, e.rates_after, e.initial)
        for e in run.events
    )
    run = dataclasses.replace(run, events=events)
    assert [s.id for s in active_schedulers(run, 0)] == [3]
    seen = projection(run, 0)
    assert seen.warmup_steps == 20
    assert seen.peak_rate == pytest.approx(PEAK)
    assert rate_at(seen.points, 21) == pytest.approx(PEAK)
    assert rate_at(seen.points, 1) == 0.0


def test_one_cycle_rises_then_falls() -> None:
    def rate(n: int) -> float:
        return PEAK * (0.04 + 0.96 * n / 30) if n <= 30 else PEAK * max(0.0, 1 - (n - 30) / 70)

    run = loop(rate, schedulers=[scheduler(rate, 100, class_name="OneCycleLR")], plan=Plan(100, source="x"))
    seen = projection(run, 0)
    assert seen.warmup_steps == 30
    assert seen.peak_rate == pytest.approx(PEAK)


def test_constant_schedule_and_no_scheduler() -> None:
    flat = loop(
        lambda n: PEAK, schedulers=[scheduler(lambda n: PEAK, 10, horizon_calls=None)], plan=Plan(9, source="x")
    )
    assert projection(flat, 0).end_rate == PEAK
    none = loop(lambda n: PEAK, plan=Plan(1000, source="x"))
    seen = projection(none, 0)
    assert seen.points == ((1, PEAK), (1000, PEAK))
    assert seen.cadence.kind == "none"
    assert "by hand" in seen.source


def test_rates_set_by_hand_are_only_observed() -> None:
    changing = loop(lambda n: PEAK * (n + 1), call_when=lambda m, s: 0)
    events = tuple(
        dataclasses.replace(e, rates=(PEAK * (e.index + 1),)) if type(e).__name__ == "OptimizerStep" else e
        for e in changing.events
    )
    seen = projection(dataclasses.replace(changing, events=events), 0)
    assert seen.points == ()
    assert len(seen.observed) == 3
    assert "by hand" in seen.reason
    source = SourceFacts(rate_assignments=(RateAssignment(SourceLine("train.py", 4)),))
    assert projection(loop(lambda n: PEAK, source=source), 0).points == ()


def test_plateau_has_no_curve() -> None:
    run = loop(lambda n: PEAK, schedulers=[scheduler(None, class_name="ReduceLROnPlateau", metric=True)])
    seen = projection(run, 0)
    assert seen.points == ()
    assert "metric" in seen.reason


def test_two_schedulers_on_one_optimizer_are_not_projected() -> None:
    rate = cosine(PEAK, 100)
    run = loop(
        rate,
        schedulers=[
            scheduler(rate, 100),
            dataclasses.replace(scheduler(rate, 100, id=1, class_name="StepLR"), calls=2),
        ],
    )
    assert "several schedulers" in projection(run, 0).reason


def test_a_rate_that_leaves_the_curve_is_not_projected() -> None:
    rate = cosine(PEAK, 100)
    run = loop(lambda n: PEAK / 3, schedulers=[scheduler(rate, 100)], plan=Plan(100, source="x"))
    seen = projection(run, 0)
    assert seen.points == ()
    assert "do not follow" in seen.reason


def test_a_resumed_schedule_is_found_on_its_curve() -> None:
    rate = cosine(PEAK, 100)
    run = loop(lambda n: rate(n + 60), schedulers=[scheduler(rate, 100)], plan=Plan(100, source="x"))
    loaded = StateLoaded(0, 0.0, "scheduler", target=0)
    seen = projection(dataclasses.replace(run, events=(loaded, *run.events)), 0)
    assert "resumed after 60 calls" in seen.source or "resumed after 6" in seen.source
    assert seen.end_rate == pytest.approx(rate(99), abs=PEAK * 0.02)
    assert seen.horizon_steps == pytest.approx(40, abs=2)


def test_fast_forward_calls_before_the_first_step_count() -> None:
    rate = cosine(PEAK, 100)
    run = loop(rate, calls_first=40, schedulers=[scheduler(rate, 100)], plan=Plan(60, source="x"))
    seen = projection(run, 0)
    assert seen.cadence.before_first == 40
    assert seen.reaches_end_at_step == 61


def test_a_sparse_curve_is_read_between_its_points() -> None:
    rate = cosine(PEAK, 10_000)
    sparse = scheduler(rate, 10_000, curve=curve(rate, 10_000, every=100))
    seen = projection(loop(rate, schedulers=[sparse], plan=Plan(10_000, source="x")), 0)
    assert len(seen.points) <= 410
    assert rate_at(seen.points, 1) == PEAK
    assert seen.end_rate == pytest.approx(0, abs=PEAK * 1e-3)


def test_a_wide_gap_beyond_the_end_is_not_filled_in() -> None:
    def turning(n: int) -> float:
        import math

        return PEAK * 0.5 * (1 + math.cos(math.pi * n / 100))

    points = (*curve(turning, 110), *(CurvePoint(c, (turning(c),)) for c in (150, 230, 370)))
    run = loop(
        turning,
        accumulation=4,
        call_when=lambda m, s: 1,
        schedulers=[scheduler(turning, 100, curve=points)],
        plan=Plan(90, source="x"),
    )
    seen = projection(run, 0)
    assert seen.end_rate is None
    assert seen.reaches_end_at_step == 26


def test_flat_beyond_the_end_is_flat_for_good() -> None:
    rate = cosine(PEAK, 100)
    points = (*curve(rate, 110), CurvePoint(150, (0.0,)))
    run = loop(
        rate,
        accumulation=8,
        call_when=lambda m, s: 1,
        schedulers=[scheduler(rate, 100, curve=points)],
        plan=Plan(100, source="x"),
    )
    assert projection(run, 0).end_rate == 0.0


def test_a_scheduler_on_a_wrapped_optimizer_belongs_to_the_only_one() -> None:
    rate = cosine(PEAK, 100)
    wrapped = scheduler(rate, 100, optimizer=None)
    run = loop(rate, schedulers=[wrapped], plan=Plan(100, source="x"))
    assert projection(run, 0).reaches_end_at_step == 101
    two = dataclasses.replace(run, optimizers=(*run.optimizers, Optimizer(1, "SGD")))
    assert active_schedulers(two, 0) == ()


def test_planned_steps() -> None:
    assert planned_steps(loop(lambda n: PEAK)) is None
    by_epoch = planned_steps(loop(lambda n: PEAK, plan=Plan(epochs=3, batches_per_epoch=10, accumulation=4)))
    assert by_epoch is not None
    assert by_epoch[0] == 9
    rate = cosine(PEAK, 100)
    known = projection(loop(rate, schedulers=[scheduler(rate, 100)]), 0, planned=(50, "config trainer.max_steps"))
    assert (known.horizon_steps, known.horizon_source) == (50, "config trainer.max_steps")


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 6), st.integers(10, 3000), st.booleans())
def test_points_agree_with_the_watch(accumulation: int, times: int, steps: int, planned: int, micro: bool) -> None:
    rate = cosine(PEAK, 5000)
    run = loop(
        rate,
        steps=steps,
        accumulation=accumulation,
        call_when=lambda m, s: times if micro else times * s,
        schedulers=[scheduler(rate, 5000, curve=curve(rate, 5000, every=7))],
        plan=Plan(planned, source="x"),
    )
    seen = projection(run, 0)
    steps_in_order = [n for n, _ in seen.points]
    assert steps_in_order == sorted(set(steps_in_order))
    by_step = dict(seen.points)
    for n, observed in seen.observed:
        if n <= planned:
            assert by_step[n] == pytest.approx(observed, abs=PEAK * 0.01)


def test_a_schedule_without_an_end_has_no_last_rate() -> None:
    def rate(calls: int) -> float:
        return PEAK * 0.7**calls

    # The recorder keeps points far beyond where anything is left of the rate.
    points = tuple(CurvePoint(n, (rate(n),)) for n in (*range(17), 20, 50, 100, 1_000, 1_000_000))
    made = scheduler(rate, class_name="StepLR", curve=points, horizon_calls=None)
    run = loop(rate, call_when=lambda m, s: 0, schedulers=[made], loaders=[Loader(0, batches=40, training=True)])
    seen = projection(run, 0)
    assert seen.horizon_source == "open"
    assert seen.end_rate is None
    assert seen.horizon_steps is not None
    assert seen.horizon_steps < 1_000
    assert seen.points[-1][1] < 0.05 * PEAK
    known = projection(run, 0, planned=(560, "config epochs"))
    assert known.end_rate == pytest.approx(rate(13))


def test_warm_up_alone_is_drawn_until_the_rate_is_constant() -> None:
    def rate(calls: int) -> float:
        return PEAK * min(1.0, (calls + 1) / 100)

    made = scheduler(rate, 100_000, class_name="LambdaLR", horizon_calls=None)
    seen = projection(loop(rate, schedulers=[made]), 0)
    assert seen.horizon_source == "open"
    assert seen.horizon_steps == pytest.approx(110, abs=3)
    assert seen.end_rate is None


def test_several_steps_on_one_batch_make_an_epoch_of_unknown_length() -> None:
    rate = cosine(PEAK, 10)
    run = loop(
        rate,
        steps=6,
        call_when=lambda m, s: 0,
        schedulers=[scheduler(rate, 10)],
        loaders=[Loader(0, batches=3, training=True)],
    )
    first = next(e for e in run.events if isinstance(e, BatchFetched))
    one_batch = [e for e in run.events if not isinstance(e, BatchFetched) or e is first]
    seen = projection(dataclasses.replace(run, events=tuple(one_batch)), 0)
    assert steps_per_epoch(dataclasses.replace(run, events=tuple(one_batch)), 0) is None
    assert steps_per_epoch(run, 0) == 3
    assert seen.cadence.kind == "unknown"


def test_an_optimizer_that_says_which_rate_it_used() -> None:
    run = loop(lambda n: PEAK)
    steps = [e for e in run.events if isinstance(e, OptimizerStep)]
    used = {e.seq: dataclasses.replace(e, scheduled_rates=(PEAK * (e.index + 1) / 10,)) for e in steps}
    seen = projection(dataclasses.replace(run, events=tuple(used.get(e.seq, e) for e in run.events)), 0)
    assert [rate for _, rate in seen.observed] == pytest.approx([PEAK / 10, PEAK / 5, 3 * PEAK / 10])
    assert not seen.points
    assert seen.reason == OWN_RATE
