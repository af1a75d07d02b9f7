"""TL401 scheduler-before-optimizer."""

from __future__ import annotations

import pytest
from trainlint.checks.schedule.scheduler_before_optimizer import scheduler_before_optimizer as check

from tests.checks.judging import findings, only
from tests.support.build import Run, cosine, linear
from trainlint.contract import NotApplicable, NotObserved

NET = {"fc.weight": (8, 8)}


def one(lr: float = 0.1, **scheduler: object) -> tuple[Run, int]:
    run = Run()
    adam = run.optimizer("SGD", run.module("Net", NET), lr=lr)
    run.scheduler(adam, scheduler.pop("factor", cosine(30)), 30, **scheduler)  # type: ignore[arg-type]
    return run, adam


def test_the_first_rate_is_lost() -> None:
    run, sgd = one()
    for _ in range(3):
        run.sched().backward().step(sgd)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "first rate of the schedule, 0.1, is never used: the first step ran at 0.0997" in finding.message
    assert finding.evidence["rate_due"] == 0.1


def test_optimizer_first_is_right() -> None:
    run, sgd = one()
    for _ in range(3):
        run.backward().step(sgd).sched()
    assert findings(check, run) == []


def test_a_call_that_changed_no_rate_is_worth_knowing_only() -> None:
    run, sgd = one(factor=lambda n: 0.1 ** (n // 10), class_name="StepLR")
    run.sched()
    for _ in range(3):
        run.backward().step(sgd)
    assert only(check, run)[0] == "info"


def test_a_warm_up_taken_off_zero() -> None:
    run, sgd = one(factor=linear(10, 100), class_name="LambdaLR")
    run.sched()
    for _ in range(3):
        run.backward().step(sgd).sched()
    assert findings(check, run) == []


def test_the_scaler_skipped_the_first_step() -> None:
    run, sgd = one()
    run.backward().scaler("step", skipped=True).sched()
    for _ in range(3):
        run.backward().step(sgd).sched()
    assert findings(check, run) == []


def test_a_resumed_schedule() -> None:
    run, sgd = one()
    run.loaded("scheduler").sched()
    run.backward().step(sgd)
    assert findings(check, run) == []


def test_wound_forward_in_a_loop() -> None:
    run, sgd = one()
    for _ in range(12):
        run.sched()
    run.backward().step(sgd)
    assert findings(check, run) == []


def test_a_metric_schedule() -> None:
    run, sgd = one(metric=True, class_name="ReduceLROnPlateau")
    run.sched().backward().step(sgd)
    assert findings(check, run) == []


def test_per_micro_batch_calls_are_a_question_of_cadence() -> None:
    run, sgd = one()
    for _ in range(3):
        for _ in range(2):
            run.backward().sched()
        run.step(sgd)
    assert findings(check, run) == []


def test_per_micro_batch_calls_and_a_last_short_window() -> None:
    run, sgd = one()
    run.backward().sched().backward().step(sgd).sched().backward().step(sgd)
    assert findings(check, run) == []


def test_once_per_step_and_before_it_under_accumulation() -> None:
    run, sgd = one()
    for _ in range(3):
        run.backward().backward().sched().step(sgd)
    assert only(check, run)[0] == "warning"


def test_the_other_optimizers_scheduler() -> None:
    run = Run()
    a = run.optimizer("Adam", run.module("Policy", NET))
    b = run.optimizer("Adam", run.module("Value", {"v.weight": (2, 2)}))
    run.scheduler(a, cosine(30), 30)
    run.scheduler(b, cosine(30), 30)
    for _ in range(3):
        run.backward().step(a).sched(0).backward().step(b).sched(1)
    assert findings(check, run) == []


def test_no_scheduler() -> None:
    run = Run()
    run.optimizer("Adam", run.module("Net", NET))
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_no_step() -> None:
    run, _ = one()
    with pytest.raises(NotObserved):
        findings(check, run.sched())
