"""How often a program calls ``scheduler.step()`` per optimizer step: from the timeline, else from the framework."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trainlint.recording.schema import Recording, Scheduler, SchedulerStep
from trainlint.recording.timeline import attempts_of, of_kind, steps_per_epoch


@dataclass(frozen=True)
class Cadence:
    """How scheduler calls lie among optimizer steps.

    ``kind``: ``step`` (every optimizer step, once or several times), ``every`` (once every few steps), ``epoch`` (at
    the end of each), ``never`` (an epoch's worth of steps and no call), ``none`` (no scheduler), ``unknown``.
    """

    kind: str = "none"
    text: str = ""
    #: Calls per optimizer step; 0 when never, ``None`` when unknown.
    calls_per_step: float | None = None
    #: Calls that came before the first step (fast-forwarding, or the scheduler stepped first).
    before_first: int = 0
    #: Step after which the first of the spaced calls comes (kinds ``every`` and ``epoch``), and their distance.
    first_after: int | None = None
    distance: int | None = None
    #: Seen in the watch; ``False`` when it is the framework's word or the usual place for a scheduler not called yet.
    observed: bool = False

    def calls_before(self, step: int) -> int:
        """Calls made before the 1-based optimizer step ``step``."""
        done = max(step - 1, 0)
        if self.distance and self.first_after is not None:
            spaced = 0 if done < self.first_after else (done - self.first_after) // self.distance + 1
            return self.before_first + spaced
        return self.before_first + int(done * (self.calls_per_step or 0))


def cadence(recording: Recording, scheduler: Scheduler, optimizer: int) -> Cadence:
    """The cadence of one scheduler relative to the steps of ``optimizer``. Calls by its constructor do not count."""
    steps = attempts_of(recording, optimizer)
    calls = [e.seq for e in of_kind(recording, SchedulerStep) if e.scheduler == scheduler.id and not e.initial]
    # positions[i]: how many optimizer steps had been made when call i came.
    positions = [sum(1 for s in steps if s < call) for call in calls]
    before_first = sum(1 for p in positions if p == 0)
    later = [p for p in positions if p > 0]
    epoch = steps_per_epoch(recording, optimizer)

    if scheduler.interval == "epoch":
        # Said by the framework. Calls that a shortened epoch brought on early do not tell the distance.
        frequency = scheduler.frequency or 1
        often = "once per epoch" if frequency == 1 else f"once every {frequency} epochs"
        return _per_epoch(epoch, frequency, before_first, often)
    if not steps:
        return Cadence("unknown", "no optimizer step was watched")
    # The program is parked inside its last wanted step: what follows that step is not seen.
    gaps = [sum(1 for p in later if p == n) for n in range(1, len(steps))]
    if not gaps or not any(gaps):
        if scheduler.interval == "step":
            return _spaced(scheduler.frequency or 1, before_first, observed=False)
        return _unseen(len(steps), epoch, before_first, bool(positions))
    if all(gap == gaps[0] for gap in gaps):
        return _each(gaps[0], before_first)
    if max(gaps) == 1:
        return _every(later, len(steps), epoch, before_first)
    mean = sum(gaps) / len(gaps)
    return Cadence("step", f"called {mean:.3g} times per optimizer step on average", mean, before_first, observed=True)


def _each(times: int, before_first: int) -> Cadence:
    text = "called once per optimizer step" if times == 1 else f"called {times} times per optimizer step"
    return Cadence("step", text, float(times), before_first, observed=True)


def _every(positions: Sequence[int], steps: int, epoch: int | None, before_first: int) -> Cadence:
    distances = {b - a for a, b in itertools.pairwise(positions)}
    if len(distances) > 1:
        rate = len(positions) / max(steps - 1, 1)
        return Cadence("step", "called at uneven distances", rate, before_first, observed=True)
    distance = distances.pop() if distances else positions[0]
    if len(positions) == 1 and steps - positions[0] > distance:
        return Cadence("unknown", "the scheduler was called once, at no distance that repeats")
    if epoch is not None and distance == epoch:
        return Cadence("epoch", "called once per epoch", 1 / distance, before_first, positions[0], distance, True)
    text = f"called once every {distance} optimizer steps"
    return Cadence("every", text, 1 / distance, before_first, positions[0], distance, True)


def _spaced(frequency: int, before_first: int, *, observed: bool) -> Cadence:
    if frequency <= 1:
        return Cadence("step", "called once per optimizer step", 1.0, before_first, observed=observed)
    text = f"called once every {frequency} optimizer steps"
    return Cadence("every", text, 1 / frequency, before_first, frequency, frequency, observed)


def _per_epoch(epoch: int | None, frequency: int, before_first: int, text: str) -> Cadence:
    if epoch is None:
        return Cadence("unknown", f"called {text}, and the length of an epoch is not known")
    distance = epoch * frequency
    text = f"called {text} ({epoch} optimizer steps)"
    return Cadence("epoch", text, 1 / distance, before_first, distance, distance)


def _unseen(steps: int, epoch: int | None, before_first: int, called: bool) -> Cadence:
    if steps < 2:
        return Cadence("unknown", "how often the scheduler is called shows only after a second optimizer step")
    if epoch is not None and steps > epoch:
        text = f"not called in {steps} optimizer steps, more than an epoch"
        return Cadence("never", text, 0.0, before_first, observed=True)
    if epoch is not None:
        guess = _per_epoch(epoch, 1, before_first, "once per epoch")
        text = f"not called in the {steps} watched steps; taken as once per epoch ({epoch} optimizer steps)"
        return Cadence("epoch", text, guess.calls_per_step, before_first, guess.first_after, guess.distance)
    when = "after the first step" if called else "in the watch"
    return Cadence("unknown", f"the scheduler was not called {when}, and the length of an epoch is not known")
