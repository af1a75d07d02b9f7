"""TL307 accumulation-token-weighting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from trainlint.checks.loop.accumulation_token_weighting import accumulation_token_weighting as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import LossCall, LossGradient, LossTarget

NET = {"fc.weight": (8, 8)}


def accumulate(
    tokens: Sequence[int],
    *,
    positions: int = 64,
    weight: str = "mean",
    reduction: str = "mean",
    measured: bool = True,
    options: dict[str, Any] | None = None,
    losses: int = 1,
    batch: bool = True,
) -> Run:
    """Windows of micro-batches whose own gradients are orthonormal per token-mean.

    ``weight``: ``mean`` (each micro-batch a mean of its own, divided by their number) or ``window`` (by all tokens).
    """
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        backwards, applied = [], []
        for n in tokens:
            if batch:
                run.batch()
            own = 1 / len(tokens) if weight == "mean" else n / sum(tokens)
            total = {"mean": own, "sum": own / n, "none": own}[reduction]
            gradient = (
                LossGradient(total, positions, n, own / n, own / n) if reduction == "none" else LossGradient(total)
            )
            for _ in range(losses):
                run._emit(
                    LossCall,
                    function="cross_entropy",
                    reduction=reduction,
                    value=1.0,
                    target=LossTarget(positions, ignored=positions - n),
                    gradient=gradient,
                    options=options or {},
                )
            run.backward()
            backwards.append(len(run.events))
            applied.append(own)
        rows = [[a * a if i == j else 0.0 for j in range(len(tokens))] for i, a in enumerate(applied)]
        products = tuple((*row, 0.0) for row in rows) + ((0.0,) * len(tokens) + (1.0,),)
        fields: dict[str, Any] = {"share_backwards": tuple(backwards), "share_products": products} if measured else {}
        run.step(adam, **fields).zero(adam)
    return run


def test_a_mean_of_means_says_what_a_token_weighs_and_how_far_off_the_gradient_is() -> None:
    severity, finding = only(check, accumulate([10, 40]))
    assert severity == "warning"
    assert "hold 10, 40 supervised tokens" in finding.message
    assert "a token among 10 weighs 4 times one among 40" in finding.message
    # (1/2, 1/2) instead of (1/5, 4/5): sqrt(0.09 + 0.09) / sqrt(0.04 + 0.64)
    assert finding.evidence["median_relative_error"] == pytest.approx((0.18 / 0.68) ** 0.5)
    assert "51% off" in finding.message


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_does_not_matter_how_the_mean_is_written(reduction: str) -> None:
    assert only(check, accumulate([10, 40, 20], reduction=reduction))[1].evidence["tokens"] == [10, 40, 20]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tokens_that_weigh_the_same_pass(reduction: str) -> None:
    assert not findings(check, accumulate([10, 40, 20], weight="window", reduction=reduction))


def test_a_small_error_is_not_worth_a_word() -> None:
    assert not findings(check, accumulate([60, 61, 60, 61]))
    assert not findings(check, accumulate([60, 60]))


def test_a_last_batch_of_fewer_samples_is_right() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        seqs = []
        for size in (8, 5):
            run.batch()
            run.events[-1] = type(run.events[-1])(seq=run.events[-1].seq, time_s=0.0, loader=0, size=size)
            run._emit(LossCall, function="cross_entropy", reduction="mean", target=LossTarget(size * 12, ignored=0),
                      gradient=LossGradient(0.5))  # fmt: skip
            run.backward()
            seqs.append(len(run.events))
        run.step(adam, share_backwards=tuple(seqs), share_products=((1.0, 0.0, 0), (0.0, 1.0, 0), (0, 0, 1))).zero(adam)
    assert not findings(check, run)


def test_two_losses_of_a_micro_batch_with_one_weight_are_chunks() -> None:
    assert only(check, accumulate([10, 40], reduction="sum", losses=2))[1].evidence["tokens"] == [20, 80]


def test_class_weights_are_not_judged() -> None:
    with pytest.raises(NotObserved, match="supervised positions"):
        findings(check, accumulate([10, 40], options={"weight": 4}))


def test_gradients_that_were_not_measured_are_not_judged() -> None:
    with pytest.raises(NotObserved, match="gradient of each micro-batch"):
        findings(check, accumulate([10, 40], measured=False))


def test_one_backward_per_step_is_another_matter() -> None:
    with pytest.raises(NotApplicable):
        findings(check, accumulate([10]))


def test_the_same_batch_again_is_no_accumulation() -> None:
    with pytest.raises(NotApplicable):
        findings(check, accumulate([10, 40], batch=False))
