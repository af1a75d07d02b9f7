"""How long the whole run is meant to be, by the trainer's word, else by the config's keys and the loader's length."""

from __future__ import annotations

import math

from trainlint.recording.projection import planned_steps
from trainlint.recording.schema import Recording
from trainlint.recording.timeline import steps_per_epoch

__all__ = ["epochs_of", "planned_length"]

#: Last names of keys, as programs call them. Only numbers under exactly one of these names are believed.
_EPOCHS = ("epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "train_epochs", "total_epochs")
_STEPS = (
    "max_steps",
    "total_steps",
    "train_steps",
    "num_train_steps",
    "num_training_steps",
    "max_train_steps",
    "max_iters",
    "num_iterations",
    "total_iters",
    "max_iterations",
)


def planned_length(recording: Recording, optimizer: int) -> tuple[int, str] | None:
    """Optimizer steps of the whole run and who says so, or ``None`` when nobody does.

    Config keys count only for programs without a trainer that says it itself, when the program read the key.
    """
    known = planned_steps(recording)
    if known is not None:
        return known
    steps = _value(recording, _STEPS)
    if steps is not None and steps[0] >= 1:
        return int(steps[0]), f"config {steps[1]}"
    epochs = _value(recording, _EPOCHS)
    per_epoch = steps_per_epoch(recording, optimizer)
    if epochs is not None and epochs[0] > 0 and per_epoch:
        return math.ceil(epochs[0] * per_epoch), f"config {epochs[1]} x {per_epoch} optimizer steps"
    return None


def epochs_of(recording: Recording, optimizer: int, steps: int | None) -> float | None:
    """Epochs of the whole run, ``None`` when not known."""
    if recording.plan.epochs:
        return recording.plan.epochs
    epochs = _value(recording, _EPOCHS)
    if epochs is not None and epochs[0] > 0:
        return epochs[0]
    per_epoch = steps_per_epoch(recording, optimizer)
    return steps / per_epoch if steps and per_epoch else None


def _value(recording: Recording, names: tuple[str, ...]) -> tuple[float, str] | None:
    found: list[tuple[float, str]] = []
    for key in recording.config.keys if recording.config is not None else ():
        if key.path.rpartition(".")[2].lower() not in names or isinstance(key.value, bool):
            continue
        # A key that was never read decides nothing; one whose reading was not tracked may.
        if isinstance(key.value, (int, float)) and key.reads != ():
            found.append((float(key.value), key.path))
    values = {v for v, _ in found}
    return found[0] if len(values) == 1 else None
