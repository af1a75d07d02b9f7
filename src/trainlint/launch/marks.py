"""Follows the streams of a watched program's processes for the marks that are meant for the supervisor."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TAG = b'["mark"'


@dataclass
class Worker:
    """One Python process of the program, as its marks tell. Times are ``time.monotonic()`` seconds."""

    pid: int
    armed: bool = False
    torch: bool = False
    backward: bool = False
    finished: bool = False
    rank: int = 0
    #: Steps by optimizer number.
    steps: dict[int, int] = field(default_factory=dict)
    done_at: float | None = None
    closed: bool = False
    #: It passes the end of its epoch, which may take ``boundary_budget_s`` seconds.
    boundary_at: float | None = None
    boundary_budget_s: float = 0.0
    parked: str | None = None
    parked_at: float | None = None
    last_growth: float = 0.0
    #: Unix times of its last two steps, for the length of a step.
    step_times: list[float] = field(default_factory=list)
    argv: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return self.backward or bool(self.steps)

    @property
    def step_s(self) -> float:
        """Seconds between the last two steps, 0 when unknown."""
        return self.step_times[-1] - self.step_times[-2] if len(self.step_times) > 1 else 0.0


@dataclass(frozen=True)
class Failure:
    """An exception that ended a process. ``time`` is Unix time."""

    pid: int
    time: float
    type: str
    text: str
    traceback: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A step that was just seen."""

    pid: int
    optimizer: int
    index: int


class Marks:
    """All streams of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[str, int] = {}
        self._rest: dict[str, bytes] = {}
        self.workers: dict[int, Worker] = {}
        self.failures: list[Failure] = []
        #: Unix time of the first optimizer step.
        self.first_step: float | None = None
        self.seen_torch = False
        self.seen_backward = False

    def read(self) -> list[Step]:
        """Read what was written since the last call; the new steps."""
        new: list[Step] = []
        try:
            entries = [e for e in os.scandir(self._folder) if e.name.endswith(".jsonl")]
        except OSError:
            return new
        for entry in sorted(entries, key=lambda e: e.name):
            try:
                size = entry.stat().st_size
                offset = self._offsets.get(entry.name, 0)
                if size <= offset:
                    continue
                with open(entry.path, "rb") as file:
                    file.seek(offset)
                    data = file.read(1 << 24)
            except OSError:
                continue
            self._offsets[entry.name] = offset + len(data)
            pid = entry.name.partition(".")[0]
            if not pid.isdigit():
                continue
            worker = self.workers.setdefault(int(pid), Worker(int(pid)))
            worker.last_growth = time.monotonic()
            *lines, rest = (self._rest.pop(entry.name, b"") + data).split(b"\n")
            if rest:
                self._rest[entry.name] = rest
            for line in lines:
                if line.startswith(_TAG):
                    self._mark(line, worker, new)
        return new

    def _mark(self, line: bytes, worker: Worker, new: list[Step]) -> None:
        try:
            _, payload = json.loads(line)
            name = payload["name"]
        except (ValueError, TypeError, KeyError):
            return
        now = time.monotonic()
        if isinstance(payload.get("rank"), int):
            worker.rank = payload["rank"]
        if name == "armed":
            # An exec keeps the process id: the interpreter that is running now is the one that counts.
            worker.armed, worker.finished = True, False
            worker.argv = tuple(str(a) for a in payload.get("argv") or ())
        elif name == "torch":
            worker.torch = self.seen_torch = True
        elif name == "backward":
            worker.backward = self.seen_backward = True
        elif name == "step":
            self._step(payload, worker, now, new)
        elif name == "closed":
            worker.closed = True
        elif name == "boundary":
            worker.boundary_at, worker.boundary_budget_s = now, _number(payload.get("budget_s"))
        elif name == "parked":
            worker.parked, worker.parked_at = str(payload.get("reason", "steps")), now
        elif name == "finished":
            worker.finished = True
        elif name == "error":
            lines = tuple(str(text) for text in payload.get("traceback") or ())
            self.failures.append(
                Failure(
                    worker.pid, _number(payload.get("time")), str(payload.get("type")), str(payload.get("text")), lines
                )
            )

    def _step(self, payload: dict[str, Any], worker: Worker, now: float, new: list[Step]) -> None:
        try:
            optimizer, index = int(payload["optimizer"]), int(payload["index"])
        except (KeyError, TypeError, ValueError):
            return
        when = _number(payload.get("time")) or time.time()
        worker.steps[optimizer] = max(worker.steps.get(optimizer, 0), index + 1)
        worker.step_times = [*worker.step_times[-1:], when]
        if self.first_step is None or when < self.first_step:
            self.first_step = when
        if payload.get("done") and worker.done_at is None:
            worker.done_at = now
        new.append(Step(worker.pid, optimizer, index))

    @property
    def trainers(self) -> list[Worker]:
        """Processes that made a backward or a step."""
        return [worker for worker in self.workers.values() if worker.trains]

    @property
    def most_steps(self) -> int:
        return max((n for worker in self.workers.values() for n in worker.steps.values()), default=0)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
