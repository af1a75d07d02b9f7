"""How often a program calls ``scheduler.step()`` per optimizer step: from the timeline, else from the framework."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trainlint.recording.boundary import between_epochs
from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    OptimizerStep,
    Recording,
    ScalerEvent,
    Scheduler,
    SchedulerStep,
)
from trainlint.recording.timeline import attempts_of, of_kind, steps_per_epoch, training_loader


@dataclass(frozen=True)
class Cadence:
    """How scheduler calls lie among optimizer steps.

    ``kind``: ``step`` (every optimizer step, once or several times), ``every`` (once every few steps), ``epoch`` (at
    the end of each), ``never`` (no call in an epoch and none at its end), ``none`` (no scheduler), ``unknown``.
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
    #: Calls made at each of those places.
    at_once: int = 1
    #: Seen, in the watch or at the end of the epoch; ``False`` when it is the framework's word or the usual place for a
    #: scheduler not called yet.
    observed: bool = False

    def calls_before(self, step: int) -> int:
        """Calls made before the 1-based optimizer step ``step``."""
        done = max(step - 1, 0)
        if self.distance and self.first_after is not None:
            spaced = 0 if done < self.first_after else (done - self.first_after) // self.distance + 1
            return self.before_first + spaced * self.at_once
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
    crossing = _crossing(recording, scheduler, optimizer)

    if scheduler.interval == "epoch":
        # Said by the framework. Calls that a shortened epoch brought on early do not tell the distance.
        frequency = scheduler.frequency or 1
        often = "once per epoch" if frequency == 1 else f"once every {frequency} epochs"
        seen = frequency == 1 and crossing is not None and crossing.at_the_end == 1
        return _per_epoch(epoch, frequency, before_first, often, observed=seen)
    if not steps:
        return Cadence("unknown", "no optimizer step was watched")
    # The program is parked inside its last wanted step: what follows that step is not seen.
    gaps = [sum(1 for p in later if p == n) for n in range(1, len(steps))]
    if not gaps or not any(gaps):
        if scheduler.interval == "step":
            return _spaced(scheduler.frequency or 1, before_first, observed=False)
        if crossing is not None and not later:
            return _at_the_end(recording, crossing, len(steps), epoch, before_first)
        return _unseen(len(steps), epoch, before_first, bool(positions))
    window = _calls_per_window(recording, calls, steps, epoch)
    if window is not None:
        text = f"called at every micro-batch ({window:.3g} times per optimizer step)"
        return Cadence("step", text, window, before_first, observed=True)
    if all(gap == gaps[0] for gap in gaps):
        return _each(gaps[0], before_first, crossing.extra(gaps[0]) if crossing is not None else 0, epoch)
    if max(gaps) == 1:
        return _every(later, len(steps), epoch, before_first)
    mean = sum(gaps) / len(gaps)
    return Cadence("step", f"called {mean:.3g} times per optimizer step on average", mean, before_first, observed=True)


def _calls_per_window(
    recording: Recording, calls: Sequence[int], steps: Sequence[int], epoch: int | None
) -> float | None:
    """Calls per step of a scheduler called once after every micro-batch, where windows of several lengths were seen.

    ``None`` for any other scheduler, and where one length was seen between all steps: then the gaps say it themselves.
    """
    backwards = [e.seq for e in of_kind(recording, Backward) if e.seq < steps[-1]]
    between = [sum(1 for c in calls if low < c < high) for low, high in itertools.pairwise(backwards)]
    windows = [sum(1 for b in backwards if low < b < high) for low, high in itertools.pairwise([0, *steps])]
    if any(n != 1 for n in between) or max(windows) < 2 or len(set(windows)) == 1:
        return None
    loader = training_loader(recording)
    batches = recording.plan.batches_per_epoch or (loader.batches if loader is not None else None)
    return batches / epoch if batches and epoch else float(max(windows))


@dataclass(frozen=True)
class Crossing:
    """Calls of one scheduler across the end of an epoch."""

    #: Between the last backward of the one epoch and the first optimizer step of the next.
    at_the_end: int
    #: Optimizer steps of the shortened epoch that came after the watch (data that was read ahead).
    left_over: int
    #: Whether the calls at the end are certain to come after the loop over the batches, not with a step left over.
    certain: bool
    #: Between the first two steps of the next epoch.
    in_next: int
    #: Of the calls at the end those between the next epoch's first step and its backward: called before the step.
    with_step: int = 0

    def extra(self, per_step: int) -> int:
        """Calls at the end beyond those of the last step, for a scheduler that is called at every step."""
        own = per_step * self.left_over + self.with_step
        return max(self.at_the_end - own, 0) if self.in_next == per_step else 0


def _crossing(recording: Recording, scheduler: Scheduler, optimizer: int) -> Crossing | None:
    boundary = recording.boundary
    between = between_epochs(boundary) if boundary is not None and boundary.outcome == "crossed" else None
    if boundary is None or between is None:
        return None
    last, first = between
    calls = [
        e.seq for e in boundary.events if isinstance(e, SchedulerStep) and e.scheduler == scheduler.id and not e.initial
    ]
    steps = [e.seq for e in boundary.events if isinstance(e, OptimizerStep) and e.optimizer == optimizer]
    later = [s for s in steps if s > first]
    if first not in steps or not later:
        return None
    at_the_end = [c for c in calls if last < c < first]
    left_over = sum(1 for s in steps if s < first)
    certain = not left_over
    if left_over and at_the_end:
        training = {loader.id for loader in boundary.loaders if loader.training}
        since = max(s for s in steps if s < first)
        other = [e.seq for e in boundary.events if isinstance(e, BatchFetched) and e.loader not in training]
        # An evaluation in between, or the next epoch's data: the loop over the batches was over.
        certain = any(since < o < at_the_end[0] for o in other) or at_the_end[0] > (boundary.next_epoch or first)
    backward = max((e.seq for e in boundary.events if isinstance(e, Backward) and last < e.seq < first), default=first)
    with_step = sum(1 for c in at_the_end if c > backward)
    return Crossing(len(at_the_end), left_over, certain, sum(1 for c in calls if first < c < later[0]), with_step)


def _at_the_end(recording: Recording, seen: Crossing, steps: int, epoch: int | None, before_first: int) -> Cadence:
    """Not called between the watched steps; what the end of the epoch shows."""
    if seen.in_next:
        text = f"not called in the {steps} watched steps, and at every step of the next epoch"
        return Cadence("unknown", text)
    if seen.at_the_end and seen.certain:
        often = "once per epoch" if seen.at_the_end == 1 else f"{seen.at_the_end} times per epoch"
        return _per_epoch(epoch, 1, before_first, often, at_once=seen.at_the_end, observed=True)
    if seen.at_the_end:
        return _unseen(steps, epoch, before_first, called=False)
    text = f"not called in the {steps} watched steps, nor at the end of the epoch or in the next one's first steps"
    if _no_line_calls_it(recording):
        return Cadence("never", text, 0.0, before_first, observed=True)
    return Cadence("unknown", f"the scheduler was {text}; it may be called at the end of some epochs only")


def _no_line_calls_it(recording: Recording) -> bool:
    """Whether every line of the program's own source that calls a ``step`` was seen to call that of something else."""
    lines = recording.source.step_calls if recording.source is not None else None
    if lines is None or any(fw.name in ("lightning", "transformers") for fw in recording.frameworks):
        return False
    events = [*recording.events, *(recording.boundary.events if recording.boundary is not None else ())]
    others = {
        (e.at.file, e.at.line)
        for e in events
        if isinstance(e, (OptimizerStep, ScalerEvent, SchedulerStep)) and e.at is not None
    }
    return bool(others) and all((line.file, line.line) in others for line in lines)


def _each(times: int, before_first: int, extra: int, epoch: int | None) -> Cadence:
    text = "called once per optimizer step" if times == 1 else f"called {times} times per optimizer step"
    if extra and epoch:
        more = "once more" if extra == 1 else f"{extra} times more"
        text = f"{text} and {more} at the end of each epoch"
        return Cadence("step", text, times + extra / epoch, before_first, observed=True)
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
        text = "called once per epoch"
        return Cadence("epoch", text, 1 / distance, before_first, positions[0], distance, observed=True)
    text = f"called once every {distance} optimizer steps"
    return Cadence("every", text, 1 / distance, before_first, positions[0], distance, observed=True)


def _spaced(frequency: int, before_first: int, *, observed: bool) -> Cadence:
    if frequency <= 1:
        return Cadence("step", "called once per optimizer step", 1.0, before_first, observed=observed)
    text = f"called once every {frequency} optimizer steps"
    return Cadence("every", text, 1 / frequency, before_first, frequency, frequency, observed=observed)


def _per_epoch(
    epoch: int | None, frequency: int, before_first: int, text: str, *, at_once: int = 1, observed: bool = False
) -> Cadence:
    if epoch is None:
        return Cadence("unknown", f"called {text}, and the length of an epoch is not known")
    distance = epoch * frequency
    text = f"called {text} ({epoch} optimizer steps)"
    return Cadence("epoch", text, at_once / distance, before_first, distance, distance, at_once, observed)


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
