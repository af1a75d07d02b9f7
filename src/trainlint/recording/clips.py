"""Gradient clipping in the timeline: for each call, which optimizer's gradients it got and whether they were used."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from trainlint.recording.intervals import Timeline
from trainlint.recording.schema import (
    Backward,
    Clip,
    Optimizer,
    OptimizerStep,
    Recording,
    SourceLine,
    StepMeasurement,
)
from trainlint.recording.timeline import attempts_of, of_kind

__all__ = ["ClipCall", "ClipSite", "clip_sites", "norm_of", "step_after"]


@dataclass(frozen=True)
class ClipCall:
    """One call of a clipping function, beside one optimizer that holds tensors that it got.

    ``when``: ``last`` (between the last backward and the step), ``between`` (further backwards follow before the step),
    ``early`` (no backward came since the step before; one comes after), ``unknown``.
    """

    clip: Clip
    optimizer: Optimizer
    when: str
    #: Measurements of the optimizer's steps before and after the call; ``None``: there was none, or it was skipped.
    before: StepMeasurement | None
    after: StepMeasurement | None
    #: ``seq`` of the steps (or skipped steps) around the call.
    low: int = 0
    high: int | None = None


@dataclass
class ClipSite:
    """All calls from one source line."""

    at: SourceLine | None
    method: str
    clips: list[Clip] = field(default_factory=list)
    #: A call stands here once for each optimizer whose tensors it got.
    calls: list[ClipCall] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        return self.clips[-1].threshold

    @property
    def function(self) -> str:
        return f"clip_grad_{self.method}_"


def clip_sites(run: Recording, timeline: Timeline) -> list[ClipSite]:
    """Clipping by source line, in order. An infinite threshold only measures the norm and is left out."""
    sites: dict[tuple[str, int, str], ClipSite] = {}
    held = {o.id: {i for g in o.groups for i in g.parameters} for o in run.optimizers}
    attempts = {o.id: attempts_of(run, o.id) for o in run.optimizers}
    steps = {o: {s.seq: s.index for s in found} for o, found in timeline.steps.items()}
    backwards = [e.seq for e in of_kind(run, Backward)]
    for clip in of_kind(run, Clip):
        if not math.isfinite(clip.threshold):
            continue
        key = (clip.at.file if clip.at else "", clip.at.line if clip.at else 0, clip.method)
        site = sites.setdefault(key, ClipSite(clip.at, clip.method))
        site.clips.append(clip)
        for optimizer in run.optimizers:
            if held[optimizer.id].isdisjoint(clip.parameters):
                continue
            around = attempts[optimizer.id]
            place = bisect.bisect(around, clip.seq)
            low = around[place - 1] if place else 0
            high = around[place] if place < len(around) else None
            indices = steps.get(optimizer.id, {})
            measured = timeline.measurements.get(optimizer.id, {})
            site.calls.append(
                ClipCall(
                    clip,
                    optimizer,
                    _when(backwards, low, clip.seq, high),
                    measured.get(indices.get(low, -1)),
                    measured.get(indices.get(high, -1)) if high is not None else None,
                    low,
                    high,
                )
            )
    return list(sites.values())


def _when(backwards: list[int], low: int, seq: int, high: int | None) -> str:
    before = bisect.bisect(backwards, seq) - bisect.bisect(backwards, low)
    after = (bisect.bisect(backwards, high) if high is not None else len(backwards)) - bisect.bisect(backwards, seq)
    if not before:
        return "early" if after else "unknown"
    if high is None:
        return "unknown"
    return "between" if after else "last"


def norm_of(measurement: StepMeasurement | None, parameters: Iterable[int] | None = None) -> float | None:
    """Norm of the gradients of some parameters (of all) as a step used them; ``None`` when it was not measured."""
    if measurement is None:
        return None
    wanted = None if parameters is None else set(parameters)
    norms = [
        n
        for i, n in zip(measurement.parameters, measurement.gradient_norm, strict=False)
        if n is not None and (wanted is None or i in wanted)
    ]
    return math.sqrt(sum(n * n for n in norms)) if norms else None


def step_after(run: Recording, timeline: Timeline, seq: int) -> tuple[Optimizer, OptimizerStep] | None:
    """The next step of any optimizer."""
    for event in run.events:
        if isinstance(event, OptimizerStep) and event.seq > seq:
            optimizer = next((o for o in run.optimizers if o.id == event.optimizer), None)
            return (optimizer, event) if optimizer is not None else None
    return None
