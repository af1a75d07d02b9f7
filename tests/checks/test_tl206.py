"""TL206: weight decay that Adam turns into something else."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.optimizer.coupled_weight_decay import coupled_weight_decay as check

from tests.checks.judging import findings, only
from tests.support.build import ADAM, Run
from trainlint.contract import Key, NotApplicable, NotObserved

NET = {"body.weight": (100, 100), "head.weight": (10, 100)}


def _run(class_name: str = "Adam", decay: float = 0.05, **hyper: Any) -> tuple[Run, int, list[int]]:
    run = Run()
    net = run.module("Net", NET)
    own = {**ADAM, "weight_decay": decay, **hyper}
    return run, run.optimizer(class_name, net, hyper=own, defined_in=f"torch.optim.{class_name.lower()}"), net


def test_a_value_of_adamw_recipes() -> None:
    run, adam, net = _run()
    run.backward().step(adam, gradient={net[0]: 1.0, net[1]: 10.0}, weight=0.02)
    severity, finding = only(check, run)
    assert severity == "warning"
    # body: 0.05 * 0.02 * 100 = 0.1 beside a gradient of 1.0
    assert finding.evidence["times_adamw_largest"] == pytest.approx(100 / (1.0 + 0.1**2) ** 0.5)
    assert "body.weight" in finding.message
    assert "5e-5 of itself" in finding.message


def test_an_ordinary_penalty() -> None:
    run, adam, _ = _run(decay=1e-4)
    run.backward().step(adam)
    assert only(check, run)[0] == "info"


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax"])
def test_its_relatives(name: str) -> None:
    run, adam, _ = _run(name)
    run.backward().step(adam)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert name in finding.message


def test_decoupled_by_its_own_switch() -> None:
    run, adam, _ = _run("NAdam", decoupled_weight_decay=True)
    run.backward().step(adam)
    assert findings(check, run) == []


def test_the_key_that_asks_for_it() -> None:
    run, adam, _ = _run()
    run.config(weight_decay=0.05)
    run.backward().step(adam)
    _, finding = only(check, run)
    assert finding.at == Key("training.weight_decay")


def test_fused_gradients_that_still_carry_the_loss_scale() -> None:
    run, adam, _ = _run(fused=True)
    run.scaler("scale").backward().step(adam).scaler("step", optimizer=adam)
    _, finding = only(check, run)
    assert "gradient_norm" not in finding.evidence


@pytest.mark.parametrize("name", ["AdamW", "SGD", "FusedAdam"])
def test_other_optimizers(name: str) -> None:
    run = Run()
    net = run.module("Net", NET)
    own = run.optimizer(name, net, hyper={**ADAM, "weight_decay": 0.1}, defined_in="torch.optim.other")
    run.backward().step(own)
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_an_adam_that_is_not_torch_s() -> None:
    run = Run()
    own = run.optimizer("Adam", run.module("Net", NET), hyper={**ADAM, "weight_decay": 0.1}, defined_in="apex")
    run.backward().step(own)
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_without_hyperparameters() -> None:
    run = Run()
    own = run.optimizer("Adam", run.module("Net", NET), hyper={}, defined_in="torch.optim.adam")
    run.backward().step(own)
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_no_step() -> None:
    run, _, _ = _run()
    with pytest.raises(NotObserved):
        findings(check, run)
