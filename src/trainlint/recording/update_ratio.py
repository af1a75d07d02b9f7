"""How far a step moves each weight matrix, against its size, and what that will be at the peak of the schedule.

Pure functions over the measurements of the watched steps.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from trainlint.recording.intervals import Timeline
from trainlint.recording.projection import projection
from trainlint.recording.schema import Optimizer, Parameter, Recording, StepMeasurement

__all__ = ["Movement", "movements"]

#: Optimizers whose step is not proportional to the rate in the group, or whose first steps say nothing of later ones.
_OWN_SIZE = ("LBFGS", "Rprop", "Adadelta")
#: A change of less than this share of the weights is rounding in good part.
_ROUNDED = 2.0**-22
#: Matrices of this size began at zero.
_ZERO = 1e-6


@dataclass(frozen=True)
class Movement:
    """One weight matrix: norm of its update over its own norm, median of the watched steps.

    Its own norm is the one at the first watched step where it has grown since: steps that overwrite a matrix soon are
    no larger than it, because it consists of them.
    """

    parameter: Parameter
    group: int
    ratio: float
    #: The same at the highest rate of the plan; ``None``: the rate is rising and nobody knows where to.
    at_peak: float | None
    rate: float
    peak: float | None
    #: Root mean square of its elements at the first watched step.
    size: float


def movements(recording: Recording, timeline: Timeline, optimizer: Optimizer) -> list[Movement]:
    """The matrices of modules that an optimizer moved by a live gradient; empty where the rate says nothing.

    Left out are vectors (norms, biases, scales), embeddings (only some rows move), matrices that began at zero, and
    half-precision ones of which some elements stood still.
    """
    if optimizer.class_name in _OWN_SIZE or any({"d", "d0"} & set(g.hyperparameters) for g in optimizer.groups):
        return []
    parameters = {p.id: p for p in recording.parameters}
    group_of = {i: g.index for g in optimizer.groups for i in g.parameters}
    seen: dict[int, list[tuple[float, float]]] = {}
    sizes: dict[int, float] = {}
    for m in sorted(timeline.measurements.get(optimizer.id, {}).values(), key=lambda m: m.index):
        rates = timeline.rate_of_parameters(optimizer.id, group_of, m.index)
        for column, i in enumerate(m.parameters):
            p, rate = parameters.get(i), rates.get(i)
            if p is None or not _is_matrix(p) or rate is None or not rate > 0 or not math.isfinite(rate):
                continue
            if column < len(m.weight_norm):
                sizes.setdefault(i, (m.weight_norm[column] or 0.0) / math.sqrt(p.numel))
            ratio = _ratio(m, column, p, sizes.get(i, math.inf) * math.sqrt(p.numel))
            if ratio is None or sizes.get(i, 0.0) < _ZERO:
                continue
            seen.setdefault(i, []).append((ratio, rate))
    peaks: dict[int, float | None] = {}
    out = []
    for i, looks in seen.items():
        p, group = parameters[i], group_of.get(i)
        if group is None:
            continue
        if group not in peaks:
            peaks[group] = _peak(recording, optimizer, group)
        peak = peaks[group]
        per_rate = statistics.median(ratio / rate for ratio, rate in looks)
        out.append(
            Movement(
                p,
                group,
                statistics.median(ratio for ratio, _ in looks),
                per_rate * peak if peak is not None else None,
                max(rate for _, rate in looks),
                peak,
                sizes[i],
            )
        )
    return out


def _is_matrix(p: Parameter) -> bool:
    return p.root is not None and len(p.shape) >= 2 and min(p.shape[:2]) > 1 and p.kind not in ("norm", "embedding")


def _ratio(m: StepMeasurement, column: int, p: Parameter, first: float) -> float | None:
    def of(values: tuple[float | None, ...]) -> float | None:
        value = values[column] if column < len(values) else None
        return value if value is not None and math.isfinite(value) else None

    gradient, weight, update, changed = of(m.gradient_norm), of(m.weight_norm), of(m.update_norm), of(m.changed)
    if not gradient or not weight or not update or not changed or p.id in m.frozen:
        return None
    if p.dtype != "float32" and changed < 0.9:
        return None  # what is measured is the spacing of the numbers
    ratio = update / (min(weight, first) or weight)
    return ratio if ratio > _ROUNDED or changed > 0.5 else None


def _peak(recording: Recording, optimizer: Optimizer, group: int) -> float | None:
    watched = [
        rates[group]
        for rates in (s.scheduled_rates or s.rates for s in Timeline(recording).steps.get(optimizer.id, ()))
        if group < len(rates) and math.isfinite(rates[group])
    ]
    planned = projection(recording, optimizer.id, group).peak_rate
    if planned is not None:
        return max([planned, *watched])
    return max(watched) if watched and not _rises(watched) else None


def _rises(rates: Iterable[float]) -> bool:
    return any(b > a for a, b in itertools.pairwise(rates))
