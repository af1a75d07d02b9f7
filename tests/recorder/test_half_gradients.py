"""Gradients computed in float16, and what a GradScaler did, as recorded."""

from __future__ import annotations

from pathlib import Path

from tests.recorder.watching import watch
from trainlint.recording.schema import ScalerEvent

HEAD = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
x = torch.randn(256, 128)
"""


def test_autocast_leaves_float16_numbers_in_float32_gradients(tmp_path: Path) -> None:
    recording = watch(
        HEAD
        + """
for _ in range(9):
    with torch.autocast("cpu", dtype=torch.float16):
        loss = nn.functional.mse_loss(model(x), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
        tmp_path,
    )
    assert not recording.problems and recording.numerics is not None
    look = recording.numerics.half_gradients[0]
    assert (look.tensors, look.half, look.autocast, look.weights) == (4, 4, True, False)
    assert look.subnormal > 0.05 * look.elements
    assert len(look.parameters) == 4


def test_float32_gradients_are_not_float16_numbers(tmp_path: Path) -> None:
    recording = watch(
        HEAD
        + """
with torch.autocast("cpu", dtype=torch.float16):
    model(x)
for _ in range(9):
    loss = nn.functional.mse_loss(model(x), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
        tmp_path,
    )
    assert recording.numerics is not None
    assert {look.half for look in recording.numerics.half_gradients} == {0}


def test_the_course_of_a_scaler(tmp_path: Path) -> None:
    recording = watch(
        HEAD
        + """
scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})
for i in range(9):
    loss = model(x).pow(2).mean() * (float("inf") if i == 1 else 1.0)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
        tmp_path,
        boundary=False,
    )
    assert not recording.problems and recording.numerics is not None
    (scaler,) = recording.numerics.scalers
    assert (scaler.scale, scaler.growth_interval, scaler.backoff_factor) == (256.0, 2, 0.5)
    (state,) = recording.numerics.scaler_states
    assert state.scale == 256.0 and state.at is not None
    updates = [e.scale for e in recording.events if isinstance(e, ScalerEvent) and e.call == "update"]
    assert updates[:3] == [256.0, 128.0, 128.0]
