"""Overfitting one batch: one rate, and when enough was seen."""

from __future__ import annotations

import math
from typing import Any

#: Share of the way from the first loss to its floor that counts as having come near it; where the floor is not known,
#: share of the first loss.
NEAR = 0.05
NEAR_UNKNOWN = 0.01
#: Steps in a row that must be near the floor.
STAYS = 3
#: Steps in which no bit of the loss changed, after the first ones, which may have had other random numbers.
CONSTANT = 30
SETTLING = 2
#: A loss this many times above where it began, for a few steps, will not come back.
BLOWN_UP = 10.0
BLOWN_UP_STEPS = 5
#: No new lowest loss by more than this share of the first in so many steps.
FLAT = 0.01
FLAT_STEPS = 100


class Overfit:
    """A constant rate, for ``steps`` steps at most."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.steps = int(plan["steps"])
        self._rate = float(plan["rate"])
        self.losses: list[float] = []

    def rate(self, step: int) -> float:
        return self._rate

    def seen(self, loss: float | None, floor: float | None) -> str:
        """Take in the loss of a step; how the curve ended, or the empty string to go on.

        ``floor``: the lowest value the loss can have, ``None`` when it is not known.
        """
        if loss is None:
            self.losses.append(self.losses[-1] if self.losses else 0.0)
            return "steps" if len(self.losses) >= self.steps else ""
        if not math.isfinite(loss):
            return "diverged"
        self.losses.append(loss)
        first, made = self.losses[0], len(self.losses)
        height = first - (floor or 0.0)
        near = NEAR if floor is not None else NEAR_UNKNOWN
        if made > STAYS and height > 0 and all(x - (floor or 0.0) <= near * height for x in self.losses[-STAYS:]):
            return "reached"
        if made >= CONSTANT + SETTLING and len(set(self.losses[SETTLING:])) == 1:
            return "constant"
        high = max(abs(height), abs(first))
        if made > BLOWN_UP_STEPS and all(x > first + BLOWN_UP * high for x in self.losses[-BLOWN_UP_STEPS:]):
            return "diverged"
        if made > 2 * FLAT_STEPS and min(self.losses[:-FLAT_STEPS]) - min(self.losses[-FLAT_STEPS:]) < FLAT * high:
            return "plateau"
        return "steps" if made >= self.steps else ""
