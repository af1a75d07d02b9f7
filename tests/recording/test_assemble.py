"""Streams of several processes become one recording; what is broken or cut off is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainlint.recording import Recording
from trainlint.recording.assemble import assemble
from trainlint.recording.schema import Backward, LossCall


def stream(run_dir: Path, pid: int, *lines: tuple[str, Any], tail: bytes = b"") -> None:
    folder = run_dir / "stream"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{pid}.jsonl").write_bytes(text.encode() + tail)


def step(rank: int, index: int) -> tuple[str, Any]:
    return "mark", {"name": "step", "rank": rank, "index": index}


def optimizer(number: int, name: str) -> tuple[str, Any]:
    return "optimizer", {"id": number, "class_name": name}


def event(seq: int, kind: str, **fields: Any) -> tuple[str, Any]:
    return "event", {"seq": seq, "kind": kind, "time_s": 0.0, **fields}


def test_nothing_recorded(tmp_path: Path) -> None:
    assert assemble(tmp_path) == Recording()


def test_the_process_that_steps_is_the_run_and_the_lowest_rank_of_several(tmp_path: Path) -> None:
    stream(tmp_path, 10, optimizer(0, "Launcher"))
    stream(tmp_path, 11, step(1, 0), optimizer(0, "RankOne"))
    stream(tmp_path, 12, step(0, 0), optimizer(0, "RankZero"))
    run = assemble(tmp_path)
    assert [o.class_name for o in run.optimizers] == ["RankZero"]
    assert (run.program.rank, run.program.ranks_seen) == (0, 2)


def test_later_lines_win_and_values_come_later(tmp_path: Path) -> None:
    stream(
        tmp_path, 1,
        optimizer(0, "Early"),
        event(2, "backward"),
        event(1, "loss", function="mse_loss"),
        optimizer(0, "Late"),
        ("event_value", {"seq": 2, "value": 0.5}),
        ("program", {"torch": "2.6"}),
        ("program", {"device": "cpu"}),
    )  # fmt: skip
    run = assemble(tmp_path)
    assert [o.class_name for o in run.optimizers] == ["Late"]
    assert [type(e) for e in run.events] == [LossCall, Backward]
    assert isinstance(run.events[1], Backward)
    assert run.events[1].value == 0.5
    assert (run.program.torch, run.program.device) == ("2.6", "cpu")


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    stream(tmp_path, 1, optimizer(0, "SGD"), tail=b'["optimizer", {"id": 1, "cla')
    assert [o.class_name for o in assemble(tmp_path).optimizers] == ["SGD"]


def test_prevented_acts_of_all_processes_once_each(tmp_path: Path) -> None:
    act = ("prevented", {"action": "delete", "target": "/out"})
    stream(tmp_path, 1, act, step(0, 0))
    stream(tmp_path, 2, act, ("prevented", {"action": "overwrite", "target": "/log"}))
    assert {(p.action, p.target) for p in assemble(tmp_path).prevented} == {("delete", "/out"), ("overwrite", "/log")}


def test_config_reads_of_the_launcher_are_kept_when_the_worker_saw_none(tmp_path: Path) -> None:
    config = {"kind": "yaml", "keys": [{"path": "lr", "value": 0.1, "type": "float"}], "tracked_by": "yaml.safe_load"}
    stream(tmp_path, 1, ("config", config))
    stream(tmp_path, 2, step(0, 0))
    found = assemble(tmp_path).config
    assert found is not None
    assert [k.path for k in found.keys] == ["lr"]


def test_training_loader_and_accumulation(tmp_path: Path) -> None:
    lines: list[tuple[str, Any]] = [("loader", {"id": 0}), ("loader", {"id": 1}), event(1, "batch", loader=1)]
    seq = 2
    for _ in range(2):
        for _ in range(4):
            lines += [event(seq, "batch", loader=0), event(seq + 1, "backward")]
            seq += 2
        lines.append(event(seq, "step", optimizer=0, index=0))
        seq += 1
    stream(tmp_path, 1, *lines)
    run = assemble(tmp_path)
    assert {loader.id: loader.training for loader in run.loaders} == {0: True, 1: False}
    assert run.plan.accumulation == 4
