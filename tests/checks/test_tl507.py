"""TL507: the logged loss and the optimized one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from trainlint.checks.loss.logged_loss_is_not_optimized_loss import logged_loss_is_not_optimized_loss

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import LossCall, LossGradient

#: (part, rest) of each step; the objective is part + 2 * rest.
PARTS = ((0.9, 0.4), (0.8, 0.35), (0.75, 0.2))


def program(
    name: str = "train/loss",
    what: str = "part",
    *,
    also: str = "",
    divisor: float = 1.0,
    scale: float = 1.0,
    parts: Sequence[tuple[float, float]] = PARTS,
) -> Run:
    run = Run()
    held = run.module("Net", {"weight": (4, 4)})
    run.optimizer("AdamW", held)
    for part, rest in parts:
        run.batch()
        for line, (value, factor) in enumerate(((part, 1.0), (rest, 2.0))):
            run._emit(
                LossCall, function="cross_entropy" if line == 0 else "mse_loss", reduction="mean", value=value,
                at=at(7 + line), gradient=LossGradient(total=factor * scale / divisor),
            )  # fmt: skip
        whole = part + 2 * rest
        run.backward(value=whole * scale / divisor, divided_by=None, loss_scale=scale if scale != 1 else None)
        run.step()
        values = {"part": part, "whole": whole, "received": whole / divisor, "mean": whole * 0.97, "rest": rest}
        run.log(name, values[what])
        if also:
            run.log(also, whole / divisor)
    return run


check = logged_loss_is_not_optimized_loss


def test_one_part_under_the_name_of_the_whole() -> None:
    severity, finding = only(check, program())
    assert severity == "info"
    assert 'What is logged as "train/loss" is cross_entropy (train.py:7) alone (0.9, 0.8, 0.75)' in finding.message
    assert "backward received 1.7, 1.5, 1.15" in finding.message
    assert only(check, program(divisor=4.0, scale=1024.0))[0] == "info"


@pytest.mark.parametrize("name", ["loss", "train_loss", "Loss/train", "train/total_loss", "trainLoss_step"])
def test_names_of_the_whole(name: str) -> None:
    assert len(findings(check, program(name))) == 1


@pytest.mark.parametrize(
    "name", ["ce_loss", "loss/kl", "train/mlm_loss", "val_loss", "eval/loss", "acc", "generator_loss"]
)
def test_names_of_something_else(name: str) -> None:
    with pytest.raises(NotApplicable):
        findings(check, program(name))


def test_the_whole_in_any_form() -> None:
    assert findings(check, program(what="whole")) == []
    assert findings(check, program(what="received", divisor=4.0)) == []
    assert findings(check, program(also="objective")) == [], "the whole is logged beside it"


def test_the_undivided_loss_when_it_is_all_there_is() -> None:
    run = program(parts=[(part, 0.0) for part, _ in PARTS], divisor=4.0)
    with pytest.raises(NotObserved):
        findings(check, run)


def test_what_cannot_be_told() -> None:
    with pytest.raises(NotObserved, match="backward"):
        findings(check, Run())
    with pytest.raises(NotObserved, match="--steps"):
        findings(check, program(what="mean"))
    with pytest.raises(NotObserved):
        findings(check, program(parts=PARTS[:1]))
    silent = Run()
    silent.optimizer("SGD", silent.module("Net", {"weight": (4, 4)}))
    silent.backward().step()
    with pytest.raises(NotApplicable, match="nothing was logged"):
        findings(check, silent)
