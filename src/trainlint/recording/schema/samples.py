"""The samples that the data loaders really delivered, by hashes of their values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """The samples that the data loaders really delivered, by hashes of their values."""
