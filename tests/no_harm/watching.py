"""Runs real child programs under the file guard and compares file trees before and after."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainlint.recorder
from trainlint.launch.journal import RestoreResult, RunFolder
from trainlint.recorder import trackers
from trainlint.recorder.settings import Settings

BOOTSTRAP = Path(trainlint.recorder.__file__).parent / "bootstrap"


def snapshot(root: Path, *, inodes: bool = True, directory_times: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything of a tree that a user could miss: kind, mode, content, times, inode."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder, directories, names in os.walk(root):
        for name in [*directories, *names, ""]:
            path = os.path.join(folder, name) if name else folder
            st = os.lstat(path)
            if stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(st.st_mode):
                content = hashlib.sha1(Path(path).read_bytes()).hexdigest()
            else:
                content = ""
            times = st.st_mtime_ns if directory_times or not stat.S_ISDIR(st.st_mode) else 0
            found[os.path.relpath(path, root)] = (oct(st.st_mode), content, times, st.st_ino if inodes else 0)
    return found


def environment(run: RunFolder) -> dict[str, str]:
    settings = Settings(
        run_dir=str(run.path),
        run_id=run.run_id,
        supervisor=os.getpid(),
        started_ns=run.started_ns,
        started=run.started_ns / 1e9,
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRAINLINT_")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # programs write their __pycache__: that is part of what is tested
    env.update(settings.to_environment())
    env["PYTHONPATH"] = str(BOOTSTRAP)
    env.update(trackers.environment(str(run.path), env))
    env["OMP_NUM_THREADS"] = "1"
    return env


@dataclass
class Outcome:
    """What the program printed, and how it ended."""

    out: str
    err: str
    code: int


class World:
    """A project folder, a state folder, and one watched run."""

    def __init__(self, tmp: Path, python: str = sys.executable) -> None:
        self.project = tmp / "project"
        self.project.mkdir()
        self.state = tmp / "state"
        self.python = python
        self.run = RunFolder(self.state)

    def file(self, name: str, content: str | bytes = "original", mode: int = 0o640) -> Path:
        path = self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        os.utime(path, ns=(1_600_000_000_000_000_000, 1_600_000_000_000_000_123))
        return path

    def start(self, program: str, **more: Any) -> subprocess.Popen[str]:
        """Start ``program`` (Python source) in the project folder. The source stands outside the project."""
        source = self.run.path.parent.parent / f"program-{self.run.run_id}.py"
        source.write_text(textwrap.dedent(program))
        return subprocess.Popen(
            [self.python, str(source)],
            cwd=self.project,
            env={**environment(self.run), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def watch(self, program: str, **more: Any) -> Outcome:
        with self.start(program, **more) as child:
            out, err = child.communicate(timeout=120)
        return Outcome(out, err, child.returncode)

    def prevented(self) -> set[tuple[str, str]]:
        """(action, path relative to the project) of every line in the streams."""
        import json

        found = set()
        for stream in (self.run.path / "stream").glob("*.jsonl"):
            for line in stream.read_text().splitlines():
                tag, payload = json.loads(line)
                if tag == "prevented":
                    target = payload["target"]
                    if target.startswith(str(self.project)):
                        target = os.path.relpath(target, self.project)
                    found.add((payload["action"], target))
        return found

    def problems(self) -> list[str]:
        import json

        lines = [
            json.loads(line)
            for stream in (self.run.path / "stream").glob("*.jsonl")
            for line in stream.read_text().splitlines()
        ]
        return [str(payload) for tag, payload in lines if tag == "problem" and "guard" in payload["where"]]

    def close(self) -> RestoreResult:
        return self.run.close()
