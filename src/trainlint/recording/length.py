"""How long the whole run is meant to be, by the trainer's word, else by the config's keys and the loader's length."""

from __future__ import annotations

import math

from trainlint.recording.projection import planned_steps
from trainlint.recording.schema import Recording
from trainlint.recording.timeline import steps_per_epoch

__all__ = ["epochs_of", "planned_length"]


def planned_length(recording: Recording, optimizer: int) -> tuple[int, str] | None:
    """Optimizer steps of the whole run and who says so, or ``None`` when nobody does.

    Config keys count only for programs without a trainer that says it itself, when the program read the key.
    """
    known = planned_steps(recording)
    if known is not None:
        return known
    steps = _value(recording, "max_steps")
    if steps is not None and steps[0] >= 1:
        return int(steps[0]), f"config {steps[1]}"
    epochs = _value(recording, "epochs")
    per_epoch = steps_per_epoch(recording, optimizer)
    if epochs is not None and epochs[0] > 0 and per_epoch:
        return math.ceil(epochs[0] * per_epoch), f"config {epochs[1]} x {per_epoch} optimizer steps"
    return None


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
