"""Programs started again as experiments: what is held still in them, and what they never notice."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import trainlint.recorder.settings as recorder_settings
from trainlint.recorder.settings import Settings
from trainlint.recording.experiment_lines import Told, read

BOOTSTRAP = Path(recorder_settings.__file__).parent / "bootstrap"


def experiment(source: str, folder: Path, **plan: Any) -> Told:
    """Run the source text as a child of an experiment until it parks or exits."""
    (folder / "program.py").write_text(textwrap.dedent(source))
    run_dir = folder / "run"
    (run_dir / "stream").mkdir(parents=True)
    (run_dir / "scratch").mkdir()
    wanted = {"name": "overfit", "steps": 60, "rate": 1e-2, "peaks": {"0": [1e-3]}, "loaders": True, **plan}
    settings = Settings(
        str(run_dir), "test", supervisor=os.getpid(), started=time.time(), started_ns=time.time_ns(),
        experiment=json.dumps(wanted),
    )  # fmt: skip
    env = {**os.environ, **settings.to_environment(), "PYTHONPATH": str(BOOTSTRAP), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "wb") as output:
        child = subprocess.Popen([sys.executable, "program.py"], env=env, stdout=output, stderr=output, cwd=folder)
        try:
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline:
                if any(b'"parked"' in f.read_bytes() for f in (run_dir / "stream").glob("*.jsonl")):
                    break
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
    return read(run_dir)


def output(folder: Path) -> str:
    return (folder / "output").read_text()


LOADER = """
    import torch, torch.nn.functional as F
    torch.manual_seed(0)
    class Noisy(torch.utils.data.Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return torch.randn(12), i % 5
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
    held_out = torch.utils.data.DataLoader(Noisy(), batch_size=8)
    net = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 5))
    optimizer = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[3].parameters(), "lr": 1e-4}],
                                  lr=1e-3, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 1e-4], total_steps=16)
"""


def test_one_batch_again_and_again(tmp_path: Path) -> None:
    told = experiment(
        LOADER
        + """
    mean = sum(x.mean() for x, _ in loader)  # a pass without training ends
    print("passed", flush=True)
    for epoch in range(2):
        for number, (x, y) in enumerate(loader):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
            x.zero_()  # what the program does to its batch is its own
            if number == 20:
                print("validated", sum(len(x) for x, _ in held_out), flush=True)
    """,
        tmp_path,
        peaks={"0": [1e-3, 1e-4]},
        steps=200,
    )
    assert told.ended == "reached", output(tmp_path)
    assert told.problems == ()
    assert told.different_batches == 1
    assert told.loss is not None
    assert (told.loss.function, told.loss.alone, told.loss.floor, told.loss.positions) == (
        "cross_entropy",
        True,
        0.0,
        8,
    )
    losses = [p.loss for p in told.points if p.loss is not None]
    assert losses[-1] < 0.1 < 1.0 < losses[0]
    assert all(b < a + 0.05 for a, b in itertools.pairwise(losses)), "no dropout, no noise: it only falls"
    assert {p.rate for p in told.points} == {1e-2}
    assert output(tmp_path).split() == ["passed", "validated", "16"]


def test_batches_drawn_by_hand_come_again(tmp_path: Path) -> None:
    told = experiment(
        """
    import random
    import numpy as np, torch, torch.nn.functional as F
    torch.manual_seed(0)
    data = torch.randn(1000, 6)
    mine, own, generator = np.random.default_rng(3), random.Random(4), torch.Generator().manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    def draw():
        rows = torch.randint(1000, (4,), generator=generator)
        scale = mine.random() + own.random() + random.random() + np.random.rand()
        return data[rows] * scale, torch.randint(3, (4,))
    x, y = draw()
    for step in range(100):
        loss = F.cross_entropy(net(x), y)
        x, y = draw()  # read ahead, as nanoGPT does
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    """,
        tmp_path,
        loaders=False,
        rate=0.1,
    )
    assert told.repeated_by == "random"
    assert told.different_batches == 1, output(tmp_path)
    assert told.ended in ("reached", "steps")
    assert told.problems == ()


def test_data_that_moves_on_is_told(tmp_path: Path) -> None:
    told = experiment(
        """
    import torch, torch.nn.functional as F
    data = torch.randn(1000, 6)
    net = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(100):
        x = data[step * 4 : step * 4 + 4]
        loss = F.mse_loss(net(x), x[:, :3])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    """,
        tmp_path,
        loaders=False,
        rate=0.01,
    )
    assert told.different_batches is not None
    assert told.different_batches > 20


def test_a_sweep_goes_through_the_epochs(tmp_path: Path) -> None:
    told = experiment(
        LOADER
        + """
    for x, y in loader:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
        rates = [g["lr"] for g in optimizer.param_groups]
        assert abs(rates[0] / rates[1] - 10) < 1e-6, rates
        assert optimizer.param_groups[0]["weight_decay"] == 0.5
    """,
        tmp_path,
        name="lr-range",
        peaks={"0": [1e-3, 1e-4]},
        low=1e-6,
        high=1e-2,
        steps=40,
    )
    assert told.ended == "swept", output(tmp_path)
    rates = [p.rate for p in told.points if p.rate is not None]
    assert len(rates) == 40
    assert rates[0] < 1.1e-6
    assert rates[-1] > 0.9e-2
    assert told.problems == ()
    assert told.held_still == ("learning-rate schedule",)
