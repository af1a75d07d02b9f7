"""Where a program evaluates: batches of a loader that no backward follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    DropoutCall,
    Event,
    LossCall,
    ModeState,
    OptimizerStep,
    Recording,
)

__all__ = ["Evaluation", "evaluations", "whole_timeline"]


@dataclass(frozen=True)
class Evaluation:
    """One pass over a loader that feeds no training, from its first batch until other data or training comes."""

    loader: int
    batches: int
    #: Everything in between, from the modes at its beginning on.
    events: tuple[Event, ...]

    @property
    def began(self) -> int:
        return self.events[0].seq

    @property
    def ended(self) -> int:
        return self.events[-1].seq

    def losses(self) -> list[LossCall]:
        return [e for e in self.events if isinstance(e, LossCall)]

    def dropouts(self) -> list[DropoutCall]:
        return [e for e in self.events if isinstance(e, DropoutCall)]

    def modes(self, root: int) -> list[ModeState]:
        """Modes of one root as they stood between the batches, in order."""
        return [e for e in self.events if isinstance(e, ModeState) and e.root == root]


def whole_timeline(run: Recording) -> tuple[Event, ...]:
    """The events of the first steps and those of the epoch boundary after them."""
    return (*run.events, *run.boundary.events) if run.boundary is not None else run.events


def evaluations(run: Recording) -> list[Evaluation]:
    """The evaluations that were seen, in order.

    A loader counts when at least two of its batches come in a row, a model did something between them, and no backward
    follows before another loader's batch. One that ever delivers a single batch between others feeds something
    together with them (labelled and unlabelled data), and so is none. A loader of one batch counts when a loss was
    computed of it without gradients.
    """
    loaders = (*run.loaders, *(run.boundary.loaders if run.boundary is not None else ()))
    training = {loader.id for loader in loaders if loader.training}
    single = {loader.id for loader in loaders if loader.batches == 1}
    runs = [r for r in _runs(whole_timeline(run)) if r.loader not in training]
    beside = {r.loader for r in runs[:-1] if r.batches == 1} - single
    return [r for r in runs if r.loader not in beside and (_evaluates(r) or (r.loader in single and _scored(r)))]


def _runs(events: Sequence[Event]) -> list[Evaluation]:
    """Batches of one loader with neither a backward nor another loader's batch between them."""
    runs: list[Evaluation] = []
    current: list[Event] = []
    loader: int | None = None
    batches = 0

    def close(used: bool) -> None:
        nonlocal current, loader, batches
        if loader is not None and not used:
            runs.append(Evaluation(loader, batches, tuple(current)))
        current, loader, batches = [], None, 0

    for event in events:
        if isinstance(event, (Backward, OptimizerStep)):
            close(used=isinstance(event, Backward))
            continue
        asked = isinstance(event, BatchFetched) or (isinstance(event, ModeState) and event.when == "batch")
        if asked and event.loader != loader:  # type: ignore[union-attr]
            close(used=False)
            loader = event.loader  # type: ignore[union-attr]
        if loader is not None:
            current.append(event)
            batches += isinstance(event, BatchFetched)
    close(used=False)
    return [r for r in runs if r.batches]


def _evaluates(run: Evaluation) -> bool:
    """Whether a model was at work after a batch and before the next one, not only at the end of a few fetched ahead."""
    fetched = [i for i, e in enumerate(run.events) if isinstance(e, BatchFetched)]
    if len(fetched) < 2:
        return False
    between = run.events[fetched[0] : fetched[-1]]
    tracked = [e.batches_tracked for e in run.events if isinstance(e, ModeState) and e.batches_tracked is not None]
    return any(isinstance(e, (LossCall, DropoutCall)) for e in between) or len(set(tracked)) > 1


def _scored(run: Evaluation) -> bool:
    losses = run.losses()
    return bool(losses) and not any(e.grad_enabled for e in losses)
