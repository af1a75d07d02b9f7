"""TL405 logged-lr-is-not-the-lr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainlint.checks.schedule.logged_lr_is_not_the_lr import logged_lr_is_not_the_lr as check

from tests.checks.judging import findings, only
from tests.support.build import Run, cosine, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.rate_log import is_rate_name

NET = {"fc.weight": (8, 8)}
Value = Callable[[Run, int], float]
WARM_UP = linear(10, 100)


def loop(
    value: Value,
    *,
    factor: Callable[[int], float] | None = WARM_UP,
    lr: Any = 1e-3,
    name: str = "train/lr",
    steps: int = 3,
    late: bool = False,
    groups: int = 1,
    hyper: dict[str, Any] | None = None,
) -> Run:
    """A loop that logs ``value(run, step)`` after the step; ``late``: before the scheduler's call."""
    run = Run()
    ids = [run.module(f"Net{g}", NET) for g in range(groups)]
    adam = run.optimizer("AdamW", *ids, lr=lr, hyper=hyper)
    if factor is not None:
        run.scheduler(adam, factor, 100, class_name="LinearLR")
    for step in range(steps):
        run.batch().backward().step(adam).zero(adam)
        if late:
            run.log(name, value(run, step))
        if factor is not None:
            run.sched()
        if not late:
            run.log(name, value(run, step))
    return run


def own(run: Run, step: int) -> float:
    return run.rates[0][0]


# -- right as it is


@pytest.mark.parametrize(
    "run",
    [
        loop(own),
        loop(own, late=True),
        loop(own, factor=None),
        loop(lambda run, step: round(own(run, step), 6)),
        loop(lambda run, step: math.log10(own(run, step) or 1e-9)),
        loop(lambda run, step: 8 * own(run, step)),
        loop(lambda run, step: sum(run.rates[0]) / 2, groups=2, lr=(1e-4, 1e-3)),
        loop(lambda run, step: max(run.rates[0]), groups=3, lr=(1e-5, 1e-4, 1e-3)),
        loop(lambda run, step: 1e-3, factor=cosine(5000)),
        loop(lambda run, step: [1e-3, 5e-4, 7e-4][step] / 3, factor=lambda n: [1, 0.1, 0.5, 0.2][n % 4]),
        loop(lambda run, step: 1e-3 * (1 - 0.1 * step / 2), factor=lambda n: 1 - 0.1 * n, late=True),
    ],
    ids=[
        "after the scheduler",
        "before the scheduler",
        "constant",
        "rounded",
        "logarithm",
        "times world size",
        "mean of groups",
        "largest group",
        "a decay too slow to tell",
        "among the rates so far",
        "running mean",
    ],
)
def test_right_logs_are_silent(run: Run) -> None:
    assert findings(check, run) == []


def test_late_and_early_by_one_step_are_rates() -> None:
    factor = linear(10, 100)
    assert findings(check, loop(lambda run, step: 1e-3 * factor(max(0, step - 1)), late=True)) == []
    assert findings(check, loop(lambda run, step: 1e-3 * factor(step + 2))) == []


def test_a_rate_read_once_per_epoch_and_logged_at_every_step() -> None:
    assert findings(check, loop(lambda run, step: 0.0, steps=5)) == []


def test_the_rate_of_the_other_optimizer_is_a_rate() -> None:
    run = Run()
    g = run.optimizer("Adam", run.module("G", NET), lr=1e-4)
    d = run.optimizer("Adam", run.module("D", NET), lr=4e-4)
    run.scheduler(d, linear(10, 100), 100)
    for _ in range(3):
        run.backward().step(d).backward().step(g).sched()
        run.log("lr_g", 1e-4).log("lr_d", run.rates[d][0]).log("lr/mean", (1e-4 + run.rates[d][0]) / 2)
    assert findings(check, run) == []


def test_optimizers_that_scale_the_rate_themselves_do_not_apply() -> None:
    run = loop(lambda run, step: 1e-6 * (step + 1), lr=1.0, hyper={"d": 1e-6, "betas": (0.9, 0.999)})
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_nothing_logged_as_a_rate_does_not_apply() -> None:
    with pytest.raises(NotApplicable):
        findings(check, loop(own, name="loss"))


def test_logged_once_is_not_enough() -> None:
    with pytest.raises(NotObserved):
        findings(check, loop(lambda run, step: 5e-3, steps=1))


# -- wrong


def test_the_configs_number_beside_a_warm_up() -> None:
    run = loop(lambda run, step: 1e-3).config(learning_rate=1e-3)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert finding.evidence["cause"] == "config"
    assert finding.evidence["key"] == "training.learning_rate"
    assert "0.001 in 3 watched steps" in finding.message
    assert "0, 0.0001, 0.0002" in finding.message
    assert "get_last_lr" in finding.fix


def test_the_base_rate_beside_a_fast_decay() -> None:
    severity, finding = only(check, loop(lambda run, step: 1e-3, factor=cosine(10)))
    assert severity == "warning"
    assert finding.evidence["cause"] == "base"


def test_the_configs_number_beside_a_scaled_rate() -> None:
    run = loop(lambda run, step: 1e-3, factor=None, lr=8e-3).config(learning_rate=1e-3)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "0.008" in finding.message
    # Layer-wise: the config's number may be the base of all of them.
    several = loop(lambda run, step: 2e-3, factor=None, lr=(1e-4, 1e-3), groups=2).config(learning_rate=2e-3)
    assert findings(check, several) == []
    unknown = loop(lambda run, step: 1e-3, factor=None, lr=8e-3)
    assert findings(check, unknown) == []


def test_get_lr_of_a_chained_schedule() -> None:
    factor = linear(10, 100)

    def get_lr(run: Run, step: int) -> float:
        now, before = factor(step + 2), factor(step + 1)
        return 1e-3 * now * now / before

    severity, finding = only(check, loop(get_lr, factor=lambda n: factor(n + 1)))
    assert severity == "warning"
    assert finding.evidence["cause"] == "get_lr"
    assert "get_lr()" in finding.message


def test_a_difference_that_nothing_explains_is_information() -> None:
    severity, finding = only(check, loop(lambda run, step: 0.3 + 0.1 * step * step))
    assert severity == "info"
    assert finding.evidence["cause"] is None


def test_logged_through_two_stages_is_one_finding() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    run.scheduler(adam, linear(10, 100), 100)
    for _ in range(3):
        run.backward().step(adam).sched()
        run.log("lr", 1e-3, by="lightning.log").log("lr_step", 0.0010000000474974513, by="CSVLogger")
    assert len(findings(check, run)) == 1


# -- names


@pytest.mark.parametrize(
    "name",
    ["lr", "train/lr", "learning_rate", "LearningRate", "learningRate", "lr-AdamW/pg1", "x/lr0", "pg0", "lr_step",
     "charts/learning_rate", "optimizer.lr", "actor_lr", "Learning Rate"],
)  # fmt: skip
def test_names_of_rates(name: str) -> None:
    assert is_rate_name(name)


@pytest.mark.parametrize(
    "name",
    ["min_lr", "lr_scale", "initial_lr", "lr-AdamW-momentum", "lr/psnr", "loss", "controller", "lrs_count", "log_lr",
     "inner_lr", "lr_warmup", "pages", "learner", "pg_loss", "lr-Adam-weight_decay"],
)  # fmt: skip
def test_names_of_other_things(name: str) -> None:
    assert not is_rate_name(name)


@given(st.integers(1, 30), st.integers(31, 200), st.integers(2, 8), st.booleans(), st.integers(1, 3))
def test_the_groups_own_rate_is_never_reported(warmup: int, calls: int, steps: int, late: bool, groups: int) -> None:
    rates = [10.0 ** -(g + 2) for g in range(groups)]
    run = loop(own, factor=linear(warmup, calls), steps=steps, late=late, groups=groups, lr=rates)
    assert findings(check, run) == []


@given(st.integers(4, 30), st.integers(31, 200), st.integers(4, 8), st.booleans())
def test_the_base_rate_in_a_warm_up_is_always_reported(warmup: int, calls: int, steps: int, late: bool) -> None:
    run = loop(lambda run, step: 1e-3, factor=linear(max(warmup, steps + 3), calls), steps=steps, late=late)
    assert only(check, run)[0] == "warning"
