"""TL402 scheduler-cadence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from trainlint.checks.schedule.scheduler_cadence import scheduler_cadence as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at, cosine, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import SchedulerStep, SourceFacts

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
        loop(linear(1, 75), 75, micro=4, per_micro=True, batches=25).plan(
            optimizer_steps=21, epochs=3, batches_per_epoch=25, accumulation=4
        ),
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
        "per micro-batch, sized so, with a last short step",
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


@pytest.mark.parametrize(("length", "severity"), [(200, "error"), (196, "error"), (190, "warning")])
def test_a_length_near_the_steps_may_be_one_in_epochs(length: int, severity: str) -> None:
    run = loop(cosine(length), length, calls=0, interval="epoch", batches=40)
    run.plan(optimizer_steps=200, epochs=5, batches_per_epoch=40)
    assert only(check, run)[0] == severity


def test_a_rise_that_hardly_begins_is_no_end_that_is_low_enough() -> None:
    def cycle(n: int) -> float:  # it ends where it began, nearly
        return 0.04 + 0.96 * n / 50 if n < 50 else max(0.0, 1 - (n - 50) / 110)

    run = loop(cycle, 158, calls=0, interval="epoch", class_name="OneCycleLR", batches=39).framework("lightning")
    run.plan(optimizer_steps=156, epochs=1, batches_per_epoch=156)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "it never gets above" in finding.message


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


# -- several schedulers, rates set again


def two(
    first: Callable[[int], float],
    second: Callable[[int], float],
    *,
    ends: tuple[int | None, int | None],
    classes: tuple[str, str] = ("LinearLR", "MultiStepLR"),
    second_per: int = 1,
    steps: int = 3,
) -> Run:
    """Two schedulers that multiply the rate, the second called every so many steps."""
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    run.loader(100)
    for factor, end, name in zip((first, second), ends, classes, strict=True):
        run.rates[adam] = [1e-3]
        run.scheduler(adam, factor, end, class_name=name)
    counts = [0, 0]
    run.rates[adam] = [1e-3 * first(0) * second(0)]
    for step in range(steps):
        run.batch().backward().step(adam).zero(adam)
        for s in (0, 1):
            if s == 0 or (step + 1) % second_per == 0:
                counts[s] += 1
                run.sched(s)
        run.rates[adam] = [1e-3 * first(counts[0]) * second(counts[1])]
    return run


def rise(n: int) -> float:
    return min(1.0, 0.1 + 0.9 * n / 30)


def test_two_schedulers_that_multiply_are_judged_one_by_one() -> None:
    right = two(rise, lambda n: 0.1 ** ((n >= 600) + (n >= 900)), ends=(30, 900)).plan(optimizer_steps=1000, epochs=10)
    assert findings(check, right) == []
    wrong = two(rise, lambda n: 0.1 ** ((n >= 6) + (n >= 9)), ends=(30, 9)).plan(optimizer_steps=1000, epochs=10)
    severity, finding = only(check, wrong)
    assert severity == "error"
    assert "MultiStepLR" in finding.message
    assert "its 9 calls are over at step 10 of 1,000" in finding.message
    assert finding.evidence["meant_end_rate"] == pytest.approx(1e-5)


def test_a_schedule_that_sets_the_rate_undoes_another() -> None:
    run = two(rise, lambda n: 0.5**n, ends=(30, None), classes=("LambdaLR", "ExponentialLR"))
    for i, e in enumerate(run.events):
        if e.kind == "step":
            run.events[i] = dataclasses.replace(e, rates=(1e-3 * rise(e.index) * (0.5 if e.index else 1.0),))
    severity, finding = only(check, run.plan(optimizer_steps=1000, epochs=10))
    assert severity == "warning"
    assert finding.evidence["kind"] == "overridden"
    assert "LambdaLR" in finding.message and "ExponentialLR" in finding.message


def held(rates: list[float]) -> Run:
    """A cosine that is called, before steps at other rates."""
    run = Run()
    adam = run.optimizer("SGD", run.module("Net", NET))
    run.loader(100)
    run.scheduler(adam, cosine(1000), 1000)
    for rate in rates:
        run.rates[adam] = [rate]
        run.batch().backward().step(adam).zero(adam).sched()
    return run.plan(optimizer_steps=1000, epochs=10)


def test_a_rate_that_is_set_again_before_every_step() -> None:
    severity, finding = only(check, held([1e-3, 1e-3, 1e-3, 1e-3]))
    assert severity == "warning"
    assert finding.evidence["kind"] == "overwritten"
    assert "meant was 0 at the end" in finding.message


def test_a_warm_up_by_hand_over_the_schedule_is_not_reported() -> None:
    with pytest.raises(NotObserved):
        findings(check, held([2e-4, 4e-4, 6e-4, 8e-4]))


def test_a_share_of_the_schedules_rate_is_not_reported() -> None:
    share = [0.5 * 1e-3 * cosine(1000)(n) for n in range(4)]
    with pytest.raises(NotObserved):
        findings(check, held(share))


@pytest.mark.parametrize(("patience", "batches", "found"), [(5, 100, 1), (5, 8, 0), (500, 10_000, 0)])
def test_a_plateau_called_at_every_batch(patience: int, batches: int, found: int) -> None:
    settings = {"patience": patience, "factor": 0.1}
    run = loop(lambda n: 1.0, None, batches=batches, metric=True, class_name="ReduceLROnPlateau", settings=settings)
    got = findings(check, run)
    assert [severity for severity, _ in got] == ["warning"] * found
    if got:
        assert "6 batches" in got[0][1].message


def test_the_loss_given_as_the_epoch() -> None:
    run = loop(cosine(1000), 1000).plan(optimizer_steps=1000, epochs=10)
    for i, e in enumerate(run.events):
        if e.kind == "backward":
            run.events[i] = dataclasses.replace(e, value=2.5 - 0.1 * i)
        if e.kind == "scheduler_step" and not e.initial:
            last = next(x for x in reversed(run.events[:i]) if x.kind == "backward")
            run.events[i] = dataclasses.replace(e, epoch=last.value)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "is given the loss" in finding.message


def test_a_scheduler_that_is_told_its_epoch_is_not_judged() -> None:
    run = loop(cosine(10), 10).plan(optimizer_steps=1000, epochs=10)
    for i, e in enumerate(run.events):
        if e.kind == "scheduler_step" and not e.initial:
            run.events[i] = dataclasses.replace(e, epoch=i / 100)
    with pytest.raises(NotObserved, match="step\\(epoch\\)"):
        findings(check, run)


def test_replaced_before_the_schedule_was_called() -> None:
    run = Run()
    net = run.module("Net", NET)
    old, new = run.optimizer("SGD", net), run.optimizer("SGD", net)
    run.scheduler(old, cosine(10), 10)
    for _ in range(3):
        run.backward().step(new).zero(new)
    assert only(check, run)[0] == "warning"
    later = Run()
    net = later.module("Net", NET)
    first, second = later.optimizer("Adam", net), later.optimizer("SGD", net)
    later.scheduler(second, cosine(10), 10)
    for _ in range(3):
        later.backward().step(first).zero(first)
    assert findings(check, later) == []


def test_by_the_trainer_and_by_hand() -> None:
    run = loop(cosine(1000), 1000, calls=0, steps=4, interval="epoch").framework("lightning")
    events = []
    for e in run.events:
        events.append(e)
        if e.kind == "step":
            events += [SchedulerStep(0, 0.0, 0, at=at(line)) for line in (16, 16, 35)]
    run.events = [dataclasses.replace(e, seq=i + 1, **({"began": i + 1} if e.kind == "step" else {}))
                  for i, e in enumerate(events)]  # fmt: skip
    severity, finding = only(check, run.plan(optimizer_steps=1000, epochs=10))
    assert severity == "error"
    assert "3 times per step" in finding.message
    assert "train.py:16 and train.py:35" in finding.message
    assert "The Trainer steps it already" in finding.fix
