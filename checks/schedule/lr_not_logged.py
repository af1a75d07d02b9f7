"""TL404: the learning rate is in no log."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import name_scheduler, number, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.schema import ConfigKey, Framework, Logged, Scheduler, SourceLine

_RATE = re.compile(r"(^|[^a-z])lr([^a-z]|$)|learning[_\- ]?rate", re.IGNORECASE)
#: Callbacks that log the rate at their own interval, which may be longer than the watch.
_MONITORS = ("LearningRateMonitor", "LRMonitor", "LearningRateLogger", "DeviceStatsAndLRMonitor")


@check("TL404", Recording, severity="warning", catalog="O23")
def lr_not_logged(run: Recording) -> Iterator[Finding]:
    """The learning rate is in no log.

    ## What goes wrong
    The rate is the setting that most often differs from what was asked for: a scheduler that nobody steps, a warm-up
    in the wrong unit, a resume that restores last week's value. With the rate in the log the curve shows it on the
    first day; without it nothing does, since a loss curve looks plausible at many rates.

    ## How it is detected
    Every value that reaches a logger or tracker in the watched steps is compared with the rates of the optimizer's
    groups: by its value, and by its name. When none follows the rate, it depends on what else is known: the config
    asks for it (`log_lr: true`), or a rate that changes is missing from a tracker that gets several other values: a
    warning. A constant rate missing from such a tracker is worth knowing, no more.

    ## What to do
    Plain code: log `scheduler.get_last_lr()[0]` or `optimizer.param_groups[0]["lr"]` beside the loss; never the
    config's number, which is what the rate was meant to be. Lightning: `Trainer(callbacks=[LearningRateMonitor()])`.
    The transformers `Trainer` logs it by itself.

    ## When it may be wrong
    A program that hands nothing, or the loss alone, to a tracker gives no finding. Values that are logged more
    rarely than the watch is long are not seen: Lightning's monitor is known by its callback, and when the program's
    source reads the rate anywhere (`get_last_lr()`, `group["lr"]`), it is taken to log it somewhere.

    ## References
    lightning.pytorch.callbacks.LearningRateMonitor; torch.optim.lr_scheduler.LRScheduler.get_last_lr.
    """
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    asked = _asked(run)
    logged = [e for e in run.events if isinstance(e, Logged)]
    if _logs_by_itself(run) or any(_RATE.search(e.name) for e in logged) or _followed(timeline, logged):
        return
    trackers = [f for f in run.frameworks if f.loggers]
    lightning = next((f for f in run.frameworks if f.name == "lightning"), None)
    if lightning is not None and not lightning.loggers and not any(not e.by.startswith("lightning") for e in logged):
        if asked is None:
            raise NotApplicable("no logger is attached to the Trainer")
    if not logged and asked is None:
        if trackers:
            raise NotObserved("nothing was logged in the watched steps; raise --steps")
        raise NotApplicable("the program hands no values to a logger that is known")
    reads = run.source.rate_reads if run.source is not None else None
    if asked is not None:
        if not logged:
            raise NotObserved(f"{asked.path} asks for the rate in the log, but nothing was logged in the watched steps")
        if not reads:
            yield _finding(run, timeline, logged, lightning, key=asked, severity=Severity.WARNING)
        return
    names = _names(logged)
    changing = _changing(run, timeline)
    schedule = _schedule_asked(run)
    if reads or len(names) < 2:
        return
    if changing is not None and _regular(timeline, logged):
        # Without the source, a rate that changes only between epochs may be logged there.
        within = len({r for rates in timeline.steps for r in timeline.rates(rates)}) > 1
        sure = within or lightning is not None or reads is not None
        yield _finding(
            run, timeline, logged, lightning, scheduler=changing, severity=Severity.WARNING if sure else Severity.INFO
        )
    elif _regular(timeline, logged):
        yield _finding(run, timeline, logged, lightning, schedule=schedule, severity=Severity.INFO)


def _logs_by_itself(run: Recording) -> bool:
    if uses(run, "transformers"):
        return True  # Trainer.log adds learning_rate at every logging step
    return any(name in callback for f in run.frameworks for callback in f.callbacks for name in _MONITORS)


def _followed(timeline: Timeline, logged: Sequence[Logged]) -> bool:
    """Whether a logged value was a rate in force at some time of the watch; for a changing rate, at two of them."""
    rates = {r for steps in timeline.steps.values() for s in steps for r in s.rates if r}
    rates |= {r for e in timeline.recording.events for r in getattr(e, "rates_after", ()) if r}
    hits: dict[str, set[float]] = {}
    for e in logged:
        for r in rates:
            if e.value is not None and math.isclose(e.value, r, rel_tol=1e-6):
                hits.setdefault(e.name, set()).add(r)
    counts = {e.name: sum(1 for o in logged if o.name == e.name) for e in logged}
    # Logged once, one agreement is all there can be.
    return any(len(h) >= 2 or counts[n] == 1 or len(rates) == 1 for n, h in hits.items())


def _asked(run: Recording) -> ConfigKey | None:
    """The key that asks for the rate in the log."""
    return _key(run, ("log_lr",))


def _schedule_asked(run: Recording) -> ConfigKey | None:
    """The key that asks for a rate that changes."""
    return _key(run, ("schedule", "warmup_steps", "warmup_ratio", "warmup_epochs"))


def _key(run: Recording, meanings: tuple[str, ...]) -> ConfigKey | None:
    for key in run.config.keys if run.config is not None else ():
        if key.meaning in meanings and key.value not in (None, False, 0, "", "none", "null", "constant"):
            return key
    return None


def _names(logged: Sequence[Logged]) -> list[str]:
    """What was logged, without counters and with Lightning's ``loss_step`` and ``loss_epoch`` as one."""
    names = {re.sub(r"_(step|epoch)$", "", e.name) for e in logged}
    return sorted(n for n in names if n.lower() not in ("epoch", "step", "global_step", "iter", "iteration"))


def _changing(run: Recording, timeline: Timeline) -> Scheduler | str | None:
    """What changes the rate: a scheduler whose curve is not flat, or the program by hand; ``None`` "
    "when nothing does."""
    for optimizer in timeline.steps:
        for s in run.schedulers:
            if s.optimizer == optimizer and (s.metric or len({p.rates for p in s.curve}) > 1):
                return s
        if len(set(timeline.rates(optimizer))) > 1:
            return "by hand"
    return None


def _regular(timeline: Timeline, logged: Sequence[Logged]) -> bool:
    """Whether one tracker got values at the pace of the steps, so that a missing one is missing on "
    "purpose or by oversight."""
    steps = max(len(s) for s in timeline.steps.values())
    by_tracker: dict[str, list[Logged]] = {}
    for e in logged:
        by_tracker.setdefault(e.by, []).append(e)
    return any(len(_names(events)) >= 2 and len(events) >= min(steps, 2) for events in by_tracker.values())


def _finding(
    run: Recording,
    timeline: Timeline,
    logged: Sequence[Logged],
    lightning: Framework | None,
    *,
    severity: Severity,
    key: ConfigKey | None = None,
    scheduler: Scheduler | str | None = None,
    schedule: ConfigKey | None = None,
) -> Finding:
    names = _names(logged)
    rates = [r[0] for o in timeline.steps for r in timeline.rates(o) if r]
    through = sorted({e.by for e in logged if e.by})
    course = f"{number(rates[0])} to {number(rates[-1])}" if len(set(rates)) > 1 else f"constant at {number(rates[0])}"
    if key is not None:
        why = f"{key.path}: {key.value} asks for the learning rate in the log; no logged value follows it."
    elif isinstance(scheduler, Scheduler):
        why = f"The learning rate is set by {name_scheduler(scheduler)} and is in no log."
    elif scheduler is not None:
        why = "The learning rate is set by hand and is in no log."
    elif schedule is not None:
        why = f"The config asks for a schedule ({schedule.path}), and the learning rate is in no log."
    else:
        why = "The learning rate is in no log."
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    message = (
        f"{why} In {plural(len(rates), 'step')} it was {course}; "
        f"logged{' through ' + ', '.join(through[:2]) if through else ''} "
        f"were {plural(len(names), 'value')} ({shown}), none equal to it."
    )
    if lightning is not None:
        fix = "Trainer(callbacks=[LearningRateMonitor()])."
    elif isinstance(scheduler, Scheduler) and not scheduler.metric:
        fix = "Log scheduler.get_last_lr()[0] beside the loss."
    else:
        fix = 'Log optimizer.param_groups[0]["lr"] beside the loss.'
    wanted = key or schedule
    at: Key | SourceLine | None = Key(wanted.path) if wanted is not None else logged[-1].at
    return Finding(
        message,
        at=at,
        evidence={"rates": rates[:16], "logged": names[:50], "through": through},
        fix=fix,
        severity=severity,
        about="asked" if key is not None else "changing" if scheduler is not None else "constant",
    )
