"""Learning rates in force around a moment of the timeline, to hold logged values against.

A program may log the rate before or after the step, before or after the scheduler's, of one group or another: all of
these are right. What is wrong is a value that no group had anywhere near.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.recording.schema import Event, Logged, OptimizerStep, Recording, SchedulerStep, StateLoaded

__all__ = ["RateLog", "Series", "is_rate_name", "near"]

#: A logged rate this close to a group's, as a share, is that rate: logs round.
TOLERANCE = 1e-3
#: Words that make of "lr" another quantity: a factor of it, a bound, a counter, a loss on low-resolution images.
_OTHER = frozenset(
    """scale scaler scaling factor factors mult multiplier multipliers ratio coef coeff decay step steps epoch epochs
    iter iters patience gamma warmup loss losses momentum weight beta betas min max base init initial peak target start
    end final best suggested suggestion found inner outer meta fast log log2 log10 ln effective eff scaled norm psnr
    ssim lpips image images img imgs acc accuracy size delta change diff reduction reductions reduced count num bad
    cooldown phase stage milestone milestones total eps d variance std time seconds schedule finder find test relative
    rel grad gradient update updates param params""".split()
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def is_rate_name(name: str) -> bool:
    """Whether a value logged under this name says that it is a learning rate: ``lr``, ``lr-AdamW/pg1``, ``pg0``."""
    # Lightning and the callbacks of tqdm append where a value was taken.
    words = [w.lower() for w in _WORDS.findall(re.sub(r"_(step|epoch)$", "", name))]
    if any(w in _OTHER for w in words):
        return False
    if "lr" in words or "lrs" in words or "learningrate" in words:
        return True
    if len(words) == 2 and words[0] == "pg" and words[1].isdecimal():
        return True
    return any(a == "learning" and b in ("rate", "rates") for a, b in itertools.pairwise(words))


def near(a: float, b: float, share: float = TOLERANCE) -> bool:
    """Equal but for rounding."""
    return math.isclose(a, b, rel_tol=share, abs_tol=1e-14)


@dataclass(frozen=True)
class Series:
    """What was logged under one name at one stage, one entry per value."""

    name: str
    by: str
    events: tuple[Logged, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(e.value for e in self.events if e.value is not None)

    @property
    def constant(self) -> bool:
        return len(set(self.values)) == 1


class RateLog:
    """The rates of all groups over time, and what was logged as a rate."""

    def __init__(self, run: Recording) -> None:
        events: tuple[Event, ...] = run.events
        if run.boundary is not None:
            events += run.boundary.events
        self.steps = [e for e in events if isinstance(e, OptimizerStep)]
        #: The same per optimizer, with the seqs apart for searching.
        self._own: dict[int, list[OptimizerStep]] = {}
        for step in self.steps:
            self._own.setdefault(step.optimizer, []).append(step)
        self._seqs = {o: [s.seq for s in steps] for o, steps in self._own.items()}
        self._calls = [e for e in events if isinstance(e, SchedulerStep) and not e.initial]
        #: What a call of a scheduler (not by its constructor) or loading a state left.
        self._set = [(e.seq, e.rates_after) for e in self._calls]
        self._set += [(e.seq, e.rates_after) for e in events if isinstance(e, StateLoaded)]
        # An optimizer that made no step in the watch has the rates that it was built with.
        self._idle = tuple(
            float(rate)
            for o in run.optimizers
            if o.id not in self._own
            for g in o.groups
            for rate in (g.hyperparameters.get("lr"),)
            if isinstance(rate, (int, float)) and not isinstance(rate, bool)
        )
        self._logged = [e for e in events if isinstance(e, Logged) and is_rate_name(e.name)]

    def series(self) -> list[Series]:
        """What was logged as a rate, by name and stage."""
        found: dict[tuple[str, str], list[Logged]] = {}
        for e in self._logged:
            if e.value is not None and math.isfinite(e.value):
                found.setdefault((e.name, e.by), []).append(e)
        return [Series(name, by, tuple(events)) for (name, by), events in found.items()]

    def place(self, seq: int) -> int:
        """Optimizer steps that were begun before this moment."""
        return sum(1 for s in self.steps if (s.began or s.seq) < seq)

    def around(self, seq: int, reach: int = 1) -> set[float]:
        """Every rate that a group had from ``reach`` steps before the last step to ``reach`` after the next one."""
        rates = set(self._idle)
        first, last = float(seq), float(seq)
        for optimizer, steps in self._own.items():
            done = bisect.bisect_left(self._seqs[optimizer], seq)
            low, high = max(0, done - 1 - reach), done + reach
            for step in steps[low : high + 1]:
                rates.update(step.rates)
                rates.update(step.scheduled_rates)
            # What a scheduler set after the step before these is what the first of them used.
            first = min(first, steps[low - 1].seq if low else 0)
            last = max(last, steps[high].seq if high < len(steps) else math.inf)
        for at, values in self._set:
            if first <= at <= last:
                rates.update(values)
        return {r for r in rates if math.isfinite(r)}

    @property
    def main(self) -> int:
        """The optimizer that made most steps, the first of several."""
        return max(self._own, key=lambda o: len(self._own[o]))

    def used(self, seq: int) -> tuple[float, ...]:
        """Rates of the main optimizer's step at this moment (inside its closure), else of the last one before it."""
        steps = self._own[self.main]
        done = bisect.bisect_left(self._seqs[self.main], seq)
        inside = done < len(steps) and 0 < steps[done].began < seq
        return steps[done if inside else max(0, done - 1)].rates

    def so_far(self, seq: int) -> set[float]:
        """Every rate that a step used up to this moment, and the next one."""
        done = sum(1 for s in self.steps if s.seq < seq)
        return {r for s in self.steps[: done + 1] for r in s.rates if math.isfinite(r)}

    def scheduled(self, seq: int) -> Iterator[tuple[float, float]]:
        """Rates before and after the last scheduler call before this moment, group by group."""
        call = next((e for e in reversed(self._calls) if e.seq < seq), None)
        if call is not None:
            yield from zip(call.rates_before, call.rates_after, strict=False)

    def courses(self, seqs: Sequence[int], shift: int) -> Iterator[list[float]]:
        """For each group, its rate at each of these moments, ``shift`` steps later; only groups that had one at all."""
        for optimizer, steps in self._own.items():
            at = [bisect.bisect_left(self._seqs[optimizer], seq) - 1 + shift for seq in seqs]
            if not at or min(at) < 0 or max(at) >= len(steps):
                continue
            for group in range(min(len(steps[n].rates) for n in at)):
                yield [steps[n].rates[group] for n in at]
