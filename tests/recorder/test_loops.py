"""How long a plain program will train, read off its own loops while they run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the recorder uses the torch of the program it watches")

from recorder.watching import watch

from trainlint.recording.length import planned_length
from trainlint.recording.schema import Recording

HEAD = """
import argparse, itertools, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
model = nn.Linear(8, 4)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(48, 8), torch.randint(0, 4, (48,)))
loader = torch.utils.data.DataLoader(data, batch_size=4)
def backward(x, y, share=1):
    (F.cross_entropy(model(x), y) / share).backward()
def update():
    opt.step(); opt.zero_grad()
"""

#: What the program does -> the optimizer steps that it will make; ``None``: its loops do not say.
PROGRAMS: dict[str, tuple[str, int | None]] = {
    "epochs and batches": (
        """
args = argparse.Namespace(epochs=7)
for epoch in range(args.epochs):
    for i, (x, y) in enumerate(loader):
        backward(x, y)
        update()
""",
        7 * 12,
    ),
    "accumulation": (
        """
for epoch in range(2):
    for i, (x, y) in enumerate(loader):
        backward(x, y, 3)
        if (i + 1) % 3 == 0:
            update()
""",
        2 * 4,
    ),
    "an epoch is a function, started in the middle": (
        """
config = {"train": {"epochs": 10}}
def one_epoch(batches):
    for x, y in batches:
        backward(x, y)
        update()
def run(start):
    for epoch in range(start, config["train"]["epochs"]):
        one_epoch(loader)
run(4)
""",
        6 * 12,
    ),
    "micro-batches in a loop of their own": (
        """
accumulate = 2
for step in range(100 // accumulate):
    for micro in range(accumulate):
        backward(torch.randn(4, 8), torch.randint(0, 4, (4,)), accumulate)
    update()
""",
        50,
    ),
    "folds, each with an optimizer of its own": (
        """
for fold in range(5):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        for x, y in loader:
            backward(x, y)
            update()
""",
        3 * 12,
    ),
    "several optimizers in a loop": (
        """
optimizers = {"w": torch.optim.SGD([model.weight], lr=0.1), "b": torch.optim.SGD([model.bias], lr=0.1)}
for epoch in range(2):
    for x, y in loader:
        backward(x, y)
        for name, each in optimizers.items():
            each.step(); each.zero_grad()
""",
        2 * 12,
    ),
    "two things at once": (
        """
inputs = torch.randn(20, 4, 8)
for x, (i, _) in zip(inputs, enumerate(range(30))):
    backward(x, torch.randint(0, 4, (4,)))
    update()
""",
        20,
    ),
    "a part of an endless stream": (
        """
for x, y in itertools.islice(itertools.cycle(loader), 40):
    backward(x, y)
    update()
""",
        40,
    ),
    "a closure": (
        """
opt = torch.optim.LBFGS(model.parameters(), max_iter=3)
x, y = torch.randn(4, 8), torch.randint(0, 4, (4,))
def closure():
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss
for i in range(25):
    opt.step(closure)
""",
        25,
    ),
    "a bar that says which epoch it is": (
        """
from tqdm import tqdm
for epoch in range(3):
    bar = tqdm(loader, desc=f"epoch {epoch}", disable=True)
    for x, y in bar:
        backward(x, y)
        update()
""",
        3 * 12,
    ),
    "a curriculum": (
        """
for stage in (4, 8, 16):
    part = range(stage)
    for i in part:
        backward(torch.randn(4, 8), torch.randint(0, 4, (4,)))
        update()
""",
        None,
    ),
    "while": (
        """
step = 0
while step < 50:
    for x, y in loader:
        backward(x, y)
        update()
        step += 1
""",
        None,
    ),
    "a loop that may be left early": (
        """
for i in range(50):
    backward(torch.randn(4, 8), torch.randint(0, 4, (4,)))
    update()
    if i > 30:
        break
""",
        None,
    ),
    "a length that the program computes": (
        """
class Settings:
    asked = 0
    @property
    def epochs(self):
        Settings.asked += 1
        assert Settings.asked == 1, "the program asks once; nobody else may"
        return 5
settings = Settings()
for epoch in range(settings.epochs):
    for x, y in loader:
        backward(x, y)
        update()
""",
        None,
    ),
    "a loader that has no length": (
        """
class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(8), torch.randint(0, 4, ())
for x, y in torch.utils.data.DataLoader(Endless(), batch_size=4):
    backward(x, y)
    update()
""",
        None,
    ),
    "an iterable that delivers more than it said": (
        """
import warnings
warnings.simplefilter("error")
class More(torch.utils.data.IterableDataset):
    def __len__(self):
        return 4
    def __iter__(self):
        for _ in range(40):
            yield torch.randn(8), torch.randint(0, 4, ())
more = torch.utils.data.DataLoader(More(), batch_size=4)
for x, y in more:
    backward(x, y)
    update()
""",
        1,
    ),
    "a generator": (
        """
def stream():
    while True:
        yield torch.randn(4, 8), torch.randint(0, 4, (4,))
for x, y in stream():
    backward(x, y)
    update()
""",
        None,
    ),
}


def steps(run: Recording) -> int | None:
    planned = planned_length(run, run.steps[0].optimizer)
    return planned[0] if planned else None


@pytest.mark.parametrize("name", PROGRAMS)
def test_steps_that_the_loops_will_make(name: str, tmp_path: Path) -> None:
    body, expected = PROGRAMS[name]
    run = watch(HEAD + body, tmp_path)
    assert len(run.steps) >= 3, (tmp_path / "output").read_text()
    assert steps(run) == expected, run.plan.training_loops
    assert not run.problems


def test_says_which_lines_it_read(tmp_path: Path) -> None:
    run = watch(HEAD + PROGRAMS["accumulation"][0], tmp_path)
    (loops,) = run.plan.training_loops
    assert [(loop.over, loop.iterations) for loop in loops.loops] == [("range(2)", 2), ("enumerate(loader)", 12)]
    assert loops.holds_backward
    planned = planned_length(run, loops.optimizer)
    assert planned is not None
    assert "2 (program.py:" in planned[1] and "3 accumulated" in planned[1]
