"""The card's part on the experiments of ``--deep``: what came of each in a line, and its curve."""

from __future__ import annotations

import math
from typing import Any

from trainlint.recording.describe import number, plural
from trainlint.recording.lr_band import Band, NoBand, band
from trainlint.recording.overfitting import best_curve, losses_of
from trainlint.recording.schema import Experiment, ExperimentCurve, Recording
from trainlint.report.model import CardLine, Curve, Plot

_ENDED = {
    "reached": "came near its floor",
    "constant": "did not change",
    "plateau": "stopped falling",
    "diverged": "blew up",
    "steps": "all steps made",
}
#: A loss that blows up is drawn up to so many times where it began.
_TALL = 1.5
#: Decades named at the axis of a sweep, every so many.
_TICK = 2


def experiments(recording: Recording) -> tuple[list[CardLine], Any, tuple[Plot, ...]]:
    """Lines, data and plots; all empty when no experiment was asked for."""
    lines: list[CardLine] = []
    data: list[dict[str, Any]] = []
    plots: list[Plot] = []
    for made in recording.experiments:
        text, figures, plot = _overfit(made) if made.name == "overfit" else _range(made)
        if made.outcome != "done":
            text, plot = f"{'not made' if made.outcome == 'left-out' else 'failed'}: {made.reason}", None
        took = f" ({made.duration_s:.0f} s)" if made.duration_s is not None else ""
        lines.append(CardLine(made.name, f"{text}{took}"))
        data.append(_data(made) | figures)
        plots += [plot] if plot is not None else []
    return lines, data or None, tuple(plots)


def _data(made: Experiment) -> dict[str, Any]:
    return {
        "name": made.name,
        "outcome": made.outcome,
        "reason": made.reason,
        "duration_s": made.duration_s,
        "steps_wanted": made.steps_wanted,
        "held_still": list(made.held_still),
        "repeated_by": made.repeated_by,
        "different_batches": made.different_batches,
        "configured_rate": made.peak_rate,
        "loss": {
            "function": made.loss.function,
            "floor": made.loss.floor,
            "alone": made.loss.alone,
            "positions": made.loss.positions,
        }
        if made.loss is not None
        else None,
        "curves": [
            {
                "ended": curve.ended,
                "reason": curve.reason,
                "rate": curve.rate,
                "steps": [p.step for p in curve.points],
                "losses": [p.loss for p in curve.points],
                "rates": [p.rate for p in curve.points],
            }
            for curve in made.curves
        ],
    }


# ------------------------------------------------------------------------------------------------ overfit one batch


def _overfit(made: Experiment) -> tuple[str, dict[str, Any], Plot | None]:
    best = best_curve(made) or next((c for c in made.curves if losses_of(c)), None)
    floor = made.loss.floor if made.loss is not None and made.loss.alone else None
    figures: dict[str, Any] = {"workable_rate": best.rate if best is not None and best.ended == "reached" else None}
    if best is None:
        return "no loss was seen", figures, None
    losses = losses_of(best)
    how = _ENDED.get(best.ended) or best.reason or best.ended
    tried = f"; {plural(len(made.curves), 'rate')} tried" if len(made.curves) > 1 else ""
    low = f", floor {number(floor)}" if floor is not None else ", floor not known"
    text = (
        f"loss of one repeated batch {number(losses[0])} → {number(losses[-1])} in {plural(len(losses), 'step')} at "
        f"rate {number(best.rate)}: {how}{low}{tried}"
    )
    curves = tuple(
        Curve(f"rate {number(curve.rate)}", points, "projected", _ENDED.get(curve.ended) or curve.ended)
        for curve in made.curves
        if len(points := _drawn(curve, losses[0])) > 1
    )
    if not curves:
        return text, figures, None
    last = max(step for curve in curves for step, _ in curve.points)
    ticks = tuple((round(last * i / 4), f"{round(last * i / 4):,}") for i in range(5))
    notes = (f"held still: {', '.join(made.held_still)}",) if made.held_still else ()
    return text, figures, Plot("loss of one repeated batch, by optimizer step", curves, ticks, notes)


def _drawn(curve: ExperimentCurve, first: float) -> tuple[tuple[int, float], ...]:
    """The finite points, a loss that blew up cut off where the rest would be pressed flat."""
    top = first + (_TALL - 1) * abs(first) if math.isfinite(first) else math.inf
    return tuple((p.step, min(p.loss, top)) for p in curve.points if p.loss is not None and math.isfinite(p.loss))


# ------------------------------------------------------------------------------------------------ range test


def _range(made: Experiment) -> tuple[str, dict[str, Any], Plot | None]:
    curve = made.curves[-1] if made.curves else None
    seen: Band | None = None
    why = "no loss was seen"
    try:
        seen = band(made)
    except NoBand as reason:
        why = str(reason)
    rates = {p.step: p.rate for p in curve.points if p.rate is not None} if curve is not None else {}
    configured = made.peak_rate
    known = f"configured {number(configured)}" if configured is not None else "configured rate not known"
    figures = {
        "band": [seen.begins, seen.ends] if seen is not None else None,
        "steepest": seen.steepest if seen is not None else None,
        "diverges": seen.diverges if seen is not None else None,
    }
    if seen is not None:
        blown = f", blows up from {number(seen.diverges)}" if seen.diverges is not None else ""
        text = (
            f"loss falls from {number(seen.begins)} to {number(seen.ends)}, fastest at {number(seen.steepest)}{blown}; "
            f"{known}"
        )
    else:
        text = f"no band: {why}; {known}"
    points = _drawn(curve, losses_of(curve)[0]) if curve is not None and losses_of(curve) else ()
    if len(points) < 2:
        return text, figures, None
    drawn = [Curve("loss of one step at each rate", points, "projected")]
    for name, rate in (
        (f"configured rate {number(configured)}", configured),
        (f"steepest {number(seen.steepest)}" if seen is not None else "", seen.steepest if seen is not None else None),
    ):
        step = _nearest(rates, rate)
        if step is not None and (loss := dict(points).get(step)) is not None:
            drawn.append(Curve(name, ((step, loss),), "observed"))
    return text, figures, Plot("learning-rate range test, loss by rate", tuple(drawn), _decades(rates))


def _nearest(rates: dict[int, float], rate: float | None) -> int | None:
    if rate is None or rate <= 0 or not rates or not min(rates.values()) <= rate <= max(rates.values()):
        return None
    return min(rates, key=lambda step: abs(math.log(rates[step] / rate)))


def _decades(rates: dict[int, float]) -> tuple[tuple[int, str], ...]:
    """The steps at which the rate passes a power of ten, every second one named."""
    if not rates:
        return ()
    low, high = math.ceil(math.log10(min(rates.values())) - 0.02), math.floor(math.log10(max(rates.values())) + 0.02)
    found = [(power, _nearest(rates, 10.0**power)) for power in range(low, high + 1)]
    return tuple(
        (step, number(10.0**power)) for power, step in found if step is not None and (power - low) % _TICK == 0
    )
