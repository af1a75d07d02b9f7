"""What is measured of the input of a loss, and what the graph says of a loss written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder.watching import watch
from torch import Tensor, nn
from torch.nn import functional as F

from trainlint.recorder import loss_inputs
from trainlint.recorder.loss_graph import origin, outer_difference
from trainlint.recording.schema import LossCall, OuterDifference

torch.manual_seed(0)
X = torch.randn(6, 5)
LAYER = nn.Linear(5, 4)


def scores() -> Tensor:
    return LAYER(X)


@pytest.mark.parametrize(
    ("make", "made_by", "over"),
    [
        (lambda z: nn.Softmax(dim=-1)(z), "softmax", 1),
        (lambda z: F.softmin(z, 0), "softmax", 0),
        (lambda z: z.softmax(1).to(torch.bfloat16).float().clone(), "softmax", 1),
        (lambda z: z.softmax(1).view(2, 3, 4).transpose(1, 2)[:, :, ::2].contiguous(), "softmax", None),
        (lambda z: torch.cat([z.softmax(1), z.softmax(1)[:2]]), "softmax", None),
        (lambda z: torch.cat([z.softmax(1), z]), "", None),
        (lambda z: z.softmax(1).chunk(2)[1].clamp(1e-7, 1), "softmax", None),
        (lambda z: torch.exp(F.log_softmax(z, 1)), "softmax", 1),
        (lambda z: (e := z.exp()) / e.sum(1, keepdim=True), "softmax", None),
        (lambda z: z / z.sum(1, keepdim=True), "", None),
        (lambda z: F.log_softmax(z, 1), "log_softmax", 1),
        (lambda z: torch.log(z.softmax(1) + 1e-9), "log_softmax", 1),
        (lambda z: z - z.logsumexp(1, keepdim=True), "log_softmax", None),
        (lambda z: torch.log(0.5 * z.softmax(1) + 0.5 * z.flip(0).softmax(1)), "log", None),
        (lambda z: torch.special.expit(z)[:, 0], "sigmoid", None),
        (lambda z: 1 / (1 + torch.exp(-z)), "sigmoid", None),
        (lambda z: F.hardsigmoid(z), "sigmoid", None),
        (lambda z: torch.log(z.sigmoid()), "logsigmoid", None),
        (lambda z: z, "linear", None),
        (lambda z: (X @ LAYER.weight.T + LAYER.bias).view(2, 3, 4), "linear", None),
        (lambda z: nn.Conv1d(1, 2, 3)(X.unsqueeze(1)), "linear", None),
        (lambda z: z.clamp(0, 1), "", None),
        (lambda z: z.relu(), "relu", None),
        (lambda z: z.softmax(1) * 3, "", None),
        (lambda z: z.softmax(1) * z, "", None),
        (lambda z: z.softmax(1).detach(), "", None),
    ],
)
def test_the_operation_that_made_a_tensor(make: Callable[[Tensor], Tensor], made_by: str, over: int | None) -> None:
    found = origin(make(scores()))
    assert (found.made_by, found.over) == (made_by, over)


def look(function: str, given: Tensor, target: Tensor | None, **options: Any) -> dict[str, Any]:
    found = loss_inputs.look(function, given, target, options)
    assert found is not None
    return found[1](found[0].tolist())


def gradient_at_scores(loss: Callable[[Tensor], Tensor]) -> Tensor:
    z = scores().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    return gradient


TARGET = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_share_of_the_gradient_that_a_second_softmax_leaves(smoothing: float) -> None:
    kept = look("cross_entropy", scores().softmax(1), TARGET, label_smoothing=smoothing)["gradient_kept"]
    twice = gradient_at_scores(lambda z: F.cross_entropy(z.softmax(1), TARGET, label_smoothing=smoothing))
    once = gradient_at_scores(lambda z: F.cross_entropy(z, TARGET, label_smoothing=smoothing))
    assert kept == pytest.approx(float(twice.norm() / once.norm()), rel=1e-4)


def test_the_share_with_ignored_positions_and_soft_targets() -> None:
    target = TARGET.masked_fill(TARGET == 3, -1)
    kept = look("cross_entropy", scores().softmax(1), target, ignore_index=-1)["gradient_kept"]
    twice = gradient_at_scores(lambda z: F.cross_entropy(z.softmax(1), target, ignore_index=-1))
    once = gradient_at_scores(lambda z: F.cross_entropy(z, target, ignore_index=-1))
    assert kept == pytest.approx(float(twice.norm() / once.norm()), rel=1e-4)
    soft = X[:, :4].softmax(1)
    kept = look("cross_entropy", scores().softmax(1), soft)["gradient_kept"]
    twice = gradient_at_scores(lambda z: F.cross_entropy(z.softmax(1), soft))
    once = gradient_at_scores(lambda z: F.cross_entropy(z, soft))
    assert kept == pytest.approx(float(twice.norm() / once.norm()), rel=1e-4)


def test_the_share_that_a_missing_logarithm_and_a_second_sigmoid_leave() -> None:
    kept = look("nll_loss", scores().softmax(1), TARGET)["gradient_kept"]
    without = gradient_at_scores(lambda z: F.nll_loss(z.softmax(1), TARGET))
    once = gradient_at_scores(lambda z: F.cross_entropy(z, TARGET))
    assert kept == pytest.approx(float(without.norm() / once.norm()), rel=1e-4)
    labels = (X[:, :4] > 0).float()
    kept = look("binary_cross_entropy_with_logits", scores().sigmoid(), labels)["gradient_kept"]
    twice = gradient_at_scores(lambda z: F.binary_cross_entropy_with_logits(z.sigmoid(), labels))
    once = gradient_at_scores(lambda z: F.binary_cross_entropy_with_logits(z, labels))
    assert kept == pytest.approx(float(twice.norm() / once.norm()), rel=1e-4)


def test_gradients_that_a_saturated_sigmoid_loses() -> None:
    logits = torch.tensor([50.0, 50.0, -50.0, 20.0, -20.0, 0.0, 10.0], requires_grad=True)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    found = look("binary_cross_entropy", logits.sigmoid(), labels)
    F.binary_cross_entropy(logits.sigmoid(), labels, reduction="sum").backward()
    assert logits.grad is not None
    lost = (logits.grad.abs() < 0.5) & ((logits.sigmoid() - labels).abs() > 0.5)
    assert found["vanished"] == int(lost.sum()) == 3


def test_rows_are_over_the_classes() -> None:
    images = nn.Conv2d(2, 3, 1)(torch.randn(2, 2, 5, 7))
    found = look("cross_entropy", images.softmax(1), torch.zeros(2, 5, 7, dtype=torch.long))
    assert (found["rows"], found["classes"]) == (70, 3)
    assert found["row_sum_min"] == pytest.approx(1, abs=1e-5)
    found = look("nll_loss", F.log_softmax(scores()[0], dim=0), torch.tensor(1))
    assert (found["rows"], found["classes"], found["made_over"]) == (1, 4, 0)
    assert found["row_logsumexp_max"] == pytest.approx(0, abs=1e-5)
    found = look("kl_div", F.log_softmax(images, dim=1), images.softmax(1))
    assert found["row_logsumexp_max"] == pytest.approx(0, abs=1e-5)


def test_large_inputs_are_sampled() -> None:
    found = look("cross_entropy", torch.randn(40, 9, 60, 60), None)
    assert 0 < found["rows"] <= loss_inputs.MOST_ROWS
    found = look("cross_entropy", torch.randn(300, 50_000), torch.zeros(300, dtype=torch.long))
    assert 0 < found["rows"] * 50_000 <= loss_inputs.MOST_ELEMENTS
    found = look("binary_cross_entropy_with_logits", torch.randn(7, 100_003), None)
    assert 0 < found["rows"] <= loss_inputs.MOST_SINGLE_ELEMENTS


def test_values_that_are_not_finite() -> None:
    given = torch.zeros(3, 4)
    given[0, 0] = -math.inf
    found = look("cross_entropy", given, TARGET[:3])
    assert (found["minimum"], found["finite"]) == (-math.inf, False)
    assert found["row_logsumexp_max"] == pytest.approx(math.log(4))


def test_what_cannot_be_read_is_left_alone() -> None:
    assert loss_inputs.look("cross_entropy", torch.empty(3, 4, device="meta"), None, {}) is None
    assert loss_inputs.look("cross_entropy", torch.empty(0, 4), None, {}) is None
    assert loss_inputs.look("cross_entropy", torch.tensor(1.0), None, {}) is None
    assert loss_inputs.look("mse_loss", torch.randn(3, 4), None, {}) is None
    seen = []
    torch.vmap(lambda z: (seen.append(loss_inputs.readable(z)), z)[1])(X)
    assert seen == [False]


COLUMN = nn.Linear(5, 1)
ROW = torch.randn(6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: ((p - ROW) ** 2).mean(),
        lambda p: 0.5 * (ROW - p).square().mean() / 3,
        lambda p: (torch.rand(6) * (p - ROW).pow(2)).sum() / 6 + COLUMN.weight.pow(2).sum(),
        lambda p: torch.sqrt(((p.flatten() - ROW[:, None]) ** 2).mean()),
        lambda p: ((d := p - ROW) * d).mean(),
        lambda p: (p - ROW).abs().mean(),
    ],
)
def test_a_difference_that_broadcast(loss: Callable[[Tensor], Tensor]) -> None:
    found = outer_difference(loss(COLUMN(X)))
    assert found is not None
    assert found.shape == (6, 6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: ((p - ROW[:, None]) ** 2).mean(),
        lambda p: ((p.flatten() - ROW) ** 2).mean(),
        lambda p: ((p - p.T) ** 2).mean(),
        lambda p: ((p - p.T - (ROW[:, None] - ROW)) ** 2).mean(),
        lambda p: ((p - torch.ones(6)) ** 2).mean(),
        lambda p: ((p - torch.randn(6, 6)) ** 2).mean(),
        lambda p: ((p - torch.randn(7)) ** 2).mean(),
        lambda p: ((p - ROW) ** 2).amin(1).mean(),
        lambda p: torch.exp(-((p - ROW) ** 2)).mean(),
        lambda p: ((p[:1] - ROW[:1]) ** 2).mean(),
        lambda p: ((p - ROW) ** 3).mean(),
    ],
)
def test_differences_that_are_meant(loss: Callable[[Tensor], Tensor]) -> None:
    assert outer_difference(loss(COLUMN(X))) is None


def test_in_a_watched_program(tmp_path: Path) -> None:
    """Function transforms, a refused target and a loss by hand pass; what the program computes is what it would be."""
    run = watch(
        """
        import torch
        from torch import nn
        from torch.nn import functional as F

        torch.manual_seed(0)
        model, column = nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)), nn.Linear(5, 1)
        optimizer = torch.optim.SGD([*model.parameters(), *column.parameters()], lr=0.1)
        for i in range(3):
            x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 0, 1])
            torch.func.grad(lambda w: F.cross_entropy(x @ w, y))(torch.randn(5, 4))
            torch.vmap(lambda z, t: F.cross_entropy(z, t))(x, y)
            try:
                F.cross_entropy(model(x), y + 1)
            except IndexError:
                pass
            loss = F.cross_entropy(model(x), y) + ((column(x) - x.sum(1)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(i, loss.item(), torch.rand(1).item())
        """,
        tmp_path,
    )
    assert run.problems == ()
    calls = [e for e in run.events if isinstance(e, LossCall) and e.input_shape == (6, 4)]
    softmaxed = [c for c in calls if c.input is not None and c.input.made_by == "softmax"]
    assert len(softmaxed) == 6
    assert [bool(c.raised) for c in softmaxed] == [True, False] * 3
    assert all(c.input.gradient_kept is not None for c in softmaxed[1::2] if c.input is not None)
    assert {e.operand_shape for e in run.events if isinstance(e, OuterDifference)} == {(6, 1)}
    last = (tmp_path / "output").read_text().splitlines()[-1].split()
    torch.manual_seed(0)
    model, column = nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)), nn.Linear(5, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *column.parameters()], lr=0.1)
    for _ in range(3):
        x = torch.randn(6, 5)
        torch.randn(5, 4)
        loss = F.cross_entropy(model(x), TARGET) + ((column(x) - x.sum(1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        drawn = torch.rand(1).item()
    assert [float(v) for v in last[1:]] == [loss.item(), drawn]
