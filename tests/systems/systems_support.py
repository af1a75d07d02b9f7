"""Running ``trainlint check`` on a real program in another environment, and looking at what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Checked:
    exit_code: int
    report: dict[str, Any]
    stderr: str

    @property
    def findings(self) -> list[dict[str, Any]]:
        return [f for f in self.report["findings"] if not f["suppressed"]]

    def strong(self) -> Counter[tuple[str, str]]:
        """(code, severity) of the findings at warning or above."""
        return Counter((f["code"], f["severity"]) for f in self.findings if f["severity"] != "info")

    def of(self, code: str) -> list[dict[str, Any]]:
        return [f for f in self.findings if f["code"] == code]

    def about(self, code: str, word: str) -> dict[str, Any]:
        """The one finding of ``code`` that points at, or speaks of, ``word``."""
        found = [f for f in self.of(code) if word in json.dumps(f)]
        pointing = [f for f in found if ((f["location"] or {}).get("key") or "").endswith(word)] or found
        assert len(pointing) == 1, f"{len(pointing)} findings of {code} about {word}:\n{self.explain()}"
        return pointing[0]

    def explain(self) -> str:
        lines = [f"exit {self.exit_code}"]
        lines += [f"{f['code']} {f['severity']}: {f['message']}" for f in self.report["findings"]]
        lines += [f"{v['code']} {v['verdict']}: {v['reason']}" for v in self.report["verdicts"]]
        return "\n".join([*lines, self.stderr[-2000:]])


def check(
    command: Sequence[str | Path], cwd: Path, *, config: Path | str | None = None, options: Sequence[str] = (),
    timeout_s: float = 300.0, env: dict[str, str] | None = None,
) -> Checked:  # fmt: skip
    """Run ``trainlint check [config] --format json [options] -- command`` in ``cwd``."""
    line = [sys.executable, "-m", "trainlint", "check", *([str(config)] if config else []), "--format", "json"]
    line += [*options, "--", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   **(env or {})}  # fmt: skip
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(
            f"no report, exit {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        ) from None
    return Checked(done.returncode, report, done.stderr)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below ``folder``: mode, time of last change, content. Bytecode caches are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        state = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (state.st_mode, 0 if path.is_dir() else state.st_mtime_ns, content)
    return found


def processes_mentioning(text: str) -> list[str]:
    """Command lines of living processes that contain ``text`` (this one left out)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in line and state != "Z":
            found.append(f"{entry.name} {line}")
    return found
