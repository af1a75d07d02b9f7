"""The card's lines on the learning rate over the run: schedule and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainlint.judge.card_curves import UNKNOWN_LENGTH, group_data
from trainlint.judge.configured import Configured, close
from trainlint.recording.describe import number, plural
from trainlint.recording.length import planned_length
from trainlint.recording.projection import OWN_RATE, Projected, active_schedulers, planned_steps
from trainlint.recording.schema import Recording, SourceLine
from trainlint.recording.timeline import steps_per_epoch
from trainlint.report.model import CardLine

Section = tuple[list[CardLine], Any]
At = Callable[[SourceLine | None], str]
Curves = dict[tuple[int, int], Projected]

_NO_SCHEDULE = frozenset(("constant", "none", "no", "off", "fixed", "null", "disabled", "false"))


def rate_words(seen: Projected) -> str:
    """``3e-5, constant``; ``0 to 3e-4 at the start``; ``3e-4 at the peak``."""
    rates = [rate for _, rate in seen.observed]
    if not rates:
        return number(seen.points[0][1]) if seen.points else ""
    if len({r for _, r in seen.points}) == 1:
        return f"{number(rates[0])}, constant"
    if seen.peak_rate is not None:
        first = number(rates[0])
        if number(seen.peak_rate) != first:
            return f"{number(seen.peak_rate)} at the peak, {first} at the first step"
        if seen.end_rate is not None:
            return f"{first} at the first step, {number(seen.end_rate)} at the last"
    if len(set(rates)) == 1:
        return f"{number(rates[0])} in the watched steps"
    return f"{number(rates[0])} to {number(rates[-1])} in the watched steps"


def schedule(recording: Recording, wanted: Configured, curves: Curves, at: At) -> Section:
    """What sets the rate, how often, and where that leads."""
    lines: list[CardLine] = []
    data = []
    configured = wanted.text("schedule")
    for optimizer in recording.optimizers:
        groups = [p for (o, _), p in sorted(curves.items()) if o == optimizer.id]
        if not groups:
            continue
        # The group with the highest rate is the one that a config speaks of.
        seen = max(groups, key=lambda p: p.peak_rate or 0.0)
        schedulers = active_schedulers(recording, optimizer.id)
        label = "schedule" if len(recording.optimizers) == 1 else f"schedule, {optimizer.class_name}"
        if not schedulers:
            by_hand = not seen.points
            text = "set by hand, no scheduler" if by_hand else "none: the rate is constant"
            if seen.reason == OWN_RATE:
                text = "none; the optimizer itself warms the rate up or adapts it"
            agrees = None if by_hand or not configured else configured.strip().lower() in _NO_SCHEDULE
            if agrees is False and recording.source is None:
                agrees = None  # Without the source, a rate set by hand later is not excluded.
            lines.append(CardLine(label, text, configured, agrees, wanted.place("schedule") if agrees is False else ""))
        for scheduler in schedulers:
            parts = f" of {', '.join(scheduler.children)}" if scheduler.children else ""
            where = f", {at(scheduler.at)}" if scheduler.at is not None else ""
            part = next((p for p in seen.parts if p.scheduler.id == scheduler.id), None)
            cadence = seen.cadence.text if scheduler.id == seen.scheduler else part.cadence.text if part else ""
            text = f"{scheduler.class_name}{parts}{where}{f'; {cadence}' if cadence else ''}"
            lines.append(CardLine(label, text, configured, _same_schedule(scheduler.class_name, wanted), seen.reason))
        if schedulers and seen.points:
            lines += _course(seen, groups, wanted)
        elif not schedulers and seen.points:
            lines += [
                CardLine("warm-up", "none", text, False if _positive(wanted, *meanings) else None)
                for meanings in (("warmup_steps", "warmup_ratio", "warmup_epochs"),)
                if (text := wanted.text(*meanings))
            ]
        data.append(_data(recording, optimizer.id, curves))
    return lines, data


def _course(seen: Projected, groups: Sequence[Projected], wanted: Configured) -> list[CardLine]:
    """Warm-up and the rate at the end, read off the curve of the group with the highest rate."""
    lines = []
    meanings = ("warmup_steps", "warmup_ratio", "warmup_epochs")
    asked = wanted.text(*meanings)
    if seen.warmup_steps is not None and (seen.warmup_steps or asked):
        text = plural(seen.warmup_steps, "optimizer step") if seen.warmup_steps else "none"
        lines.append(CardLine("warm-up", text, asked, _same_warmup(seen, wanted)))
    end = None
    if seen.end_rate is not None:
        where = (
            "the end of the schedule" if seen.horizon_source == "schedule" else f"step {seen.horizon_steps:,}, the last"
        )
        ends = sorted(p.end_rate for p in groups if p.end_rate is not None)
        low, high = number(ends[0]), number(ends[-1])
        end = f"{low} at {where}" if low == high else f"{low} to {high}, by group, at {where}"
    early = seen.reaches_end_at_step
    if early is not None and seen.horizon_steps is not None and early < 0.95 * seen.horizon_steps:
        end = f"{end or 'not known at the end'}; the schedule has run its course at step {early:,}"
    if end is not None:
        asked_min = wanted.text("min_lr", "min_lr_ratio")
        lines.append(CardLine("final rate", end, asked_min, _same_minimum(seen, wanted)))
    return lines


def _positive(wanted: Configured, *meanings: str) -> bool:
    return any((wanted.number(m) or 0) > 0 for m in meanings)


def _same_schedule(class_name: str, wanted: Configured) -> bool | None:
    key = wanted.key("schedule")
    if key is None:
        return None
    asked = str(key.value).rpartition(".")[2].lower()
    seen = class_name.lower()
    # A name can only confirm: transformers builds every schedule from LambdaLR.
    words = ("cosine", "linear", "step", "exponential", "polynomial", "onecycle")
    return True if asked == seen or (asked in words and asked in seen) else None


def _same_warmup(seen: Projected, wanted: Configured) -> bool | None:
    steps = wanted.number("warmup_steps")
    if steps is None:
        ratio = wanted.number("warmup_ratio")
        if ratio is None or seen.horizon_steps is None or seen.horizon_source in UNKNOWN_LENGTH:
            return None
        steps = ratio * seen.horizon_steps
    if seen.warmup_steps is None:
        return None
    # Schedules differ in whether the first step has rate 0 or the first fraction, and whether they count from 0 or 1.
    return abs(seen.warmup_steps - steps) <= max(2.0, 0.02 * steps)


def _same_minimum(seen: Projected, wanted: Configured) -> bool | None:
    asked = wanted.number("min_lr")
    ratio = wanted.number("min_lr_ratio")
    if asked is None and ratio is not None and seen.peak_rate is not None:
        asked = ratio * seen.peak_rate
    if asked is None or seen.end_rate is None or not seen.peak_rate:
        return None
    # The last step lies just before the end of the curve. Anything else may be meant: a decay that goes on later.
    return True if close(asked, seen.end_rate, 0.05) or abs(asked - seen.end_rate) <= 0.01 * seen.peak_rate else None


def _data(recording: Recording, optimizer: int, curves: Curves) -> dict[str, Any]:
    schedulers = active_schedulers(recording, optimizer)
    groups = [p for (o, _), p in sorted(curves.items()) if o == optimizer]
    first = groups[0]
    return {
        "schedulers": [
            {"class": s.class_name, "children": list(s.children), "interval": s.interval, "settings": dict(s.settings)}
            for s in schedulers
        ],
        "cadence": {
            "kind": first.cadence.kind,
            "calls_per_step": first.cadence.calls_per_step,
            "observed": first.cadence.observed,
            "text": first.cadence.text,
        },
        "horizon_steps": first.horizon_steps,
        "horizon_source": first.horizon_source,
        "reaches_end_at_step": first.reaches_end_at_step,
        "warmup_steps": first.warmup_steps,
        "peak_rates": [p.peak_rate for p in groups],
        "end_rates": [p.end_rate for p in groups],
        "first_rates": [p.observed[0][1] if p.observed else None for p in groups],
        "groups": group_data(recording, optimizer, curves),
        "reason": first.reason,
    }


def length(recording: Recording, wanted: Configured, curves: Curves) -> Section:
    """How long the run is meant to be, and who says so."""
    planned = planned_steps(recording)
    plan = recording.plan
    asked_steps, asked_epochs = wanted.number("max_steps"), wanted.number("epochs")
    lines = []
    if planned is not None:
        own = planned[1].startswith("config")
        agrees = None if own or asked_steps is None else close(asked_steps, planned[0])
        note = f"says {planned[1]}" if planned[1] else ""
        text = plural(planned[0], "optimizer step")
        lines.append(CardLine("length", text, wanted.text("max_steps"), agrees, note))
    if plan.epochs is not None:
        # With a number of steps, trainers let it rule and epochs follow.
        agrees = None if asked_epochs is None or asked_steps is not None else close(asked_epochs, plan.epochs, 0.01)
        per = f" of {plural(plan.batches_per_epoch, 'batch')}" if plan.batches_per_epoch else ""
        lines.append(CardLine("epochs", f"{number(plan.epochs)}{per}", wanted.text("epochs"), agrees))
    if not lines and (known := _length_by_config(recording)) is not None:
        planned = known
        lines.append(
            CardLine("length", plural(known[0], "optimizer step"), wanted.text("epochs", "max_steps"), None, known[1])
        )
    if not lines:
        epochs = {n for o in recording.optimizers if (n := steps_per_epoch(recording, o.id)) is not None}
        epoch = f"; an epoch is {plural(epochs.pop(), 'optimizer step')}" if len(epochs) == 1 else ""
        lines.append(CardLine("length", f"not told by the program{epoch}", wanted.text("max_steps", "epochs")))
    data = {
        "optimizer_steps": planned[0] if planned else None,
        "source": planned[1] if planned else None,
        "epochs": plan.epochs,
        "batches_per_epoch": plan.batches_per_epoch,
    }
    return lines, data


def _length_by_config(recording: Recording) -> tuple[int, str] | None:
    """The one length that the config's keys give to every optimizer that steps."""
    found = {planned_length(recording, o.id) for o in recording.optimizers if o.steps}
    known = found.pop() if len(found) == 1 else None
    return (known[0], f"by {known[1]}") if known is not None else None
