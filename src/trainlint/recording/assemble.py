"""Puts the streams of all watched processes together into one Recording."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainlint.recording.codec import decode
from trainlint.recording.schema import SCHEMA, Recording

Line = tuple[str, Any]

#: Tags whose payloads are objects with an identifier, and the field of Recording they end up in.
_KEYED = {
    "root": "roots",
    "parameter": "parameters",
    "optimizer": "optimizers",
    "scheduler": "schedulers",
    "loader": "loaders",
    "shadow": "shadows",
}

#: What a framework says of a scheduler.
_FROM_FRAMEWORK = ("interval", "frequency", "monitor", "steps_per_call")


#: Tags of the parts of a Recording that are written piece by piece: lists grow, other fields are replaced.
_PIECEWISE = ("provenance", "adapters", "replay", "numerics", "samples", "costs")

#: Tags of what holds for the whole run, whenever it was written: how keys were read, what was prevented, what failed.
_WHOLE = frozenset(("config", "prevented", "problem", "shadow", *_PIECEWISE))


@dataclass
class Process:
    """The lines of one process: ``lines`` of the watch, ``after`` of the epoch boundary that followed it."""

    pid: int
    lines: list[Line] = field(default_factory=list)
    after: list[Line] = field(default_factory=list)
    #: What the ``boundary`` lines say, together; empty when there is none.
    boundary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def split(cls, pid: int, lines: Iterable[Line]) -> Process:
        """Nothing of the boundary belongs to the watch, except numbers that were still owed to its events."""
        process = cls(pid)
        seen: set[int] = set()
        for tag, payload in lines:
            if tag == "boundary":
                process.boundary.update(payload)
            elif not process.boundary.get("began"):
                if tag == "event":
                    seen.add(payload["seq"])
                process.lines.append((tag, payload))
            elif tag in _WHOLE or (tag == "event_value" and payload["seq"] in seen):
                process.lines.append((tag, payload))
            else:
                process.after.append((tag, payload))
        return process

    def marks(self, name: str) -> list[dict[str, Any]]:
        return [p for tag, p in self.lines if tag == "mark" and p.get("name") == name]

    @property
    def steps(self) -> int:
        return len(self.marks("step"))

    @property
    def rank(self) -> int:
        for mark in reversed(self.marks("step") + self.marks("parked")):
            if isinstance(mark.get("rank"), int):
                return int(mark["rank"])
        return 0


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of one stream. A line that was cut off by a kill is left out."""
    try:
        text = path.read_bytes()
    except OSError:
        return
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, list) and len(line) == 2 and isinstance(line[0], str):
            yield line[0], line[1]


def read_processes(run_dir: Path) -> list[Process]:
    """All processes that wrote a stream, in order of pid."""
    out = []
    for path in sorted((run_dir / "stream").glob("*.jsonl")):
        if path.stem.isdigit():
            out.append(Process.split(int(path.stem), read_lines(path)))
    return sorted(out, key=lambda p: p.pid)


def assemble(run_dir: Path) -> Recording:
    """A Recording from what the recorder of each process wrote.

    The process that made the most optimizer steps (of several, the lowest rank) is the run; of the others the config
    reads, prevented acts, loads and problems are kept. Config, ending and command are the caller's to add.
    """
    processes = read_processes(run_dir)
    if not processes:
        return Recording()
    main = min(processes, key=lambda p: (tuple(-w for w in _weight(p)), p.rank, p.pid))
    data = assemble_process(main)
    data["boundary"] = assemble_boundary(main, data)
    ranks = {p.rank for p in processes if p.steps}
    program = data.setdefault("program", {})
    program["ranks_seen"] = max(1, len(ranks))
    program["rank"] = main.rank
    for process in processes:
        if process is main:
            continue
        data.setdefault("prevented", []).extend(p for tag, p in process.lines if tag == "prevented")
        data.setdefault("problems", []).extend(p for tag, p in process.lines if tag == "problem")
        if "config" not in data:
            config = last(p for tag, p in process.lines if tag == "config")
            if config:
                data["config"] = config
    data["prevented"] = _distinct(data.get("prevented", []))
    data["problems"] = _distinct(data.get("problems", []))
    return decode(Recording, {"schema": SCHEMA, **data})


def _weight(process: Process) -> tuple[int, int, int]:
    backwards = sum(1 for tag, p in process.lines if tag == "event" and p.get("kind") == "backward")
    return process.steps, backwards, len(process.lines)


def assemble_process(process: Process) -> dict[str, Any]:
    """The JSON form of a Recording from one process's lines."""
    keyed: dict[str, dict[Any, dict[str, Any]]] = {tag: {} for tag in _KEYED}
    frameworks: dict[str, dict[str, Any]] = {}
    program: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    events: dict[int, dict[str, Any]] = {}
    dropped: dict[str, int] = {}
    scheduler_settings: dict[Any, dict[str, Any]] = {}
    moments: dict[tuple[int, int], dict[str, Any]] = {}
    lists: dict[str, list[Any]] = {"measure": [], "prevented": [], "problem": []}
    single: dict[str, Any] = {}
    for tag, payload in process.lines:
        if tag in keyed:
            keyed[tag][payload["id"]] = payload
        elif tag == "event":
            events[payload["seq"]] = payload
        elif tag == "event_value":
            target = events.get(payload["seq"])
            if target is not None:
                target.update(payload)
        elif tag in lists:
            lists[tag].append(payload)
        elif tag == "program":
            program.update(payload)
        elif tag == "plan":
            plan.update({k: v for k, v in payload.items() if v is not None})
        elif tag == "framework":
            frameworks[payload["name"]] = payload
        elif tag == "scheduler_config":
            scheduler_settings[payload["scheduler"]] = payload
        elif tag == "second_moment":
            moments[payload["optimizer"], payload["group"]] = payload
        elif tag == "dropped":
            dropped.update(payload)
        elif tag in ("config", "outsiders"):
            single[tag] = payload
        elif tag in _PIECEWISE:
            _add_to(single.setdefault(tag, {}), payload)
    for number, settings in scheduler_settings.items():
        scheduler = keyed["scheduler"].get(number)
        if scheduler is not None:
            scheduler.update({k: settings[k] for k in _FROM_FRAMEWORK if settings.get(k) is not None})
    data: dict[str, Any] = {name: [keyed[tag][i] for i in sorted(keyed[tag])] for tag, name in _KEYED.items()}
    _mark_training_loaders(data["loaders"], events)
    if "accumulation" not in plan:
        seen = accumulation(events.values())
        if seen is not None:
            plan["accumulation"] = seen
    data.update(
        program=program,
        plan=plan,
        frameworks=list(frameworks.values()),
        events=[events[seq] for seq in sorted(events)],
        events_dropped=dropped,
        steps=lists["measure"],
        second_moments=[moments[key] for key in sorted(moments)],
        prevented=lists["prevented"],
        problems=lists["problem"],
        **single,
    )
    return data


def assemble_boundary(process: Process, watch: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of a Boundary: what followed the watch of the same process, and how it came out."""
    told = process.boundary
    if not told.get("began"):
        steps = process.marks("step")
        complete = bool(steps) and bool(steps[-1].get("done"))
        why = (
            "nothing new was begun after the last watched step" if complete else "the watched steps were not completed"
        )
        return {"outcome": told.get("outcome", "left-out"), "reason": told.get("reason") or why}
    data = assemble_process(Process(process.pid, process.after))
    trained = {loader["id"] for loader in watch["loaders"] if loader["training"]} | set(told.get("training", ()))
    for loader in data["loaders"]:
        loader["training"] = loader["training"] or loader["id"] in trained
    outcome, reason, end = _ending(process)
    if told.get("outcome"):
        outcome, reason = told["outcome"], told.get("reason", "")
    duration = told.get("duration_s")
    if duration is None and end is not None:
        duration = max(0.0, round(end - told["time"], 3))
    return {
        "outcome": outcome,
        "reason": reason,
        "duration_s": duration,
        **{k: told.get(k) for k in ("loader", "batches_delivered", "batches_meant", "next_epoch")},
        **{k: data.get(k) for k in _BOUNDARY_PARTS if data.get(k) is not None},
    }


_BOUNDARY_PARTS = (*(name for name in _KEYED.values() if name != "shadows"), "events", "steps", "outsiders")


def _ending(process: Process) -> tuple[str, str, float | None]:
    """How a boundary ended that the recorder did not end itself: outcome, reason, Unix time."""
    after = Process(process.pid, process.after)
    errors = after.marks("error")
    if errors:
        text = f"{errors[0].get('type')}: {errors[0].get('text')}".removesuffix(": ")
        return "failed", f"the program raised {text}", errors[0].get("time")
    finished = after.marks("finished")
    if finished:
        return "ended", "the program came to its end with this epoch", finished[-1].get("time")
    return "timeout", "the next epoch did not begin in time", None


def accumulation(events: Iterable[dict[str, Any]]) -> int | None:
    """Backwards per optimizer step when one optimizer steps, the same number at every step; else ``None``."""
    counts: list[int] = []
    backwards = 0
    optimizers = set()
    for event in sorted(events, key=lambda e: e["seq"]):
        if event["kind"] == "backward":
            backwards += 1
        elif event["kind"] == "step":
            optimizers.add(event["optimizer"])
            counts.append(backwards)
            backwards = 0
    if len(optimizers) != 1 or not counts or len(set(counts)) != 1 or counts[0] == 0:
        return None
    return counts[0]


def _mark_training_loaders(loaders: list[dict[str, Any]], events: dict[int, dict[str, Any]]) -> None:
    """A loader trains when a backward follows one of its batches before another loader's batch does."""
    current: int | None = None
    training: set[int] = set()
    for seq in sorted(events):
        event = events[seq]
        if event["kind"] == "batch":
            current = event["loader"]
        elif event["kind"] == "backward" and current is not None:
            training.add(current)
    for loader in loaders:
        loader["training"] = loader["id"] in training


def _add_to(part: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if isinstance(value, list) and isinstance(part.get(name), list):
            part[name] = [*part[name], *value]
        else:
            part[name] = value


def last(items: Iterable[Any]) -> Any:
    """The last item or ``None``."""
    found = None
    for item in items:
        found = item
    return found


def _distinct(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: set[str] = set()
    out = []
    for item in items:
        key = json.dumps({k: v for k, v in item.items() if k != "at"}, sort_keys=True)
        if key not in seen:
            seen.add(key)
            out.append(item)
    return out
