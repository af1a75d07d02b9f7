"""Updates of half-precision weights that round away: how many, at the watched and at the planned rate.

Pure functions over ``Recording.numerics.rounding``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainlint.recording.projection import projection
from trainlint.recording.schema import Optimizer, ParamGroup, Recording, RoundedUpdates

__all__ = ["Loss", "losses", "settled"]

#: Exponent of the first bin of ``RoundedUpdates.bins`` and ``weights``.
_FIRST = -24
#: Sampled elements below which nothing is said.
_FEW = 64
#: Share of the elements, and of the squared updates, that must be lost.
_SHARE = 0.5
_POWER = 0.5
_SOME_POWER = 0.2


@dataclass(frozen=True)
class Loss:
    """What rounding takes from the updates of one param group."""

    optimizer: Optimizer
    group: ParamGroup
    dtype: str
    steps: int
    #: Sampled elements with an update (by an unknown formula: with a gradient), summed over the steps.
    elements: int
    #: Share of them that did not change, and of the squared updates that were meant for these.
    share: float
    power: float | None
    rate: float
    #: The highest rate of the plan, and the same two shares at that; ``None``: not known.
    peak: float | None
    peak_share: float | None
    peak_power: float | None
    #: The rate at which half of the elements would move.
    moving_rate: float | None
    formula: str
    #: It keeps what the weights cannot hold: where, or how.
    kept: str = ""
    #: That the weights are rounded to the nearest number is proven.
    proven: bool = True

    @property
    def severity(self) -> str | None:
        """``error``, ``warning`` or ``None``."""
        if self.kept or self.peak is None or self.elements < _FEW or not self.proven:
            return None
        if not self.formula:
            return "warning" if self.share >= _SHARE and self.peak <= 1.5 * self.rate else None
        share, power = self.peak_share or 0.0, self.peak_power or 0.0
        if share < _SHARE or power < _SOME_POWER:
            return None
        return "error" if power >= _POWER else "warning"


def settled(recording: Recording) -> set[tuple[int, int]]:
    """(optimizer, group) of those whose updates are lost to rounding, or kept where the weights cannot hold them."""
    return {(loss.optimizer.id, loss.group.index) for loss in losses(recording) if loss.severity or loss.kept}


def losses(recording: Recording) -> list[Loss]:
    """One for each param group with half-precision weights that was measured at a rate above 0."""
    measured: dict[tuple[int, int], list[RoundedUpdates]] = {}
    for record in recording.numerics.rounding if recording.numerics is not None else ():
        if record.elements and record.rate and record.rate > 0:
            measured.setdefault((record.optimizer, record.group), []).append(record)
    out = []
    for optimizer in recording.optimizers:
        for group in optimizer.groups:
            records = measured.get((optimizer.id, group.index))
            if records:
                out.append(_loss(recording, optimizer, group, records))
    return out


def _loss(recording: Recording, optimizer: Optimizer, group: ParamGroup, records: Sequence[RoundedUpdates]) -> Loss:
    own = optimizer.defined_in.split(".")[:2] == ["torch", "optim"]
    formula = records[0].formula if len({r.formula for r in records}) == 1 else ""
    large = sum(r.large for r in records)
    if large >= 20 and sum(r.large_changed for r in records) < 0.9 * large:
        formula = ""  # the updates are smaller than the formula says
    elements = sum(r.elements for r in records)
    rate = max(r.rate or 0.0 for r in records)
    peak = _peak(recording, optimizer, group, records)
    scaled = [(r, (peak or rate) / (r.rate or rate) * _growth(optimizer, group, r)) for r in records]
    known = bool(formula)
    medians = [r.rate / r.median_ratio / _growth(optimizer, group, r) for r in records if r.median_ratio and r.rate]
    return Loss(
        optimizer,
        group,
        records[0].dtype,
        len(records),
        elements,
        sum(r.unchanged for r in records) / elements,
        _mean([(r.unchanged_power, r.elements) for r in records]) if known else None,
        rate,
        peak,
        sum(_below(r.bins, factor) for r, factor in scaled) / elements if known else None,
        _mean([(_below(r.power, factor), r.elements) for r, factor in scaled]) if known else None,
        sorted(medians)[len(medians) // 2] if known and medians else None,
        formula,
        next((r.kept_in for r in records if r.kept_in), "") or ("" if own else _stochastic(records, known)),
        own and known or _to_nearest(records, known),
    )


def _mean(weighted: Sequence[tuple[float | None, int]]) -> float | None:
    kept = [(v, n) for v, n in weighted if v is not None]
    total = sum(n for _, n in kept)
    return sum(v * n for v, n in kept) / total if total else None


def _peak(
    recording: Recording, optimizer: Optimizer, group: ParamGroup, records: Sequence[RoundedUpdates]
) -> float | None:
    """The highest rate of the plan; without a plan that of the watch, unless the rates were still rising."""
    watched = [r.rate for r in records if r.rate is not None]
    planned = projection(recording, optimizer.id, group.index).peak_rate
    if planned is not None:
        return max(planned, *watched)
    rising = any(b > a for a, b in itertools.pairwise(watched))
    return None if rising else max(watched)


def _growth(optimizer: Optimizer, group: ParamGroup, record: RoundedUpdates) -> float:
    """What momentum will still make of a gradient that keeps its direction."""
    momentum = group.hyperparameters.get("momentum")
    if record.formula != "sgd" or not isinstance(momentum, (int, float)) or not 0 < momentum < 1:
        return 1.0
    if optimizer.state_tensors_before or optimizer.state_loaded:
        return 1.0
    return 1.0 / (1.0 - float(momentum) ** (record.index + 1))


def _below(bins: Sequence[float], factor: float) -> float:
    """The sum of the bins whose ratio is below 1 once multiplied by ``factor``, within a bin in proportion."""
    edge = -math.log2(factor) - _FIRST
    return sum(n * min(1.0, max(0.0, edge - k)) for k, n in enumerate(bins))


def _stochastic(records: Sequence[RoundedUpdates], known: bool) -> str:
    expected = sum(r.small_expected for r in records)
    changed = sum(r.small_changed for r in records)
    return "stochastic rounding" if known and changed >= 5 and changed > 0.2 * expected else ""


def _to_nearest(records: Sequence[RoundedUpdates], known: bool) -> bool:
    """Whether the updates of somebody's own optimizer are seen to be rounded to the nearest number.

    Under stochastic rounding the share of elements that change halves with each power of two of the weights; under
    rounding to the nearest it falls from much to nothing.
    """
    if known and sum(r.small_expected for r in records) >= 20:
        return sum(r.small_changed for r in records) <= 0.1 * sum(r.small_expected for r in records)
    totals = [sum(column) for column in zip(*(r.weights for r in records), strict=False)]
    moved = [sum(column) for column in zip(*(r.weights_changed for r in records), strict=False)]
    for low in range(len(totals)):
        share = moved[low] / totals[low] if totals[low] >= 20 else 0.0
        for first in range(low + 2, len(totals)) if share >= 0.2 else ():
            expected = sum(totals[k] * share / 2.0 ** (k - low) for k in range(first, len(totals)))
            if expected >= 12 and not any(moved[first:]):
                return True
    return False
