"""Programs with torch, watched by the real recorder from start to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launch.programs import Run, write

from trainlint.launch.model import Launch, Watched
from trainlint.launch.routes import find_launch

pytest.importorskip("torch")

LOOP = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step():
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Run(tmp_path)


def start(run: Run, text: str, **options: object) -> Watched:
    write(run.folder / "train.py", LOOP + text)
    return run(run.command(sys.executable, "train.py"), **options)  # type: ignore[arg-type]


def test_plain_loop(run: Run) -> None:
    seen = start(run, "for i in range(10**9):\n    step()\n", steps=4)
    assert seen.ending.how == "steps"
    assert seen.steps == 4
    assert run.progress.steps[-1] == (0, 3, 4)


def test_program_that_swallows_everything_and_writes_when_it_ends(run: Run) -> None:
    text = """
import atexit
atexit.register(lambda: open("saved", "w").close())
while True:
    try:
        step()
    except:
        open("swallowed", "w").close()
    finally:
        open("finally", "a").write("x")
"""
    seen = start(run, text)
    assert seen.ending.how == "steps"
    assert not (run.folder / "saved").exists()
    assert not (run.folder / "swallowed").exists()


def test_hanging_program_says_where_it_hangs(run: Run) -> None:
    seen = start(run, "import time\ndef wait_for_data():\n    time.sleep(600)\nwait_for_data()\n", timeout_s=12.0)
    assert seen.ending.how == "timeout"
    assert "no backward came" in seen.hint
    where = seen.ending.where
    assert where is not None
    assert (Path(where.file).name, where.function) == ("train.py", "wait_for_data")


def test_update_by_hand_ends_at_the_cap(run: Run) -> None:
    text = """
while True:
    model(torch.randn(8, 4)).square().mean().backward()
    for p in model.parameters():
        p.data -= 0.1 * p.grad
"""
    seen = start(run, text, backward_cap=20)
    assert seen.ending.how == "backward-cap"
    assert seen.ending.where is not None
    assert Path(seen.ending.where.file).name == "train.py"


def test_data_workers_are_ended(run: Run) -> None:
    text = """
if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.randn(10**4, 4), batch_size=2, num_workers=2, persistent_workers=True)
    for batch in data:
        step()
"""
    assert start(run, text).ending.how == "steps"


def test_ranks_under_torchrun(run: Run) -> None:
    text = """
torch.distributed.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(10**9):
    step()
"""
    write(run.folder / "train.py", LOOP + text)
    seen = run(run.command(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"))
    assert seen.ending.how == "steps"
    assert seen.ranks == 2


def test_entry_that_hands_its_run_over(run: Run) -> None:
    text = """
import trainlint
def build(config: dict):
    return trainlint.TrainingRun(
        model=model, optimizers=optimizer, loss=lambda m, batch: m(batch).mean(), batches=[torch.randn(2, 4)] * 3,
        schedulers=[torch.optim.lr_scheduler.StepLR(optimizer, 1)], accumulation=config["accumulation"], clip=1.0)
"""
    write(run.folder / "train.py", LOOP + text)
    write(run.folder / "c.yaml", "accumulation: 1\n")
    found = find_launch(Path("c.yaml"), ["accumulation=2"], entry="train:build", cwd=run.folder, python=sys.executable)
    assert isinstance(found, Launch)
    stream = run.run_folder.path / "stream"
    close = run.run_folder.close
    backwards: list[int] = []

    def count_and_close() -> object:
        lines = [json.loads(line) for file in stream.glob("*.jsonl") for line in file.read_text().splitlines()]
        backwards.append(sum(tag == "event" and load["kind"] == "backward" for tag, load in lines))
        return close()

    run.run_folder.close = count_and_close  # type: ignore[method-assign,assignment]
    seen = run(found)
    assert seen.ending.how == "steps"
    assert backwards == [6]
    assert sorted(p.name for p in run.folder.iterdir() if p.name.startswith(".")) == []
