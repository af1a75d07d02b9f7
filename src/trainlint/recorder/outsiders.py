"""Trainable parameters that no optimizer holds: does a gradient reach them, does anything move them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import measure
from .watch import Session


class Outsiders:
    """Looked at from the first optimizer step to the end of the watch."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tensors: dict[int, Any] = {}
        self.samples: measure.Samples | None = None
        self.bits: dict[int, int | None] = {}
        self.gradients: dict[int, float] = {}

    def begin(self, holds: Callable[[], set[int]]) -> None:
        """Find them, once the roots and the optimizers are known. Later calls do nothing."""
        if self.samples is not None:
            return
        held = holds()
        self.tensors = {
            n: p
            for n, p in self.session.modules.parameters.items()
            if p.requires_grad and n not in held and p.device.type != "meta"
        }
        items = list(self.tensors.items())
        self.samples = measure.Samples(items)
        self.bits = measure.bits(items)

    def look(self) -> None:
        """After a step: note the gradients that have arrived."""
        for number, norm in measure.gradient_norms(list(self.tensors.items())).items():
            if norm is not None:
                self.gradients[number] = norm
                self.session.modules.gradient_seen.add(number)

    def close(self, held: set[int]) -> None:
        """Write those that no optimizer came to hold in the meantime."""
        if self.samples is None or not self.tensors:
            return
        items = [(n, p) for n, p in self.tensors.items() if n not in held]
        numels = {n: measure.local(p).numel() for n, p in self.tensors.items()}
        _, changed = self.samples.compare(measure.Samples(list(self.tensors.items())), numels)
        still = measure.bits([(n, p) for n, p in items if not changed.get(n) and self.bits.get(n) is not None])
        self.session.recorder.emit(
            "outsiders",
            {
                "parameters": [n for n, _ in items],
                "gradient_norm": [self.gradients.get(n) for n, _ in items],
                "moved": [self._moved(n, changed, still) for n, _ in items],
            },
        )

    def _moved(self, number: int, changed: dict[int, float], still: dict[int, int | None]) -> bool | None:
        """Proven by the sample when it moved, by all bits when it did not."""
        if changed.get(number, 0.0) > 0:
            return True
        before = self.bits.get(number)
        return None if before is None else still.get(number) != before
