"""Which instrument of the recorder takes how much of a watched step.

    python benchmarks/instruments.py

Trains a 0.1M MLP in this process with the recorder armed, and adds up the time inside each of its hooks: over the first
three steps, as a check watches them, and over later ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainlint.recorder import core
from trainlint.recorder.settings import Settings

#: Seconds inside each outermost hook.
taken: dict[str, float] = defaultdict(float)


def timed(quiet: Callable[..., Any]) -> Callable[..., Any]:
    def timing(recorder: core.Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
        code = getattr(function, "__code__", None) or getattr(getattr(function, "__func__", None), "__code__", None)
        name = f"{Path(code.co_filename).stem}.{function.__name__}" if code is not None else repr(function)
        guarded = quiet(recorder, function)

        def measured(*args: Any, **kwargs: Any) -> Any:
            if recorder.busy:
                return None
            began = time.perf_counter()
            try:
                return guarded(*args, **kwargs)
            finally:
                taken[name] += time.perf_counter() - began

        return measured

    return timing


def show(title: str, steps: int, whole: float) -> None:
    print(f"{title}: {whole / steps * 1e3:.2f} ms a step, {sum(taken.values()) / steps * 1e3:.2f} ms of it in hooks")
    for name, seconds in sorted(taken.items(), key=lambda item: -item[1])[:14]:
        print(f"  {name:44} {seconds / steps * 1e3:8.3f} ms")
    taken.clear()


def main() -> None:
    folder = tempfile.mkdtemp(prefix="trainlint-bench-")  # the recorder guards it to the end
    for name in ("stream", "scratch"):
        (Path(folder) / name).mkdir()
    settings = Settings(run_dir=folder, run_id="bench", supervisor=os.getppid(), steps=1_000_000)
    os.environ.update(settings.to_environment())
    core.Recorder.quiet = timed(core.Recorder.quiet)  # type: ignore[method-assign, assignment]
    from trainlint.recorder.arm import arm

    arm()
    train()
    sys.stdout.flush()
    os._exit(0)  # the recorder would write what it knows at the end


def train() -> None:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    x = torch.randn(512, 128, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for title, steps in (("first three steps", 3), ("warm-up", 80), ("later steps", 200)):
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        if title == "warm-up":
            taken.clear()
        else:
            show(title, steps, time.perf_counter() - began)


if __name__ == "__main__":
    main()
