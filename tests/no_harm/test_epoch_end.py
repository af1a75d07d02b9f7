"""What a program does to files at the end of its epoch, or of its training, is undone like everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from no_harm.watching import snapshot

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(240)

PROGRAM = """
import os, shutil, subprocess, sys
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(400, 4)
train = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for epoch in range(EPOCHS):
    for inputs, targets in train:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    torch.save(model.state_dict(), "best.pt")
    shutil.rmtree("checkpoints/step_100", ignore_errors=True)
    os.makedirs("checkpoints/step_200", exist_ok=True)
    with open("log.csv", "a") as log:
        log.write(f"{epoch},1.0\\n")
    os.replace("log.csv", "metrics.csv")
    shutil.copy("metrics.csv", "log.csv")
torch.save(model.state_dict(), "final.pt")
subprocess.run(["rm", "-rf", "checkpoints"])
os.remove("best.pt")
"""


def check(folder: Path, epochs: int, *options: str) -> dict[str, Any]:
    (folder / "train.py").write_text(PROGRAM.replace("EPOCHS", str(epochs)))
    (folder / "best.pt").write_bytes(b"the best of last week")
    (folder / "final.pt").write_bytes(b"the last of last week")
    (folder / "log.csv").write_text("epoch,loss\n0,2.0\n")
    (folder / "checkpoints" / "step_100").mkdir(parents=True)
    (folder / "checkpoints" / "step_100" / "model.bin").write_bytes(bytes(range(256)))
    before = snapshot(folder, inodes=False)
    line = [sys.executable, "-m", "trainlint", "check", "-q", "--format", "json", *options]
    done = subprocess.run(
        [*line, "--", sys.executable, "train.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert snapshot(folder, inodes=False) == before
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_between_two_epochs(tmp_path: Path) -> None:
    report = check(tmp_path, 5)
    assert report["run"]["boundary"]["outcome"] == "crossed"
    assert {Path(act["target"]).name for act in report["prevented"]} >= {"best.pt", "log.csv", "step_100"}


def test_at_the_end_of_the_program(tmp_path: Path) -> None:
    report = check(tmp_path, 1)
    assert report["run"]["boundary"]["outcome"] == "ended"
    assert {Path(act["target"]).name for act in report["prevented"]} >= {"best.pt", "final.pt"}


def test_left_out(tmp_path: Path) -> None:
    report = check(tmp_path, 5, "--no-boundary")
    assert report["run"]["boundary"]["outcome"] == "left-out"
    assert report["run"]["boundary"]["reason"] == "switched off"
    assert report["prevented"] == []
    assert any("epoch boundary: not crossed: switched off" in note for note in report["notes"])


def test_left_out_by_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.trainlint]\nboundary = false\n")
    assert check(tmp_path, 5)["run"]["boundary"]["outcome"] == "left-out"


def test_the_command_line_wins_over_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.trainlint]\nboundary = false\n")
    assert check(tmp_path, 5, "--boundary")["run"]["boundary"]["outcome"] == "crossed"
