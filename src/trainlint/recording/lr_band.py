"""What a learning-rate range test shows: where the loss begins to fall, where it falls fastest, where it blows up.

One step per rate says less than a run: a rate at which one step shows nothing may do all in a thousand steps. What can
be compared with a run is the sum of all rates up to a point, the distance that the weights were allowed to go.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from trainlint.recording.schema import Experiment

__all__ = ["Band", "NoBand", "band"]

#: Points at the lowest rates whose losses are those of the untrained model.
_QUIET = 15
#: Width of the moving average over the losses.
_WINDOW = 5
#: A fall must be at least this share of the loss, and this many times what the averaged loss swings by itself.
_LEAST_FALL = 0.05
_TIMES_NOISE = 4.0
#: Share of the whole fall at which the band begins.
_BEGINS = 0.1
#: The loss has blown up where it stays above so many times what it was.
_BLOWN_UP = 2.0
_STAYS = 3


class NoBand(Exception):
    """The sweep shows no band; the text says why."""


@dataclass(frozen=True)
class Band:
    """Rates of the group with the highest; the others keep their ratio."""

    #: The averaged loss has fallen by a tenth of its whole fall.
    begins: float
    #: Where it falls fastest over the logarithm of the rate.
    steepest: float
    #: Where it is lowest: the end of the band.
    ends: float
    #: From here on the loss is far above where it began, or no number; ``None``: not up to the highest rate.
    diverges: float | None
    #: The loss before anything moved, and the lowest that it came to (averaged).
    loss_before: float
    loss_lowest: float
    #: Sum of all rates up to ``begins``.
    travelled: float


def band(experiment: Experiment) -> Band:
    """The band of a sweep.

    Raises:
        NoBand: too few steps, or a loss that no rate moved beyond its own noise.
    """
    curve = experiment.curves[-1] if experiment.curves else None
    points = [(p.rate, p.loss) for p in curve.points if p.rate is not None and p.loss is not None] if curve else []
    finite = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    cut = f": {curve.reason}" if curve is not None and curve.ended not in ("swept", "diverged") and curve.reason else ""
    if len(finite) < _QUIET + _WINDOW:
        raise NoBand(f"only {len(finite)} steps of the sweep have a loss{cut}")
    rates = [rate for rate, _ in finite]
    losses = [loss for _, loss in finite]
    before = statistics.median(losses[:_QUIET])
    noise = statistics.stdev(losses[:_QUIET]) / math.sqrt(_WINDOW)
    smooth = _averaged(losses)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    fall = before - smooth[lowest]
    if fall < max(_LEAST_FALL * abs(before), _TIMES_NOISE * noise):
        if cut:
            raise NoBand(f"the sweep came no further than rate {rates[-1]:.1g}{cut}")
        raise NoBand(
            f"no rate from {rates[0]:.1g} to {rates[-1]:.1g} moved the loss beyond its own noise "
            f"({before:.4g} at first, {smooth[lowest]:.4g} at best)"
        )
    mark = before - max(_BEGINS * fall, 2 * noise)
    begins = lowest
    while begins > 0 and smooth[begins - 1] <= mark:
        begins -= 1
    slopes = {
        i: (smooth[i - 1] - smooth[i + 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(max(1, begins - _WINDOW), min(lowest + 1, len(rates) - 1))
    }
    steepest = max(slopes, key=slopes.__getitem__) if slopes else lowest
    return Band(
        begins=rates[begins],
        steepest=rates[max(begins, steepest)],
        ends=rates[lowest],
        diverges=_diverges(points, finite, lowest, before),
        loss_before=before,
        loss_lowest=smooth[lowest],
        travelled=sum(rates[: begins + 1]),
    )


def _averaged(losses: list[float]) -> list[float]:
    """Each with its neighbours on both sides, so that nothing is shifted to higher rates."""
    half = _WINDOW // 2
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def _diverges(
    points: list[tuple[float, float]], finite: list[tuple[float, float]], lowest: int, before: float
) -> float | None:
    limit = before + (_BLOWN_UP - 1) * abs(before)
    above = 0
    for i, (_, loss) in enumerate(finite):
        above = above + 1 if loss > limit and i > lowest else 0
        if above == _STAYS or (above and i == len(finite) - 1):
            return finite[i - above + 1][0]
    return next((rate for rate, loss in points if not math.isfinite(loss)), None)
