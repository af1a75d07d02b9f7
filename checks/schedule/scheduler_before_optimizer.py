"""TL401: the scheduler is stepped before the optimizer's first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import name_optimizer, name_scheduler, number, place, uses
from trainlint.recording.intervals import Timeline, same_line
from trainlint.recording.projection import active_schedulers
from trainlint.recording.schema import (
    Backward,
    Optimizer,
    OptimizerStep,
    ScalerEvent,
    Scheduler,
    SchedulerStep,
    StateLoaded,
)
from trainlint.recording.source_loops import early_schedulers
from trainlint.recording.source_order import NOT_RUN, traces_of


@check("TL401", Recording, severity="warning", catalog="O8")
def scheduler_before_optimizer(run: Recording) -> Iterator[Finding]:
    """The scheduler is stepped before the optimizer's first step.

    ## What goes wrong
    Building a scheduler sets the first rate of the schedule; each `scheduler.step()` moves on to the next. Called
    before the first `optimizer.step()`, as programs from before torch 1.1 do at the top of each epoch or iteration,
    it skips that first value: no step ever runs at it, and everything after comes one call early. With a per-epoch
    schedule that is a whole epoch.

    ## How it is detected
    The calls of every scheduler and the steps of its optimizer lie on one timeline. A call (not the one that the
    constructor makes) before the optimizer's first step is reported, with the rate that was due and the one that the
    first step used instead.

    Without a run, from the source: the call of one of torch's schedulers comes first in the loop that holds the
    steps of its optimizer, and no step comes before that loop.

    ## What to do
    Call `optimizer.step()` first, then `scheduler.step()`: once per iteration for schedules sized in steps, at the
    end of each epoch for schedules sized in epochs. In Lightning's manual optimization call
    `self.lr_schedulers().step()` after `opt.step()`.

    ## When it may be wrong
    Not reported: a first step that a GradScaler skipped, a schedule that is wound forward in a loop to where a
    resumed run begins, one whose state was loaded, ReduceLROnPlateau, a single call that takes the rate off 0 before
    training starts (a warm-up whose first value is 0), and the calls of a scheduler that runs per micro-batch under
    accumulation (that is a question of cadence). When the call changed no rate, the shift by one call is given as
    information.

    ## References
    torch.optim documentation, "How to adjust learning rate" (the note on torch 1.1.0).
    """
    if not run.schedulers:
        raise NotApplicable("the program uses no learning-rate scheduler")
    timeline = Timeline(run)
    looked = False
    for optimizer in run.optimizers:
        steps = timeline.steps.get(optimizer.id, [])
        if not steps:
            continue
        for scheduler in active_schedulers(run, optimizer.id):
            looked = True
            if scheduler.metric:
                continue
            finding = _judge(run, optimizer, scheduler, steps)
            if finding is not None:
                yield finding
    if not looked:
        raise NotObserved("no optimizer with a scheduler made a step in the watch; raise --timeout or --steps")


def _judge(
    run: Recording, optimizer: Optimizer, scheduler: Scheduler, steps: Sequence[OptimizerStep]
) -> Finding | None:
    first = steps[0].began or steps[0].seq
    calls = [e for e in run.events if isinstance(e, SchedulerStep) and e.scheduler == scheduler.id and not e.initial]
    early = [e for e in calls if e.seq < first]
    if not early:
        return None
    before = [e for e in run.events if e.seq < early[-1].seq]
    if any(isinstance(e, ScalerEvent) and e.call == "step" for e in before):
        return None  # a skipped step, or one whose optimizer was not seen
    if any(isinstance(e, StateLoaded) and e.what in ("optimizer", "scheduler") and not e.empty for e in before):
        return None
    if len(early) > 1:
        # Wound forward to the start of a resumed run, or called per micro-batch: neither is a matter of order.
        return None
    call = early[0]
    if call.rates_before and not any(call.rates_before) and any(call.rates_after):
        return None  # taken off a first value of 0 before training starts
    if _between_micro_batches(run, call, first):
        return None
    if len(steps) > 1:
        between = [e for e in calls if steps[0].seq < e.seq < steps[1].seq]
        if len(between) > 1:
            return None  # several calls per optimizer step
    return _finding(run, optimizer, scheduler, call, steps[0])


def _between_micro_batches(run: Recording, call: SchedulerStep, first: int) -> bool:
    """Whether the same line ran backward before and after the call, both for the first step: it accumulates."""
    backwards = [e for e in run.events if isinstance(e, Backward) and e.seq < first]
    later = [e for e in backwards if e.seq > call.seq]
    return any(same_line([a, b]) for a in backwards if a.seq < call.seq for b in later)


def _finding(
    run: Recording, optimizer: Optimizer, scheduler: Scheduler, call: SchedulerStep, step: OptimizerStep
) -> Finding:
    changed = [g for g, (a, b) in enumerate(zip(call.rates_before, call.rates_after, strict=False)) if a != b]
    group = changed[0] if changed else 0
    due = call.rates_before[group] if group < len(call.rates_before) else None
    used = step.rates[group] if group < len(step.rates) else None
    head = (
        f"{name_scheduler(scheduler)} is stepped ({place(call.at) or 'unknown line'}) before the first step of "
        f"{name_optimizer(optimizer)}."
    )
    if changed:
        text = (
            f" The first rate of the schedule, {number(due)}, is never used: the first step ran at "
            f"{number(used)}, and every "
            "later rate comes one call early."
        )
    else:
        text = f" The rate stayed at {number(due)}, so nothing is lost yet; every later change comes one call early."
    fix = "Call optimizer.step() first, then scheduler.step()."
    if uses(run, "lightning"):
        fix = "Call self.lr_schedulers().step() after opt.step()."
    return Finding(
        head + text,
        at=call.at,
        evidence={
            "scheduler": scheduler.class_name,
            "rate_due": due,
            "rate_used": used,
            "calls_before_first_step": 1,
            "first_step_at": place(step.at),
        },
        fix=fix,
        severity=None if changed else Severity.INFO,
        about=scheduler.class_name,
    )


# ---------------------------------------------------------------------------------------------- without a run


@check("TL401", SourceFacts, severity="warning", catalog="O8")
def scheduler_before_optimizer_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from the order of the two calls in a loop."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in early_schedulers(trace):
            scheduler = fault.scheduler.class_name if fault.scheduler is not None else "The scheduler"
            yield Finding(
                f"{scheduler}.step() ({place(fault.call.at)}) comes before {fault.optimizer.name}.step() "
                f"({place(fault.other.at)}) in the loop: the first rate of the schedule is never used. {NOT_RUN}",
                at=fault.call.at,
                evidence={"scheduler": scheduler, "first_step_at": place(fault.other.at)},
                fix="Call optimizer.step() first, then scheduler.step().",
                about=scheduler,
            )
