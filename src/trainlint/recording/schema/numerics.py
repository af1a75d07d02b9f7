"""What the numbers of the run did: rounding, loss scale, values that are not finite, memory never written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """What the numbers of the run did: rounding, loss scale, values that are not finite, memory never written."""
