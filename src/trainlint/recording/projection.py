"""The learning rate over the whole planned run, from a few watched steps.

A scheduler's curve is its rate over the number of ``scheduler.step()`` calls. What a run really does depends on how
often the program calls it: once per optimizer step, once per micro-batch, once per epoch. This module reads that
cadence off the timeline and lays the curve over the planned optimizer steps. Pure functions over a
:class:`~trainlint.recording.schema.Recording`; nothing is invented: where the rate cannot be known there is no point.

Optimizer steps are numbered from 1 (the first watched step). The rate of step ``n`` is the one that step uses.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trainlint.recording.cadence import Cadence, cadence
from trainlint.recording.schema import Recording, Scheduler, StateLoaded
from trainlint.recording.timeline import of_kind, steps_of

__all__ = ["OWN_RATE", "Cadence", "Projected", "active_schedulers", "planned_steps", "projection"]

#: Points of a projected curve: more than a terminal or a page can show.
_MAX_POINTS = 400
#: Observed rates must lie this close to the curve, as a share of its peak, for the curve to be believed.
_TOLERANCE = 0.01
#: Said of an optimizer that makes the rate it uses from the one in its groups.
OWN_RATE = "no scheduler: the optimizer itself warms its rate up or adapts it"
#: A change of the rate below this share of its peak is not worth drawing.
_VISIBLE = 0.01


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
    if len(schedulers) > 1:
        names = ", ".join(s.class_name for s in schedulers)
        return replace(base, reason=f"several schedulers set the rate of one optimizer ({names})")
    scheduler = schedulers[0]
    seen = cadence(recording, scheduler, optimizer_id)
    base = replace(base, cadence=seen, scheduler=scheduler.id)
    if scheduler.metric:
        return replace(base, reason=f"{scheduler.class_name} follows a metric, which only training itself can tell")
    if not scheduler.curve:
        why = f": {scheduler.curve_missing}" if scheduler.curve_missing else ""
        return replace(base, reason=f"the schedule of {scheduler.class_name} could not be projected{why}")
    if seen.kind == "unknown":
        return replace(base, reason=seen.text)
    curve = _Curve.of(scheduler, group)
    if curve is None:
        return replace(base, reason=f"{scheduler.class_name} has no rate for param group {group}")
    return _along(recording, scheduler, curve, base)


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

    The parts of a SequentialLR or ChainedScheduler are built on the same optimizer before it; they are told by class
    and order. Of several that remain, those that were stepped count; when none was, all of them.
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
    remaining = [s for s in own if s.id not in inside]
    if len(remaining) > 1:
        remaining = [s for s in remaining if s.calls > 0] or remaining
    return tuple(remaining)


# ------------------------------------------------------------------------------------------- the scheduler's curve


@dataclass(frozen=True)
class _Curve:
    """Rates over calls. The recorder's points lie dense up to the schedule's end and ever wider beyond it."""

    calls: tuple[int, ...]
    rates: tuple[float, ...]
    #: Widest gap between two points that may be filled in: a cosine that turns is not seen through a wider one.
    gap: float = math.inf
    #: From this call on the rate no longer changes.
    flat_from: float = math.inf

    @classmethod
    def of(cls, scheduler: Scheduler, group: int) -> _Curve | None:
        points = sorted((p.calls, p.rates[group]) for p in scheduler.curve if group < len(p.rates))
        if not points:
            return None
        calls, rates = tuple(c for c, _ in points), tuple(r for _, r in points)
        flat = next((i for i in range(len(rates), 0, -1) if rates[i - 1] != rates[-1]), 0)
        horizon = scheduler.horizon_calls
        gap = max(1.0, horizon / 16) if horizon else math.inf
        # Flat is believed when points beyond the schedule's end show it, or when the whole curve is.
        beyond = flat == 0 or (horizon is not None and flat < len(rates) - 1 and calls[-1] > horizon)
        return cls(calls, rates, gap, calls[flat] if beyond else math.inf)

    @property
    def last(self) -> int:
        return self.calls[-1]

    @property
    def peak(self) -> float:
        return max(self.rates)

    def at(self, calls: int) -> float | None:
        """Rate after ``calls`` calls, linear between points; ``None`` where it is not known."""
        if calls >= self.flat_from:
            return self.rates[-1]
        if calls < self.calls[0] or calls > self.calls[-1]:
            return None
        right = bisect.bisect_left(self.calls, calls)
        if self.calls[right] == calls:
            return self.rates[right]
        c0, c1, r0, r1 = self.calls[right - 1], self.calls[right], self.rates[right - 1], self.rates[right]
        if c1 - c0 > self.gap:
            return None
        return r0 + (r1 - r0) * (calls - c0) / (c1 - c0)

    def rise_ends(self) -> int:
        """Calls until the rate stops rising from its start; 0 when it does not rise."""
        end = 0
        for i in range(1, len(self.rates)):
            if self.rates[i] < self.rates[i - 1] * (1 - 1e-9):
                break
            if self.rates[i] > self.rates[i - 1] * (1 + 1e-9):
                end = self.calls[i]
        return end

    def settles(self) -> int:
        """Calls after which what remains of the curve can no longer be told apart in a drawing."""
        last, visible = self.rates[-1], _VISIBLE * self.peak
        moving = [c for c, r in zip(self.calls, self.rates, strict=True) if abs(r - last) > visible]
        if not moving:
            return self.calls[0]
        # A tenth more, so that the flat part shows where there is one.
        return min(math.ceil(1.1 * moving[-1]) + 1, self.last)


def _along(recording: Recording, scheduler: Scheduler, curve: _Curve, base: Projected) -> Projected:
    seen = base.cadence
    offset = _offset(recording, scheduler, curve, seen, base.observed)
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
    recording: Recording, scheduler: Scheduler, curve: _Curve, seen: Cadence, observed: Sequence[tuple[int, float]]
) -> int | None:
    """How many calls the schedule had behind it when this run began: 0, or what a loaded state tells; None: no fit."""
    tolerance = _TOLERANCE * max(curve.peak, max((r for _, r in observed), default=0.0))

    def fits(offset: int) -> bool:
        for step, rate in observed:
            expected = curve.at(seen.calls_before(step) + offset)
            if expected is not None and abs(expected - rate) > tolerance:
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
