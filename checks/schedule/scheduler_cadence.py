"""TL402: the scheduler is stepped in another unit than it was sized in."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.course import ScheduleOnRun, schedule_on_run
from trainlint.recording.describe import name_optimizer, name_scheduler, number, percent, place, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.projection import active_schedulers, own_schedulers
from trainlint.recording.rate_setters import (
    Elsewhere,
    calls_of,
    elsewhere,
    epochs_passed,
    loss_passed,
    overridden,
    overwritten,
    plateau_pace,
)
from trainlint.recording.schema import Optimizer, Scheduler, StateLoaded

#: Schedules that turn on purpose have no end to reach.
_CYCLIC = ("CosineAnnealingWarmRestarts", "CyclicLR", "SWALR")
#: A schedule may end this share of its course short or early: rounding of batches, a dropped last one, a warm-up call.
_HAIR = 0.05
#: How near two lengths must be to be the same length counted twice.
_SAME = 0.1
#: A run whose rate stays below this share of the schedule's peak never gets there.
_REACHED = 0.9
#: A rate below this share of the peak trains nothing.
_DEAD = 1e-4


@check("TL402", Recording, severity="error", catalog="O8")
def scheduler_cadence(run: Recording) -> Iterator[Finding]:
    """The scheduler is stepped in another unit than it was sized in.

    ## What goes wrong
    A schedule counts calls of `scheduler.step()`. Its length is given in some unit (optimizer steps, batches,
    epochs), and the program calls it in another:

    - sized in steps, called once per epoch: a warm-up never ends, a decay never comes;
    - sized in epochs, called at every step: it is over within the first epochs; a cosine then climbs back and down
      again, hundreds of times, anything else trains on at a rate of nearly 0;
    - sized in optimizer steps, called at every micro-batch, once per process, or by the trainer and by hand: it runs
      out that many times too early. Sized in batches under accumulation, it ends after 1/N of its course;
    - never called, built on another optimizer than the one that steps, or overwritten by hand before every step: the
      rate stays where it is;
    - `ReduceLROnPlateau` called at every batch with a patience meant in epochs: the rate falls on the noise of the
      loss; two schedulers of which one sets the rate from its base: what the other does is undone.

    ## How it is detected
    The whole curve of the schedule is made on a copy. How often the program calls it is read from the timeline (an
    epoch's end is brought on early, which tells once per epoch from never) or from the framework's `interval`. The
    run's length is the trainer's word, else that of the program's own loops, else of config and loader: this gives the
    rate at every step to the end of training. A finding needs both: the schedule does not fit the planned run at this
    cadence, and it does fit at another one (its length is that of the run counted in epochs, steps or batches). It
    states the rate at the end and the one that was meant. A rate that falls below a 10,000th of its peak for most of
    the run is reported whatever the unit. Several schedulers on one optimizer are multiplied, each at its own
    cadence, where torch's classes work that way. What a call leaves is held against what the next step uses: when it
    moves and every step uses one and the same other rate, the schedule has no effect (warning).

    ## What to do
    Sized in steps: call `scheduler.step()` after every `optimizer.step()`, and only then (under accumulation inside
    the same `if`); in Lightning return `{"scheduler": scheduler, "interval": "step"}` from `configure_optimizers`;
    with accelerate pass the scheduler through `accelerator.prepare`. Sized in epochs: call it at the end of each
    epoch. The number of optimizer steps is `epochs * ceil(batches / accumulation)`; Lightning knows it as
    `trainer.estimated_stepping_batches`.

    ## When it may be wrong
    Warm restarts and cyclic schedules, per-epoch StepLR, schedules whose length is unknown and those that are told
    where they are (`step(epoch)`) are not judged by their length; nor is a resumed schedule. A plateau per batch is a
    warning, and only with a patience below 100 calls and half an epoch. A rate that is held by hand for a first phase
    looks like one that is overwritten for good. A schedule that is longer or shorter than the run by a
    factor that no unit explains (training for the first tenth of a plan) is not a question of cadence; one whose
    length is only near that of the run in another unit is a warning (200 epochs, tried on 5 of 39 batches). When the
    end of the epoch was not reached, a scheduler that was not called may be called per epoch or never: reported only
    when both are wrong. When nobody says how long the run is, only a schedule sized by the loader can be judged.

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
    for wrong in elsewhere(run):
        judged += 1
        yield _elsewhere(wrong)
    for optimizer in run.optimizers:
        if optimizer.id not in timeline.steps:
            continue
        undone = _undone(run, optimizer)
        if undone is not None:
            judged += 1
            yield undone
            continue
        for scheduler in active_schedulers(run, optimizer.id):
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


def _elsewhere(found: Elsewhere) -> Finding:
    scheduler, steps, called = found.scheduler, found.steps, found.calls
    calls = f" and {plural(len(called), 'call')} of the scheduler" if called else ""
    return Finding(
        f"{name_scheduler(scheduler)} sets the rate of {name_optimizer(found.own)}, which never steps; the same "
        f"weights are stepped by {name_optimizer(found.stepping)}, whose rate stayed at "
        f"{number(next(iter(steps[0].rates), None))} through {plural(len(steps), 'step')}{calls}.",
        at=called[0].at if called else scheduler.at,
        evidence={"scheduler": scheduler.class_name, "steps": len(steps), "calls": len(called)},
        fix="Build the scheduler on the optimizer that steps (after the optimizer was built for the last time).",
        severity=None if called else Severity.WARNING,
        about=f"{scheduler.class_name}-elsewhere",
    )


# ------------------------------------------------------------------------------------------------ without effect


def _undone(run: Recording, optimizer: Optimizer) -> Finding | None:
    """A schedule that something else undoes: the program by hand, another scheduler, or the loss given as an epoch."""
    for scheduler in active_schedulers(run, optimizer.id):
        given = loss_passed(run, scheduler)
        if len(given) > 1:
            return Finding(
                f"{name_scheduler(scheduler)}.step() is given the loss ({number(given[0].epoch)}, "
                f"{number(given[1].epoch)}, ...), which it takes for the epoch that it is in: the rate follows the "
                f"loss, not the schedule.",
                at=given[0].at,
                evidence={"kind": "loss-as-epoch", "passed": [e.epoch for e in given[:8]]},
                fix="Call scheduler.step() without an argument; only ReduceLROnPlateau takes a metric.",
                about=f"{scheduler.class_name}-loss",
            )
    hand = overwritten(run, optimizer.id)
    if hand is not None:
        scheduler = active_schedulers(run, optimizer.id)[-1]
        f = schedule_on_run(run, optimizer, scheduler)
        where = f" ({place(hand.at)})" if hand.at is not None else ""
        meant = f"; meant was {number(f.meant)} at the end" if f.horizon and f.meant is not None else ""
        shown = ", ".join(f"{rate:.6g}" for rate in hand.scheduled[:3])
        return Finding(
            f"{name_scheduler(scheduler)} has no effect: it set the rate to {shown} after its calls, and every step "
            f"that followed used {hand.used:.6g}: something sets the rate again before the step{where}. It stays "
            f"there as long as that goes on{meant}.",
            at=hand.at or scheduler.at,
            evidence={"kind": "overwritten", "scheduled": list(hand.scheduled[:8]), "used": hand.used},
            fix='Leave the rate to the scheduler: do not assign group["lr"] in the loop.',
            severity=Severity.WARNING,
            about=f"{scheduler.class_name}-overwritten",
        )
    lost = overridden(run, optimizer.id)
    if lost is not None:
        return Finding(
            f"{name_scheduler(lost.by)} sets the rate from the base rate at every call, which undoes what "
            f"{name_scheduler(lost.victim)} on the same optimizer has made of it: after "
            f"{plural(lost.calls, 'call')} the step ran at {lost.rate:.6g}; both together would give "
            f"{lost.together:.6g}.",
            at=lost.victim.at,
            evidence={"kind": "overridden", "rate": lost.rate, "together": lost.together, "calls": lost.calls},
            fix="Put both into one LambdaLR, or one after the other into a SequentialLR.",
            severity=Severity.WARNING,
            about=f"{lost.victim.class_name}-overridden",
        )
    return None


def _plateau(run: Recording, optimizer: Optimizer, scheduler: Scheduler) -> Finding | None:
    """ReduceLROnPlateau with a patience of a few calls, called at every step."""
    pace = plateau_pace(run, optimizer.id, scheduler)
    if pace is None:
        return None
    rate = next((r for rates in Timeline(run).rates(optimizer.id) for r in rates), None)
    steps = math.ceil(math.ceil(math.log(_DEAD) / math.log(pace.factor)) * pace.steps)
    return Finding(
        f"{name_scheduler(scheduler)} is {pace.text}, with patience = {pace.patience}: {pace.patience + 1} batches "
        f"without a better loss, {percent(pace.steps, pace.steps_per_epoch)} of an epoch of "
        f"{pace.steps_per_epoch:,} steps, and the rate is multiplied by {pace.factor:g}. On the noise of single "
        f"batches it can fall from {number(rate)} to {number((rate or 0) * _DEAD)} within {plural(steps, 'step')}.",
        at=next((e.at for e in calls_of(run, scheduler) if e.at is not None), scheduler.at),
        evidence={"patience": pace.patience, "factor": pace.factor, "steps_per_epoch": pace.steps_per_epoch},
        fix="Call scheduler.step(validation_loss) once per epoch"
        + (' ("interval": "epoch").' if uses(run, "lightning") else ", or give a patience in steps."),
        severity=Severity.WARNING,
        about=f"{scheduler.class_name}-per-batch",
    )


# ------------------------------------------------------------------------------------------------- the judgement


def _judge(run: Recording, optimizer: Optimizer, scheduler: Scheduler) -> Finding | str | None:
    """A finding, ``None`` when the cadence is right, or why it could not be judged."""
    if scheduler.metric:
        return _plateau(run, optimizer, scheduler)
    if scheduler.class_name in _CYCLIC or any(c in _CYCLIC for c in scheduler.children):
        return None
    loaded = [e for e in run.events if isinstance(e, StateLoaded) and e.what in ("scheduler", "optimizer")]
    if any(not e.empty and e.target in (scheduler.id, optimizer.id, None) for e in loaded):
        return f"{scheduler.class_name} was resumed: where it stands in its course is judged by the resume checks"
    if not scheduler.curve:
        why = scheduler.curve_missing or "no curve"
        return f"the schedule of {scheduler.class_name} could not be projected ({why})"
    f = schedule_on_run(run, optimizer, scheduler)
    if epochs_passed(run, scheduler) or (f.part is None and len(own_schedulers(run, optimizer.id)) > 1):
        return f.projected.reason
    if f.watched < 2 and scheduler.interval is None:
        return "how often the scheduler is called shows only after a second optimizer step; raise --steps"
    if not f.followed:
        return f.projected.reason or f"the watched rates do not follow {scheduler.class_name}"
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
        if abs(calls - f.horizon) <= slack or (f.called_at_every_batch and _near(f.horizon, f.all_batches)):
            return None
        end, meant = f.projected.end_rate, f.meant
        if end is None and f.part is None:
            end = f.course.rate(calls)
        found = None
        if calls > f.horizon and f.course.decays:
            found = _too_fast(f, steps, calls)
        elif calls < f.horizon and end is not None and meant is not None and _differs(f, end, meant):
            found = _too_slow(f, steps, calls, end, meant)
        if found is not None:
            return found
    return _dead(f, steps) if f.part is None else None


def _differs(f: ScheduleOnRun, end: float, meant: float) -> bool:
    """Whether what the run makes of the schedule is not what was meant: at its end, or at its height."""
    return abs(end - meant) > _HAIR * f.peak or _highest(f, end) < _REACHED * f.peak


def _highest(f: ScheduleOnRun, end: float) -> float:
    return max((rate for _, rate in f.projected.points), default=end)


def _too_slow(f: ScheduleOnRun, steps: int, calls: int, end: float, meant: float) -> Finding | None:
    spaced = f.cadence.kind in ("epoch", "every")
    ranks = f.run.program.world_size
    resize = f"Size it in optimizer steps: {steps:,} instead of {f.horizon:,}."
    count = steps
    if spaced and _near(f.horizon, steps):
        unit, repair = f"optimizer steps ({steps:,})", _per_step(f)
    elif f.micro > 1 and _near(f.horizon, steps * f.micro):
        count = steps * f.micro
        unit = f"batches ({steps * f.micro:,} at accumulation {f.micro})"
        repair = f"{_per_step(f)} {resize}" if spaced else resize
    elif ranks > 1 and _near(f.horizon, steps * ranks):
        count = steps * ranks
        unit, repair = f"the steps of {ranks} processes together", resize
    else:
        return None
    top, peak = _highest(f, end), f.peak
    takes = f", and would take {f.done_at - 1:,} steps" if f.done_at is not None and f.done_at > steps else ""
    never = f", and it never gets above {number(top)} (peak {number(peak)})" if top < _REACHED * peak else ""
    message = (
        f"{name_scheduler(f.scheduler)} is sized in {unit} but {f.pace}: {plural(calls, 'call')} of its "
        f"{f.horizon:,}, {percent(calls, f.horizon)} of its course{takes}. The run ends at rate {number(end)}; "
        f"meant was {number(meant)}{never}."
    )
    return _finding(f, message, repair, "too-slow", calls, end, _at_most(f, count))


def _at_most(f: ScheduleOnRun, count: int) -> Severity | None:
    """A warning where the length may be a round number of another unit: 200 epochs, tried on 5 of them, 196 steps."""
    rounding = max(2.0, f.epochs or 0.0) * f.micro
    return None if f.counts_steps or abs(f.horizon - count) <= rounding else Severity.WARNING


def _too_fast(f: ScheduleOnRun, steps: int, calls: int) -> Finding | None:
    unit = _why_too_fast(f, steps)
    if unit is None:
        return None
    why, repair = unit
    done, peak, meant = f.done_at, f.peak, f.meant or 0.0
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
    elif end is not None:
        ends = f" Meant was to get there at step {steps:,}."
    message = f"{name_scheduler(f.scheduler)} is {why}: its {f.horizon:,} calls are over {when}, {then}.{ends}"
    return _finding(f, message, repair, "too-fast", calls, end)


def _why_too_fast(f: ScheduleOnRun, steps: int) -> tuple[str, str] | None:
    """The unit that was mistaken and the repair; ``None`` when no unit explains the length."""
    per_step, ranks = f.cadence.calls_per_step or 0.0, f.run.program.world_size
    if per_step > 1 and _near(f.horizon, steps):
        why = f"sized in optimizer steps ({steps:,}) but"
        times = f"{per_step:g} times per step"
        lines = sorted({place(e.at) for e in calls_of(f.run, f.scheduler) if e.at is not None})
        if len(lines) > 1:
            repair = "Keep one of the calls."
            if f.scheduler.interval is not None:
                repair = "The Trainer steps it already: leave out the call in the program."
            return f"{why} called {times}, at {' and '.join(lines[:3])}", repair
        if f.micro > 1 and abs(per_step - f.micro) < 0.2:
            return f"{why} called at every micro-batch ({times})", _only_at_steps(f)
        if ranks > 1 and abs(per_step - ranks) < 0.2:
            return f"{why} called once per process ({times})", f"Size it with num_processes: {steps * ranks:,} calls."
        return f"{why} called {times}", "Keep one of the calls: the trainer steps it too, or the loop more than once."
    if f.cadence.kind == "step" and f.epochs and (f.steps_per_epoch or 0) > 1 and _near(f.horizon, f.epochs):
        repair = f"Call it once per epoch, or size it in optimizer steps: {steps:,}."
        if uses(f.run, "lightning"):
            repair = f'Return "interval": "epoch" from configure_optimizers, or size it in optimizer steps: {steps:,}.'
        return f"sized in epochs ({f.horizon:,}) but {f.pace} ({steps:,} steps)", repair
    return None


def _dead(f: ScheduleOnRun, steps: int) -> Finding | None:
    """Most of the run at a rate that trains nothing, whatever the reason."""
    last = f.alive_until(_DEAD)
    stopping = any("EarlyStopping" in c for fw in f.run.frameworks for c in fw.callbacks)
    if last is None or last >= 0.9 * steps or stopping:
        return None
    calls = f.cadence.calls_before(steps + 1)
    message = (
        f"{name_scheduler(f.scheduler)}, {f.cadence.text}, is below a 10,000th of its peak ({number(f.peak)}) from "
        f"step {last + 1:,} of {steps:,} on: the last {percent(steps - last, steps)} of the run trains at next to "
        f"nothing ({number(f.projected.end_rate)} at the end)."
    )
    fix = f"Call it once per epoch if it is sized in epochs; else size it for {calls:,} calls."
    at_most = None if last < 0.1 * steps else Severity.WARNING
    return _finding(f, message, fix, "dead", calls, f.projected.end_rate, at_most)


# ----------------------------------------------------------------------------------- not called while it was watched


def _not_called(f: ScheduleOnRun) -> Finding | str | None:
    """No call between the watched steps: once per epoch, or never. A fault only when both are wrong."""
    if f.horizon and f.steps is not None and _near(f.horizon, f.steps) and f.steps > f.watched:
        return _not_called_though_sized_in_steps(f, f.steps)
    if f.epochs is not None and f.horizon and _near(f.horizon, f.epochs) and not f.no_call_in_source:
        return None
    if f.no_call_in_source:
        return _never(f, f"not called in {plural(f.watched, 'step')}, and no line of the program calls its step()")
    batches = f.batches
    whole = bool(batches) and f.horizon >= 2 * (batches or 1) and f.horizon % (batches or 1) == 0
    if f.steps is None and batches and batches > f.watched and whole and f.counts_steps:
        epochs = f.horizon // batches
        message = (
            f"{name_scheduler(f.scheduler)} has {f.horizon:,} calls, just {epochs} epochs of "
            f"{batches} batches, but was "
            f"not called in {plural(f.watched, 'step')}: sized in steps and called once per epoch, {epochs} epochs go "
            f"through {percent(epochs, f.horizon)} of its course (rate {number(f.course.rate(epochs))}; meant was "
            f"{number(f.course.end)})."
        )
        return _finding(f, message, _per_step(f), "too-slow", epochs, f.course.rate(epochs), Severity.WARNING)
    return f"{f.scheduler.class_name} was not called in {plural(f.watched, 'step')}; right if it is meant per epoch"


def _not_called_though_sized_in_steps(f: ScheduleOnRun, steps: int) -> Finding | None:
    # Without the number of epochs: called once every so many steps at most, since none came in those that were watched.
    calls = math.ceil(f.epochs if f.epochs is not None else steps / f.watched)
    end, meant = (f.course.rate(calls), f.course.end) if f.part is None else (f.projected.end_rate, f.meant)
    if calls >= (1 - _SAME) * f.horizon or end is None or meant is None or not _differs(f, end, meant):
        return None
    if f.missed_the_epochs_end and f.part is None:
        message = (
            f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, the run has {steps:,}) but was "
            f"not called in {plural(f.watched, 'step')}, nor at the end of the epoch that was watched: the rate stays "
            f"at {number(f.course.rate(0))}; meant was {number(meant)} at step {steps:,}."
        )
        return _finding(f, message, _per_step(f), "never", 0, f.course.rate(0), _at_most(f, steps))
    never = f" ({number(f.course.rate(0))} if it is never called)" if f.part is None else ""
    how = "Called once per epoch it makes" if f.epochs is not None else "At that pace it makes at most"
    message = (
        f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, the run has {steps:,}) but was not "
        f"called in {plural(f.watched, 'step')}. {how} {plural(calls, 'call')}, {percent(calls, f.horizon)} of its "
        f"course: the run ends at rate {number(end)}{never}; meant was {number(meant)}."
    )
    return _finding(f, message, _per_step(f), "too-slow", calls, end, _at_most(f, steps))


def _never(f: ScheduleOnRun, text: str) -> Finding | None:
    if f.course.flat:
        return None
    rises = (f.course.rate(0) or 0.0) < 0.5 * f.course.peak
    end = f"; the schedule would go to {number(f.course.end)}" if f.horizon else ""
    message = f"{name_scheduler(f.scheduler)} was {text}. The rate stays at {number(f.course.rate(0))}{end}."
    fix = "Call scheduler.step() after optimizer.step(), or at the end of each epoch if it is sized in epochs."
    # A decay may be meant to begin in a later epoch; a warm-up is not.
    at_most = None if rises or f.no_call_in_source else Severity.WARNING
    return _finding(f, message, fix, "never", 0, f.course.rate(0), at_most)


def _without_length(f: ScheduleOnRun) -> Finding | str | None:
    """Nobody says how long the run is: only a schedule sized by the loader's own length can be judged."""
    per_step, per_epoch, batches = f.cadence.calls_per_step or 0.0, f.steps_per_epoch, f.batches
    if per_step > 1.5 and f.horizon and per_epoch and batches and f.course.decays and f.horizon >= 2 * per_epoch:
        whole = f.horizon % per_epoch == 0 or f.horizon % max(batches // f.micro, 1) == 0
        at_micro_batches = f.micro > 1 and abs(per_step - f.micro) < 0.2
        if whole and not (at_micro_batches and f.horizon % batches == 0):
            over = math.ceil(f.horizon / per_step)
            when = "at every micro-batch" if at_micro_batches else f"{per_step:g} times per optimizer step"
            message = (
                f"{name_scheduler(f.scheduler)} is sized in optimizer steps ({f.horizon:,}, "
                f"{f.horizon / per_epoch:.3g} epochs of {per_epoch:,}) but called {when}: it is over, at rate "
                f"{number(f.meant)}, after {over:,} steps, {over / per_epoch:.2g} epochs, {per_step:g} times too early."
            )
            # Per micro-batch the unit is plain; two calls per step may be what somebody counted on.
            at_most = None if at_micro_batches else Severity.WARNING
            return _finding(f, message, _only_at_steps(f), "too-fast", None, None, at_most)
    return "nobody says how many optimizer steps the run will make, so the schedule cannot be laid over it"


# -------------------------------------------------------------------------------------------------------- words


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
    kind: str,
    calls: int | None,
    end: float | None,
    severity: Severity | None = None,
) -> Finding:
    seen = next((e.at for e in calls_of(f.run, f.scheduler) if e.at is not None), None)
    return Finding(
        message,
        at=seen or f.scheduler.at,
        evidence={
            "kind": kind,
            "scheduler": f.scheduler.class_name,
            "horizon_calls": f.horizon or None,
            "calls_by_the_end": calls,
            "calls_per_step": f.cadence.calls_per_step,
            "cadence_seen": f.cadence.observed,
            "planned_steps": f.steps,
            "planned_by": f.steps_source,
            "end_rate": end,
            "meant_end_rate": f.meant,
            "peak_rate": f.peak,
            "over_at_step": f.done_at,
        },
        fix=fix,
        about=f"{f.scheduler.class_name}-{kind}",
        severity=severity,
    )
