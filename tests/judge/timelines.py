"""Small recordings built by hand for the judge's tests: a loop of backwards, optimizer steps and scheduler steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    CurvePoint,
    Event,
    Loader,
    Optimizer,
    OptimizerStep,
    ParamGroup,
    Plan,
    Recording,
    Scheduler,
    SchedulerStep,
)

Rate = Callable[[int], float]


def cosine(peak: float, calls: int) -> Rate:
    return lambda n: peak * 0.5 * (1 + math.cos(math.pi * min(n, calls) / calls))


def warm_cosine(peak: float, warmup: int, calls: int) -> Rate:
    tail = cosine(peak, calls - warmup)
    return lambda n: peak * n / warmup if n < warmup else tail(n - warmup)


def curve(rate: Rate, calls: int, every: int = 1) -> tuple[CurvePoint, ...]:
    marks = sorted({*range(0, calls + 1, every), calls})
    return tuple(CurvePoint(n, (rate(n),)) for n in marks)


def scheduler(rate: Rate | None, calls: int = 100, **fields: Any) -> Scheduler:
    defaults: dict[str, Any] = {
        "id": 0,
        "class_name": "CosineAnnealingLR",
        "optimizer": 0,
        "curve": curve(rate, calls) if rate else (),
        "horizon_calls": calls if rate else None,
    }
    return Scheduler(**{**defaults, **fields})


def loop(
    rate: Rate,
    *,
    steps: int = 3,
    accumulation: int = 1,
    call_when: Callable[[int, bool], int] = lambda micro, stepped: int(stepped),
    plan: Plan | None = None,
    schedulers: Sequence[Scheduler] = (),
    loaders: Iterable[Loader] = (),
    calls_first: int = 0,
    **fields: Any,
) -> Recording:
    """A program's loop: micro-batches, a step every ``accumulation`` of them, scheduler calls where ``call_when`` says.

    ``rate`` gives the learning rate after so many scheduler calls; ``call_when(micro_batch, stepped)`` the number of
    scheduler calls at the end of that micro-batch.
    """
    events: list[Event] = []
    calls = 0

    def call(initial: bool = False) -> None:
        nonlocal calls
        before = rate(calls)
        calls += not initial
        events.append(SchedulerStep(len(events) + 1, 0.0, 0, (before,), (rate(calls),), initial=initial))

    if schedulers:
        call(initial=True)
    for _ in range(calls_first):
        call()
    done = micro = 0
    while done < steps:
        micro += 1
        for loader in loaders:
            events.append(BatchFetched(len(events) + 1, 0.0, loader.id, size=loader.batch_size))
        events.append(Backward(len(events) + 1, 0.0, value=1.0))
        stepped = micro % accumulation == 0
        if stepped:
            seq = len(events) + 1
            events.append(OptimizerStep(seq, 0.0, 0, done, (rate(calls),), began=seq))
            done += 1
        if done < steps and schedulers:
            for _ in range(call_when(micro, stepped)):
                call()
    own = tuple(dataclasses.replace(s, calls=calls) if s.id == 0 else s for s in schedulers)
    defaults: dict[str, Any] = {
        "optimizers": (Optimizer(0, "AdamW", groups=(ParamGroup(0, (), {"lr": rate(0)}),), steps=steps),),
        "schedulers": own,
        "loaders": tuple(loaders),
        "plan": plan or Plan(),
        "events": tuple(events),
    }
    return Recording(**{**defaults, **fields})
