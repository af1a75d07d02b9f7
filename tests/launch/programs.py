"""Small programs to be watched. They run with ``-S``, so without the recorder, and write the marks themselves."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from trainlint.launch.journal import RunFolder
from trainlint.launch.model import Launch, Watched, WatchOptions
from trainlint.launch.processes import environment_of
from trainlint.launch.supervisor import watch

PRELUDE = """
import json, os, sys, time, signal
_stream = os.path.join(os.environ["TRAINLINT_RUN_DIR"], "stream")

def mark(name, **fields):
    with open(os.path.join(_stream, "%d.jsonl" % os.getpid()), "a") as f:
        f.write(json.dumps(["mark", {"name": name, "time": time.time(), "pid": os.getpid(), **fields}]) + "\\n")

def steps(n, park=True, rank=0):
    mark("armed"); mark("torch"); mark("backward")
    for i in range(n):
        mark("step", optimizer=0, index=i, done=i >= 2, rank=rank)
    if park:
        mark("parked", reason="steps", rank=rank)
        while True:
            time.sleep(1)
"""


class Watching:
    """A :class:`Progress` that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.lines: list[str] = []
        self.steps: list[tuple[int, int, int]] = []
        self.warnings: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def output(self, line: str) -> None:
        self.lines.append(line)

    def step(self, optimizer: int, index: int, wanted: int) -> None:
        self.steps.append((optimizer, index, wanted))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


class Run:
    """One watched run of a fake program in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress = Watching()
        self.run_folder = RunFolder(folder / "state")
        self.run_id = self.run_folder.run_id

    def launch(self, code: str, *arguments: str) -> Launch:
        program = self.folder / "program.py"
        program.write_text(PRELUDE + textwrap.dedent(code), encoding="utf-8")
        return self.command(sys.executable, "-S", str(program), *arguments)

    def command(self, *words: str) -> Launch:
        return Launch(1, "told by the test", words, self.folder, interpreter=sys.executable)

    def __call__(self, code: str | Launch, timeout_s: float = 60.0, **options: object) -> Watched:
        launch = code if isinstance(code, Launch) else self.launch(code)
        try:
            return watch(launch, WatchOptions(timeout_s=timeout_s, **options), self.run_folder, self.progress)  # type: ignore[arg-type]
        finally:
            left = survivors(self.run_id)
            self.run_folder.close()
            assert not left, f"processes of the run outlived it: {left}"


def survivors(run_id: str) -> list[int]:
    """Processes that carry the id of a run, found without the code under test's idea of a tree."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            if environment_of(int(name)).get(b"TRAINLINT_RUN_ID") == run_id.encode():
                try:
                    state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if state != "Z":
                    found.append(int(name))
    return found


def gone(pids: Sequence[int], patience_s: float = 5.0) -> bool:
    """Whether all these processes are dead."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        alive = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                alive.append(pid)
        if not alive:
            return True
        time.sleep(0.05)
    return False
