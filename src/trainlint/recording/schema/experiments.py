"""Experiments that were made beside the watched run (``--deep``), each in a child of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One experiment: the user's own program again, with some things held still or changed."""

    #: ``overfit`` or ``lr-range``.
    name: str
    #: ``done``, ``failed`` or ``left-out``.
    outcome: str = "left-out"
    #: Why it failed or was left out.
    reason: str = ""
    duration_s: float | None = None
