"""Reads what the child of an experiment wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainlint.recording.assemble import read_processes
from trainlint.recording.codec import decode
from trainlint.recording.schema import ExperimentLoss, ExperimentPoint

__all__ = ["Told", "read"]


@dataclass(frozen=True)
class Told:
    """The ``experiment`` lines of the process that made the most steps."""

    points: tuple[ExperimentPoint, ...] = ()
    ended: str = ""
    reason: str = ""
    held_still: tuple[str, ...] = ()
    repeated_by: str = ""
    different_batches: int | None = None
    program_rate: float | None = None
    loss: ExperimentLoss | None = None
    problems: tuple[str, ...] = field(default=())


def read(run_dir: Path) -> Told:
    """Everything that the experiment's processes wrote; empty when none came so far."""
    best: dict[str, Any] = {}
    problems: list[str] = []
    order: tuple[int, int] = (0, 0)
    for process in read_processes(run_dir):
        problems += [f"{p.get('where')}: {p.get('error')}" for tag, p in process.lines if tag == "problem"]
        told: dict[str, Any] = {"points": []}
        for tag, payload in process.lines:
            if tag == "experiment":
                told["points"] += payload.get("points", [])
                told.update({k: v for k, v in payload.items() if k != "points"})
        rank = (-len(told["points"]), process.rank)
        if len(told) > 1 and (not best or rank < order):
            best, order = told, rank
    loss = best.get("loss")
    return Told(
        points=tuple(decode(ExperimentPoint, p) for p in best.get("points", ())),
        ended=best.get("ended") or "",
        reason=best.get("reason") or "",
        held_still=tuple(best.get("held_still") or ()),
        repeated_by=best.get("repeated_by") or "",
        different_batches=best.get("different_batches"),
        program_rate=best.get("program_rate"),
        loss=decode(ExperimentLoss, loss) if loss else None,
        problems=tuple(problems),
    )
