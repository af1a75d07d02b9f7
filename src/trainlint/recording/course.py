"""The course of one schedule: its rate over calls of ``scheduler.step()``, and where it ends."""

from __future__ import annotations

import bisect

from trainlint.recording.schema import Scheduler

__all__ = ["Course"]


class Course:
    """The curve of the param group with the highest rate.

    The recorder's points lie dense around the end of the schedule; between two points the earlier one holds.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        groups = min((len(p.rates) for p in scheduler.curve), default=0)
        self.scheduler = scheduler
        self.group = max(range(groups), key=lambda g: max(p.rates[g] for p in scheduler.curve), default=0)
        self._calls = [p.calls for p in scheduler.curve] if groups else []
        self._rates = [p.rates[self.group] for p in scheduler.curve] if groups else []

    def rate(self, calls: int) -> float | None:
        """Rate after so many calls; ``None`` beyond the curve."""
        if not self._calls or not self._calls[0] <= calls <= self._calls[-1]:
            return None
        return self._rates[bisect.bisect_right(self._calls, calls) - 1]

    @property
    def flat(self) -> bool:
        """The rate never changes."""
        return len(set(self._rates)) < 2

    @property
    def horizon(self) -> int | None:
        """Calls until the end of the course: what the settings say, else where the curve reaches 0 for good."""
        if self.scheduler.horizon_calls is not None:
            return self.scheduler.horizon_calls
        top = max(self._rates, default=0.0)
        if self.scheduler.class_name != "LambdaLR" or top <= 0 or self._rates[-1] > 1e-9 * top:
            return None
        alive = [c for c, r in zip(self._calls, self._rates, strict=True) if r > 1e-9 * top]
        return alive[-1] + 1 if alive else None

    @property
    def peak(self) -> float:
        """Highest rate up to the end of the course."""
        end = self.horizon
        within = [r for c, r in zip(self._calls, self._rates, strict=True) if end is None or c <= end]
        return max(within, default=0.0)

    @property
    def end(self) -> float | None:
        """Rate at the end of the course."""
        end = self.horizon
        return self.rate(end) if end is not None else None

    @property
    def decays(self) -> bool:
        """It ends low. A schedule that does not (a warm-up alone) may rightly be over before the run is."""
        end = self.end
        return end is not None and end < 0.5 * self.peak
