"""Start-up of the commands that run nothing, loading the catalog, and judging a large recording.

    python benchmarks/judging.py

Promises: `explain`, `rules`, `check --static` <= 0.4 s; catalog <= 0.15 s; a recording of 10,000 parameters x 5 steps
is read and judged in <= 1 s. Each number is a median of seven.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainlint.judge import JudgeOptions, judge, load_catalog
from trainlint.recording import Recording, dumps, loads
from trainlint.recording.schema import (
    Backward,
    Ending,
    Optimizer,
    OptimizerStep,
    Parameter,
    ParamGroup,
    RootModule,
    StepMeasurement,
    ZeroGrad,
)


def median(action: Callable[[], object], times: int = 7) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def large(parameters: int = 10_000, steps: int = 5) -> Recording:
    ids = tuple(range(parameters))
    events: list[Backward | OptimizerStep | ZeroGrad] = []
    for i in range(steps):
        events.append(Backward(seq=3 * i + 1, time_s=float(i), value=2.0, grad_fn="NllLossBackward0", divided_by=1.0))
        events.append(OptimizerStep(seq=3 * i + 2, time_s=float(i), optimizer=0, index=i, rates=(1e-3,)))
        events.append(ZeroGrad(seq=3 * i + 3, time_s=float(i), optimizer=0, had_gradients=parameters))
    return Recording(
        ending=Ending(how="steps"),
        roots=(RootModule(id=0, class_name="Model", n_parameters=parameters * 16, n_trainable=parameters * 16),),
        parameters=tuple(
            Parameter(id=i, name=f"layers.{i // 10}.w{i % 10}", shape=(4, 4), dtype="float32", device="cpu",
                      requires_grad=True, kind="weight", root=0, owner="Linear", gradient_seen=True)
            for i in ids
        ),
        optimizers=(
            Optimizer(id=0, class_name="AdamW", steps=steps,
                      groups=(ParamGroup(0, ids, {"lr": 1e-3, "weight_decay": 0.01}, "float32"),)),
        ),
        events=tuple(events),
        steps=tuple(
            StepMeasurement(optimizer=0, index=i, parameters=ids, gradient_norm=(0.5,) * parameters,
                            weight_norm=(1.0,) * parameters, update_norm=(1e-3,) * parameters,
                            changed=(1.0,) * parameters, sampled=(16,) * parameters, gradient_norm_total=50.0)
            for i in range(steps)
        ),
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text("".join(f"key{i}: {i}\n" for i in range(200)), encoding="utf-8")
        for words in (["rules"], ["explain", "TL202"], ["check", "--static", str(config)]):
            command = [sys.executable, "-m", "trainlint", *words]
            taken = median(lambda command=command: subprocess.run(command, capture_output=True))  # type: ignore[misc]
            print(f"{' '.join(words[:2])}: {taken:.2f} s (promise 0.4 s)")
    probe = (
        "import time; began = time.perf_counter(); from trainlint.judge import load_catalog; load_catalog(); "
        "print(time.perf_counter() - began)"
    )
    fresh = [
        float(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout) for _ in range(7)
    ]
    print(f"loading the catalog of {len(load_catalog())} checks: {statistics.median(fresh):.3f} s (promise 0.15 s)")
    text = dumps(large())
    reading = median(lambda: loads(text))
    recording = loads(text)
    judging = median(lambda: judge(recording, None, None, JudgeOptions()))
    print(f"reading 10,000 parameters x 5 steps: {reading:.2f} s; judging: {judging:.2f} s (promise 1 s)")


if __name__ == "__main__":
    main()
