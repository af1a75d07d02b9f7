"""TL402: the scheduler is stepped in another unit than it was sized in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.course import ScheduleOnRun, schedule_on_run
from trainlint.recording.describe import name_optimizer, name_scheduler, number, percent, place, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.projection import active_schedulers
from trainlint.recording.schema import Optimizer, OptimizerStep, ScalerEvent, Scheduler, SchedulerStep, StateLoaded
from trainlint.recording.timeline import training_loader

#: Schedules that turn on purpose have no end to reach.
_CYCLIC = ("CosineAnnealingWarmRestarts", "CyclicLR", "SWALR")
#: A schedule may end this share of its course short or early: rounding of batches, a dropped last one, a warm-up call.
_HAIR = 0.05
#: How near two lengths must be to be the same length counted twice.
_SAME = 0.1
#: More epochs than anybody plans.
_MANY_EPOCHS = 3000
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
    it is reported only when both are wrong. When nobody says how long the run is, only a schedule sized by the
    length of the loader can be judged.

    ## References
    torch.optim.lr_scheduler; lightning documentation, "configure_optimizers"; accelerate documentation, "Performing
    gradient accumulation"; Loshchilov and Hutter 2017, "SGDR".
    """
    if not run.schedulers:
        raise NotApplicable("the program uses no learning-rate scheduler")
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    reasons: list[str] = []
    judged = 0
    for finding in _elsewhere(run, timeline):
        judged += 1
        yield finding
    for optimizer in run.optimizers:
        if optimizer.id not in timeline.steps:
            continue
        schedulers = active_schedulers(run, optimizer.id)
        if len(schedulers) > 1:
            reasons.append("several schedulers set the rate of one optimizer")
            continue
        for scheduler in schedulers:
            found = _judge(run, optimizer, scheduler)
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


def _judge(run: Recording, optimizer: Optimizer, scheduler: Scheduler) -> Finding | str | None:
    """A finding, ``None`` when the cadence is right, or why it could not be judged."""
    if scheduler.metric or scheduler.class_name in _CYCLIC or any(c in _CYCLIC for c in scheduler.children):
        return None
    loaded = [e for e in run.events if isinstance(e, StateLoaded) and e.what in ("scheduler", "optimizer")]
    if any(not e.empty and e.target in (scheduler.id, optimizer.id, None) for e in loaded):
        return f"{scheduler.class_name} was resumed: where it stands in its course is judged by the resume checks"
    if not scheduler.curve:
        why = scheduler.curve_missing or "no curve"
        return f"the schedule of {scheduler.class_name} could not be projected ({why})"
    f = schedule_on_run(run, optimizer, scheduler)
    if f.watched < 2 and scheduler.interval is None:
        return "how often the scheduler is called shows only after a second optimizer step; raise --steps"
    if not f.followed:
        return f"the watched rates do not follow {scheduler.class_name}: something else sets the rate too"
    cadence = f.cadence
    if cadence.kind == "unknown" or (cadence.kind == "epoch" and not cadence.observed and scheduler.interval is None):
        return _not_called(f)
    if cadence.kind == "never":
        return _never(f, cadence.text)
    if f.steps is None:
        return _without_length(f)
    return _at_known_cadence(f, f.steps)


def _near(a: float, b: float | None) -> bool:
    return b is not None and b > 0 and (abs(a - b) <= _SAME * max(a, b) or abs(a - b) <= 1)


# ----------------------------------------------------------------------------------------- called as was observed


def _at_known_cadence(f: ScheduleOnRun, steps: int) -> Finding | None:
    calls = f.cadence.calls_before(steps + 1)
    if f.horizon:
        slack = max(_HAIR * f.horizon, 2.0, f.cadence.calls_per_step or 0.0)
        if abs(calls - f.horizon) <= slack:
            return None
        end, meant = f.projected.end_rate, f.course.end
        if end is None:
            end = f.course.rate(calls)
        found = None
        if calls > f.horizon and f.course.decays:
            found = _too_fast(f, steps, calls)
        elif calls < f.horizon and end is not None and meant is not None and abs(end - meant) > _HAIR * f.course.peak:
            found = _too_slow(f, steps, calls, end, meant)
        if found is not None:
            return found
    return _dead(f, steps)


def _too_slow(f: ScheduleOnRun, steps: int, calls: int, end: float, meant: float) -> Finding | None:
    spaced = f.cadence.kind in ("epoch", "every")
    ranks = f.run.program.world_size
    resize = f"Size it in optimizer steps: {steps:,} instead of {f.horizon:,}."
    if spaced and _near(f.horizon, steps):
        unit, repair = f"optimizer steps ({steps:,})", _per_step(f)
    elif f.micro > 1 and _near(f.horizon, steps * f.micro):
        unit = f"batches ({steps * f.micro:,} at accumulation {f.micro})"
        repair = f"{_per_step(f)} {resize}" if spaced else resize
    elif ranks > 1 and _near(f.horizon, steps * ranks):
        unit, repair = f"the steps of {ranks} processes together", resize
    else:
        return None
    top = max((rate for _, rate in f.projected.points), default=end)
    peak = f.course.peak
    never = f", and it never gets above {number(top)} (peak {number(peak)})" if top < 0.9 * peak else ""
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} is sized in {unit} but {f.cadence.text}: {plural(calls, 'call')} of its "
        f"{f.horizon:,}, {percent(calls, f.horizon)} of its course. The run ends at rate {number(end)}; meant was "
        f"{number(meant)}{never}.",
        repair,
        kind="too-slow",
        calls=calls,
        end=end,
    )


def _too_fast(f: ScheduleOnRun, steps: int, calls: int) -> Finding | None:
    unit = _why_too_fast(f, steps)
    if unit is None:
        return None
    why, repair = unit
    done, peak, meant = f.projected.reaches_end_at_step, f.course.peak, f.course.end or 0.0
    after = [rate for n, rate in f.projected.points if done is not None and n > done]
    if f.scheduler.class_name == "OneCycleLR":
        then = "and the next call raises ValueError"
    elif after and max(after) > max(2 * meant, 0.1 * peak):
        then = f"then it climbs again, up to {number(max(after))}"
    else:
        then = f"then it trains on at about {number(meant)}"
    when = f"long before step {steps:,}"
    if done is not None:
        when = f"at step {done:,} of {steps:,} ({percent(done, steps)})"
    end = f.projected.end_rate
    ends = ""
    if end is not None and abs(end - meant) > _HAIR * peak:
        ends = f" The run ends at rate {number(end)}; meant was {number(meant)}."
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} is {why}: its {f.horizon:,} calls are over {when}, {then}.{ends}",
        repair,
        kind="too-fast",
        calls=calls,
        end=end,
    )


def _why_too_fast(f: ScheduleOnRun, steps: int) -> tuple[str, str] | None:
    """The unit that was mistaken and the repair; ``None`` when no unit explains the length."""
    per_step, ranks = f.cadence.calls_per_step or 0.0, f.run.program.world_size
    sized = f"sized in optimizer steps ({steps:,}) but"
    if per_step > 1 and _near(f.horizon, steps):
        times = f"{per_step:g} times per step"
        if f.micro > 1 and _near(per_step, f.micro):
            return f"{sized} called at every micro-batch ({times})", _only_at_steps(f)
        if ranks > 1 and _near(per_step, ranks):
            return f"{sized} called once per process ({times})", f"Size it with num_processes: {steps * ranks:,} calls."
        lines = sorted({place(e.at) for e in _calls(f) if e.at is not None})
        where = f", at {' and '.join(lines[:3])}" if len(lines) > 1 else ""
        repair = "Keep one of the calls: the trainer steps it too, or the loop calls it more than once."
        return f"{sized} called {times}{where}", repair
    if f.cadence.kind == "step" and f.epochs and (f.steps_per_epoch or 0) > 1 and _near(f.horizon, f.epochs):
        repair = f"Call it once per epoch, or size it in optimizer steps: {steps:,}."
        if uses(f.run, "lightning"):
            repair = f'Return "interval": "epoch" from configure_optimizers, or size it in optimizer steps: {steps:,}.'
        return f"sized in epochs ({f.horizon:,}) but {f.cadence.text} ({steps:,} steps)", repair
    return None


def _dead(f: ScheduleOnRun, steps: int) -> Finding | None:
    """Most of the run at a rate that trains nothing, whatever the reason."""
    points = f.projected.points
    top = max((rate for _, rate in points), default=0.0)
    if not points or f.projected.end_rate is None or steps < 20 or top <= 0:
        return None
    last = max((n for n, rate in points if rate > _DEAD * top), default=0)
    if last >= 0.9 * steps or any("EarlyStopping" in c for fw in f.run.frameworks for c in fw.callbacks):
        return None
    calls = f.cadence.calls_before(steps + 1)
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)}, {f.cadence.text}, is below a 10,000th of its peak ({number(top)}) from step "
        f"{last + 1:,} of {steps:,} on: the last {percent(steps - last, steps)} of the run trains at next to nothing "
        f"({number(f.projected.end_rate)} at the end).",
        f"Call it once per epoch if it is sized in epochs; else size it for {calls:,} calls.",
        kind="dead",
        calls=calls,
        end=f.projected.end_rate,
        severity=None if last < 0.1 * steps else Severity.WARNING,
    )


# ----------------------------------------------------------------------------------- not called while it was watched


def _not_called(f: ScheduleOnRun) -> Finding | str | None:
    """No call between the watched steps: once per epoch, or never. A fault only when both are wrong."""
    if f.horizon and f.steps is not None and _near(f.horizon, f.steps) and f.steps > f.watched:
        return _not_called_though_sized_in_steps(f, f.steps)
    if f.epochs is not None and f.horizon and _near(f.horizon, f.epochs) and not _no_call_in_the_source(f.run):
        return None
    if _no_call_in_the_source(f.run):
        return _never(f, f"not called in {plural(f.watched, 'step')}, and no line of the program calls its step()")
    loader = training_loader(f.run)
    batches = loader.batches if loader is not None else None
    whole = bool(batches) and f.horizon >= 2 * (batches or 1) and f.horizon % (batches or 1) == 0
    if f.steps is None and batches and batches > f.watched and whole and _speaks_of_steps(f):
        epochs = f.horizon // batches
        return _finding(
            f,
            f"{name_scheduler(f.scheduler)} has {f.horizon:,} calls, just {epochs} epochs of "
            f"{batches} batches, but was "
            f"not called in {plural(f.watched, 'step')}: sized in steps and called once per epoch, {epochs} epochs go "
            f"through {percent(epochs, f.horizon)} of its course (rate {number(f.course.rate(epochs))}; meant was "
            f"{number(f.course.end)}).",
            _per_step(f),
            kind="too-slow",
            calls=epochs,
            end=f.course.rate(epochs),
            severity=Severity.WARNING,
        )
    return f"{f.scheduler.class_name} was not called in {plural(f.watched, 'step')}; right if it is meant per epoch"


def _not_called_though_sized_in_steps(f: ScheduleOnRun, steps: int) -> Finding | None:
    # Without the number of epochs: called once every so many steps at most, since none came in those that were watched.
    calls = math.ceil(f.epochs if f.epochs is not None else steps / f.watched)
    end, meant = f.course.rate(calls), f.course.end
    if calls >= (1 - _SAME) * f.horizon or end is None or meant is None or abs(end - meant) <= _HAIR * f.course.peak:
        return None
    how = "Called once per epoch it makes" if f.epochs is not None else "At that pace it makes at most"
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, the run has {steps:,}) but was not "
        f"called in {plural(f.watched, 'step')}. {how} {plural(calls, 'call')}, {percent(calls, f.horizon)} of its "
        f"course: the run ends at rate {number(end)} ({number(f.course.rate(0))} if it is never called); meant was "
        f"{number(meant)}.",
        _per_step(f),
        kind="too-slow",
        calls=calls,
        end=end,
    )


def _speaks_of_steps(f: ScheduleOnRun) -> bool:
    """Whether the length can hardly be one in epochs: 200 may be 200 epochs as well as 2 epochs of 100 batches."""
    in_steps = f.scheduler.class_name == "OneCycleLR" or "lr_lambda.num_training_steps" in f.scheduler.settings
    return in_steps or f.horizon > _MANY_EPOCHS


def _no_call_in_the_source(run: Recording) -> bool:
    """Whether every call of a ``step`` in the program's own source is known to be of something else."""
    calls = run.source.step_calls if run.source is not None else None
    if calls is None or any(fw.name in ("lightning", "transformers") for fw in run.frameworks):
        return False
    events = [e for e in run.events if isinstance(e, (OptimizerStep, ScalerEvent)) and e.at is not None]
    others = {(e.at.file, e.at.line) for e in events if e.at is not None}
    return bool(others) and all((c.file, c.line) in others for c in calls)


def _never(f: ScheduleOnRun, text: str) -> Finding | None:
    if f.course.flat:
        return None
    rises = (f.course.rate(0) or 0.0) < 0.5 * f.course.peak
    end = f"; the schedule would go to {number(f.course.end)}" if f.horizon else ""
    return _finding(
        f,
        f"{name_scheduler(f.scheduler)} was {text}. The rate stays at {number(f.course.rate(0))}{end}.",
        "Call scheduler.step() after optimizer.step(), or at the end of each epoch if it is sized in epochs.",
        kind="never",
        calls=0,
        end=f.course.rate(0),
        # A decay may be meant to begin in a later epoch; a warm-up is not.
        severity=None if rises or _no_call_in_the_source(f.run) else Severity.WARNING,
    )


def _without_length(f: ScheduleOnRun) -> Finding | str | None:
    """Nobody says how long the run is: only a schedule sized by the loader's own length can be judged."""
    per_step, per_epoch = f.cadence.calls_per_step or 0.0, f.steps_per_epoch
    loader = training_loader(f.run)
    batches = loader.batches if loader is not None else None
    if per_step > 1.5 and f.horizon and per_epoch and batches and f.course.decays and f.horizon >= 2 * per_epoch:
        whole = f.horizon % per_epoch == 0 or f.horizon % max(batches // f.micro, 1) == 0
        at_micro_batches = f.micro > 1 and _near(per_step, f.micro)
        if whole and not (at_micro_batches and f.horizon % batches == 0):
            over = math.ceil(f.horizon / per_step)
            when = "at every micro-batch" if at_micro_batches else f"{per_step:g} times per optimizer step"
            return _finding(
                f,
                f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, "
                f"{f.horizon / per_epoch:.3g} "
                f"epochs of {per_epoch:,}) but called {when}: it is over after {over:,} "
                f"steps, {over / per_epoch:.2g} epochs, {per_step:g} times too early.",
                _only_at_steps(f),
                kind="too-fast",
                calls=None,
                end=None,
                # Per micro-batch the unit is plain; two calls per step may be what somebody counted on.
                severity=None if at_micro_batches else Severity.WARNING,
            )
    return "nobody says how many optimizer steps the run will make, so the schedule cannot be laid over it"


# -------------------------------------------------------------------------------------------------------- words


def _calls(f: ScheduleOnRun) -> list[SchedulerStep]:
    return [e for e in f.run.events if isinstance(e, SchedulerStep) and e.scheduler == f.scheduler.id and not e.initial]


def _per_step(f: ScheduleOnRun) -> str:
    if uses(f.run, "lightning"):
        return 'In configure_optimizers return "lr_scheduler": {"scheduler": ..., "interval": "step"}.'
    return "Call scheduler.step() after every optimizer.step()."


def _only_at_steps(f: ScheduleOnRun) -> str:
    if uses(f.run, "accelerate") and not uses(f.run, "transformers"):
        return "Pass the scheduler through accelerator.prepare, and call it inside accelerator.accumulate."
    return "Call it only where the optimizer steps, once, right after optimizer.step()."


def _finding(
    f: ScheduleOnRun,
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
            "planned_by": f.steps_source,
            "end_rate": end,
            "meant_end_rate": f.course.end,
            "peak_rate": f.course.peak,
        },
        fix=fix,
        severity=severity,
        about=f"{f.scheduler.class_name}-{kind}",
    )
