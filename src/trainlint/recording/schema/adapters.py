"""Adapters on a model (LoRA and its relatives), and what a save of the model would leave out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Adapters:
    """Adapters on a model (LoRA and its relatives), and what a save of the model would leave out."""
