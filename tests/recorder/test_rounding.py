"""What a step meant to add to half-precision weights, and what of it arrived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recorder.watching import watch
from trainlint.recorder.rounding import Rounding


def one_step(optimizer: torch.optim.Optimizer, *, steps: int = 1) -> dict[str, object]:
    sampler = Rounding(7)
    payload: dict[str, object] = {}
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape).to(p.dtype)
        sampler.before(optimizer, closure=False)
        optimizer.step()
        ((tag, numerics),) = sampler.after(optimizer)
        assert tag == "numerics"
        (payload,) = numerics["rounding"]
    return payload


def weights(size: float, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    torch.manual_seed(0)
    return torch.nn.Parameter((size * (1.1 + 0.7 * torch.rand(32, 16))).to(dtype))


@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), "adam"),
        (lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True, foreach=True), "adam"),
        (lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, fused=True), "adam"),
        (lambda p, lr: torch.optim.SGD(p, lr=lr), "sgd"),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True), "sgd"),
        (lambda p, lr: torch.optim.RMSprop(p, lr=lr), "rmsprop"),
        (lambda p, lr: torch.optim.Adagrad(p, lr=lr), "adagrad"),
    ],
)
def test_formulas_say_which_elements_move(make: object, formula: str) -> None:
    lost = one_step(make([weights(1.0)], 1e-7))  # type: ignore[operator]
    assert (lost["formula"], lost["elements"], lost["unchanged"]) == (formula, 512, 512)
    assert lost["small"] == 512 and lost["small_changed"] == 0
    moved = one_step(make([weights(1e-3)], 3.0))  # type: ignore[operator]
    assert moved["large"] and moved["large_changed"] == moved["large"]


def test_the_ratio_is_the_update_over_half_the_distance_between_numbers() -> None:
    p = weights(1.0)  # between 1.1 and 1.8, where numbers are 2**-7 apart
    payload = one_step(torch.optim.AdamW([p], lr=2.0**-10, weight_decay=0.0))
    assert payload["median_ratio"] == pytest.approx(0.25, rel=0.02)
    half = one_step(torch.optim.AdamW([weights(1.0, torch.float16)], lr=2.0**-13, eps=1e-6, weight_decay=0.0))
    assert half["median_ratio"] == pytest.approx(0.25, rel=0.02)


def test_float32_weights_and_later_steps_cost_nothing() -> None:
    sampler = Rounding(0)
    p = weights(1.0, torch.float32)
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([p], lr=0.1)
    sampler.before(optimizer, closure=False)
    assert sampler.after(optimizer) == []
    sampler.steps = 100
    half = weights(1.0)
    half.grad = torch.ones_like(half)
    optimizer = torch.optim.SGD([half], lr=0.1)
    sampler.before(optimizer, closure=False)
    assert sampler.after(optimizer) == []


class Own(torch.optim.Optimizer):
    """Signs of the gradient, in place."""

    def __init__(self, p: list[torch.nn.Parameter], keep: str) -> None:
        super().__init__(p, {"lr": 1e-6})
        self.keep = keep
        self.copies = [x.detach().float().clone() for x in p] if keep == "copies" else None

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            update = self.param_groups[0]["lr"] * p.grad.sign()
            state = self.state[p]
            if self.keep == "master":
                state.setdefault("fp32", p.float().clone()).sub_(update)
                p.copy_(state["fp32"])
            elif self.keep == "rest":
                rest = state.setdefault("rest", torch.zeros_like(p))
                exact = p.float() - update.float() + rest.float()
                p.copy_(exact)
                rest.copy_(exact - p.float())
            else:
                p.sub_(update)


@pytest.mark.parametrize(
    ("keep", "where"), [("master", "fp32"), ("rest", "rest"), ("copies", "float32 tensors of its own"), ("", "")]
)
def test_where_an_optimizer_keeps_what_rounds_away(keep: str, where: str) -> None:
    payload = one_step(Own([weights(1.0)], keep), steps=2)
    assert payload["kept_in"] == where
    assert payload["formula"] == ""
    assert payload["unchanged"] == payload["elements"]


def test_a_watched_program(tmp_path: Path) -> None:
    recording = watch(
        """
        import torch
        from torch import nn
        model = nn.Linear(16, 16).bfloat16()
        frozen = nn.Linear(16, 16)
        optimizer = torch.optim.Adam([{"params": frozen.parameters()}, {"params": model.parameters()}], lr=1e-6)
        def closure():
            optimizer.zero_grad()
            loss = frozen(model(torch.randn(8, 16).bfloat16()).float()).pow(2).mean()
            loss.backward()
            return loss
        for _ in range(9):
            optimizer.step(closure)
        """,
        tmp_path,
        steps=2,
    )
    assert not recording.problems
    assert recording.numerics is not None
    records = recording.numerics.rounding
    assert [(r.group, r.index) for r in records][:2] == [(1, 0), (1, 1)]
    assert records[0].formula == "adam" and records[0].rate == 1e-6
    assert records[0].unchanged > 0.9 * records[0].elements > 0
