"""TL402 scheduler-cadence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from trainlint.checks.schedule.scheduler_cadence import scheduler_cadence as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at, cosine, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import SourceFacts

NET = {"fc.weight": (8, 8)}


def one_cycle(calls: int) -> Callable[[int], float]:
    rise = 0.3 * calls
    return lambda n: (
        0.04 + 0.96 * n / rise if n < rise else 0.5 * (1 + math.cos(math.pi * min(1.0, (n - rise) / (calls - rise))))
    )


def loop(
    factor: Callable[[int], float],
    horizon: int | None,
    *,
    micro: int = 1,
    calls: int = 1,
    per_micro: bool = False,
    batches: int | None = 100,
    steps: int = 3,
    **scheduler: Any,
) -> Run:
    """A loop over a loader: ``calls`` scheduler calls after each optimizer step, or one at each micro-batch."""
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    run.loader(batches)
    run.scheduler(adam, factor, horizon, **scheduler)
    for _ in range(steps):
        for i in range(micro):
            run.batch().backward(divided_by=float(micro))
            if i == micro - 1:
                run.step(adam).zero(adam)
            if per_micro:
                run.sched()
        for _ in range(0 if per_micro else calls):
            run.sched()
    return run


# -- right as it is


@pytest.mark.parametrize(
    "run",
    [
        loop(cosine(1000), 1000).plan(optimizer_steps=1000, epochs=10),
        loop(cosine(990), 990).plan(optimizer_steps=1000, epochs=10),
        loop(one_cycle(1000), 1000, class_name="OneCycleLR").plan(optimizer_steps=1000, epochs=10),
        loop(linear(100, 1000), 1000, class_name="LambdaLR").plan(optimizer_steps=1000, epochs=10),
        loop(cosine(50), None, class_name="CosineAnnealingWarmRestarts").plan(optimizer_steps=1000, epochs=10),
        loop(cosine(50), None, class_name="CyclicLR").plan(optimizer_steps=1000, epochs=10),
        loop(lambda n: min(1.0, 0.01 + n / 100), 100, class_name="LinearLR").plan(optimizer_steps=1000, epochs=10),
        loop(cosine(10), 10, calls=0).plan(optimizer_steps=1000, epochs=10),
        loop(cosine(10), 10, calls=0, interval="epoch").plan(optimizer_steps=1000, epochs=10),
        loop(cosine(250), 250, micro=4).plan(optimizer_steps=250, epochs=10, accumulation=4),
        loop(cosine(1000), 1000, micro=4, per_micro=True).plan(optimizer_steps=250, epochs=10, accumulation=4),
        loop(lambda n: 0.9999**n, None, class_name="ExponentialLR").plan(optimizer_steps=1000, epochs=10),
        loop(cosine(10000), 10000).plan(optimizer_steps=1000, epochs=10),
    ],
    ids=[
        "cosine per step",
        "short by a hair",
        "one cycle per step",
        "warm-up and decay",
        "warm restarts",
        "cyclic",
        "warm-up only",
        "per epoch, sized in epochs",
        "per epoch by the framework",
        "accumulation, per optimizer step",
        "per micro-batch, sized so",
        "slow exponential",
        "the first tenth of a longer plan",
    ],
)
def test_right_cadences_are_silent(run: Run) -> None:
    assert findings(check, run) == []


def test_plateau_and_step_per_epoch() -> None:
    assert findings(check, loop(lambda n: 1.0, None, calls=0, metric=True, class_name="ReduceLROnPlateau")) == []
    with pytest.raises(NotObserved):
        findings(check, loop(lambda n: 0.1 ** (n // 30), None, calls=0, class_name="StepLR"))


def test_a_resumed_schedule_is_left_to_other_checks() -> None:
    run = loop(cosine(10), 10).plan(optimizer_steps=1000, epochs=10)
    run.loaded("scheduler")
    with pytest.raises(NotObserved):
        findings(check, run)


# -- too slow


def test_sized_in_steps_and_called_per_epoch_by_lightning() -> None:
    run = loop(one_cycle(1000), 1000, calls=0, interval="epoch", class_name="OneCycleLR").framework("lightning")
    run.plan(optimizer_steps=1000, epochs=10, batches_per_epoch=100)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "10 calls of its 1,000, 1% of its course" in finding.message
    assert '"interval": "step"' in finding.fix
    assert finding.evidence["kind"] == "too-slow"


def test_sized_in_steps_and_not_called_in_the_watch() -> None:
    run = loop(cosine(1000), 1000, calls=0).plan(optimizer_steps=1000, epochs=10)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "not called in 3 steps" in finding.message
    assert "if it is never called" in finding.message


def test_a_round_number_of_epochs_is_no_number_of_steps() -> None:
    with pytest.raises(NotObserved):
        findings(check, loop(cosine(200), 200, calls=0))


def test_sized_by_the_loaders_length_and_not_called() -> None:
    severity, finding = only(check, loop(one_cycle(500), 500, calls=0, class_name="OneCycleLR"))
    assert severity == "warning"
    assert "5 epochs of 100 batches" in finding.message


def test_sized_in_batches_under_accumulation() -> None:
    run = loop(cosine(1000), 1000, micro=4).plan(optimizer_steps=250, epochs=10, accumulation=4)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "25% of its course" in finding.message
    assert "250" in finding.fix


def test_the_configs_epochs_tell_the_length() -> None:
    run = loop(cosine(1000), 1000, calls=0).config(epochs=10)
    assert only(check, run)[0] == "error"


# -- too fast


def test_sized_in_epochs_and_called_per_step() -> None:
    run = loop(cosine(10), 10).plan(optimizer_steps=1000, epochs=10)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "sized in epochs (10)" in finding.message
    assert "climbs again" in finding.message


def test_called_at_every_micro_batch() -> None:
    run = loop(linear(10, 250), 250, micro=4, per_micro=True, class_name="LambdaLR")
    run.plan(optimizer_steps=250, epochs=10, accumulation=4)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "called at every micro-batch (4 times per step)" in finding.message


def test_called_at_every_micro_batch_of_a_run_of_unknown_length() -> None:
    severity, finding = only(check, loop(cosine(50), 50, micro=4, per_micro=True))
    assert severity == "error"
    assert "4 times too early" in finding.message


def test_called_by_the_trainer_and_by_hand() -> None:
    run = loop(linear(3, 300), 300, calls=2, class_name="LambdaLR", interval="step").plan(optimizer_steps=300, epochs=3)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "called 2 times per step" in finding.message


def test_a_rate_that_is_dead_for_most_of_the_run() -> None:
    run = loop(lambda n: 0.1 ** (n // 3), None, class_name="StepLR", reach=2000).plan(optimizer_steps=1000, epochs=10)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "below a 10,000th" in finding.message


# -- never, elsewhere


def test_never_called_and_no_line_calls_it() -> None:
    run = loop(lambda n: min(1.0, 0.01 + n / 10), 10, calls=0, batches=None, class_name="LinearLR")
    source = SourceFacts(files=("/home/user/train.py",), step_calls=(at(12),))
    severity, finding = only(check, run, source=source)
    assert severity == "error"
    assert "no line of the program calls its step()" in finding.message
    other = SourceFacts(files=("/home/user/train.py",), step_calls=(at(12), at(40)))
    with pytest.raises(NotObserved):
        findings(check, run, source=other)


def test_more_than_an_epoch_without_a_call() -> None:
    warmup = loop(lambda n: min(1.0, 0.01 + n / 10), 10, calls=0, batches=2, class_name="LinearLR")
    assert only(check, warmup)[0] == "error"
    decay = loop(lambda n: 0.9**n, None, calls=0, batches=2, class_name="ExponentialLR")
    assert only(check, decay)[0] == "warning"


def test_built_on_an_optimizer_that_was_replaced() -> None:
    run = Run()
    net = run.module("Net", NET)
    old, new = run.optimizer("SGD", net), run.optimizer("SGD", net)
    run.scheduler(old, cosine(40), 40)
    for _ in range(3):
        run.backward().step(new).zero(new).sched()
    severity, finding = only(check, run)
    assert severity == "error"
    assert "which never steps" in finding.message


def test_a_schedule_for_a_model_whose_turn_has_not_come() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    run.scheduler(opt_d, cosine(40), 40)
    for _ in range(3):
        run.backward().step(opt_g).zero(opt_g).sched()
    assert findings(check, run) == []


# -- not to be judged


def test_rates_set_by_hand_beside_the_scheduler() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    run.scheduler(adam, cosine(10), 10)
    for step in range(3):
        run.rates[adam] = [0.5 + 0.1 * step]
        run.backward().step(adam)
    with pytest.raises(NotObserved):
        findings(check, run.plan(optimizer_steps=1000, epochs=10))


def test_no_scheduler_does_not_apply() -> None:
    run = Run()
    run.optimizer("Adam", run.module("Net", NET))
    with pytest.raises(NotApplicable):
        findings(check, run)
