"""The course of a schedule: its rate over calls of ``scheduler.step()``, where it ends, and how it lies on the run."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from trainlint.recording.boundary import between_epochs
from trainlint.recording.cadence import Cadence
from trainlint.recording.length import epochs_of, planned_length
from trainlint.recording.projection import Part, Projected, calls_seen, projection
from trainlint.recording.schema import Optimizer, OptimizerStep, Recording, ScalerEvent, Scheduler, SchedulerStep
from trainlint.recording.timeline import accumulation, steps_of, steps_per_epoch, training_loader

#: More epochs than anybody plans.
_MANY_EPOCHS = 3000

__all__ = ["Course", "ScheduleOnRun", "schedule_on_run"]


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


@dataclass(frozen=True)
class ScheduleOnRun:
    """One scheduler laid over the run that its optimizer will make."""

    run: Recording
    scheduler: Scheduler
    course: Course
    projected: Projected
    #: Optimizer steps of the whole run and who says so; ``None`` when nobody does.
    steps: int | None
    steps_source: str
    epochs: float | None
    steps_per_epoch: int | None
    #: Backwards per optimizer step.
    micro: int
    #: Optimizer steps in the watch.
    watched: int

    #: How often the program calls the scheduler.
    cadence: Cadence
    #: One of several schedulers whose factors multiply into the rate.
    part: Part | None = None

    @property
    def done_at(self) -> int | None:
        """The step at which the schedule has run its course; ``None`` when it never has."""
        return self.part.reaches_end_at_step if self.part is not None else self.projected.reaches_end_at_step

    @property
    def meant(self) -> float | None:
        """The rate at the end of the course; with several schedulers, when each of them has run its own."""
        return self.projected.meant_rate if self.part is not None else self.course.end

    @property
    def peak(self) -> float:
        """The highest rate that the run is meant to have."""
        return self.course.peak if self.part is None else max(self.course.peak, self.projected.peak_rate or 0.0)

    @property
    def horizon(self) -> int:
        """Calls after which the schedule has run its course; 0 when it has no end that is known."""
        return self.course.horizon or 0

    @property
    def followed(self) -> bool:
        """Whether the watched rates are the schedule's; not so when they are set by hand as well, or scaled."""
        observed = self.projected.observed
        if self.projected.points or not observed:
            return True
        rates = {rate for _, rate in observed}
        due = [self.course.rate(n) for n in range(self.cadence.before_first + 2)]
        return len(rates) == 1 and any(r is not None and math.isclose(observed[0][1], r, rel_tol=1e-6) for r in due)

    @property
    def counts_steps(self) -> bool:
        """Whether the length can hardly be one in epochs: 200 may be 200 epochs as well as 2 epochs of 100 batches."""
        in_steps = (
            self.scheduler.class_name == "OneCycleLR" or "lr_lambda.num_training_steps" in self.scheduler.settings
        )
        return in_steps or self.horizon > _MANY_EPOCHS

    @property
    def no_call_in_source(self) -> bool:
        """Whether every call of a ``step`` in the program's own source is known to be of something else."""
        calls = self.run.source.step_calls if self.run.source is not None else None
        if calls is None or any(fw.name in ("lightning", "transformers") for fw in self.run.frameworks):
            return False
        events = [e for e in self.run.events if isinstance(e, (OptimizerStep, ScalerEvent)) and e.at is not None]
        others = {(e.at.file, e.at.line) for e in events if e.at is not None}
        return bool(others) and all((c.file, c.line) in others for c in calls)

    @property
    def batches(self) -> int | None:
        """Training batches of an epoch."""
        loader = training_loader(self.run)
        return self.run.plan.batches_per_epoch or (loader.batches if loader is not None else None)

    @property
    def all_batches(self) -> float | None:
        """Training batches of the run. Not its steps times the accumulation: a last, shorter group is stepped too."""
        return self.epochs * self.batches if self.epochs and self.batches else None

    @property
    def batches_per_step(self) -> float | None:
        """Training batches per optimizer step over an epoch, its last, shorter group included."""
        return self.batches / self.steps_per_epoch if self.batches and self.steps_per_epoch else None

    @property
    def called_at_every_batch(self) -> bool:
        """Whether it is called once per micro-batch under accumulation."""
        per_step, whole = self.cadence.calls_per_step, self.batches_per_step
        return self.micro > 1 and self.cadence.kind == "step" and per_step in (self.micro, whole)

    @property
    def pace(self) -> str:
        """How often it is called, and how that is known where it takes the end of an epoch to see it."""
        if self.cadence.kind != "epoch":
            return self.cadence.text
        if self.cadence.observed:
            return f"{self.cadence.text}, as seen at the end of the first"
        told = ", by the Trainer's interval" if self.scheduler.interval is not None else ""
        return f"{self.cadence.text}{told}; the end of an epoch was not seen"

    @property
    def missed_the_epochs_end(self) -> bool:
        """Whether the end of an epoch was watched and it was not called there, nor in the next one's first steps."""
        boundary = self.run.boundary
        if boundary is None or boundary.outcome != "crossed" or between_epochs(boundary) is None:
            return False
        return not any(isinstance(e, SchedulerStep) and e.scheduler == self.scheduler.id for e in boundary.events)

    def alive_until(self, share: float) -> int | None:
        """The last step whose rate is above this share of the peak; ``None`` when that cannot be said."""
        points = self.projected.points
        top = max((rate for _, rate in points), default=0.0)
        if self.projected.end_rate is None or (self.steps or 0) < 20 or top <= 0:
            return None
        return max((n for n, rate in points if rate > share * top), default=0)


def schedule_on_run(run: Recording, optimizer: Optimizer, scheduler: Scheduler) -> ScheduleOnRun:
    """Lay the schedule over the run: by the trainer's word on its length, else the config's."""
    course = Course(scheduler)
    planned = planned_length(run, optimizer.id)
    projected = projection(run, optimizer.id, course.group, planned=planned)
    return ScheduleOnRun(
        run=run,
        scheduler=scheduler,
        course=course,
        projected=projected,
        steps=planned[0] if planned else None,
        steps_source=planned[1] if planned else "",
        epochs=epochs_of(run, optimizer.id, planned[0] if planned else None),
        steps_per_epoch=steps_per_epoch(run, optimizer.id),
        micro=run.plan.accumulation or accumulation(run, optimizer.id) or 1,
        watched=len(steps_of(run, optimizer.id)),
        cadence=calls_seen(run, scheduler, optimizer.id),
        part=next((p for p in projected.parts if p.scheduler.id == scheduler.id), None),
    )
