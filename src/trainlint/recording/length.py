"""How long the whole run is meant to be: the trainer's word, else the program's own loops, else config and loader."""

from __future__ import annotations

import itertools
import math

from trainlint.recording.describe import place
from trainlint.recording.projection import planned_steps
from trainlint.recording.schema import Backward, Recording
from trainlint.recording.timeline import attempts_of, of_kind, steps_per_epoch

__all__ = ["epochs_of", "planned_length", "steps_of_loops"]


def planned_length(recording: Recording, optimizer: int) -> tuple[int, str] | None:
    """Optimizer steps of the whole run and who says so, or ``None`` when nobody does.

    Config keys count only for programs without a trainer that says it itself, when the program read the key.
    """
    known = planned_steps(recording)
    if known is not None:
        return known
    looped = steps_of_loops(recording, optimizer)
    if looped is not None:
        return looped
    steps = _value(recording, "max_steps")
    if steps is not None and steps[0] >= 1:
        return int(steps[0]), f"config {steps[1]}"
    epochs = _value(recording, "epochs")
    per_epoch = steps_per_epoch(recording, optimizer)
    if epochs is not None and epochs[0] > 0 and per_epoch:
        return math.ceil(epochs[0] * per_epoch), f"config {epochs[1]} x {per_epoch} optimizer steps"
    return None


def steps_of_loops(recording: Recording, optimizer: int) -> tuple[int, str] | None:
    """Steps that the program's own loops will make, when the length of each is known and none can be left early."""
    found = next((t for t in recording.plan.training_loops if t.optimizer == optimizer), None)
    if found is None or not found.loops:
        return None
    iterations = 1
    for loop in found.loops:
        if loop.iterations is None or loop.may_end_early:
            return None
        iterations *= loop.iterations
    every = _iterations_per_step(recording, optimizer) if found.holds_backward else 1
    if not every or iterations < every:
        return None
    counts = " x ".join(f"{loop.iterations:,} ({place(loop.at)})" for loop in found.loops)
    by = f" / {every} accumulated" if every > 1 else ""
    return iterations // every, f"the program's loops: {counts}{by}"


def _iterations_per_step(recording: Recording, optimizer: int) -> int | None:
    """How often the first watched backward's line was run for each step; ``None`` when that varies."""
    backwards = of_kind(recording, Backward)
    lines = {(b.at.file, b.at.line) if b.at else None for b in backwards}
    edges = [0, *attempts_of(recording, optimizer)]
    if not backwards or len(edges) < 2:
        return None
    first = min(backwards, key=lambda b: b.seq).at
    same = [b.seq for b in backwards if b.at == first or len(lines) == 1]
    counts = {sum(1 for s in same if low < s <= high) for low, high in itertools.pairwise(edges)}
    return counts.pop() if len(counts) == 1 else None


def epochs_of(recording: Recording, optimizer: int, steps: int | None) -> float | None:
    """Epochs of the whole run, ``None`` when not known."""
    if recording.plan.epochs:
        return recording.plan.epochs
    epochs = _value(recording, "epochs")
    if epochs is not None and epochs[0] > 0:
        return epochs[0]
    per_epoch = steps_per_epoch(recording, optimizer)
    return steps / per_epoch if steps and per_epoch else None


def _value(recording: Recording, meaning: str) -> tuple[float, str] | None:
    """The one value that the config gives to a setting, and the key's path; ``None`` when it gives none or several."""
    found: list[tuple[float, str]] = []
    for key in recording.config.keys if recording.config is not None else ():
        # A key that was never read decides nothing; one whose reading was not tracked may.
        if key.meaning == meaning and key.reads != () and isinstance(key.value, (int, float)):
            if not isinstance(key.value, bool):
                found.append((float(key.value), key.path))
    return found[0] if len({value for value, _ in found}) == 1 else None
