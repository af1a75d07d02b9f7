"""The curve of a scheduler made on a copy: the rates that stepping the scheduler itself would give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

from trainlint.recorder import curves


class WarmUpThen(lrs.LRScheduler):
    """Keeps the scheduler that follows as an attribute, as a well-known package does."""

    def __init__(self, optimizer: Any, multiplier: float, calls: int, after: Any) -> None:
        self.multiplier, self.calls, self.after, self.finished = multiplier, calls, after, False
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch > self.calls:
            if not self.finished:
                self.after.base_lrs = [base * self.multiplier for base in self.base_lrs]
                self.finished = True
            return self.after.get_last_lr()
        return [b * ((self.multiplier - 1) * self.last_epoch / self.calls + 1) for b in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.finished:
            self.after.step()
            self._last_lr = self.after.get_last_lr()
        else:
            super().step()


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 40),
    "one cycle": lambda o: lrs.OneCycleLR(o, [1e-3, 1e-2], total_steps=60),
    "sequence": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=7), lrs.CosineAnnealingLR(o, 30)], [7]),
    "side by side": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=7), lrs.ExponentialLR(o, 0.9)]),
    "kept as an attribute": lambda o: WarmUpThen(o, 8.0, 10, lrs.CosineAnnealingLR(o, 30)),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 9, 2),
    "factor by factor": lambda o: lrs.MultiplicativeLR(o, lambda n: 0.97),
}  # fmt: skip


def optimizer() -> Any:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": [weights[0]], "lr": 1e-3}, {"params": [weights[1]], "lr": 1e-2}], lr=1e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_copy_goes_where_the_scheduler_goes(name: str) -> None:
    own = optimizer()
    scheduler = SCHEDULERS[name](own)
    points, missing = curves.curve(curves.take(scheduler), curves.horizon(scheduler), None)
    known = dict(points)
    assert missing == "" or name == "one cycle"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in range(41):
            assert known[call] == pytest.approx([g["lr"] for g in own.param_groups], rel=1e-6, abs=1e-12), call
            scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_and_its_optimizer_are_left_alone(name: str) -> None:
    own = optimizer()
    scheduler = SCHEDULERS[name](own)
    before = repr(scheduler.state_dict()), [g["lr"] for g in own.param_groups]
    curves.curve(curves.take(scheduler), curves.horizon(scheduler), 100)
    assert (repr(scheduler.state_dict()), [g["lr"] for g in own.param_groups]) == before


def test_schedulers_beside_each_other_have_no_end_when_one_has_none() -> None:
    assert curves.horizon(SCHEDULERS["side by side"](optimizer())) is None
    both = lrs.ChainedScheduler([lrs.LinearLR(o := optimizer(), 0.1, total_iters=7), lrs.CosineAnnealingLR(o, 30)])
    assert curves.horizon(both) == 30
