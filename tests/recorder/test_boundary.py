"""The end of an epoch, brought on early in programs of many shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorder.watching import watch

from trainlint.recording.boundary import evaluation_batches, steps_in_next_epoch
from trainlint.recording.schema import BatchFetched, Boundary, ModeChanged, OptimizerStep, Recording, SchedulerStep

START = """
import itertools, queue, threading
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

torch.manual_seed(0)
x = torch.randn(400, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters())
train = DataLoader(data, batch_size=8, shuffle=True)

def step(inputs, targets):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
"""


def indented(text: str) -> str:
    lines = text.strip("\n").splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines)


def run(text: str, folder: Path, **options: int) -> tuple[Recording, Boundary]:
    seen = watch(START + indented(text), folder, **options)
    assert seen.boundary is not None
    assert not seen.problems
    return seen, seen.boundary


def steps(events: object) -> int:
    return sum(isinstance(e, OptimizerStep) for e in events)  # type: ignore[attr-defined]


def test_evaluation_scheduler_and_the_next_epoch(tmp_path: Path) -> None:
    seen, boundary = run(
        """
        valid = DataLoader(TensorDataset(x, x), batch_size=8)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for epoch in range(9):
            model.train()
            for inputs, targets in train:
                step(inputs, targets)
            model.eval()
            with torch.no_grad():
                losses = [model(inputs) for inputs, _ in valid]
            scheduler.step()
        """,
        tmp_path,
    )
    assert steps(seen.events) == 3
    assert max(e.seq for e in seen.events) < min(e.seq for e in boundary.events)
    assert (boundary.outcome, boundary.reason) == ("crossed", "")
    assert (boundary.batches_delivered, boundary.batches_meant) == (3, 50)
    assert evaluation_batches(boundary) == 2
    assert steps_in_next_epoch(boundary) == 2
    assert [e.training for e in boundary.events if isinstance(e, ModeChanged)] == [False, True]
    assert sum(isinstance(e, SchedulerStep) for e in boundary.events) == 1
    assert boundary.schedulers[0].calls == 1
    assert seen.schedulers[0].calls == 0
    assert seen.schedulers[0].curve
    assert [loader.training for loader in boundary.loaders] == [True, False]


CROSSED = {
    "try and next": """
        batches = iter(train)
        for _ in range(200):
            try:
                inputs, targets = next(batches)
            except StopIteration:
                batches = iter(train)
                inputs, targets = next(batches)
            step(inputs, targets)
    """,
    "a generator that goes round": """
        def endless():
            while True:
                yield from train
        batches = endless()
        for _ in range(200):
            step(*next(batches))
    """,
    "a generator for each epoch": """
        def doubled():
            for inputs, targets in train:
                yield 2 * inputs, 2 * targets
        for _ in range(9):
            for inputs, targets in doubled():
                step(inputs, targets)
    """,
    "an iterator of its own": """
        class Twice:
            def __iter__(self):
                self.batches = iter(train)
                return self
            def __next__(self):
                inputs, targets = next(self.batches)
                return 2 * inputs, 2 * targets
        for _ in range(9):
            for inputs, targets in Twice():
                step(inputs, targets)
    """,
    "loaders made anew": """
        for _ in range(9):
            for inputs, targets in enumerate(DataLoader(data, batch_size=8, shuffle=True)):
                step(*targets)
            for inputs, _ in DataLoader(data, batch_size=8):
                model(inputs)
    """,
    "two loaders together": """
        other = DataLoader(data, batch_size=4)
        for _ in range(9):
            for (inputs, targets), (more, _) in zip(train, other):
                model(more)
                step(inputs, targets)
    """,
    "evaluation on the training's own loader": """
        for _ in range(9):
            for inputs, targets in train:
                step(inputs, targets)
            with torch.no_grad():
                losses = [model(inputs) for inputs, _ in train]
            assert len(losses) < 50
    """,
    "evaluation in the middle": """
        valid = DataLoader(data, batch_size=8)
        for _ in range(9):
            for i, (inputs, targets) in enumerate(train):
                step(inputs, targets)
                if i % 2 == 0:
                    model.eval()
                    losses = [model(inputs) for inputs, _ in valid]
                    model.train()
    """,
    "persistent workers": """
        train = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
        for _ in range(9):
            for inputs, targets in train:
                step(inputs, targets)
    """,
    "a stream read by workers": """
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([(x[i], x[i].sum(0, keepdim=True)) for i in range(400)])
        for _ in range(9):
            for inputs, targets in DataLoader(Stream(), batch_size=8, num_workers=2):
                step(inputs, targets)
    """,
    "a batch sampler": """
        train = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, drop_last=True))
        for _ in range(9):
            for inputs, targets in train:
                step(inputs, targets)
    """,
    "data read ahead by a thread": """
        def ahead():
            waiting = queue.Queue(3)
            def fill():
                for batch in train:
                    waiting.put(batch)
                waiting.put(None)
            threading.Thread(target=fill, daemon=True).start()
            while (batch := waiting.get()) is not None:
                yield batch
        for _ in range(9):
            for inputs, targets in ahead():
                step(inputs, targets)
    """,
    "several steps on one batch": """
        for _ in range(9):
            for inputs, targets in train:
                step(inputs, targets)
                step(inputs, targets)
    """,
    "accumulation": """
        for _ in range(9):
            for i, (inputs, targets) in enumerate(train):
                (torch.nn.functional.mse_loss(model(inputs), targets) / 4).backward()
                if i % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
    """,
    "an epoch of just the watched steps": """
        for _ in range(9):
            for inputs, targets in DataLoader(data, batch_size=150):
                step(inputs, targets)
    """,
    "training in a thread": """
        def go():
            for _ in range(9):
                for inputs, targets in train:
                    step(inputs, targets)
        thread = threading.Thread(target=go)
        thread.start()
        thread.join()
    """,
    "an optimizer for each epoch": """
        for _ in range(9):
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            for inputs, targets in train:
                step(inputs, targets)
    """,
}


@pytest.mark.parametrize("shape", CROSSED)
def test_crossed(shape: str, tmp_path: Path) -> None:
    seen, boundary = run(CROSSED[shape], tmp_path)
    assert (boundary.outcome, boundary.reason) == ("crossed", "")
    assert boundary.next_epoch is not None
    assert steps_in_next_epoch(boundary) >= 2
    assert steps(seen.events) in (3, 6)


def test_going_round_over_what_was_kept(tmp_path: Path) -> None:
    _, boundary = run(
        """
        for inputs, targets in itertools.islice(itertools.cycle(train), 200):
            step(inputs, targets)
        """,
        tmp_path,
    )
    assert boundary.outcome == "crossed"
    assert boundary.next_epoch is None
    assert "without opening its loader again" in boundary.reason


LEFT_OUT = {
    "next() that nothing catches": (
        """
        batches = iter(train)
        for _ in range(len(train)):
            step(*next(batches))
        """,
        "program.py:19 asks for batches with next()",
    ),
    "next() in a function, caught as a failure of anything": (
        """
        def fetch(batches):
            return next(batches)
        def main():
            batches = iter(train)
            while True:
                inputs, targets = fetch(batches)
                step(inputs, targets)
                step(inputs, targets)
                print("another two")
        try:
            main()
        except Exception:
            print("FAILED")
        """,
        "not prepared for their end",
    ),
    "a generator that ends, asked by next()": (
        """
        def doubled():
            for inputs, targets in train:
                yield 2 * inputs, 2 * targets
        batches = doubled()
        while True:
            step(*next(batches))
        """,
        "program.py:22 asks for batches with next()",
    ),
    "an epoch that ended in the watch": (
        """
        for _ in range(9):
            for inputs, targets in DataLoader(data, batch_size=200):
                step(inputs, targets)
        """,
        "another pass over its data within the watched steps",
    ),
    "a new pass for each batch": (
        """
        for _ in range(200):
            step(*next(iter(train)))
        """,
        "another pass over its data within the watched steps",
    ),
    "one batch for all steps": (
        """
        inputs, targets = next(iter(train))
        for _ in range(200):
            step(inputs, targets)
        """,
        "no new batches",
    ),
    "no loader": (
        """
        for i in range(200):
            step(*data[i : i + 8])
        """,
        "no DataLoader feeds the training",
    ),
}


@pytest.mark.parametrize("shape", LEFT_OUT)
def test_left_out(shape: str, tmp_path: Path) -> None:
    text, why = LEFT_OUT[shape]
    seen, boundary = run(text, tmp_path)
    assert boundary.outcome == "left-out"
    assert why in boundary.reason
    assert boundary.next_epoch is None
    assert steps(seen.events) == 3
    assert "FAILED" not in (tmp_path / "output").read_text()


def test_a_program_of_one_epoch(tmp_path: Path) -> None:
    _, boundary = run("for inputs, targets in train:\n    step(inputs, targets)", tmp_path)
    assert (boundary.outcome, boundary.next_epoch) == ("ended", None)


def test_a_program_that_the_shortening_breaks(tmp_path: Path) -> None:
    seen, boundary = run(
        """
        losses = [step(inputs, targets) for inputs, targets in train]
        assert len(losses) == 50, "too few"
        """,
        tmp_path,
    )
    assert boundary.outcome == "failed"
    assert boundary.reason == "the program raised AssertionError: too few"
    assert steps(seen.events) == 3


def test_numbers_owed_to_the_watch_are_its_own(tmp_path: Path) -> None:
    """Nothing that the watch records depends on whether the boundary is crossed."""
    text = START + "for _ in range(9):\n    for inputs, targets in train:\n        step(inputs, targets)"
    with_boundary, without = (tmp_path / "with", tmp_path / "without")
    with_boundary.mkdir()
    without.mkdir()
    crossed = watch(text, with_boundary)
    left_out = watch(text, without, boundary=False)
    assert left_out.boundary is not None
    assert (left_out.boundary.outcome, left_out.boundary.reason) == ("left-out", "switched off")
    assert crossed.steps[0].gradient_norm == left_out.steps[0].gradient_norm
    fingerprints = [[e.fingerprint for e in r.events if isinstance(e, BatchFetched)] for r in (crossed, left_out)]
    assert fingerprints[0] == fingerprints[1]
    assert [(type(e), e.seq) for e in crossed.events] == [(type(e), e.seq) for e in left_out.events]
    for a, b in zip(crossed.steps, left_out.steps, strict=True):
        assert (a.gradient_norm, a.update_norm, a.weight_norm) == (b.gradient_norm, b.update_norm, b.weight_norm)
