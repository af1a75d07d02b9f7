"""Which tensors nobody wrote, as recorded from running programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.schema import UnwrittenTensors

HEAD = """
import copy
import torch
from torch import nn
torch.set_default_dtype(torch.float64)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.empty(16, 16))
        self.b = nn.Parameter(
            torch.Tensor(16, 16)
        )
        self.c = nn.Parameter(torch.Tensor([1.0] * 16))
        self.begin()
    def begin(self):
        nn.init.ones_(self.a)
        {begin}
    def forward(self, x):
        return x @ torch.tanh(self.a) @ torch.tanh(torch.nan_to_num(self.b)) + self.c

def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
blocks = [torch.randn(16, 16) for _ in range(512)]
del blocks
"""


def unwritten(folder: Path, program: str, begin: str = "pass") -> tuple[UnwrittenTensors, ...]:
    recording = watch(HEAD.replace("{begin}", begin) + program, folder, boundary=False)
    assert not recording.problems
    assert recording.numerics is None or isinstance(recording.numerics.unwritten, tuple)
    return recording.numerics.unwritten if recording.numerics is not None else ()


def test_parameters_made_of_empty_memory(tmp_path: Path) -> None:
    (record,) = unwritten(tmp_path, "train(Layer())")
    assert (record.how, record.module, record.unwritten, record.tensors) == ("torch.empty", "Layer", ("b",), 1)
    assert record.at is not None


@pytest.mark.parametrize(
    "begin", ["self.b.data.normal_()", "self.b.detach().numpy()[:] = 2.0", "self.b.data = torch.ones(16, 16)"]
)
def test_every_way_of_writing_counts(tmp_path: Path, begin: str) -> None:
    assert unwritten(tmp_path, "train(Layer())", begin) == ()


def test_to_empty_without_and_with_what_follows(tmp_path: Path) -> None:
    program = """
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
model.to_empty(device="cpu")
nn.init.ones_(model[0].weight)
model[1].reset_parameters()
train(model)
"""
    (record,) = unwritten(tmp_path, program)
    assert record.how == "to_empty" and record.unwritten == ("0.bias",)
    assert (record.matrices, record.matrices_unwritten) == (1, 0)


def test_copies_loaded_and_skipped_models_are_silent(tmp_path: Path) -> None:
    program = """
with torch.device("meta"):
    model = nn.Linear(16, 16)
model.to_empty(device="cpu")
model.load_state_dict(nn.Linear(16, 16).state_dict(), assign=True)
other = nn.utils.skip_init(nn.Linear, 16, 16)
train(copy.deepcopy(model))
"""
    assert unwritten(tmp_path, program) == ()
