"""Copies of a trained module, and the updates that reach them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.schema import Recording

HEAD = """
import copy, os, torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
ema = {ema}
for p in ema.parameters():
    p.requires_grad_(False)
for step in range(12):
    loss = (model(torch.randn(8, 6)) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        {update}
"""
LOOP = "[{call} for e, p in zip(ema.parameters(), model.parameters())]"


def run(folder: Path, update: str, ema: str = "copy.deepcopy(model)") -> Recording:
    return watch(HEAD.format(update=update, ema=ema), folder, steps=4)


@pytest.mark.parametrize(
    "call", ["e.lerp_(p, 0.001)", "e.mul_(0.99).add_(p, alpha=0.01)", "e.data.mul_(0.99).add_(p.data, alpha=0.01)"]
)
def test_an_average_that_follows(tmp_path: Path, call: str) -> None:
    (shadow,) = run(tmp_path, LOOP.format(call=call)).shadows
    assert shadow.idle_updates == 0
    assert shadow.moved


@pytest.mark.parametrize("call", ["e.lerp_(p, 0.0)", "e.mul_(1.0).add_(p, alpha=0)", "e.lerp_(e, 0.1)"])
def test_updates_that_change_nothing(tmp_path: Path, call: str) -> None:
    (shadow,) = run(tmp_path, LOOP.format(call=call)).shadows
    assert shadow.idle_updates == 3  # the one after the last watched step is not seen
    assert shadow.due > 8
    assert not shadow.moved


def test_a_frozen_copy_is_left_alone(tmp_path: Path) -> None:
    (shadow,) = run(tmp_path, "ema(torch.randn(2, 6)); torch.save(ema.state_dict(), 'ema.pt')").shadows
    assert shadow.idle_updates == shadow.effective_updates == 0
    assert shadow.calls is None
    assert shadow.forwards == 3
    assert shadow.saved is not None and shadow.saved.endswith("ema.pt")


def test_a_hard_copy_every_other_step(tmp_path: Path) -> None:
    (shadow,) = run(tmp_path, "step % 2 or ema.load_state_dict(model.state_dict())").shadows
    assert shadow.effective_updates >= 1
    assert shadow.idle_updates == 0


@pytest.mark.parametrize(("decay", "idle"), [("0.999", 0), ("1.0", 3)])
def test_averaged_model(tmp_path: Path, decay: str, idle: int) -> None:
    ema = f"AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn({decay}))"
    (shadow,) = run(tmp_path, "ema.update_parameters(model)", ema).shadows
    assert shadow.class_name == "AveragedModel"
    assert shadow.calls is not None and shadow.calls >= 3
    assert shadow.at is not None
    assert shadow.effective_updates >= 1  # the first call copies
    assert shadow.idle_updates >= idle - 1 if idle else shadow.idle_updates == 0


def test_a_whole_copy_can_still_be_saved_and_copied(tmp_path: Path) -> None:
    both = "(copy.deepcopy(ema), torch.load('a.pt', weights_only=False))"
    update = f"torch.save(ema, 'a.pt'); [m(torch.randn(1, 6)) for m in {both}]"
    (shadow,) = run(tmp_path, update).shadows
    assert shadow.saved is not None
    assert not run_problems(tmp_path)


def run_problems(folder: Path) -> str:
    text = (folder / "output").read_text()
    return text if "Error" in text else ""


def test_layers_that_are_alike_are_no_copies_of_each_other(tmp_path: Path) -> None:
    recording = watch(
        """
        import torch
        from torch import nn
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(9):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
        """,
        tmp_path,
    )
    assert recording.shadows == ()
