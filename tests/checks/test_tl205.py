"""TL205 params-unmoved."""

from __future__ import annotations

import dataclasses
import math

import pytest
from trainlint.checks.optimizer.params_unmoved import params_unmoved as check

from tests.checks.judging import findings, only
from tests.support.build import Run, linear
from trainlint.contract import NotObserved
from trainlint.recording.schema import OptimizerStep

NET = {"fc.weight": (8, 8), "norm.weight": (8,)}


def trained(optimizer: str = "AdamW", lr: float = 1e-3, dtype: str = "float32") -> tuple[Run, list[int], int]:
    run = Run()
    net = run.module("Net", NET, dtype=dtype)
    return run, net, run.optimizer(optimizer, net, lr=lr)


def test_a_step_that_does_nothing() -> None:
    run, _, adam = trained(lr=0.05)
    for _ in range(3):
        run.backward().step(adam, moved=[])
    severity, finding = only(check, run)
    assert severity == "error"
    assert "None of the parameters in AdamW" in finding.message
    assert "3 steps ran at rate 0.05" in finding.message


def test_one_tensor_that_is_written_elsewhere() -> None:
    run, net, adam = trained()
    for _ in range(3):
        run.backward().step(adam, moved=[net[1]])
    severity, finding = only(check, run)
    assert severity == "error"
    assert "fc.weight" in finding.message


def test_moved_once_is_moved() -> None:
    run, _, adam = trained()
    run.backward().step(adam).backward().step(adam, moved=[])
    assert findings(check, run) == []


def test_warm_up_from_zero_is_not_observed() -> None:
    run, _, adam = trained(lr=0.0)
    for _ in range(3):
        run.backward().step(adam, moved=[])
    with pytest.raises(NotObserved):
        findings(check, run)


@pytest.mark.parametrize("gradient", [None, 0.0, math.inf, math.nan])
def test_without_a_live_gradient_standing_still_is_right(gradient: float | None) -> None:
    run, net, adam = trained()
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: gradient, net[1]: 1.0}, moved=[net[1]])
    assert findings(check, run) == []


def test_frozen_parameters_stand_still_rightly() -> None:
    run, net, adam = trained()
    for _ in range(3):
        run.backward().step(adam, moved=[net[1]], frozen=[net[0]])
    assert findings(check, run) == []


def test_bfloat16_norms_that_round_away_are_a_warning_with_the_cause() -> None:
    run, net, adam = trained(lr=1e-4, dtype="bfloat16")
    for _ in range(3):
        run.backward().step(adam, moved=[net[0]])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "rounds away" in finding.message
    assert "autocast" in finding.fix


def test_everything_rounding_away_is_an_error() -> None:
    run, _, sgd = trained("SGD", lr=1e-12)
    for _ in range(3):
        run.backward().step(sgd, moved=[], gradient=0.1)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "1e-12" in finding.message
    assert finding.evidence["rounding"]


def test_rounding_at_the_foot_of_a_warm_up_is_not_judged() -> None:
    run, _, adam = trained(lr=1e-3, dtype="bfloat16")
    schedule = run.scheduler(adam, linear(1000, 10000), 10000, class_name="LambdaLR")
    run.sched(schedule)
    for _ in range(3):
        run.backward().step(adam, moved=[]).sched(schedule)
    assert findings(check, run) == []


def test_tiny_gradients_in_float32_underflow_rightly() -> None:
    run, net, sgd = trained("SGD", lr=1e-3)
    for _ in range(3):
        run.backward().step(sgd, gradient={net[0]: 1e-7, net[1]: 1.0}, moved=[net[1]])
    assert findings(check, run) == []


def test_a_converged_lbfgs_returns_early() -> None:
    run = Run()
    net = run.module("Net", NET)
    lbfgs = run.optimizer("LBFGS", net, lr=1.0, hyper={"tolerance_grad": 1e-7})
    for _ in range(3):
        run.step(lbfgs, gradient=1e-9, moved=[], began=run.begin())
    with pytest.raises(NotObserved):
        findings(check, run)


def test_without_steps_it_is_not_observed() -> None:
    run, _, _ = trained()
    with pytest.raises(NotObserved):
        findings(check, run)


def test_rounding_noise_at_one_tensor_of_an_unknown_formula_is_no_fault() -> None:
    run, net, own = trained("HomeMade", lr=0.05)
    hyper = {"lr": 0.05, "momentum": 0.9}
    group = dataclasses.replace(run.optimizers[own].groups[0], hyperparameters=hyper)
    run.optimizers[own] = dataclasses.replace(run.optimizers[own], groups=(group,))
    for _ in range(3):
        run.backward().step(own, gradient={net[0]: 1.0, net[1]: 3e-8}, moved=[net[0]])
    assert findings(check, run) == []


def test_a_rate_that_the_optimizer_says_is_zero_moves_nothing() -> None:
    run, _, own = trained(lr=0.05)
    for _ in range(3):
        run.backward().step(own, moved=[])
    run.events = [
        dataclasses.replace(e, scheduled_rates=(0.0,)) if isinstance(e, OptimizerStep) else e for e in run.events
    ]
    with pytest.raises(NotObserved):
        findings(check, run)
