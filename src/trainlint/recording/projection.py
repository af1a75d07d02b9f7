"""The learning rate over the whole planned run, from a few watched steps.

A scheduler's curve is its rate over the number of ``scheduler.step()`` calls. What a run really does depends on how
often the program calls it: once per optimizer step, once per micro-batch, once per epoch. This module reads that
cadence off the timeline and lays the curve over the planned optimizer steps. Pure functions over a
:class:`~trainlint.recording.schema.Recording`; nothing is invented: where the rate cannot be known there is no point.

Optimizer steps are numbered from 1 (the first watched step). The rate of step ``n`` is the one that step uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trainlint.recording.cadence import Cadence, cadence
from trainlint.recording.rate_curve import RateCurve, sets_rate
from trainlint.recording.schema import Recording, Scheduler, SchedulerStep, StateLoaded
from trainlint.recording.timeline import of_kind, steps_of, steps_per_epoch

__all__ = [
    "OWN_RATE",
    "Cadence",
    "Part",
    "Projected",
    "active_schedulers",
    "calls_seen",
    "own_schedulers",
    "planned_steps",
    "projection",
]

#: Points of a projected curve: more than a terminal or a page can show.
_MAX_POINTS = 400
#: Observed rates must lie this close to the curve, as a share of its peak, for the curve to be believed.
_TOLERANCE = 0.01
#: Said of an optimizer that makes the rate it uses from the one in its groups.
OWN_RATE = "no scheduler: the optimizer itself warms its rate up or adapts it"


@dataclass(frozen=True)
class Projected:
    """The learning rate of one param group over the run.

    ``points`` is empty when the rate cannot be projected; ``reason`` then says why, and ``observed`` still holds the
    watched steps. ``end_rate`` is the rate of the last planned step; ``None`` when the curve does not reach so far.
    """

    #: (optimizer step, learning rate), increasing in step.
    points: tuple[tuple[int, float], ...] = ()
    observed: tuple[tuple[int, float], ...] = ()
    end_rate: float | None = None
    peak_rate: float | None = None
    #: Steps before the rate first reaches its peak; 0 without warm-up, ``None`` when not known.
    warmup_steps: int | None = None
    cadence: Cadence = field(default_factory=Cadence)
    #: Optimizer steps of the whole run that ``points`` are laid over.
    horizon_steps: int | None = None
    #: Who says so; ``schedule`` when only the schedule's own length is known, ``open`` when it has none either (StepLR,
    #: ExponentialLR): then ``points`` show where its changes are, and say nothing about the end of the run.
    horizon_source: str = ""
    #: The step at which the schedule has run its course; may lie far beyond ``horizon_steps``.
    reaches_end_at_step: int | None = None
    #: What the points come from, as a person reads it.
    source: str = ""
    #: Why there are no points.
    reason: str = ""
    scheduler: int | None = None
    #: The schedulers whose factors multiply into the rate, when there are several.
    parts: tuple[Part, ...] = ()
    #: With several: the rate when each of them has run its course.
    meant_rate: float | None = None


@dataclass(frozen=True)
class Part:
    """One of several schedulers that each multiply the rate they find."""

    scheduler: Scheduler
    curve: RateCurve
    base_rate: float
    cadence: Cadence
    #: The step at which it has run its course; ``None`` when it never has.
    reaches_end_at_step: int | None = None

    def factor(self, calls: int) -> float | None:
        """What it has made of the base rate after so many calls; ``None`` where that is not known."""
        end = self.scheduler.horizon_calls
        if self.scheduler.class_name.startswith("Cosine") and end is not None and calls > end:
            return None  # from here on it adds to the rate that it finds
        rate = self.curve.at(calls)
        return None if rate is None or not self.base_rate else rate / self.base_rate


def projection(
    recording: Recording, optimizer_id: int, group: int = 0, *, planned: tuple[int, str] | None = None
) -> Projected:
    """Project the learning rate of one param group over the planned run.

    Args:
        recording: what was watched.
        optimizer_id: ``Optimizer.id``.
        group: index of the param group.
        planned: optimizer steps of the whole run and who says so, when the caller knows better than the recording.
    """
    observed = tuple(
        (step.index + 1, step.rates[group]) for step in steps_of(recording, optimizer_id) if group < len(step.rates)
    )
    length = planned or planned_steps(recording)
    base = Projected(observed=observed)
    if length is not None:
        base = replace(base, horizon_steps=length[0], horizon_source=length[1])
    schedulers = active_schedulers(recording, optimizer_id)
    if not schedulers:
        used = tuple(
            (step.index + 1, step.scheduled_rates[group])
            for step in steps_of(recording, optimizer_id)
            if group < len(step.scheduled_rates)
        )
        if used and used != observed:
            return replace(base, observed=used, reason=OWN_RATE)
        return _without_scheduler(recording, base)
    waiting = [s for s in own_schedulers(recording, optimizer_id) if s not in schedulers]
    if waiting:
        names = " and ".join(dict.fromkeys(s.class_name for s in waiting))
        text = f"{names} was not called in the watched steps: whether it is called per epoch, takes turns, or never"
        return replace(base, reason=f"{text}, is not known")
    if len(schedulers) > 1:
        return _together(recording, optimizer_id, group, schedulers, base)
    scheduler = schedulers[0]
    seen = calls_seen(recording, scheduler, optimizer_id)
    base = replace(base, cadence=seen, scheduler=scheduler.id)
    if scheduler.metric:
        return replace(base, reason=f"{scheduler.class_name} follows a metric, which only training itself can tell")
    if not scheduler.curve:
        why = f": {scheduler.curve_missing}" if scheduler.curve_missing else ""
        return replace(base, reason=f"the schedule of {scheduler.class_name} could not be projected{why}")
    if any(e.epoch is not None for e in of_kind(recording, SchedulerStep) if e.scheduler == scheduler.id):
        text = f"the program says where in its course {scheduler.class_name} is at every call: step(epoch)"
        return replace(base, reason=text)
    if seen.kind == "unknown":
        return replace(base, reason=seen.text)
    curve = RateCurve.of(scheduler, group)
    if curve is None:
        return replace(base, reason=f"{scheduler.class_name} has no rate for param group {group}")
    return _along(recording, optimizer_id, scheduler, curve, base)


def planned_steps(recording: Recording) -> tuple[int, str] | None:
    """Optimizer steps of the whole run and who says so, or ``None`` when nobody does."""
    plan = recording.plan
    if plan.optimizer_steps is not None and plan.optimizer_steps > 0:
        return plan.optimizer_steps, plan.source or "the trainer"
    if plan.epochs and plan.batches_per_epoch:
        per_step = plan.accumulation or 1
        steps = math.ceil(plan.epochs * math.ceil(plan.batches_per_epoch / per_step))
        return steps, plan.source or f"{plan.epochs:g} epochs of {plan.batches_per_epoch} batches"
    return None


def active_schedulers(recording: Recording, optimizer_id: int) -> tuple[Scheduler, ...]:
    """The schedulers that set this optimizer's rate: without those inside a SequentialLR and those never stepped.

    Of several, those that were stepped or that a framework will step count; when there is none, all of them.
    """
    own = own_schedulers(recording, optimizer_id)
    if len(own) < 2:
        return own
    later = recording.boundary.schedulers if recording.boundary is not None else ()
    called = {s.id for s in (*own, *later) if s.calls > 0 or s.interval is not None}
    return tuple(s for s in own if s.id in called) or own


def own_schedulers(recording: Recording, optimizer_id: int) -> tuple[Scheduler, ...]:
    """The schedulers built on this optimizer, without the parts of a SequentialLR or ChainedScheduler.

    These are built on the same optimizer before it; they are told by class and order.
    """
    # A scheduler built on a wrapper (accelerate's AcceleratedOptimizer) may not say which optimizer is inside. When
    # there is only one, it is that; whether the rates follow is looked at before anything is projected.
    alone = len(recording.optimizers) == 1
    own = [s for s in recording.schedulers if s.optimizer == optimizer_id or (s.optimizer is None and alone)]
    inside: set[int] = set()
    for holder in own:
        for child in holder.children:
            parts = [s.id for s in own if s.class_name == child and s.id < holder.id and s.id not in inside]
            if parts:
                inside.add(parts[-1])
    return tuple(s for s in own if s.id not in inside)


def calls_seen(recording: Recording, scheduler: Scheduler, optimizer_id: int) -> Cadence:
    """The cadence as it is: a framework's word that it calls once per epoch does not hold where the program calls too.

    (Lightning's default interval, and ``self.lr_schedulers().step()`` in ``training_step``.)
    """
    told = cadence(recording, scheduler, optimizer_id)
    if scheduler.interval != "epoch" or (steps_per_epoch(recording, optimizer_id) or 1) < 2:
        return told
    seen = cadence(recording, replace(scheduler, interval=None), optimizer_id)
    often = seen.observed and seen.kind == "step" and (seen.calls_per_step or 0) >= 1
    return seen if often and len(steps_of(recording, optimizer_id)) > 2 else told


# ------------------------------------------------------------------------------------------- along one curve


def _along(
    recording: Recording, optimizer_id: int, scheduler: Scheduler, curve: RateCurve, base: Projected
) -> Projected:
    seen = base.cadence
    offset = None
    if not _replaced(recording, optimizer_id, scheduler):
        offset = _offset(recording, optimizer_id, scheduler, curve, seen, base.observed)
    if offset is None:
        return replace(
            base,
            reason=f"the watched rates do not follow {scheduler.class_name}: "
            "something else sets the rate too (by hand, a framework, a checkpoint)",
        )
    before = _shifted(seen.calls_before, offset)
    own_end = _first_step(before, scheduler.horizon_calls, seen)
    if base.horizon_steps is None:
        # Nobody says how long the run is: the schedule's own length is the best guess, and is named as such.
        whose = "schedule" if own_end is not None else "open"
        reached = own_end if own_end is not None else _first_step(before, curve.settles(), seen)
        watched = max((n for n, _ in base.observed), default=1)
        guess = max(reached - 1, 1 if own_end is not None else watched) if reached is not None else None
        base = replace(base, horizon_steps=guess, horizon_source=whose if guess is not None else "")
    elif offset:
        # A resumed schedule: the plan counts from the first step of all runs, this run only does the rest.
        base = replace(base, horizon_steps=max(base.horizon_steps - _steps_for(seen, offset), len(base.observed), 1))
    horizon = base.horizon_steps or max((n for n, _ in base.observed), default=1)
    rise = curve.rise_ends()
    wanted = _grid(horizon, (_first_step(before, rise, seen), own_end, *(n for n, _ in base.observed)))
    points = tuple((n, rate) for n in wanted if (rate := curve.at(before(n))) is not None)
    resumed = f", resumed after {offset} calls" if offset else ""
    warmup = 0 if rise <= offset else (_first_step(before, rise, seen) or 0) - 1
    return replace(
        base,
        points=points,
        end_rate=curve.at(before(horizon)) if base.horizon_source != "open" else None,
        peak_rate=max((rate for _, rate in points), default=None),
        warmup_steps=warmup if rise <= offset or _first_step(before, rise, seen) is not None else None,
        reaches_end_at_step=own_end,
        source=f"{scheduler.class_name}, {seen.text}{resumed}",
    )


def _offset(
    recording: Recording,
    optimizer_id: int,
    scheduler: Scheduler,
    curve: RateCurve,
    seen: Cadence,
    observed: Sequence[tuple[int, float]],
) -> int | None:
    """How many calls the schedule had behind it when this run began: 0, or what a loaded state tells; None: no fit."""
    tolerance = _TOLERANCE * max(curve.peak, max((r for _, r in observed), default=0.0))

    made = _calls_made(recording, scheduler, optimizer_id)

    def fits(offset: int) -> bool:
        for step, rate in observed:
            counts = made.get(step) or (seen.calls_before(step),)
            expected = [r for n in counts if (r := curve.at(n + offset)) is not None]
            if expected and all(abs(r - rate) > tolerance for r in expected):
                return False
        return True

    if fits(0):
        return 0
    loaded = any(e.what in ("scheduler", "optimizer") and not e.empty for e in of_kind(recording, StateLoaded))
    if not loaded:
        return None
    found = [c for c in curve.calls if c > 0 and fits(c)]
    # A flat or symmetric curve fits in several places: then the place is not known.
    return found[0] if found and found[-1] - found[0] <= max(2, curve.last // 50) else None


def _replaced(recording: Recording, optimizer_id: int, scheduler: Scheduler) -> bool:
    """Whether no watched step that a call preceded used a rate that the call had left: something sets it again."""
    calls = [e for e in of_kind(recording, SchedulerStep) if e.scheduler == scheduler.id and not e.initial]
    kept = []
    for step, low in zip(steps_of(recording, optimizer_id)[1:], steps_of(recording, optimizer_id), strict=False):
        left = [c.rates_after for c in calls if low.seq < c.seq < step.seq]
        if left:
            kept.append(any(math.isclose(a, b, rel_tol=1e-9) for a in left[-1] for b in step.rates))
    return len(kept) > 1 and not any(kept)


def _calls_made(recording: Recording, scheduler: Scheduler, optimizer_id: int) -> dict[int, tuple[int, ...]]:
    """Calls that had been made when each watched step began and when it ended: a closure may make some."""
    calls = [e.seq for e in of_kind(recording, SchedulerStep) if e.scheduler == scheduler.id and not e.initial]
    out = {}
    for step in steps_of(recording, optimizer_id):
        counts = {sum(1 for c in calls if c < seq) for seq in (step.began or step.seq, step.seq)}
        out[step.index + 1] = tuple(sorted(counts))
    return out


def _shifted(calls_before: Callable[[int], int], offset: int) -> Callable[[int], int]:
    return lambda step: calls_before(step) + offset


def _steps_for(seen: Cadence, calls: int) -> int:
    return round(calls / seen.calls_per_step) if seen.calls_per_step else 0


def _first_step(before: Callable[[int], int], calls: int | None, seen: Cadence) -> int | None:
    """The first step that has at least ``calls`` calls behind it; ``None`` when that never comes."""
    if calls is None:
        return None
    if before(1) >= calls:
        return 1
    if not seen.calls_per_step:
        return None
    low, high = 1, 2
    while before(high) < calls:
        low, high = high, high * 2
        if high > 1 << 50:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if before(middle) >= calls else (middle, high)
    return high


def _grid(horizon: int, extra: Sequence[int | None]) -> list[int]:
    if horizon <= _MAX_POINTS:
        steps = set(range(1, horizon + 1))
    else:
        steps = {1 + round(i * (horizon - 1) / (_MAX_POINTS - 1)) for i in range(_MAX_POINTS)}
    steps.update(n for n in extra if n is not None and 1 <= n <= horizon)
    return sorted(steps)


# ---------------------------------------------------------------------------------------- several schedulers


def _together(
    recording: Recording, optimizer_id: int, group: int, schedulers: Sequence[Scheduler], base: Projected
) -> Projected:
    """Several schedulers on one optimizer, each called at its own cadence: the product of what each makes of the rate.

    Most of torch's schedulers multiply the rate that they find, and so work together; others set it from the base
    rate, and nothing of another's work remains.
    """
    names = ", ".join(s.class_name for s in schedulers)
    several = f"several schedulers set the rate of one optimizer ({names})"
    parts: list[Part] = []
    for s in schedulers:
        if s.metric:
            return replace(base, reason=f"{several}; {s.class_name} follows a metric, which only training can tell")
        if sets_rate(s) is not False:
            return replace(base, reason=f"{several}; what {s.class_name} makes of the others' rate is not known")
        curve = RateCurve.of(s, group)
        if curve is None or group >= len(s.base_rates):
            why = f" ({s.curve_missing})" if s.curve_missing else ""
            return replace(base, reason=f"{several}; {s.class_name} could not be projected{why}")
        seen = calls_seen(recording, s, optimizer_id)
        if seen.kind == "unknown":
            return replace(base, reason=f"{several}; {s.class_name}: {seen.text}")
        reached = _first_step(seen.calls_before, s.horizon_calls, seen)
        parts.append(Part(s, curve, s.base_rates[group], seen, reached))
    text = "; ".join(f"{p.scheduler.class_name} {p.cadence.text}" for p in parts)
    base = replace(base, parts=tuple(parts), source=text, cadence=Cadence("several", text, observed=True))
    if not _product_fits(recording, optimizer_id, parts, base.observed):
        return replace(base, reason=f"the watched rates are not the product of {names}: something else sets them too")
    return _product(parts, base)


def _rate_of(parts: Sequence[Part], calls: Sequence[int]) -> float | None:
    rate = parts[0].base_rate
    for part, n in zip(parts, calls, strict=True):
        factor = part.factor(n)
        if factor is None:
            return None
        rate *= factor
    return rate


def _product_fits(
    recording: Recording, optimizer_id: int, parts: Sequence[Part], observed: Sequence[tuple[int, float]]
) -> bool:
    made = [_calls_made(recording, p.scheduler, optimizer_id) for p in parts]
    for step, rate in observed:
        due = [
            r
            for counts in itertools.product(*(m.get(step, (0,)) for m in made))
            if (r := _rate_of(parts, counts)) is not None
        ]
        if due and all(abs(r - rate) > _TOLERANCE * max(parts[0].base_rate, rate) for r in due):
            return False
    return True


def _product(parts: Sequence[Part], base: Projected) -> Projected:
    ends = [p.reaches_end_at_step for p in parts]
    if base.horizon_steps is None:
        known = [n for n in ends if n is not None]
        guess = max(known, default=0) - 1
        if guess > 0:
            base = replace(base, horizon_steps=guess, horizon_source="schedule" if None not in ends else "open")
    horizon = base.horizon_steps or max((n for n, _ in base.observed), default=1)
    rises = (_first_step(p.cadence.calls_before, p.curve.rise_ends(), p.cadence) for p in parts)
    wanted = _grid(horizon, (*ends, *rises, *(n for n, _ in base.observed)))
    points = tuple(
        (n, r) for n in wanted if (r := _rate_of(parts, [p.cadence.calls_before(n) for p in parts])) is not None
    )
    last = _rate_of(parts, [p.cadence.calls_before(horizon) for p in parts])
    done = [
        p.scheduler.horizon_calls if p.scheduler.horizon_calls is not None else p.cadence.calls_before(horizon)
        for p in parts
    ]
    peak = max((rate for _, rate in points), default=None)
    return replace(
        base,
        points=points,
        end_rate=last if base.horizon_source != "open" else None,
        peak_rate=peak,
        warmup_steps=next((n - 1 for n, rate in points if peak is not None and rate >= peak * (1 - 1e-9)), None),
        reaches_end_at_step=max(n for n in ends if n is not None) if None not in ends else None,
        meant_rate=_rate_of(parts, done),
    )


# ------------------------------------------------------------------------------------------------- no scheduler


def _without_scheduler(recording: Recording, base: Projected) -> Projected:
    rates = [rate for _, rate in base.observed]
    by_hand = bool(recording.source and recording.source.rate_assignments)
    if not rates:
        return replace(base, reason="no optimizer step was watched")
    if len(set(rates)) > 1:
        return replace(
            base,
            peak_rate=None,
            reason="no scheduler, and the rate changed between the watched steps: the program sets it by hand",
        )
    if by_hand:
        return replace(base, reason="no scheduler; the program's source sets the rate by hand")
    text = "no scheduler: the rate stays as the param group has it"
    if recording.source is None:
        text += " (unless the program sets it by hand later)"
    horizon = base.horizon_steps or base.observed[-1][0]
    rate = rates[0]
    points = ((1, rate), (horizon, rate)) if horizon > 1 else ((1, rate),)
    return replace(
        base,
        points=points,
        end_rate=rate,
        peak_rate=rate,
        warmup_steps=0,
        horizon_steps=horizon,
        horizon_source=base.horizon_source or "the watched steps",
        cadence=Cadence(kind="none", text="no scheduler"),
        source=text,
    )
