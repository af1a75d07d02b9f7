"""Runs a small program as a watched child, without the supervisor, and assembles what it recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import trainlint.recorder.settings as recorder_settings
from trainlint.recorder.settings import Settings
from trainlint.recording.assemble import assemble
from trainlint.recording.schema import Recording

BOOTSTRAP = Path(recorder_settings.__file__).parent / "bootstrap"


def watch(
    source: str,
    folder: Path,
    *,
    steps: int = 3,
    backward_cap: int = 200,
    limit_s: float = 120,
    boundary: bool = True,
) -> Recording:
    """Run the source text as a program until it parks or exits; return what was recorded.

    What the program printed is in ``folder/output``.
    """
    program = folder / "program.py"
    program.write_text(textwrap.dedent(source), encoding="utf-8")
    run_dir = folder / "run"
    (run_dir / "stream").mkdir(parents=True)
    (run_dir / "scratch").mkdir()
    settings = Settings(
        run_dir=str(run_dir),
        run_id="test",
        supervisor=os.getpid(),
        steps=steps,
        backward_cap=backward_cap,
        started=time.time(),
        started_ns=time.time_ns(),
        boundary=boundary,
    )
    env = {**os.environ, **settings.to_environment(), "PYTHONPATH": str(BOOTSTRAP), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "wb") as output:
        child = subprocess.Popen([sys.executable, str(program)], env=env, stdout=output, stderr=output, cwd=folder)
        deadline = time.monotonic() + limit_s
        try:
            while child.poll() is None and time.monotonic() < deadline:
                if any(b'"parked"' in f.read_bytes() for f in (run_dir / "stream").glob("*.jsonl")):
                    break
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
    return assemble(run_dir)
