"""Memory and time of the watched steps, by phase (forward, backward, optimizer step)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Memory and time of the watched steps, by phase (forward, backward, optimizer step)."""
