"""Who sets an optimizer's rate: schedulers that have no effect because something else sets it after them.

Every scheduler call is recorded with the rates it found and left, every step with the rates it used: what lies between
them is somebody else's doing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.recording.projection import active_schedulers, calls_seen, own_schedulers
from trainlint.recording.rate_curve import RateCurve, sets_rate
from trainlint.recording.schema import (
    Backward,
    Event,
    Optimizer,
    OptimizerStep,
    Recording,
    Scheduler,
    SchedulerStep,
    SourceLine,
)
from trainlint.recording.timeline import steps_per_epoch

__all__ = [
    "Elsewhere",
    "Overridden",
    "Overwritten",
    "PlateauPace",
    "calls_of",
    "elsewhere",
    "epochs_passed",
    "loss_passed",
    "overridden",
    "overwritten",
    "plateau_pace",
]

#: A patience in steps is larger than this; one in epochs is not.
_FEW_CALLS = 100


@dataclass(frozen=True)
class Elsewhere:
    """A scheduler that sets the rate of an optimizer that makes no step; another one steps the same weights."""

    scheduler: Scheduler
    own: Optimizer
    stepping: Optimizer
    steps: Sequence[OptimizerStep]
    #: Its calls by the program.
    calls: Sequence[SchedulerStep]


def elsewhere(run: Recording) -> Iterator[Elsewhere]:
    """Schedulers on the wrong optimizer: called, or built on one that another, newer one has replaced."""
    steps: dict[int, list[OptimizerStep]] = {}
    for e in run.events:
        if isinstance(e, OptimizerStep):
            steps.setdefault(e.optimizer, []).append(e)
    held = {o.id: {i for g in o.groups for i in g.parameters} for o in run.optimizers}
    by_id = {o.id: o for o in run.optimizers}
    for scheduler in run.schedulers:
        own = by_id.get(scheduler.optimizer) if scheduler.optimizer is not None else None
        if own is None or own.id in steps or own.skipped_steps:
            continue
        if own.class_name == "AcceleratedOptimizer":
            continue  # a wrapper: the one inside steps, with the same groups
        other = next((o for o in run.optimizers if o.id in steps and held[o.id] & held[own.id]), None)
        if other is None or len({s.rates for s in steps[other.id]}) > 1:
            continue  # something does set the stepping optimizer's rate
        calls = calls_of(run, scheduler)
        if not calls and (own.id > other.id or active_schedulers(run, other.id)):
            continue  # not called yet, and not replaced either: it may be for a later phase
        yield Elsewhere(scheduler, own, other, steps[other.id], calls)


@dataclass(frozen=True)
class PlateauPace:
    """ReduceLROnPlateau called at every step, with a patience of a small part of an epoch."""

    patience: int
    factor: float
    text: str
    steps_per_epoch: int
    #: Steps without a better value until the rate falls.
    steps: float


def plateau_pace(run: Recording, optimizer: int, scheduler: Scheduler) -> PlateauPace | None:
    """How soon a scheduler that follows a metric may act; ``None`` unless that is many times per epoch."""
    seen = calls_seen(run, scheduler, optimizer)
    epoch = steps_per_epoch(run, optimizer)
    patience, factor = scheduler.settings.get("patience"), scheduler.settings.get("factor")
    if not seen.observed or seen.kind != "step" or not seen.calls_per_step or seen.calls_per_step < 1 or not epoch:
        return None
    if not isinstance(patience, int) or not isinstance(factor, float) or not 0 < factor < 1:
        return None
    steps = (patience + 1) / seen.calls_per_step
    if patience >= _FEW_CALLS or steps > epoch / 2:
        return None
    return PlateauPace(patience, factor, seen.text, epoch, steps)


@dataclass(frozen=True)
class Overwritten:
    """A schedule moved, and the steps kept to one rate of their own."""

    #: What the scheduler left before each of these steps, and what they used, in the group with the highest rate.
    scheduled: tuple[float, ...]
    used: float
    group: int
    #: The line that assigns rates, when the program's source has just one.
    at: SourceLine | None = None


def overwritten(run: Recording, optimizer: int) -> Overwritten | None:
    """Whether every watched step after a scheduler's call used one constant rate instead of what the call had set.

    A rate that moves otherwise (a warm-up by hand before the schedule begins) or that is a share of the scheduler's is
    none of this.
    """
    own = {s.id for s in own_schedulers(run, optimizer)}
    events = _events(run)
    left: tuple[float, ...] = ()
    pairs: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    for e in events:
        if isinstance(e, SchedulerStep) and e.scheduler in own and not e.initial:
            left = e.rates_after
        elif isinstance(e, OptimizerStep) and e.optimizer == optimizer and left:
            pairs.append((left, e.rates))
            left = ()
    if len(pairs) < 2:
        return None
    groups = min(min(len(a), len(b)) for a, b in pairs)
    for group in range(groups):
        scheduled = [a[group] for a, _ in pairs]
        used = [b[group] for _, b in pairs]
        if len(set(used)) > 1 or len(set(scheduled)) < 2 or any(_same(a, used[0]) for a in scheduled):
            return None
    if not groups:
        return None
    group = max(range(groups), key=lambda g: pairs[0][1][g])
    lines = run.source.rate_assignments if run.source is not None else ()
    return Overwritten(
        tuple(a[group] for a, _ in pairs), pairs[0][1][group], group, lines[0].at if len(lines) == 1 else None
    )


@dataclass(frozen=True)
class Overridden:
    """Two schedulers on one optimizer, of which one sets the rate from its base and so undoes the other's work."""

    by: Scheduler
    victim: Scheduler
    calls: int
    #: The rate of the last watched step, and what both together would have made of it.
    rate: float
    together: float


def overridden(run: Recording, optimizer: int) -> Overridden | None:
    """A scheduler that multiplies the rate beside one that sets it, both called between the same steps."""
    own = own_schedulers(run, optimizer)
    setters = [s for s in own if sets_rate(s)]
    factors = [s for s in own if sets_rate(s) is False and not s.metric]
    steps = [e for e in run.events if isinstance(e, OptimizerStep) and e.optimizer == optimizer]
    if len(setters) != 1 or len(factors) != 1 or len(own) != 2 or len(steps) < 3:
        return None
    setter, victim = setters[0], factors[0]
    calls = [e for e in run.events if isinstance(e, SchedulerStep) and not e.initial and e.seq < steps[-1].seq]
    for low, high in itertools.pairwise(steps):
        between = {e.scheduler for e in calls if low.seq < e.seq < high.seq}
        if not {setter.id, victim.id} <= between:
            return None
    curves = RateCurve.of(setter, 0), RateCurve.of(victim, 0)
    counts = [sum(1 for e in calls if e.scheduler == s.id) for s in (setter, victim)]
    if curves[0] is None or curves[1] is None or not victim.base_rates or not victim.base_rates[0]:
        return None
    alone, other = curves[0].at(counts[0]), curves[1].at(counts[1])
    if alone is None or other is None or not steps[-1].rates:
        return None
    together, rate = alone * other / victim.base_rates[0], steps[-1].rates[0]
    if math.isclose(together, rate, rel_tol=1e-6):
        return None
    return Overridden(setter, victim, counts[1], rate, together)


def epochs_passed(run: Recording, scheduler: Scheduler) -> list[float]:
    """What the program passed to ``step(epoch)`` of this scheduler, in order; empty when it calls ``step()``."""
    return [e.epoch for e in calls_of(run, scheduler) if e.epoch is not None]


def loss_passed(run: Recording, scheduler: Scheduler) -> list[SchedulerStep]:
    """Calls that hand the value of the last backward's loss to a scheduler that takes an epoch there."""
    out = []
    for call in calls_of(run, scheduler):
        if call.epoch is None or call.epoch == round(call.epoch):
            continue
        losses = [e.value for e in _events(run) if isinstance(e, Backward) and e.seq < call.seq and e.value is not None]
        if losses and math.isclose(losses[-1], call.epoch, rel_tol=1e-6):
            out.append(call)
    return out


def calls_of(run: Recording, scheduler: Scheduler) -> list[SchedulerStep]:
    """Calls in the watch and over the end of the epoch that are not its constructor's."""
    return [e for e in _events(run) if isinstance(e, SchedulerStep) and e.scheduler == scheduler.id and not e.initial]


def _events(run: Recording) -> Sequence[Event]:
    return (*run.events, *(run.boundary.events if run.boundary is not None else ()))


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-18)
