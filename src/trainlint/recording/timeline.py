"""Questions that checks and cards ask of the timeline, answered once.

Pure functions over a :class:`~trainlint.recording.schema.Recording`; events are in the order of ``seq``.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TypeVar

from trainlint.recording.schema import Backward, BatchFetched, Loader, OptimizerStep, Recording, ScalerEvent

E = TypeVar("E")


def of_kind(recording: Recording, kind: type[E]) -> list[E]:
    """The events of one class, in order."""
    return [event for event in recording.events if type(event) is kind]


def steps_of(recording: Recording, optimizer: int) -> list[OptimizerStep]:
    """The steps of one optimizer, in order."""
    return [step for step in of_kind(recording, OptimizerStep) if step.optimizer == optimizer]


def attempts_of(recording: Recording, optimizer: int) -> list[int]:
    """``seq`` of every step of one optimizer that happened or that a GradScaler skipped."""
    seqs = [step.seq for step in steps_of(recording, optimizer)]
    seqs += [
        event.seq
        for event in of_kind(recording, ScalerEvent)
        if event.call == "step" and event.skipped and event.optimizer in (optimizer, None)
    ]
    return sorted(seqs)


def accumulation(recording: Recording, optimizer: int) -> int | None:
    """Backwards per optimizer step, as watched (the median); ``None`` when no step or no backward was seen.

    A program that calls backward once per loss has several per batch: this counts backwards, not batches. Where
    optimizers take turns (a GAN), a backward belongs to the step that comes next.
    """
    backwards = [event.seq for event in of_kind(recording, Backward)]
    others = [step.seq for step in of_kind(recording, OptimizerStep) if step.optimizer != optimizer]
    counts = []
    for low, high in itertools.pairwise([0, *attempts_of(recording, optimizer)]):
        last = max((b for b in backwards if low < b <= high), default=low)
        # A step of another optimizer between this step's backwards ends what came before it.
        start = max((s for s in others if low < s < last), default=low)
        counts.append(sum(1 for b in backwards if start < b <= high))
    return int(statistics.median_low(counts)) or None if counts else None


def batches_per_step(recording: Recording, optimizer: int) -> int | None:
    """Training batches fetched per optimizer step, as watched; ``None`` when no loader was seen feeding the training.

    Counted between steps, because loaders are read ahead before the first (accelerate fetches one batch early).
    0 when several steps share a batch.
    """
    training = {loader.id for loader in recording.loaders if loader.training}
    seqs = [event.seq for event in of_kind(recording, BatchFetched) if event.loader in training]
    steps = attempts_of(recording, optimizer)
    if len(training) != 1 or not seqs or not steps:
        return None
    return _between(recording, optimizer, seqs, from_first=len(steps) == 1)


def _between(recording: Recording, optimizer: int, seqs: list[int], *, from_first: bool = True) -> int:
    steps = attempts_of(recording, optimizer)
    edges = [0, *steps] if from_first else steps
    counts = [sum(1 for s in seqs if low < s <= high) for low, high in itertools.pairwise(edges)]
    return int(statistics.median_low(counts)) if counts else 0


def training_loader(recording: Recording) -> Loader | None:
    """The loader that feeds the training, when there is exactly one."""
    loaders = [loader for loader in recording.loaders if loader.training]
    return loaders[0] if len(loaders) == 1 else None


def steps_per_epoch(recording: Recording, optimizer: int) -> int | None:
    """Optimizer steps in one epoch, from the length of the training loader and the watched accumulation.

    ``None`` also when several steps were made on one batch: nobody knows how many more would follow.
    """
    loader = training_loader(recording)
    batches = recording.plan.batches_per_epoch or (loader.batches if loader else None)
    if not batches:
        return None
    per_step = recording.plan.accumulation or batches_per_step(recording, optimizer)
    if per_step == 0:
        return None
    per_step = per_step or 1
    # A last, smaller group of micro-batches is stepped too by Lightning and transformers.
    return max(1, math.ceil(batches / per_step))
