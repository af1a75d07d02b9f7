"""What watching costs per optimizer step and in memory, as ratios in one run.

    python benchmarks/watched_step.py

Bare and watched children take turns (A B A B ...), so that a change of the machine's speed hits both; the ratio of each
pair is taken, and the median of the ratios is printed with the smallest and the largest. The promise: at most 1.05 on a
25M-parameter transformer, at most 1.5 on a 0.1M MLP, memory at most 1.1.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import trainlint.recorder.settings as recorder_settings
from trainlint.recorder.settings import Settings

BOOTSTRAP = Path(recorder_settings.__file__).parent / "bootstrap"

PROGRAM = """
import json, resource, sys, time
import torch, torch.nn as nn
torch.manual_seed(0)
if sys.argv[1] == "transformer":
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, dropout=0.0)
    model, x, steps = nn.TransformerEncoder(layer, 8), torch.randn(4, 64, 512), 8
else:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    x, steps = torch.randn(512, 128), 200
device = "cuda" if torch.cuda.is_available() else "cpu"
model, x = model.to(device), x.to(device)
opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
times = []
for _ in range(steps + 2):
    began = time.perf_counter()
    opt.zero_grad()
    model(x).pow(2).mean().backward()
    opt.step()
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - began)
times = sorted(times[2:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if device == "cuda":
    peak = torch.cuda.max_memory_allocated()
count = sum(p.numel() for p in model.parameters())
print(json.dumps({"step_s": times[len(times) // 2], "peak": peak, "parameters": count}))
"""


def run(model: str, watched: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRAINLINT_")}
        if watched:
            (Path(folder) / "stream").mkdir()
            (Path(folder) / "scratch").mkdir()
            settings = Settings(run_dir=folder, run_id="bench", supervisor=os.getpid(), steps=1_000_000)
            env.update(settings.to_environment(), PYTHONPATH=str(BOOTSTRAP))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, model], env=env, capture_output=True, text=True, check=True, cwd=folder
        )
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    for model, pairs, promise in (("mlp", 7, 1.5), ("transformer", 5, 1.05)):
        times, peaks, parameters = [], [], 0.0
        for _ in range(pairs):
            bare, watched = run(model, False), run(model, True)
            times.append(watched["step_s"] / bare["step_s"])
            peaks.append(watched["peak"] / bare["peak"])
            parameters = bare["parameters"]
        print(
            f"{model} ({parameters / 1e6:.1f}M parameters): step x{statistics.median(times):.3f} "
            f"({min(times):.3f}-{max(times):.3f}, promise {promise}), "
            f"memory x{statistics.median(peaks):.3f} ({min(peaks):.3f}-{max(peaks):.3f}, promise 1.1)"
        )


if __name__ == "__main__":
    main()
