"""TL405: a logged learning rate is none that a param group had."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import number, place, plural, uses
from trainlint.recording.rate_log import RateLog, Series, near
from trainlint.recording.schema import ConfigKey, Logged

#: A float32 of a number is that number.
_SAME = 1e-6
#: Logged values shown in a message.
_SHOWN = 4
#: Keys of a param group that an optimizer multiplies its rate with (Prodigy, D-Adaptation).
_OWN_FACTOR = ("d", "d0", "dlr", "effective_lr")


@check("TL405", Recording, severity="warning", catalog="O23")
def logged_lr_is_not_the_lr(run: Recording) -> Iterator[Finding]:
    """A logged learning rate is none that a param group had.

    ## What goes wrong
    The log shows a learning rate that the optimizer does not use: the config's number while a warm-up, a scaling rule
    or a resumed state has set another, or what `scheduler.get_lr()` returns, which for a scheduler that works from
    the last rate applies the last change once more. Whoever reads the curve to find out why training is slow or
    diverges is told that the rate is what was asked for. It is the one number that cannot show the fault.

    ## How it is detected
    Values that reach a logger or tracker under a name that says learning rate (`lr`, `learning_rate`,
    `lr-AdamW/pg1`) are held against the rates of all param groups around that moment: of the last step and the next,
    a step to each side, before and after the scheduler's call. A warning needs at least two steps at which the value
    is none of these and either a number that is known (the config's, the base rate that schedulers keep in
    `initial_lr`, the result of `get_lr()`), or one value for all steps while the rates of all groups change. A value
    that differs and that nothing explains is given as information.

    ## What to do
    Log what the optimizer has: `optimizer.param_groups[0]["lr"]` or `scheduler.get_last_lr()[0]`, never the config's
    number and never `scheduler.get_lr()`. Lightning: `LearningRateMonitor()`, or
    `self.optimizers().param_groups[0]["lr"]`. The transformers `Trainer` logs it by itself.

    ## When it may be wrong
    Not reported: a rate that is late or early by one step; of any group or any optimizer; a mean of groups or over
    the steps so far; its logarithm; a fixed multiple of it (times world size or accumulation); values logged once;
    optimizers that scale the rate themselves (Prodigy, D-Adaptation, schedule-free, Adafactor without a rate). A
    value within 0.1% of the rate counts as the rate, so that the base rate logged beside a slow decay without warm-up
    cannot be told from it in few steps: raise `--steps`. Names that say more than learning rate (`min_lr`,
    `initial_lr`, `lr_scale`) are left alone.

    ## References
    torch.optim.lr_scheduler.LRScheduler.get_last_lr; lightning.pytorch.callbacks.LearningRateMonitor.
    """
    log = RateLog(run)
    if not log.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    series = log.series()
    if not series:
        raise NotApplicable("no value is logged under the name of a learning rate")
    if any(not math.isfinite(r) for s in log.steps for r in s.rates) or any(s.scheduled_rates for s in log.steps):
        raise NotApplicable("the optimizer makes the rate that it uses itself, so that no group's rate is the rate")
    if any(k in g.hyperparameters for o in run.optimizers for g in o.groups for k in _OWN_FACTOR):
        raise NotApplicable("the optimizer multiplies its groups' rates with a factor of its own")
    judged = [s for s in series if len({log.place(e.seq) for e in s.events}) > 1]
    if not judged:
        raise NotObserved("a learning rate was logged at one watched step only; raise --steps")
    reported: list[Series] = []
    for one in judged:
        # The same value passes through a framework's logger into a tracker: once is enough.
        if any(one.name == r.name or near(one.values[0], r.values[0], _SAME) for r in reported):
            continue
        found = _judge(run, log, one)
        if found is not None:
            reported.append(one)
            yield found


@dataclass(frozen=True)
class _Cause:
    kind: str
    text: str
    key: ConfigKey | None = None


def _judge(run: Recording, log: RateLog, series: Series) -> Finding | None:
    wrong = [e for e in series.events if not _is_rate(log, e)]
    places = {log.place(e.seq) for e in wrong}
    if series.constant:
        # Where the rate moves on by one step at a time, a value that stands still is right once and late once.
        stands = {log.place(e.seq) for e in series.events if not _is_rate(log, e, reach=0)}
        if not places or len(stands) < 2:
            return None
        return _constant(run, log, series, wrong)
    if len(places) < 2 or _averaged(log, series) or _multiple(log, series):
        return None
    if sum(1 for e in wrong if _applied_twice(log, e)) >= 2:
        cause = _Cause(
            "get_lr",
            "that is the scheduler's last change applied once more, as scheduler.get_lr() returns it outside of step()",
        )
        return _finding(run, log, series, wrong, cause)
    return _finding(run, log, series, wrong, None, severity=Severity.INFO)


def _is_rate(log: RateLog, event: Logged, reach: int = 1) -> bool:
    """Whether the value is a rate of that time: itself, between the groups', or its logarithm."""
    value = event.value
    assert value is not None
    rates = log.around(event.seq, reach)
    if not rates or any(near(value, r) for r in rates) or min(rates) < value < max(rates):
        return True
    # A negative number is no rate, whatever it is.
    return value < 0 or any(r > 0 and (near(value, f(r)) or near(-value, f(r))) for r in rates for f in _LOGARITHMS)


_LOGARITHMS = (math.log, math.log10, math.log2)


def _constant(run: Recording, log: RateLog, series: Series, wrong: Sequence[Logged]) -> Finding | None:
    value = series.values[0]
    keys = [k for k in run.config.keys if k.meaning == "learning_rate"] if run.config is not None else []
    key = next((k for k in keys if isinstance(k.value, (int, float)) and near(float(k.value), value, _SAME)), None)
    used = {rates for e in series.events for rates in (log.used(e.seq),)}
    if len(used) < 2:
        # Nothing moved: only the config's own number beside another one in effect says what was logged.
        rates = {r for group in used for r in group}
        if key is None or len(rates) != 1:
            return None
        return _finding(run, log, series, wrong, _Cause("config", "that is the config's", key))
    if key is not None:
        return _finding(run, log, series, wrong, _Cause("config", "that is the config's", key))
    bases = {r for s in run.schedulers for r in s.base_rates}
    bases |= {
        float(v)
        for o in run.optimizers
        for g in o.groups
        for n in ("initial_lr", "max_lr")
        for v in (g.hyperparameters.get(n),)
        if isinstance(v, (int, float))
    }
    if any(near(value, b, _SAME) for b in bases):
        cause = _Cause("base", "that is the base rate that the optimizer was built with")
        return _finding(run, log, series, wrong, cause)
    if any(near(value, r) for r in log.so_far(series.events[-1].seq)):
        return None  # read once and logged at every step, until it is read again
    return _finding(run, log, series, wrong, _Cause("constant", "a number that does not follow the rate"))


def _averaged(log: RateLog, series: Series) -> bool:
    """Every value lies among the rates used so far: a mean over steps, as meters keep it."""
    for e in series.events:
        rates = log.so_far(e.seq) | log.around(e.seq)
        assert e.value is not None
        if not rates or not min(rates) * (1 - 1e-3) <= e.value <= max(rates) * (1 + 1e-3):
            return False
    return True


def _multiple(log: RateLog, series: Series) -> bool:
    """The values are the rate of some group times one factor."""
    for shift in (-1, 0, 1):
        # What lies before the first or after the last watched step has no rate to be held against.
        part = series.events[1:] if shift <= 0 and len(series.events) > 2 else series.events
        part = part[:-1] if shift > 0 else part
        values = [e.value for e in part if e.value is not None]
        for rates in log.courses([e.seq for e in part], shift):
            if any((r == 0) != (v == 0) for r, v in zip(rates, values, strict=True)):
                continue
            factors = [v / r for r, v in zip(rates, values, strict=True) if r]
            if len(factors) > 1 and all(near(f, factors[0]) for f in factors):
                return True
    return False


def _applied_twice(log: RateLog, event: Logged) -> bool:
    """What ``get_lr()`` of a scheduler that works from the last rate returns: ``rate * (rate / rate before)``."""
    assert event.value is not None
    for before, after in log.scheduled(event.seq):
        if before > 0 and not near(before, after) and near(event.value, after * after / before):
            return True
    return False


# ------------------------------------------------------------------------------------------------------- words


def _shown(values: Sequence[float]) -> str:
    texts = [number(v) for v in values]
    if len(set(texts)) == 1:
        return texts[0]
    more = ", ..." if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _finding(
    run: Recording,
    log: RateLog,
    series: Series,
    wrong: Sequence[Logged],
    cause: _Cause | None,
    severity: Severity | None = None,
) -> Finding:
    last = wrong[-1]
    where = place(last.at)
    group = _widest(log)
    used = [rates[group] for e in series.events if group < len(rates := log.used(e.seq))]
    steps = len({log.place(e.seq) for e in series.events})
    what = "is" if not where else f"({where}) is"
    message = (
        f"`{series.name}` {what} logged as {_shown(series.values)} in {plural(steps, 'watched step')}, but the "
        f"optimizer's rate was {_shown(used)}: no param group had the logged one."
    )
    if cause is not None:
        which = f" {cause.key.path}: {cause.key.value}" if cause.key is not None else ""
        message = message.removesuffix(".") + f"; {cause.text}{which}."
    if uses(run, "lightning"):
        fix = (
            "Trainer(callbacks=[LearningRateMonitor()]), or log "
            'self.trainer.optimizers[0].param_groups[0]["lr"] instead.'
        )
    elif uses(run, "transformers"):
        fix = "Leave it to the Trainer, which logs learning_rate from the scheduler."
    elif run.schedulers:
        fix = "Log scheduler.get_last_lr()[0] instead."
    else:
        fix = 'Log optimizer.param_groups[0]["lr"] instead.'
    return Finding(
        message,
        at=last.at or (Key(cause.key.path) if cause is not None and cause.key is not None else None),
        evidence={
            "name": series.name,
            "through": series.by,
            "logged": list(series.values[:16]),
            "rates": used[:16],
            "cause": cause.kind if cause is not None else None,
            "key": cause.key.path if cause is not None and cause.key is not None else None,
        },
        fix=fix,
        severity=severity,
        about=series.name,
    )


def _widest(log: RateLog) -> int:
    """The group with the highest rate: the one that a person means by *the* rate."""
    rates = max((s.rates for s in log.steps), key=lambda r: max(r, default=0.0), default=())
    return rates.index(max(rates)) if rates else 0
