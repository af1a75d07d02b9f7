"""TL402 over schedulers of torch itself, called as they should be and as they should not."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lrs
from trainlint.checks.schedule.logged_lr_is_not_the_lr import logged_lr_is_not_the_lr
from trainlint.checks.schedule.scheduler_before_optimizer import scheduler_before_optimizer
from trainlint.checks.schedule.scheduler_cadence import scheduler_cadence

from tests.checks.judging import findings
from tests.support.build import Run, at
from trainlint.contract import Finding, NotApplicable, NotObserved
from trainlint.recorder import curves
from trainlint.recording.projection import projection
from trainlint.recording.schema import CurvePoint, Scheduler, SchedulerStep

Make = Callable[[Any, int], Any]

#: Schedules that are sized by a number of calls.
SIZED: dict[str, Make] = {
    "cosine": lambda o, n: lrs.CosineAnnealingLR(o, n),
    "cosine with a floor": lambda o, n: lrs.CosineAnnealingLR(o, n, eta_min=1e-5),
    "one cycle": lambda o, n: lrs.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=n + 2),
    "linear": lambda o, n: lrs.LinearLR(o, 1.0, 0.01, total_iters=n),
    "polynomial": lambda o, n: lrs.PolynomialLR(o, total_iters=n, power=2.0),
    "lambda": lambda o, n: lrs.LambdaLR(o, lambda k, num_training_steps=n: max(0.0, 1 - k / num_training_steps)),
    "warm-up, then cosine": lambda o, n: lrs.SequentialLR(
        o,
        [lrs.LinearLR(o, 0.1, total_iters=max(2, n // 10)), lrs.CosineAnnealingLR(o, n - max(2, n // 10))],
        [max(2, n // 10)],
    ),
    "milestones": lambda o, n: lrs.MultiStepLR(o, [max(1, n // 2), max(2, int(0.9 * n))]),
    "chained": lambda o, n: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, total_iters=max(2, n // 20)), lrs.CosineAnnealingLR(o, n)]
    ),
}
#: Schedules that have no length: right at any cadence.
FREE: dict[str, Make] = {
    "restarts": lambda o, n: lrs.CosineAnnealingWarmRestarts(o, max(2, n // 5)),
    "cyclic": lambda o, n: lrs.CyclicLR(o, 1e-5, 1e-3, step_size_up=max(2, n // 5), cycle_momentum=False),
    "exponential": lambda o, n: lrs.ExponentialLR(o, 0.01 ** (1 / n)),
    "step": lambda o, n: lrs.StepLR(o, max(1, n // 3)),
    "warm-up alone": lambda o, n: lrs.LinearLR(o, 0.1, total_iters=max(2, n // 10)),
    "constant": lambda o, n: lrs.LambdaLR(o, lambda k: 1.0),
}


@dataclass
class Loop:
    """A training loop with a scheduler of torch: so many batches an epoch, so many of them a step."""

    batches: int
    epochs: int
    micro: int
    groups: int
    watched: int

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.batches / self.micro)

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch

    def run(self, make: Make, calls: int, when: str, times: int = 1) -> Run:
        """``when``: ``step``, ``epoch`` or ``batch``; ``calls``: what the schedule is sized by."""
        run = Run()
        rates = [1e-3 / 10**g for g in range(self.groups)]
        tensors = [torch.nn.Parameter(torch.zeros(2)) for _ in rates]
        optimizer = torch.optim.SGD([{"params": [p], "lr": r} for p, r in zip(tensors, rates)], lr=1e-3)
        own = run.optimizer("SGD", *(run.module(f"M{g}", {"w": (2,)}) for g in range(self.groups)), lr=rates)
        run.loader(self.batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = make(optimizer, calls)
            horizon = curves.horizon(scheduler)
            points, missing = curves.curve(curves.take(scheduler), horizon, self.steps)
        run.schedulers[0] = Scheduler(
            0,
            type(scheduler).__name__,
            own,
            at(6),
            settings=curves.settings(scheduler),
            base_rates=tuple(float(b) for b in getattr(scheduler, "base_lrs", ())),
            children=tuple(type(c).__name__ for c in getattr(scheduler, "_schedulers", ())),
            curve=tuple(CurvePoint(n, tuple(r)) for n, r in points),
            curve_missing=missing,
            horizon_calls=horizon,
        )
        run.plan(
            optimizer_steps=self.steps, epochs=self.epochs, batches_per_epoch=self.batches, accumulation=self.micro
        )

        def rates_now() -> list[float]:
            return [float(g["lr"]) for g in optimizer.param_groups]

        def call() -> None:
            for _ in range(times):
                before = tuple(rates_now())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scheduler.step()
                run.schedulers[0] = dataclasses.replace(run.schedulers[0], calls=run.schedulers[0].calls + 1)
                run._emit(SchedulerStep, scheduler=0, rates_before=before, rates_after=tuple(rates_now()), at=at(13))

        done = 0
        watched = min(self.watched, self.steps)
        while done < watched:
            for batch in range(self.batches):
                run.batch().backward(divided_by=float(self.micro))
                if (batch + 1) % self.micro == 0 or batch + 1 == self.batches:
                    run.rates[own] = rates_now()
                    run.step(own)
                    done += 1
                    if done == watched:
                        return run
                    run.zero(own).log("lr", rates_now()[0])
                    if when == "step":
                        call()
                if when == "batch":
                    call()
            if when == "epoch":
                call()
        return run


loops = st.builds(
    Loop,
    batches=st.integers(2, 60),
    epochs=st.integers(3, 30),
    micro=st.integers(1, 6),
    groups=st.integers(1, 3),
    watched=st.integers(2, 8),
)


def judged(run: Run) -> list[tuple[str, Finding]]:
    out = []
    for check in (scheduler_cadence, scheduler_before_optimizer, logged_lr_is_not_the_lr):
        try:
            out += findings(check, run)
        except (NotApplicable, NotObserved):
            pass
    return out


@settings(max_examples=150, deadline=None)
@given(loops, st.sampled_from(sorted(SIZED)), st.sampled_from(["step", "epoch", "batch"]))
@example(Loop(batches=3, epochs=3, micro=2, groups=1, watched=2), "one cycle", "batch")
def test_no_finding_where_the_length_counts_the_calls(loop: Loop, name: str, when: str) -> None:
    calls = {"step": loop.steps, "epoch": loop.epochs, "batch": loop.epochs * loop.batches}[when]
    found = judged(loop.run(SIZED[name], calls, when))
    assert [f.message for severity, f in found if severity != "info"] == []


@settings(max_examples=80, deadline=None)
@given(loops, st.sampled_from(sorted(FREE)), st.sampled_from(["step", "epoch"]))
def test_no_error_for_schedules_without_a_length(loop: Loop, name: str, when: str) -> None:
    found = judged(loop.run(FREE[name], loop.steps if when == "step" else loop.epochs, when))
    assert [f.message for severity, f in found if severity == "error"] == []


@settings(max_examples=60, deadline=None)
@given(loops, st.sampled_from(sorted({**SIZED, **FREE})))
def test_the_projection_passes_through_what_was_watched(loop: Loop, name: str) -> None:
    run = loop.run({**SIZED, **FREE}[name], loop.steps, "step")
    recording = run.recording()
    for group in range(loop.groups):
        seen = projection(recording, 0, group)
        points = dict(seen.points)
        assert points, seen.reason
        for step, rate in seen.observed:
            assert points.get(step, rate) == pytest.approx(rate, rel=0.02, abs=1e-2 * 10.0 ** -(3 + group))


LONG = [n for n in sorted(SIZED) if n not in ("milestones", "linear")]
plain = st.builds(Loop, batches=st.integers(20, 40), epochs=st.integers(4, 9), micro=st.just(1), groups=st.just(1),
                  watched=st.integers(3, 6))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plain, st.sampled_from(LONG))
def test_sized_in_epochs_and_called_per_step_is_an_error(loop: Loop, name: str) -> None:
    if name == "one cycle":  # it raises by itself, within the watch
        return
    found = judged(loop.run(SIZED[name], loop.epochs, "step"))
    assert [(severity, f.evidence["kind"]) for severity, f in found] == [("error", "too-fast")]


@settings(max_examples=60, deadline=None)
@given(plain, st.sampled_from(LONG), st.integers(3, 4))
def test_called_at_every_micro_batch_is_an_error(loop: Loop, name: str, micro: int) -> None:
    # A one-cycle schedule raises by itself once its calls are over: not within the watch.
    watched = min(loop.watched, 4)
    loop = dataclasses.replace(loop, micro=micro, batches=loop.batches // micro * micro, watched=watched)
    found = judged(loop.run(SIZED[name], loop.steps, "batch"))
    assert [(severity, f.evidence["kind"]) for severity, f in found] == [("error", "too-fast")]


@settings(max_examples=60, deadline=None)
@given(plain, st.sampled_from(LONG))
def test_sized_in_steps_and_called_per_epoch_is_an_error(loop: Loop, name: str) -> None:
    run = loop.run(SIZED[name], loop.steps, "none")
    run.schedulers[0] = dataclasses.replace(run.schedulers[0], interval="epoch")
    found = judged(run.framework("lightning"))
    assert [(severity, f.evidence["kind"]) for severity, f in found] == [("error", "too-slow")]
