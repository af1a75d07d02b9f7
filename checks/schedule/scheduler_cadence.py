"""TL402: the scheduler is stepped in another unit than it was sized in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.cadence import Cadence
from trainlint.recording.course import Course
from trainlint.recording.describe import name_optimizer, name_scheduler, number, percent, place, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.length import epochs_of, planned_length
from trainlint.recording.projection import Projected, active_schedulers, projection
from trainlint.recording.schema import Optimizer, Scheduler, SchedulerStep, StateLoaded
from trainlint.recording.timeline import accumulation, steps_per_epoch, training_loader

#: Schedules that turn on purpose have no end to reach.
_CYCLIC = ("CosineAnnealingWarmRestarts", "CyclicLR", "SWALR")
#: A schedule may end this share of its course short or early: rounding of batches, a dropped last one, a warm-up call.
_HAIR = 0.05
#: How near two lengths must be to be the same length counted twice.
_SAME = 0.1
#: A rate below this share of the peak trains nothing.
_DEAD = 1e-4


@check("TL402", Recording, severity="error", catalog="O8")
def scheduler_cadence(run: Recording) -> Iterator[Finding]:
    """The scheduler is stepped in another unit than it was sized in.

    ## What goes wrong
    A schedule counts calls of `scheduler.step()`. Its length is given in some unit (optimizer steps, batches,
    epochs), and the program calls it in another:

    - sized in steps, called once per epoch: it goes through a few calls of thousands. A warm-up never ends, a decay
      never comes;
    - sized in epochs, called at every step: it is over within the first epochs; a cosine then climbs back to its
      peak and down again, hundreds of times, anything else trains on at a rate of nearly 0;
    - sized in optimizer steps, called at every micro-batch under accumulation, once per process, or by the trainer
      and by hand: it runs out that many times too early;
    - sized in batches, called at optimizer steps under accumulation: it ends after 1/N of its course;
    - never called, or built on another optimizer than the one that steps: the rate stays where it is.

    ## How it is detected
    The whole curve of the schedule is made on a copy of the scheduler. How often the program calls it is read from
    the timeline between optimizer steps, or from the framework's own setting (`interval`). Laid over the planned
    number of optimizer steps, this gives the rate at every step to the end of training. A finding needs both: the
    schedule does not fit the planned run at this cadence, and it does fit at another one (its length is that of the
    run counted in epochs, steps or batches). It states the rate at the end and the one that was meant. A rate that
    falls below a 10,000th of its peak for most of the run is reported whatever the unit.

    ## What to do
    Sized in steps: call `scheduler.step()` after every `optimizer.step()`, and only then (under accumulation inside
    the same `if`); in Lightning return `{"scheduler": scheduler, "interval": "step"}` from `configure_optimizers`;
    with accelerate pass the scheduler through `accelerator.prepare`. Sized in epochs: call it at the end of each
    epoch. The number of optimizer steps is `epochs * ceil(batches / accumulation)`; Lightning knows it as
    `trainer.estimated_stepping_batches`.

    ## When it may be wrong
    Warm restarts and cyclic schedules, ReduceLROnPlateau, per-epoch StepLR and schedules whose length is unknown are
    not judged by their length; nor is a resumed schedule. A schedule that is longer or shorter than the run by a
    factor that no unit explains (training for the first tenth of a plan) is not a question of cadence. Whether a
    scheduler that was not called in the watched steps is called per epoch or never cannot be seen within an epoch;
    it is reported only when both are wrong. When nobody says how long the run is, the finding is a warning.

    ## References
    torch.optim.lr_scheduler; lightning documentation, "configure_optimizers"; accelerate documentation, "Performing
    gradient accumulation"; Loshchilov and Hutter 2017, "SGDR".
    """
    if not run.schedulers:
        raise NotApplicable("the program uses no learning-rate scheduler")
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    yield from _elsewhere(run, timeline)
    reasons: list[str] = []
    judged = 0
    for optimizer in run.optimizers:
        if optimizer.id not in timeline.steps:
            continue
        schedulers = active_schedulers(run, optimizer.id)
        if len(schedulers) > 1:
            reasons.append("several schedulers set the rate of one optimizer")
            continue
        for scheduler in schedulers:
            found = _judge(run, timeline, optimizer, scheduler)
            if isinstance(found, str):
                reasons.append(found)
                continue
            judged += 1
            if found is not None:
                yield found
    if not judged and reasons:
        raise NotObserved("; ".join(dict.fromkeys(reasons)))


# ---------------------------------------------------------------------------------------- on another optimizer


def _elsewhere(run: Recording, timeline: Timeline) -> Iterator[Finding]:
    """A scheduler that is called and sets the rate of an optimizer that never steps, beside one that does."""
    held = {o.id: {i for g in o.groups for i in g.parameters} for o in run.optimizers}
    by_id = {o.id: o for o in run.optimizers}
    for scheduler in run.schedulers:
        own = by_id.get(scheduler.optimizer) if scheduler.optimizer is not None else None
        if own is None or own.id in timeline.steps or own.skipped_steps or not scheduler.calls:
            continue
        if own.class_name == "AcceleratedOptimizer":
            continue  # a wrapper: the one inside steps, with the same groups
        stepping = [o for o in run.optimizers if o.id in timeline.steps and held[o.id] & held[own.id]]
        if not stepping:
            continue
        other = stepping[0]
        rates = timeline.rates(other.id)
        call = next(
            (e for e in run.events if isinstance(e, SchedulerStep) and e.scheduler == scheduler.id and not e.initial),
            None,
        )
        if len(rates) > 1 and any(a != b for a, b in pairwise(rates)):
            continue  # something does set the stepping optimizer's rate
        yield Finding(
            f"{name_scheduler(scheduler)} sets the rate of {name_optimizer(own)}, which never steps; the weights are "
            f"stepped by {name_optimizer(other)}, whose rate stayed at "
            f"{number(rates[0][0] if rates and rates[0] else None)} "
            f"through {plural(len(rates), 'step')} and {plural(scheduler.calls, 'call')} of the scheduler.",
            at=call.at if call is not None else scheduler.at,
            evidence={"scheduler": scheduler.class_name, "steps": len(rates), "calls": scheduler.calls},
            fix="Build the scheduler on the optimizer that steps (after the optimizer was built for the last time).",
            about=f"{scheduler.class_name}-elsewhere",
        )


# ------------------------------------------------------------------------------------------------- the judgement


@dataclass(frozen=True)
class _Facts:
    """One scheduler, with everything the judgement needs."""

    run: Recording
    optimizer: Optimizer
    scheduler: Scheduler
    projected: Projected
    course: Course
    #: Optimizer steps of the run, and who says so; ``None`` when nobody does.
    steps: int | None
    source: str
    epochs: float | None
    steps_per_epoch: int | None
    #: Backwards per optimizer step.
    micro: int
    watched: int

    @property
    def cadence(self) -> Cadence:
        return self.projected.cadence

    @property
    def peak(self) -> float:
        return self.course.peak

    @property
    def horizon(self) -> int:
        """Calls after which the schedule has run its course; 0 when it has no end that is known."""
        return self.course.horizon or 0

    @property
    def meant(self) -> float | None:
        """Rate at the end of the schedule."""
        return self.course.end

    def rate(self, calls: int) -> float | None:
        return self.course.rate(calls)


def _judge(run: Recording, timeline: Timeline, optimizer: Optimizer, scheduler: Scheduler) -> Finding | str | None:
    """A finding, ``None`` when the cadence is right, or why it could not be judged."""
    if scheduler.metric or scheduler.class_name in _CYCLIC or any(c in _CYCLIC for c in scheduler.children):
        return None
    loaded = [e for e in run.events if isinstance(e, StateLoaded) and e.what in ("scheduler", "optimizer")]
    if any(not e.empty and e.target in (scheduler.id, optimizer.id, None) for e in loaded):
        return f"{scheduler.class_name} was resumed: where it stands in its course is judged by the resume checks"
    if not scheduler.curve:
        return (
            f"the schedule of {scheduler.class_name} could not be projected ({scheduler.curve_missing or 'no curve'})"
        )
    course = Course(scheduler)
    planned = planned_length(run, optimizer.id)
    projected = projection(run, optimizer.id, course.group, planned=planned)
    watched = len(timeline.steps[optimizer.id])
    if watched < 2 and scheduler.interval is None:
        return "how often the scheduler is called shows only after a second optimizer step; raise --steps"
    if not _follows(scheduler, course.group, projected):
        return f"the watched rates do not follow {scheduler.class_name}: something else sets the rate too"
    facts = _Facts(
        run=run,
        optimizer=optimizer,
        scheduler=scheduler,
        projected=projected,
        course=course,
        steps=planned[0] if planned else None,
        source=planned[1] if planned else "",
        epochs=epochs_of(run, optimizer.id, planned[0] if planned else None),
        steps_per_epoch=steps_per_epoch(run, optimizer.id),
        micro=run.plan.accumulation or accumulation(run, optimizer.id) or 1,
        watched=watched,
    )
    cadence = facts.cadence
    if cadence.kind == "unknown" or (cadence.kind == "epoch" and not cadence.observed and scheduler.interval is None):
        return _not_called(facts)
    if cadence.kind == "never":
        return _never(facts)
    if facts.steps is None:
        return _without_length(facts)
    return _at_known_cadence(facts, facts.steps)


def _follows(scheduler: Scheduler, group: int, projected: Projected) -> bool:
    """Whether the first watched rate is on the curve, near its beginning; rates set by hand or scaled are not."""
    if projected.points or not projected.observed:
        return True
    near = [p.rates[group] for p in scheduler.curve if p.calls <= projected.cadence.before_first + 1]
    first = projected.observed[0][1]
    rates = {rate for _, rate in projected.observed}
    return len(rates) == 1 and any(math.isclose(first, r, rel_tol=1e-6, abs_tol=1e-15) for r in near)


def _near(a: float, b: float | None) -> bool:
    return b is not None and b > 0 and (abs(a - b) <= _SAME * max(a, b) or abs(a - b) <= 1)


# ----------------------------------------------------------------------------------------- called as was observed


def _at_known_cadence(f: _Facts, steps: int) -> Finding | None:
    calls = f.cadence.calls_before(steps + 1)
    per_call = f.cadence.calls_per_step or 0.0
    if f.horizon:
        slack = max(_HAIR * f.horizon, 2.0, per_call)
        if abs(calls - f.horizon) <= slack:
            return None
        end, meant = f.projected.end_rate, f.meant
        if calls < f.horizon:
            if end is None:
                end = f.rate(calls)
            if end is not None and meant is not None and abs(end - meant) > _HAIR * f.peak:
                found = _too_slow(f, steps, calls, end, meant)
                if found is not None:
                    return found
        elif f.course.decays:
            found = _too_fast(f, steps, calls)
            if found is not None:
                return found
    return _dead(f, steps)


def _too_slow(f: _Facts, steps: int, calls: int, end: float, meant: float) -> Finding | None:
    spaced = f.cadence.kind in ("epoch", "every")
    micro_batches = steps * f.micro
    if spaced and _near(f.horizon, steps):
        unit, repair = f"optimizer steps ({steps:,})", _per_step(f)
    elif f.micro > 1 and _near(f.horizon, micro_batches):
        unit = f"batches ({micro_batches:,} at accumulation {f.micro})"
        repair = (
            f"{_per_step(f)} Size it in optimizer steps: {steps:,} instead of {f.horizon:,}."
            if spaced
            else f"Size the schedule in optimizer steps: {steps:,} instead of {f.horizon:,}."
        )
    elif f.run.program.world_size > 1 and _near(f.horizon, steps * f.run.program.world_size):
        unit = f"steps of {f.run.program.world_size} processes together"
        repair = f"Size the schedule in the optimizer steps of one process: {steps:,}."
    else:
        return None
    share = percent(calls, f.horizon)
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} is sized in {unit} but {f.cadence.text}: {plural(calls, 'call')} of its "
        f"{f.horizon:,}, {share} of its course. The run ends at rate {number(end)}; meant was {number(meant)}"
        f"{_peak_text(f, end)}.",
        repair,
        kind="too-slow",
        calls=calls,
        end=end,
    )


def _peak_text(f: _Facts, end: float) -> str:
    top = max((rate for _, rate in f.projected.points), default=end)
    return f", and it never gets above {number(top)} (peak {number(f.peak)})" if top < 0.9 * f.peak else ""


def _too_fast(f: _Facts, steps: int, calls: int) -> Finding | None:
    per_step = f.cadence.calls_per_step or 0.0
    if per_step > 1 and _near(f.horizon, steps):
        times = f"{per_step:g}"
        if f.micro > 1 and _near(per_step, f.micro):
            why = f"sized in optimizer steps ({steps:,}) but called at every micro-batch ({times} per step)"
            repair = "Call it only where the optimizer steps, right after optimizer.step()."
            if uses(f.run, "accelerate") and not uses(f.run, "transformers"):
                repair = "Pass the scheduler through accelerator.prepare, and call it inside accelerator.accumulate."
        elif f.run.program.world_size > 1 and _near(per_step, f.run.program.world_size):
            why = f"sized in optimizer steps ({steps:,}) but called once per process ({times} times per step)"
            repair = f"Size it with num_processes: {steps * f.run.program.world_size:,} calls."
        else:
            lines = sorted({place(e.at) for e in _calls(f) if e.at is not None})
            where = f", at {' and '.join(lines[:3])}" if len(lines) > 1 else ""
            why = f"sized in optimizer steps ({steps:,}) but called {times} times per step{where}"
            repair = "Keep one of the calls (the trainer steps it too, or the loop calls it twice)."
    elif (
        f.epochs is not None
        and f.cadence.kind == "step"
        and (f.steps_per_epoch or 0) > 1
        and _near(f.horizon, f.epochs)
    ):
        why = f"sized in epochs ({f.horizon:,}) but {f.cadence.text} ({steps:,} steps)"
        repair = f"Call it once per epoch, or size it in optimizer steps: {steps:,}."
        if uses(f.run, "lightning"):
            repair = (
                f'Return {{"scheduler": ..., "interval": "epoch"}} from configure_optimizers, or size it {steps:,}.'
            )
    else:
        return None
    done = f.projected.reaches_end_at_step
    after = [rate for n, rate in f.projected.points if done is not None and n > done]
    meant = f.meant or 0.0
    raises = f.scheduler.class_name == "OneCycleLR"
    if raises:
        then = "and the next call raises ValueError"
    elif after and max(after) > max(2 * meant, 0.1 * f.peak):
        then = f"then it climbs again, up to {number(max(after))}"
    else:
        then = f"then it trains on at about {number(meant)}"
    when = (
        f"at step {done:,} of {steps:,} ({percent(done, steps)})" if done is not None else f"long before step {steps:,}"
    )
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} is {why}: its {f.horizon:,} calls are over {when}, {then}. "
        f"The run ends at rate {number(f.projected.end_rate)}; meant was {number(meant)}.",
        repair,
        kind="too-fast",
        calls=calls,
        end=f.projected.end_rate,
    )


def _calls(f: _Facts) -> list[SchedulerStep]:
    return [e for e in f.run.events if isinstance(e, SchedulerStep) and e.scheduler == f.scheduler.id and not e.initial]


def _dead(f: _Facts, steps: int) -> Finding | None:
    """Most of the run at a rate that trains nothing, whatever the reason."""
    points = f.projected.points
    top = max((rate for _, rate in points), default=0.0)
    if not points or f.projected.end_rate is None or steps < 20 or top <= 0:
        return None
    alive = [n for n, rate in points if rate > _DEAD * top]
    last = alive[-1] if alive else 0
    if last >= 0.9 * steps or any("EarlyStopping" in c for fw in f.run.frameworks for c in fw.callbacks):
        return None
    early = last < 0.1 * steps
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)}, {f.cadence.text}, is below a 10,000th of its peak ({number(top)}) from step "
        f"{last + 1:,} of {steps:,} on: the last {percent(steps - last, steps)} of the run trains at a rate of "
        f"{number(f.projected.end_rate)} in the end.",
        "Call it once per epoch if it is sized in epochs; else size it for "
        f"{f.cadence.calls_before(steps + 1):,} calls.",
        kind="dead",
        calls=f.cadence.calls_before(steps + 1),
        end=f.projected.end_rate,
        severity=None if early else Severity.WARNING,
    )


# ----------------------------------------------------------------------------------- not called while it was watched


def _not_called(f: _Facts) -> Finding | str | None:
    """No call between the watched steps: once per epoch, or never. A fault only when both are wrong."""
    if not f.horizon:
        return (
            f"{f.scheduler.class_name} was not called in {plural(f.watched, 'step')}; that is right if it is per epoch"
        )
    if f.steps is not None and _near(f.horizon, f.steps) and f.steps > f.watched:
        # Once every so many steps at most: none came in those that were watched.
        most = f.epochs if f.epochs is not None else f.steps / f.watched
        calls = math.ceil(most)
        if calls >= (1 - _SAME) * f.horizon:
            return None
        end, meant = f.rate(calls), f.meant
        if end is None or meant is None or abs(end - meant) <= _HAIR * f.peak:
            return None
        return _finding(
            f,
            f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, the run has "
            f"{f.steps:,}) but was not "
            f"called in {plural(f.watched, 'step')}. Called once per epoch it makes {plural(calls, 'call')}, "
            f"{percent(calls, f.horizon)} of its course: the run ends at rate {number(end)} "
            f"({number(f.rate(0))} if it is "
            f"never called); meant was {number(meant)}.",
            _per_step(f),
            kind="too-slow",
            calls=calls,
            end=end,
        )
    loader = training_loader(f.run)
    batches = loader.batches if loader is not None else None
    if f.steps is None and batches and batches > f.watched and f.horizon >= 2 * batches and f.horizon % batches == 0:
        epochs = f.horizon // batches
        return _finding(
            f,
            f"{name_scheduler(f.scheduler)} has {f.horizon:,} calls, just {epochs} epochs of "
            f"{batches} batches, but was not "
            f"called in {plural(f.watched, 'step')}: sized in steps and called once per epoch, "
            f"{epochs} epochs go through "
            f"{percent(epochs, f.horizon)} of its course (rate {number(f.rate(epochs))}; meant was {number(f.meant)}).",
            _per_step(f),
            kind="too-slow",
            calls=epochs,
            end=f.rate(epochs),
            severity=Severity.WARNING,
        )
    if f.epochs is not None and _near(f.horizon, f.epochs):
        return None
    return f"{f.scheduler.class_name} was not called in {plural(f.watched, 'step')}; that is right if it is per epoch"


def _never(f: _Facts) -> Finding | None:
    if f.course.flat:
        return None
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} was {f.cadence.text}. The rate stays at {number(f.rate(0))}"
        + (f"; the schedule would end at {number(f.meant)}." if f.horizon else "."),
        "Call scheduler.step() after optimizer.step(), or at the end of each epoch if it is sized in epochs.",
        kind="never",
        calls=0,
        end=f.rate(0),
    )


def _without_length(f: _Facts) -> Finding | str | None:
    """Nobody says how long the run is: only a schedule sized by the loader's own length can be judged."""
    per_step, per_epoch = f.cadence.calls_per_step or 0.0, f.steps_per_epoch
    loader = training_loader(f.run)
    batches = loader.batches if loader is not None else None
    if per_step > 1.5 and f.horizon and per_epoch and batches and f.course.decays:
        whole = f.horizon % per_epoch == 0 or (f.micro > 1 and f.horizon % max(batches // f.micro, 1) == 0)
        in_batches = f.horizon % batches == 0 and f.micro > 1 and _near(per_step, f.micro)
        if whole and not in_batches and f.horizon >= 2 * per_epoch:
            return _finding(
                f,
                f"{name_scheduler(f.scheduler)} is {f.cadence.text} and has {f.horizon:,} calls, a "
                "whole number of epochs "
                f"of {per_epoch:,} optimizer steps: it is over {per_step:g} times too early, after "
                f"{math.ceil(f.horizon / per_step):,} steps.",
                "Call it only where the optimizer steps, once, right after optimizer.step().",
                kind="too-fast",
                calls=None,
                end=None,
                severity=Severity.WARNING,
            )
    return "nobody says how many optimizer steps the run will make, so the schedule cannot be laid over it"


# -------------------------------------------------------------------------------------------------------- words


def _per_step(f: _Facts) -> str:
    if uses(f.run, "lightning"):
        return 'In configure_optimizers return "lr_scheduler": {"scheduler": ..., "interval": "step"}.'
    return "Call scheduler.step() after every optimizer.step()."


def _finding(
    f: _Facts,
    message: str,
    fix: str,
    *,
    kind: str,
    calls: int | None,
    end: float | None,
    severity: Severity | None = None,
) -> Finding:
    seen = next((e.at for e in _calls(f) if e.at is not None), None)
    return Finding(
        message,
        at=seen or f.scheduler.at,
        evidence={
            "kind": kind,
            "scheduler": f.scheduler.class_name,
            "horizon_calls": f.horizon or None,
            "calls_by_the_end": calls,
            "calls_per_step": f.cadence.calls_per_step,
            "planned_steps": f.steps,
            "planned_by": f.source,
            "end_rate": end,
            "meant_end_rate": f.meant if f.horizon else None,
            "peak_rate": f.peak if f.horizon else None,
        },
        fix=fix,
        severity=severity,
        about=f"{f.scheduler.class_name}-{kind}",
    )
