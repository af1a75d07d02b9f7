"""What led to each optimizer step: the stretch of the timeline between one step and the one before it.

Several optimizers, closures and several backwards before one step make bare order meaningless; an interval says which
backwards, clearings and fetches lie between two steps of the *same* optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    Clip,
    Event,
    Forward,
    OptimizerStep,
    Recording,
    ScalerEvent,
    SourceLine,
    StepMeasurement,
    ZeroGrad,
)

__all__ = ["Interval", "Timeline", "clears", "new_data", "same_line"]


@dataclass(frozen=True)
class Interval:
    """Everything after the previous step of an optimizer up to and including this one."""

    step: OptimizerStep
    #: ``seq`` of the previous step of the same optimizer, 0 before its first.
    after: int
    events: tuple[Event, ...]
    measurement: StepMeasurement | None

    @property
    def first(self) -> bool:
        return self.after == 0

    def backwards(self) -> list[Backward]:
        return [e for e in self.events if isinstance(e, Backward)]

    def clearings(self) -> list[ZeroGrad]:
        return [e for e in self.events if isinstance(e, ZeroGrad)]

    def clips(self) -> list[Clip]:
        return [e for e in self.events if isinstance(e, Clip)]

    def between(self, low: int, high: int) -> list[Event]:
        """Events with ``low < seq < high``."""
        return [e for e in self.events if low < e.seq < high]

    def had_gradient(self) -> bool | None:
        """Whether the step found any gradient that is not exactly zero; ``None`` when it was not measured."""
        if self.measurement is None or not self.measurement.gradient_norm:
            return None
        return any(norm for norm in self.measurement.gradient_norm)

    def moved(self) -> bool | None:
        """Whether the step changed any parameter; ``None`` when it was not measured."""
        if self.measurement is None or not self.measurement.changed:
            return None
        return any(c is not None and c > 0 for c in self.measurement.changed)

    def rate(self, group: int = 0) -> float | None:
        return self.step.rates[group] if group < len(self.step.rates) else None


class Timeline:
    """A recording's events and measurements, indexed for checks."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.events = recording.events
        self.steps: dict[int, list[OptimizerStep]] = {}
        for event in recording.events:
            if isinstance(event, OptimizerStep):
                self.steps.setdefault(event.optimizer, []).append(event)
        self.measurements: dict[int, dict[int, StepMeasurement]] = {}
        for m in recording.steps:
            self.measurements.setdefault(m.optimizer, {})[m.index] = m

    def intervals(self, optimizer: int) -> list[Interval]:
        """The intervals of one optimizer, in order."""
        out = []
        after = 0
        for step in self.steps.get(optimizer, []):
            events = tuple(e for e in self.events if after < e.seq <= step.seq)
            out.append(Interval(step, after, events, self.measurements.get(optimizer, {}).get(step.index)))
            after = step.seq
        return out

    def backwards(self) -> list[Backward]:
        return [e for e in self.events if isinstance(e, Backward)]

    def skipped_steps(self) -> list[ScalerEvent]:
        """Steps that a GradScaler did not take."""
        return [e for e in self.events if isinstance(e, ScalerEvent) and e.call == "step" and e.skipped]

    def rates(self, optimizer: int) -> list[tuple[float, ...]]:
        return [step.rates for step in self.steps.get(optimizer, [])]

    def rate_of_parameters(self, optimizer: int, groups: Mapping[int, int], index: int) -> dict[int, float | None]:
        """Rate of each parameter (``groups``: parameter -> group) that a step of an optimizer used."""
        step = next((s for s in self.steps.get(optimizer, []) if s.index == index), None)
        if step is None:
            return dict.fromkeys(groups, None)
        rates = step.scheduled_rates or step.rates
        return {p: rates[g] if g < len(rates) else None for p, g in groups.items()}


def new_data(interval: Interval, a: Backward, b: Backward) -> bool | None:
    """Whether the second of two backwards had data of its own: a batch fetched since, or another input of the model.

    ``None``: not known. Inputs are seen only without loaders, and from the first backward of the program on.
    """
    if any(isinstance(e, BatchFetched) for e in interval.between(a.seq, b.seq)):
        return True
    forwards = [e for e in interval.events if isinstance(e, Forward) and e.grad_enabled]
    first = [e.fingerprint for e in forwards if e.seq < a.seq][-1:]
    second = [e.fingerprint for e in forwards if a.seq < e.seq < b.seq][-1:]
    if not first or not second or first[0] is None or second[0] is None:
        return None
    return first[0] != second[0]


def clears(event: Event, optimizer: int, roots: set[int | None]) -> bool:
    """Whether an event clears gradients that an optimizer would have used, and there were some."""
    if not isinstance(event, ZeroGrad) or event.had_gradients == 0:
        return False
    if event.optimizer is not None:
        return event.optimizer == optimizer
    return event.root is None or event.root in roots


def same_line(events: list[Backward]) -> bool:
    """Whether all were called from one source line (all from nowhere known counts too)."""
    return len({_line(e.at) for e in events}) <= 1


def _line(at: SourceLine | None) -> tuple[str, int] | None:
    return (at.file, at.line) if at is not None else None
