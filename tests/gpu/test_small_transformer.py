"""One small transformer in every precision and implementation: the findings, and what watching it asks of the device.

The same programs run on the CPU, so that what is tested with a GPU is known to work without one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.recorder.watching import watch
from trainlint.recording import loads

PROGRAM = Path(__file__).parent / "programs" / "small_transformer.py"


@functools.lru_cache(maxsize=1)
def why_no_gpu() -> str:
    """Why the GPU tests are skipped; empty when there is a device. Asked in a process of its own: torch is large."""
    asked = "import torch; raise SystemExit(not torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True)
    return "" if done.returncode == 0 else "there is no CUDA device"


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None and why_no_gpu():
        pytest.skip(why_no_gpu())


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def check(folder: Path, *arguments: str, steps: int = 3) -> dict[str, Any]:
    """The report of a watched program."""
    recording = folder / "recording.json"
    command = [sys.executable, "-m", "trainlint", "check", "--steps", str(steps), "--format", "json",
               "--save-recording", str(recording), "--", sys.executable, str(PROGRAM), *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    report["recording"] = loads(recording.read_text(encoding="utf-8"))
    assert not [v for v in report["verdicts"] if v["verdict"] == "crashed"]
    assert report["recording"].problems == ()
    return report


def codes(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f["code"], f["severity"]) for f in report["findings"]]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("arguments", "precision", "expected"),
    [
        (["--precision", "bf16-autocast"], "autocast to bf16", []),
        (["--precision", "bf16"], "weights bf16", [("TL208", "error")]),
        (["--precision", "fp16-scaled"], "loss scaling", []),
        (["--fused"], "weights fp32", []),
    ],
)
def test_precisions(
    device: str, arguments: list[str], precision: str, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    report = check(tmp_path, "--device", device, *arguments)
    assert codes(report) == expected
    assert precision in report["run"]["card"]["precision"][0]["observed"]
    _measured_on(device, report)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor",
                         marks=pytest.mark.gpu)])  # fmt: skip
def test_a_compiled_model(device: str, backend: str, tmp_path: Path) -> None:
    report = check(tmp_path, "--device", device, "--compile", backend, "--precision", "bf16-autocast")
    assert codes(report) == []
    _measured_on(device, report)
    assert [s.compiled for s in report["recording"].costs.steps] == [True, False, False]
    assert report["run"]["time"]["includes_start_up"] is False


def _measured_on(device: str, report: dict[str, Any]) -> None:
    """Every step was measured, in the units of the device."""
    recording = report["recording"]
    costs = recording.costs
    assert recording.program.device.startswith(device)
    assert costs.device.startswith(device)
    assert costs.clock == ("device" if device == "cuda" else "wall")
    assert costs.memory_of == ("device" if device == "cuda" else "process")
    assert [s.backwards for s in costs.steps] == [1, 1, 1]
    for step in costs.steps[1:]:
        assert set(step.seconds) >= {"data", "forward", "backward", "optimizer"}
        assert all(seconds >= 0 for seconds in step.seconds.values())
    assert costs.peak_bytes > 0
    if device == "cuda":
        assert 0 < report["run"]["memory"]["share_of_device"] < 1
        assert costs.reserved_bytes >= costs.peak_bytes
    for step in recording.steps:
        assert all(isinstance(norm, float) for norm in step.gradient_norm if norm is not None)
        assert step.gradient_norm_total > 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["bf16", "fp16-scaled"])
def test_no_tensor_is_asked_by_itself(device: str, precision: str, tmp_path: Path) -> None:
    """A model of four times as many tensors asks the device for values as often as the small one."""
    asked = {}
    for layers in (1, 5):
        folder = tmp_path / str(layers)
        folder.mkdir()
        arguments = ["--device", device, "--precision", precision, "--layers", str(layers), "--reads"]
        run = f"import runpy, sys; sys.argv[1:] = {arguments}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
        assert watch(run, folder, steps=7, boundary=False).problems == ()
        output = (folder / "output").read_text()
        lines = [tuple(map(int, found)) for found in re.findall(r"reads and waits: (\d+) (\d+)", output)]
        asked[layers] = lines[4:6]  # the first steps look at some things once
    assert len(asked[1]) == len(asked[5]) == 2
    for small, large in zip(asked[1], asked[5], strict=True):
        # 48 tensors more.
        assert large[0] <= small[0] + 4, asked
        assert large[1] <= small[1] + 4, asked


@pytest.mark.gpu
def test_the_counters_of_the_program_are_left_alone(tmp_path: Path) -> None:
    """The program resets and reads the allocator's peak itself: watched or not, it reads about the same."""
    source = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    torch.cuda.reset_peak_memory_stats()
    loss = model(torch.randn(4096, 1024, device="cuda")).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("peak:", torch.cuda.max_memory_allocated(), flush=True)
"""
    bare = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=500).stdout
    recording = watch(source, tmp_path, steps=5)
    watched = (tmp_path / "output").read_text()
    peaks = [[int(n) for n in re.findall(r"peak: (\d+)", text)] for text in (bare, watched)]
    assert len(peaks[0]) == len(peaks[1]) == 3
    for bare_peak, watched_peak in zip(*peaks, strict=True):
        assert abs(watched_peak - bare_peak) < 0.02 * bare_peak + (4 << 20)
    assert recording.costs is not None
    assert recording.costs.memory_of == "device"
