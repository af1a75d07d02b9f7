"""What backwards add to gradients, and what steps leave behind, measured in real programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.intervals import Timeline
from trainlint.recording.micro_batches import shares_of
from trainlint.recording.schema import Backward, Clip, Recording

HEAD = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
def loss():
    x = torch.randn(8, 8)
    return nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
"""


def quiet(recording: Recording) -> Recording:
    assert not recording.problems
    return recording


def carried(recording: Recording, optimizer: int = 0) -> list[tuple[int, ...] | None]:
    return [m.carried and m.carried.parameters for m in recording.steps if m.optimizer == optimizer]


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ("loss().backward(); o.step()", [None, (0, 1, 2, 3), (0, 1, 2, 3)]),
        ("loss().backward(); o.step(); o.zero_grad()", [None, (), ()]),
        ("o.zero_grad(set_to_none=False); loss().backward(); o.step()", [None, (), ()]),
        ("loss().backward(); o.step(); [p.grad.data.zero_() for p in model.parameters()]", [None, (), ()]),
        ("loss().backward(); o.step(); [p.grad.mul_(0.5) for p in model.parameters()]", [None, (), ()]),
        # Left behind, and never added to again.
        ("loss().backward(); o.step(); model[2].zero_grad(); model[0].requires_grad_(False)", [None, (), ()]),
        ("loss().backward(); nn.utils.clip_grad_norm_(model.parameters(), 0.1); o.step()", [None, (0, 1, 2, 3)] * 1),
    ],
)
def test_what_is_left_over_is_told_from_what_was_cleared(
    loop: str, expected: list[tuple[int, ...] | None], tmp_path: Path
) -> None:
    source = f"{HEAD}\no = torch.optim.SGD(model.parameters(), lr=0.01)\nfor _ in range(9):\n    {loop}\n"
    found = carried(quiet(watch(source, tmp_path)))
    assert [None if c is None else tuple(sorted(c)) for c in found][: len(expected)] == expected


def test_a_closure_that_clears_leaves_nothing_and_one_that_does_not_is_seen(tmp_path: Path) -> None:
    for name, clear in (("clears", "o.zero_grad()"), ("keeps", "pass")):
        (tmp_path / name).mkdir()
        source = (
            HEAD
            + f"""
o = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
x = torch.randn(8, 8)
def closure():
    {clear}
    value = model(x).pow(2).mean()
    value.backward()
    return value
for _ in range(9):
    o.step(closure)
"""
        )
        found = carried(quiet(watch(source, tmp_path / name)))
        assert [bool(c) for c in found] == ([False] * 3 if name == "clears" else [False, True, True])


def test_steps_inside_backward_leave_nothing(tmp_path: Path) -> None:
    source = (
        HEAD
        + """
each = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
def step(p):
    each[p].step()
    each[p].zero_grad()
for p in model.parameters():
    p.register_post_accumulate_grad_hook(step)
for _ in range(9):
    loss().backward()
"""
    )
    recording = quiet(watch(source, tmp_path))
    assert len(recording.steps) >= 12
    assert all(not m.carried.parameters for m in recording.steps if m.carried)


def test_shares_give_the_gradient_of_other_weights(tmp_path: Path) -> None:
    source = (
        HEAD
        + """
import json
o = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(9):
    o.zero_grad()
    xs = torch.randn(3, 8, 8)
    losses = lambda: [nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()) for x in xs]
    flat = lambda value: torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    a, b, c = losses()
    meant, sums = flat((a + 2 * b + 5 * c) / 8), [flat(x) for x in losses()]
    print(json.dumps([float((sum(sums) / 3 - meant).norm() / meant.norm()), float(sums[0].norm())]), flush=True)
    for value in losses():
        value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    o.step()
"""
    )
    recording = quiet(watch(source, tmp_path))
    truth = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines()[:3]]
    for interval, (error, norm) in zip(Timeline(recording).intervals(0), truth, strict=True):
        shares = shares_of(interval)
        assert shares is not None
        assert shares.error([1 / 3] * 3, [1 / 8, 2 / 8, 5 / 8]) == pytest.approx(error, rel=1e-3)
        assert shares.norm([1, 0, 0]) == pytest.approx(norm, rel=1e-3)
        m = interval.measurement
        assert m is not None and m.gradient_norm_total == pytest.approx(0.01, rel=1e-2)
        assert m.share_products[-1][-1] == pytest.approx(1e-4, rel=1e-2)


def test_backward_inside_backward_is_one(tmp_path: Path) -> None:
    source = (
        HEAD
        + """
from torch.utils.checkpoint import checkpoint
o = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(9):
    x = torch.randn(8, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).pow(2).mean().backward()
    o.step()
    o.zero_grad()
"""
    )
    recording = quiet(watch(source, tmp_path))
    assert sum(isinstance(e, Backward) for e in recording.events) == 3


def test_clipping_is_known_by_what_it_got(tmp_path: Path) -> None:
    source = (
        HEAD
        + """
a = torch.optim.SGD(model[0].parameters(), lr=0.01)
b = torch.optim.SGD(model[2].parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu")
once = model.parameters()
list(once)
for _ in range(9):
    scaler.scale(loss()).backward()
    scaler.unscale_(a)
    nn.utils.clip_grad_norm_(model[0].parameters(), 0.1)
    nn.utils.clip_grad_norm_(model[2].parameters(), 0.2)
    nn.utils.clip_grad_norm_(once, 0.3)
    norm = nn.utils.get_total_norm([p.grad for p in model[0].parameters()])
    nn.utils.clip_grads_with_norm_(model[0].parameters(), max_norm=0.4, total_norm=norm)
    nn.utils.clip_grad_norm_([torch.zeros(3, requires_grad=True)], 0.5)
    for o in (a, b):
        scaler.step(o)
        o.zero_grad()
    scaler.update()
"""
    )
    recording = quiet(watch(source, tmp_path))
    clips = {e.threshold: e for e in recording.events if isinstance(e, Clip)}
    assert [clips[t].scaled for t in (0.1, 0.2, 0.4)] == [False, True, False]
    assert [clips[t].n_tensors for t in (0.1, 0.3, 0.4)] == [2, 0, 2]
    assert [clips[t].with_gradient for t in (0.1, 0.3, 0.5)] == [2, 0, 0]
    assert clips[0.4].total_norm == pytest.approx(0.1, rel=1e-2)
