"""When an experiment has seen enough, at which rates it goes on, and how low a loss can get."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.build import Run
from tests.support.experiments import curve, falling
from trainlint.recorder.experiment_losses import floor_of
from trainlint.recorder.experiment_lr import Sweep
from trainlint.recorder.experiment_overfit import Overfit
from trainlint.recording.experiment_plan import next_rate, plan
from trainlint.recording.schema import Ending


def ended(policy: Any, losses: list[float], floor: float | None = 0.0) -> tuple[str, int]:
    for number, loss in enumerate(losses, 1):
        how = policy.seen(loss, floor)
        if how:
            return how, number
    return "", len(losses)


def overfit() -> Overfit:
    return Overfit({"steps": 300, "rate": 1e-3})


def test_when_a_batch_has_been_seen_often_enough() -> None:
    assert ended(overfit(), falling(2.3, 0.01))[0] == "reached"
    assert ended(overfit(), [2.2, 2.4] + [2.3] * 300) == ("constant", 32)
    assert ended(overfit(), [2.3, 2.2, math.nan]) == ("diverged", 3)
    assert ended(overfit(), [2.3] + [99.0] * 10)[0] == "diverged"
    assert ended(overfit(), falling(2.3, 1.5))[0] == "plateau"
    assert ended(overfit(), [2.3 - 0.003 * i for i in range(300)]) == ("steps", 300)
    # Of an unknown floor only that it is not far from 0 can be said; below 0 anything goes.
    assert ended(overfit(), falling(2.3, 0.01), None)[0] == "reached"
    assert ended(overfit(), falling(2.3, -50.0, 100), None)[0] in ("", "reached")
    assert ended(overfit(), falling(2.3, 1.05), 1.0)[0] == "reached"


def test_a_sweep_is_geometric_and_ends_where_the_loss_blows_up() -> None:
    policy = Sweep({"steps": 101, "low": 1e-7, "high": 10.0})
    assert policy.rate(0) == pytest.approx(1e-7)
    assert policy.rate(50) == pytest.approx(1e-3)
    assert policy.rate(100) == pytest.approx(10.0)
    assert ended(policy, [2.3] * 101) == ("swept", 101)
    how, made = ended(Sweep({"steps": 100, "low": 1e-7, "high": 10.0}), [2.3] * 80 + [30.0] * 20)
    assert how == "diverged"
    assert made < 85
    noisy = [1.4, 3.7, 4.6, 3.5, 4.5, 4.0, 6.1, 4.2, 4.4, 9.6, 3.5, 10.8] * 8
    assert ended(Sweep({"steps": 96, "low": 1e-7, "high": 10.0}), noisy) == ("swept", 96)


def test_where_to_look_next() -> None:
    assert next_rate([curve([2.3, math.nan], "diverged", 1e-3)]) == pytest.approx(1e-4)
    assert next_rate([curve([2.3 - 0.001 * i for i in range(300)], "steps", 1e-3)]) == pytest.approx(1e-2)
    assert next_rate([curve(falling(2.3, 0.1), "reached", 1e-3)]) is None
    assert next_rate([curve([2.3] * 30, "constant", 1e-3)]) is None
    assert next_rate([curve(falling(2.3, 0.9), "plateau", 1e-3)]) is None, "it is being learned"
    assert next_rate([curve(falling(2.3, 1.6), "plateau", 1e-3)], floor=1.1) is None
    assert next_rate([curve([2.3] * 9, "died", 1e-3)]) is None
    two = [curve([2.3, math.nan], "diverged", 1e-2), curve(falling(2.3, 2.2), "plateau", 1e-3)]
    assert next_rate(two) is None, "1e-2 was tried"


def test_floors() -> None:
    torch.manual_seed(0)
    scores = torch.randn(8, 5)
    index = torch.tensor([0, 1, 2, 3, 4, -100, -100, 1])
    assert floor_of("cross_entropy", {"input": scores}, index) == (0.0, 6)
    assert floor_of("mse_loss", {}, torch.randn(4, 2)) == (0.0, 8)
    assert floor_of("gaussian_nll_loss", {}, torch.randn(4))[0] is None
    assert floor_of("nll_loss", {"input": scores}, index)[0] is None, "positive: no log-probabilities"
    assert floor_of("nll_loss", {"input": F.log_softmax(scores, 1)}, index) == (0.0, 6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_floors_of_soft_targets_are_what_the_best_prediction_costs(reduction: str) -> None:
    torch.manual_seed(0)
    soft = torch.softmax(torch.randn(6, 5, dtype=torch.double), 1)
    best = F.cross_entropy(soft.log(), soft, reduction=reduction)
    found, positions = floor_of("cross_entropy", {"input": soft, "reduction": reduction}, soft)
    assert positions == 6
    assert found == pytest.approx(float(best))
    index = torch.tensor([0, 1, 2, 3, 4, 0])
    smoothed = F.one_hot(index, 5) * 0.7 + 0.3 / 5
    best = F.cross_entropy(smoothed.log(), index, label_smoothing=0.3, reduction=reduction)
    arguments = {"input": soft, "label_smoothing": 0.3, "reduction": reduction}
    assert floor_of("cross_entropy", arguments, index)[0] == pytest.approx(float(best), rel=1e-5)
    share = torch.rand(4, 3, dtype=torch.double)
    best = F.binary_cross_entropy(share, share, reduction=reduction)
    found, _ = floor_of("binary_cross_entropy_with_logits", {"reduction": reduction}, share)
    assert found == pytest.approx(float(best))


def program(class_name: str = "AdamW", lr: float = 1e-3, origin: str = "fresh", **hyper: Any) -> Run:
    run = Run()
    adam = run.optimizer(class_name, run.module("Net", {"weight": (8, 8)}, origin=origin), lr=lr, hyper=hyper)
    for _ in range(3):
        run.batch().backward().step(adam).zero(adam)
    run.fields["ending"] = Ending(how="steps")
    return run


@pytest.mark.parametrize(
    ("class_name", "lr", "origin", "rate"),
    [
        ("AdamW", 3e-4, "fresh", 3e-4),
        ("AdamW", 1e-7, "fresh", 1e-3),
        ("AdamW", 1e-7, "loaded:model.pt", 1e-4),
        ("AdamW", 5.0, "fresh", 1e-3),
        ("SGD", 0.1, "fresh", 0.1),
        ("SGD", 1e-6, "fresh", 1e-2),
        ("Muon", 2e-5, "fresh", 2e-2),
        ("Lion", 1.0, "fresh", 1e-4),
    ],
)
def test_the_rate_to_overfit_at(class_name: str, lr: float, origin: str, rate: float) -> None:
    made = plan(program(class_name, lr, origin).recording(), "overfit")
    assert made.reason == ""
    assert made.rate == pytest.approx(rate)
    assert made.configured_rate == pytest.approx(lr)


@pytest.mark.parametrize(
    "class_name", ["LBFGS", "AdamWScheduleFree", "ScheduleFreeWrapper", "Prodigy", "DAdaptAdam", "Rprop"]
)
def test_optimizers_that_find_their_own_steps(class_name: str) -> None:
    assert "own step sizes" in plan(program(class_name).recording(), "lr-range").reason


def test_several_optimizers() -> None:
    def two(turns: bool) -> Run:
        run = Run()
        first = run.optimizer("Muon", run.module("A", {"weight": (8, 8)}), lr=2e-2)
        second = run.optimizer("AdamW", run.module("B", {"weight": (8, 8)}), lr=1e-3)
        for _ in range(3):
            run.batch().backward().step(first)
            if turns:
                run.backward()
            run.step(second)
        run.fields["ending"] = Ending(how="steps")
        return run

    assert "take turns" in plan(two(True).recording(), "overfit").reason
    together = plan(two(False).recording(), "overfit")
    assert together.reason == ""
    assert together.optimizer == 0
    assert dict(together.peaks) == {0: (2e-2,), 1: (1e-3,)}


def test_the_sweep_reaches_around_the_configured_rate() -> None:
    made = plan(program(lr=1e-8).recording(), "lr-range")
    assert made.low is not None
    assert made.low < 1e-9
    assert plan(Run().recording(), "lr-range").reason
