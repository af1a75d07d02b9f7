"""The learning-rate range test: rates that grow geometrically from step to step (Smith 2017, arXiv:1506.01186)."""

from __future__ import annotations

import math
import statistics
from typing import Any

#: Weight of the losses before in the smoothed loss.
SMOOTH = 0.8
#: Steps at the lowest rates, whose losses are those of the untrained model: their median is where the loss began.
SETTLING = 15
#: The sweep is over when the smoothed loss lies this many times its size above where it began.
BLOWN_UP = 2.0


class Sweep:
    """``steps`` rates from ``low`` to ``high``."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.steps = int(plan["steps"])
        self.low, self.high = float(plan["low"]), float(plan["high"])
        self._made = 0
        self._losses: list[float] = []
        self._began: float | None = None
        self._smooth = 0.0

    def rate(self, step: int) -> float:
        share = min(1.0, step / max(1, self.steps - 1))
        return float(self.low * (self.high / self.low) ** share)

    def seen(self, loss: float | None, floor: float | None) -> str:
        """Take in the loss of a step; how the curve ended, or the empty string to go on."""
        self._made += 1
        if loss is not None and (not math.isfinite(loss) or self._blows_up(loss)):
            return "diverged"
        return "swept" if self._made >= self.steps else ""

    def _blows_up(self, loss: float) -> bool:
        if self._began is None:
            self._losses.append(loss)
            if len(self._losses) == SETTLING:
                self._began = self._smooth = statistics.median(self._losses)
            return False
        self._smooth = SMOOTH * self._smooth + (1 - SMOOTH) * loss
        return self._smooth > self._began + BLOWN_UP * abs(self._began)
