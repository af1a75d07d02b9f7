"""One extra eager forward over the last watched batch, with RNG, buffers and modes put back afterwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replay:
    """One extra eager forward over the last watched batch, with RNG, buffers and modes put back afterwards."""
