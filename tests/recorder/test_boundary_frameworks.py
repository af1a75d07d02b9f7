"""The end of an epoch in trainers that count batches, and in those that read ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recorder.watching import watch

from trainlint.recording.boundary import evaluation_batches, steps_in_next_epoch
from trainlint.recording.codec import load
from trainlint.recording.schema import Backward, BatchFetched, Boundary, Logged, OptimizerStep, Recording, SchedulerStep

pytestmark = [pytest.mark.systems, pytest.mark.timeout(300)]

LIGHTNING = """
import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

x = torch.randn(400, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))
train, valid = DataLoader(data, 8, shuffle=True), DataLoader(TensorDataset(*data[:80]), 8)

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self.log("valid", torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1]))
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

def fit(net=None, train=train, **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(accelerator="cpu", **{"max_epochs": 5, **quiet, **options}).fit(net or Net(), train, valid)
    print("AFTER")
"""


def crossed(text: str, folder: Path) -> tuple[Recording, Boundary]:
    seen = watch(text, folder)
    assert seen.boundary is not None
    assert not seen.problems
    assert len([e for e in seen.events if isinstance(e, OptimizerStep)]) == 3
    assert "AFTER" not in (folder / "output").read_text()
    return seen, seen.boundary


def count(boundary: Boundary, kind: type) -> int:
    return sum(isinstance(e, kind) for e in boundary.events)


def test_lightning(tmp_path: Path) -> None:
    """It validates before the callback that needs the metric is asked, and steps its per-epoch scheduler."""
    pytest.importorskip("lightning")
    _, boundary = crossed(LIGHTNING + "fit(callbacks=[EarlyStopping('valid')], accumulate_grad_batches=2)", tmp_path)
    assert (boundary.outcome, boundary.reason) == ("crossed", "")
    assert (boundary.batches_delivered, boundary.batches_meant) == (8, 50)
    assert evaluation_batches(boundary) == 2
    assert steps_in_next_epoch(boundary) == 2
    assert count(boundary, SchedulerStep) == 1
    assert {e.name for e in boundary.events if isinstance(e, Logged)} == {"valid"}
    assert boundary.next_epoch is not None
    old = [e for e in boundary.events if e.seq < boundary.next_epoch]
    # One whole window of accumulation, not a part of one.
    assert sum(isinstance(e, Backward) for e in old) == 2
    assert sum(isinstance(e, OptimizerStep) for e in old) == 1


LIGHTNING_SHAPES = {
    "validation twice an epoch": ("fit(val_check_interval=0.5)", 2),
    "validation at every second epoch": ("fit(check_val_every_n_epoch=2)", 0),
    "fewer batches than there are": ("fit(limit_train_batches=20)", 2),
    "data without a length": (
        """
class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x[i], x[i].sum(0, keepdim=True)) for i in range(400)])
fit(train=DataLoader(Stream(), 8))
""",
        2,
    ),
    "two loaders": (
        """
class Two(Net):
    def training_step(self, batch, index):
        return super().training_step(batch["a"], index) + 0 * batch["b"][0].sum()
fit(Two(), {"a": train, "b": DataLoader(data, 4)})
""",
        2,
    ),
    "manual optimization": (
        """
class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
    def on_train_epoch_end(self):
        self.lr_schedulers().step()
fit(Manual())
""",
        2,
    ),
}


@pytest.mark.parametrize("shape", LIGHTNING_SHAPES)
def test_lightning_loops(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    text, evaluated = LIGHTNING_SHAPES[shape]
    _, boundary = crossed(LIGHTNING + text, tmp_path)
    assert (boundary.outcome, boundary.reason) == ("crossed", "")
    assert evaluation_batches(boundary) == evaluated
    assert steps_in_next_epoch(boundary) == 2
    assert count(boundary, SchedulerStep) == 1


def test_lightning_in_its_last_epoch(tmp_path: Path) -> None:
    """The validation and the scheduler of the last epoch are seen, what the program does after the training is not."""
    pytest.importorskip("lightning")
    _, boundary = crossed(LIGHTNING + "fit(max_epochs=1)", tmp_path)
    assert boundary.outcome == "ended"
    assert evaluation_batches(boundary) == 2
    assert count(boundary, SchedulerStep) == 1


TRANSFORMERS = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

class Sequences(torch.utils.data.Dataset):
    def __len__(self):
        return 200
    def __getitem__(self, i):
        return {"input_ids": torch.arange(6) + i % 10, "labels": torch.arange(6) + i % 10}

model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
arguments = TrainingArguments(
    "out", per_device_train_batch_size=4, gradient_accumulation_steps=3, num_train_epochs=EPOCHS,
    eval_strategy="epoch", save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
)
Trainer(model, arguments, train_dataset=Sequences(), eval_dataset=Sequences()).train()
print("AFTER")
"""


@pytest.mark.parametrize(("epochs", "outcome", "steps"), [(4, "crossed", 2), (1, "ended", 0)])
def test_transformers(epochs: int, outcome: str, steps: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _, boundary = crossed(TRANSFORMERS.replace("EPOCHS", str(epochs)), tmp_path)
    assert boundary.outcome == outcome
    assert (boundary.batches_delivered, boundary.batches_meant) == (12, 50)
    assert evaluation_batches(boundary) == 2
    assert steps_in_next_epoch(boundary) == steps
    assert count(boundary, OptimizerStep) == 1 + steps
    assert count(boundary, Backward) == 3 * (1 + steps)
    assert any(e.name == "eval_loss" for e in boundary.events if isinstance(e, Logged))


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    _, boundary = crossed(
        """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
x = torch.randn(400, 4)
model = torch.nn.Linear(4, 1)
model, optimizer, train, valid = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()), DataLoader(TensorDataset(x, x), 8), DataLoader(TensorDataset(x), 8)
)
for epoch in range(4):
    for inputs, _ in train:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    ends = []
    for (inputs,) in valid:
        accelerator.gather_for_metrics(inputs)
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert ends == [False, True], ends
print("AFTER")
""",
        tmp_path,
    )
    assert (boundary.outcome, boundary.reason) == ("crossed", "")
    assert count(boundary, OptimizerStep) == 3
    assert count(boundary, Backward) == 9
    assert evaluation_batches(boundary) == 2


def test_two_ranks(tmp_path: Path) -> None:
    """All ranks of a job do the same at the same step, also when one of them is late."""
    (tmp_path / "train.py").write_text(
        """
import time
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
x = torch.randn(400, 4)
sampler = DistributedSampler(TensorDataset(x, x))
train = DataLoader(TensorDataset(x, x), 8, sampler=sampler)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(5):
    sampler.set_epoch(epoch)
    for inputs, targets in train:
        time.sleep(0.2 * dist.get_rank())
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    dist.barrier()
"""
    )
    saved = tmp_path / "run.json"
    line = [sys.executable, "-m", "trainlint", "check", "-q", "--save-recording", str(saved), "--"]
    subprocess.run(
        [*line, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        check=True,
        timeout=240,
    )
    seen = load(saved)
    assert seen.boundary is not None
    assert seen.ending.how == "steps"
    assert (seen.boundary.outcome, seen.program.ranks_seen) == ("crossed", 2)
    assert (seen.boundary.batches_delivered, seen.boundary.batches_meant) == (3, 25)
    first = [e.fingerprint for e in seen.events if isinstance(e, BatchFetched)]
    assert first[0] not in [e.fingerprint for e in seen.boundary.events if isinstance(e, BatchFetched)][:1]
