"""The rate of one param group over calls of its scheduler, and which schedulers multiply into one rate."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from trainlint.recording.schema import Scheduler

__all__ = ["RateCurve", "sets_rate"]

#: A change of the rate below this share of its peak is not worth drawing.
_VISIBLE = 0.01
#: A rate below this share of the peak is as good as 0 in a drawing.
_LOW = 0.01
#: Calls that are drawn of a curve that never comes to rest.
_RESTLESS = 5_000
#: torch's schedulers that multiply the rate they find by what they have become since the last call, whoever set it.
_MULTIPLY = frozenset(
    ("LinearLR", "ConstantLR", "StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR", "MultiplicativeLR")
)
#: torch's schedulers that set the rate from the base rate, so that nothing of another scheduler's remains.
_SET = frozenset(("LambdaLR", "OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "SWALR"))


def sets_rate(scheduler: Scheduler) -> bool | None:
    """Whether a call sets the rate from the base rate (``False``: it multiplies the rate that it finds).

    ``None``: not known (a class of the program's own), or neither (a cosine towards a rate other than 0 adds to it,
    parts that follow each other may do either).
    """
    names = scheduler.children if scheduler.class_name == "ChainedScheduler" else (scheduler.class_name,)
    if any(n in _SET for n in names):
        return True
    for index, name in enumerate(names):
        prefix = f"{index}.{name}." if scheduler.children else ""
        flat = name == "CosineAnnealingLR" and scheduler.settings.get(f"{prefix}eta_min") == 0
        if name not in _MULTIPLY and not flat:
            return None
    return False


@dataclass(frozen=True)
class RateCurve:
    """Rates of one param group over calls of ``scheduler.step()``.

    The recorder's points lie dense up to the schedule's end and ever wider beyond it.
    """

    calls: tuple[int, ...]
    rates: tuple[float, ...]
    #: Widest gap between two points that may be filled in: a cosine that turns is not seen through a wider one.
    gap: float = math.inf
    #: From this call on the rate no longer changes.
    flat_from: float = math.inf

    @classmethod
    def of(cls, scheduler: Scheduler, group: int) -> RateCurve | None:
        points = sorted((p.calls, p.rates[group]) for p in scheduler.curve if group < len(p.rates))
        if not points:
            return None
        calls, rates = tuple(c for c, _ in points), tuple(r for _, r in points)
        flat = next((i for i in range(len(rates), 0, -1) if rates[i - 1] != rates[-1]), 0)
        horizon = scheduler.horizon_calls
        gap = max(1.0, horizon / 16) if horizon else math.inf
        # Flat is believed when points beyond the schedule's end show it, or when the whole curve is.
        beyond = flat == 0 or (horizon is not None and flat < len(rates) - 1 and calls[-1] > horizon)
        return cls(calls, rates, gap, calls[flat] if beyond else math.inf)

    @property
    def last(self) -> int:
        return self.calls[-1]

    @property
    def peak(self) -> float:
        return max(self.rates)

    def at(self, calls: int) -> float | None:
        """Rate after ``calls`` calls, linear between points; ``None`` where it is not known."""
        if calls >= self.flat_from:
            return self.rates[-1]
        if calls < self.calls[0] or calls > self.calls[-1]:
            return None
        right = bisect.bisect_left(self.calls, calls)
        if self.calls[right] == calls:
            return self.rates[right]
        c0, c1, r0, r1 = self.calls[right - 1], self.calls[right], self.rates[right - 1], self.rates[right]
        if c1 - c0 > self.gap:
            return None
        return r0 + (r1 - r0) * (calls - c0) / (c1 - c0)

    def rise_ends(self) -> int:
        """Calls until the rate stops rising from its start; 0 when it does not rise."""
        end = 0
        for i in range(1, len(self.rates)):
            if self.rates[i] < self.rates[i - 1] * (1 - 1e-9):
                break
            if self.rates[i] > self.rates[i - 1] * (1 + 1e-9):
                end = self.calls[i]
        return end

    def settles(self) -> int:
        """Calls after which what remains of the curve can no longer be told apart in a drawing."""
        low = self._first_low()
        if low is not None:
            return low
        last, visible = self.rates[-1], _VISIBLE * self.peak
        moving = [c for c, r in zip(self.calls, self.rates, strict=True) if abs(r - last) > visible]
        if not moving:
            return self.calls[0]
        # A tenth more, so that the flat part shows where there is one; a curve that never comes to rest tells nothing
        # more when it is drawn for ever.
        return min(math.ceil(1.1 * moving[-1]) + 1, self.last if moving[-1] < 0.9 * self.last else _RESTLESS)

    def _first_low(self) -> int | None:
        """Where the rate first comes down to almost nothing from its highest, and then rises again (a cosine)."""
        top = next(i for i, r in enumerate(self.rates) if r >= 0.9 * self.peak)
        for i in range(top + 1, len(self.rates) - 1):
            if (
                self.rates[i] < _LOW * self.peak
                and self.rates[i] <= self.rates[i - 1]
                and self.rates[i] < self.rates[i + 1]
            ):
                return self.calls[i]
        return None
