"""Where weights came from: the loads that were watched, and what each of them matched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """Where weights came from: the loads that were watched, and what each of them matched."""
