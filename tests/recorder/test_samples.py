"""What is recorded of the samples that loaders deliver, and that drawing from them leaves the program as it was."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import pytest

from tests.recorder.watching import watch

#: Prints what the program's random number generators give after its steps, and what its loader delivers.
PROGRAM = """
import hashlib, random, sys
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

random.seed(1); np.random.seed(2); torch.manual_seed(3)

class Noisy(Dataset):
    def __init__(self, n):
        self.x, self.rng = torch.randn(n, 8), np.random.default_rng(0)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        open("drawn", "a").write("x")
        return self.x[i] + torch.from_numpy(self.rng.normal(size=8)).float(), int(i) % 3

{setup}
model = nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(2):
    for step, (x, y) in enumerate(train):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        digest = hashlib.md5(x.numpy().tobytes()).hexdigest()
        print(epoch, step, digest, random.random(), np.random.rand(), torch.rand(1).item(), flush=True)
    with torch.no_grad():
        for x, y in held_out:
            print("held out", hashlib.md5(x.numpy().tobytes()).hexdigest(), flush=True)
"""
LOADERS = """
data = Noisy(48)
generator = torch.Generator().manual_seed(5)
train = DataLoader(data, batch_size=8, shuffle=True, num_workers=2, generator=generator)
held_out = DataLoader(Noisy(16), batch_size=8)
"""


def _left(marker: str) -> list[str]:
    """Processes of the program that are still there after the program's own workers had time to notice its end."""
    for _ in range(150):
        if not _processes(marker):
            return []
        time.sleep(0.1)
    return _processes(marker)


def _processes(marker: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in command:
            found.append(f"{pid} {command}")
    return found


def test_drawing_changes_nothing(tmp_path: Path) -> None:
    """Generators, samples and files are as without the recorder's draws, and no process of its own is left."""
    out = {}
    for name, off in (("drawn", ""), ("plain", "import _trainlint_recorder.child as c; c.possible = lambda: 'off'\n")):
        folder = tmp_path / name
        folder.mkdir()
        run = watch(PROGRAM.replace("{setup}", off + LOADERS), folder, steps=4)
        out[name] = (folder / "output").read_text()
        assert run.samples is not None
        assert [bool(d.straight) for d in run.samples.draws] == [name == "drawn"] * 2
        assert {d.why for d in run.samples.draws} == {"" if name == "drawn" else "off"}
        assert run.boundary is not None and run.boundary.outcome == "crossed"
    assert out["drawn"] == out["plain"]
    assert out["drawn"].count("\n") >= 6
    assert not _left(str(tmp_path))


def test_what_workers_drew(tmp_path: Path) -> None:
    run = watch(PROGRAM.replace("{setup}", LOADERS), tmp_path)
    assert run.samples is not None
    first, later = run.samples.draws
    assert (first.when, later.when) == ("watch", "next-epoch")
    assert len(first.straight) == 2 and len(first.straight[0]) >= 6
    assert first.straight[0] == first.straight[1] and len(set(first.straight[0])) == len(first.straight[0])
    both = min(len(first.straight[0]), len(later.straight[0]))
    assert first.straight[0][:both] == later.straight[0][:both], "the dataset of the main process never moves"
    assert first.turned[0] != first.turned[1]
    facts = {d.loader: d for d in run.samples.loaders}[first.loader]
    assert facts.generators == ("dataset.rng (numpy Generator)",)
    assert facts.sampler == "RandomSampler" and facts.own_generator and facts.start_method == "fork"


def test_a_generator_made_at_the_first_sample(tmp_path: Path) -> None:
    """Each worker makes its own: nothing may draw a sample before the workers are started."""
    setup = """
class Lazy(Noisy):
    rng = None
    def __init__(self, n):
        self.x = torch.randn(n, 8)
    def __getitem__(self, i):
        if self.rng is None:
            self.rng = np.random.default_rng(torch.initial_seed())
        return super().__getitem__(i)
train = DataLoader(Lazy(48), batch_size=8, num_workers=2)
held_out = DataLoader(Lazy(16), batch_size=8)
"""
    run = watch(PROGRAM.replace("{setup}", setup), tmp_path)
    assert run.samples is not None
    assert len(run.samples.draws) == 2
    for draws in run.samples.draws:
        assert not set(draws.straight[0]) & set(draws.straight[1])


def test_passes_and_batches(tmp_path: Path) -> None:
    """Positions that the sampler gave, hashes and labels of the samples, and passes in the order of their opening."""
    setup = """
    x = torch.arange(48.0).reshape(24, 2).repeat(1, 4)
    data = torch.utils.data.TensorDataset(x, torch.arange(24) // 8)
    train = DataLoader(data, batch_size=4)
    held_out = DataLoader(torch.utils.data.Subset(data, range(6)), batch_size=4)
    """
    run = watch(PROGRAM.replace("{setup}", textwrap.dedent(setup)), tmp_path)
    assert run.samples is not None
    passes = run.samples.passes
    assert [p.number for p in passes] == list(range(len(passes)))
    assert passes[0].indices[:3] == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    assert passes[0].fed and passes[0].delivered == 3
    batches = [b for b in run.samples.batches if b.loader == passes[0].loader]
    assert batches[0].labels == (0, 0, 0, 0) and batches[2].labels == (1, 1, 1, 1)
    assert len({h for b in batches[:3] for h in b.hashes}) == 12
    held_out = next(b for b in run.samples.batches if b.loader != passes[0].loader)
    assert held_out.hashes == batches[0].hashes
    order = run.samples.labels[0]
    assert (order.runs, order.classes, order.looked_at, order.whole) == (3, 3, 24, True)
    overlap = run.samples.overlaps[0]
    assert (overlap.by, overlap.shared, overlap.other_samples, overlap.training_samples) == ("indices", 6, 6, 24)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("import time; time.sleep(0.3)", "too long"),
        ("import os; os._exit(3) if torch.utils.data.get_worker_info() and marker() else None", "died"),
    ],
)
def test_datasets_that_cannot_be_drawn_from(tmp_path: Path, body: str, why: str) -> None:
    """Slow ones, and ones that end the process: said, and nothing else happens."""
    setup = f"""
from pathlib import Path
def marker():
    return Path("watched").exists()
class Odd(Noisy):
    def __getitem__(self, i):
        {body}
        return super().__getitem__(i)
train = DataLoader(Odd(24), batch_size=2, num_workers=1)
held_out = []
real = torch.optim.SGD.step
def step(self, *args, **kwargs):
    result = real(self, *args, **kwargs)
    Path("watched").touch()
    return result
torch.optim.SGD.step = step
"""
    run = watch(PROGRAM.replace("{setup}", setup), tmp_path, steps=1)
    assert run.samples is not None and run.samples.draws
    assert why in run.samples.draws[0].why or "exited" in run.samples.draws[0].why, run.samples.draws[0]
    assert not _left(str(tmp_path))
