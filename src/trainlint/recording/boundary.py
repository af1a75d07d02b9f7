"""Questions about what followed the watched steps: the end of the epoch and the first steps of the next."""

from __future__ import annotations

import dataclasses

from trainlint.recording.describe import plural
from trainlint.recording.schema import Backward, BatchFetched, Boundary, OptimizerStep, Recording


def evaluation_batches(boundary: Boundary) -> int:
    """Batches of loaders that feed no training: what the program evaluated on, of the few that it was given."""
    training = {loader.id for loader in boundary.loaders if loader.training}
    return sum(1 for e in boundary.events if isinstance(e, BatchFetched) and e.loader not in training)


def steps_in_next_epoch(boundary: Boundary) -> int:
    """Optimizer steps after the next epoch's first batch; of several optimizers, those of the busiest."""
    counts: dict[int, int] = {}
    for event in boundary.events:
        if isinstance(event, OptimizerStep) and boundary.next_epoch is not None and event.seq > boundary.next_epoch:
            counts[event.optimizer] = counts.get(event.optimizer, 0) + 1
    return max(counts.values(), default=0)


def between_epochs(boundary: Boundary) -> tuple[int, int] | None:
    """``seq`` of the last backward of the epoch that was ended (0: none in here) and of the next epoch's first step.

    What lies between the two, the program does once per epoch. ``None`` when no next epoch was seen to begin.
    """
    if boundary.next_epoch is None:
        return None
    last = max((e.seq for e in boundary.events if isinstance(e, Backward) and e.seq < boundary.next_epoch), default=0)
    first = next((e.seq for e in boundary.events if isinstance(e, OptimizerStep) and e.seq > boundary.next_epoch), None)
    return None if first is None else (last, first)


def after_the_epoch(run: Recording) -> Recording | None:
    """The run as it stands in the first steps of the next epoch; ``None`` when none were seen.

    Objects as they were at the end of the boundary, and only what happened from the next epoch's first batch on.
    """
    boundary = run.boundary
    if boundary is None or boundary.next_epoch is None or not steps_in_next_epoch(boundary):
        return None
    events = tuple(e for e in boundary.events if e.seq >= (boundary.next_epoch or 0))
    made = {(e.optimizer, e.index) for e in events if isinstance(e, OptimizerStep)}
    return dataclasses.replace(
        _with_objects(run, boundary),
        events=events,
        steps=tuple(m for m in boundary.steps if (m.optimizer, m.index) in made),
        outsiders=boundary.outsiders,
        boundary=None,
    )


def across_the_epoch(run: Recording) -> Recording | None:
    """The watched steps and what followed them as one timeline; ``None`` when nothing followed.

    ``requires_grad`` of a parameter stays what it was at first, ``requires_grad_later`` is what it was at the end.
    """
    boundary = run.boundary
    if boundary is None or not boundary.steps:
        return None
    first = {p.id: p for p in run.parameters}
    parameters = []
    for p in boundary.parameters:
        before = first.get(p.id)
        if before is not None and before.requires_grad != p.requires_grad:
            p = dataclasses.replace(p, requires_grad=before.requires_grad, requires_grad_later=p.requires_grad)
        parameters.append(p)
    return dataclasses.replace(
        _with_objects(run, boundary),
        parameters=tuple(parameters),
        events=(*run.events, *boundary.events),
        steps=(*run.steps, *boundary.steps),
        boundary=None,
    )


def _with_objects(run: Recording, boundary: Boundary) -> Recording:
    return dataclasses.replace(
        run, roots=boundary.roots, parameters=boundary.parameters, optimizers=boundary.optimizers
    )


def text(boundary: Boundary) -> str:
    """``crossed in 1.2 s (evaluation of 2 batches; the next epoch's first 2 steps)``, or why it was not."""
    if boundary.outcome == "left-out":
        return f"not crossed: {boundary.reason}"
    evaluated, steps = evaluation_batches(boundary), steps_in_next_epoch(boundary)
    seen = []
    if evaluated:
        seen.append("evaluation of 1 batch" if evaluated == 1 else f"evaluation of {evaluated} batches")
    if steps:
        seen.append(f"the next epoch's first {plural(steps, 'step')}")
    took = f" in {boundary.duration_s:.1f} s" if boundary.duration_s is not None else ""
    inside = f" ({'; '.join(seen)})" if seen else ""
    if boundary.outcome == "crossed":
        why = f"; {boundary.reason}" if boundary.reason else ""
        return f"crossed{took}{inside}{why}"
    if boundary.outcome == "ended":
        return f"seen up to the end of the program{took}{inside}: {boundary.reason}"
    # What a shortened epoch breaks is trainlint's doing; an evaluation that dies would die at the end of a whole one.
    doubt = "; the epoch was cut short, which may be why" if boundary.outcome == "failed" else ""
    return f"not crossed: {boundary.reason}{inside}{doubt}"
