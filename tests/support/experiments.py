"""Experiments built by hand, as children would have written them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trainlint.recording.schema import Experiment, ExperimentCurve, ExperimentLoss, ExperimentPoint


def curve(losses: Sequence[float], ended: str = "steps", rate: float = 1e-3, **fields: Any) -> ExperimentCurve:
    points = tuple(ExperimentPoint(i, loss, rate) for i, loss in enumerate(losses))
    return ExperimentCurve(ended, rate, points, **fields)


def falling(first: float, last: float, steps: int = 300) -> list[float]:
    """Quickly at first, then flat."""
    return [last + (first - last) * math.exp(-i / (steps / 10)) for i in range(steps)]


def overfit(*curves: ExperimentCurve, **fields: Any) -> Experiment:
    known: dict[str, Any] = {
        "outcome": "done",
        "repeated_by": "loader",
        "different_batches": 1,
        "steps_wanted": 300,
        "optimizer": 0,
        "configured_rate": 1e-3,
        "held_still": ("dropout", "weight decay"),
        "loss": ExperimentLoss("cross_entropy", 2.3, alone=True, calls=1, floor=0.0, positions=32),
    }
    return Experiment("overfit", curves=curves, **{**known, **fields})


def sweep(loss_at: Callable[[float], float], **fields: Any) -> Experiment:
    """A range test of 100 steps whose loss at each rate is given; it ends where the loss is no number."""
    points = []
    for i in range(100):
        rate = 1e-7 * 1e8 ** (i / 99)
        points.append(ExperimentPoint(i, loss_at(rate), rate))
        if not math.isfinite(points[-1].loss or 0.0):
            break
    known: dict[str, Any] = {"outcome": "done", "optimizer": 0, "configured_rate": 1e-3}
    return Experiment("lr-range", curves=(ExperimentCurve("swept", None, tuple(points)),), **{**known, **fields})


def valley(rate: float) -> float:
    """Falls from 0.003 on, is lowest at 0.1, blows up at 1."""
    if rate >= 1:
        return 50.0 * rate
    distance = max(0.0, math.log10(rate / 1e-3))
    noise = 0.01 * math.sin(1e3 * math.log(rate))
    return 2.3 - 0.6 * min(distance, 2.0) + noise
