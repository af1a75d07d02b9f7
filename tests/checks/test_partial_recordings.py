"""Checks over recordings with parts missing, as a program that died or a recorder that failed leaves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainlint.checks.loop.accumulation_not_divided import accumulation_not_divided
from trainlint.checks.loop.accumulation_token_weighting import accumulation_token_weighting
from trainlint.checks.loop.clipping_ineffective import clipping_ineffective
from trainlint.checks.loop.clipping_never_or_always_binds import clipping_never_or_always_binds
from trainlint.checks.loop.gradients_never_zeroed import gradients_never_zeroed
from trainlint.checks.loop.loss_detached import loss_detached
from trainlint.checks.loop.wrong_mode import wrong_mode
from trainlint.checks.loop.wrong_step_order import wrong_step_order
from trainlint.checks.optimizer.frozen_but_optimized import frozen_but_optimized
from trainlint.checks.optimizer.half_precision_optimizer_math import half_precision_optimizer_math
from trainlint.checks.optimizer.params_not_in_optimizer import params_not_in_optimizer
from trainlint.checks.optimizer.params_unmoved import params_unmoved
from trainlint.checks.optimizer.params_without_gradient import params_without_gradient
from trainlint.checks.schedule.lr_not_logged import lr_not_logged
from trainlint.checks.schedule.scheduler_before_optimizer import scheduler_before_optimizer
from trainlint.checks.schedule.scheduler_cadence import scheduler_cadence

from tests.support.build import Run, at, cosine
from trainlint.contract import Finding, NotApplicable, NotObserved
from trainlint.recording.schema import CarriedGradients, Ending, Recording

CHECKS: tuple[Callable[[Any], Any], ...] = (
    params_not_in_optimizer,
    frozen_but_optimized,
    params_without_gradient,
    params_unmoved,
    half_precision_optimizer_math,
    loss_detached,
    wrong_mode,
    wrong_step_order,
    accumulation_not_divided,
    accumulation_token_weighting,
    clipping_ineffective,
    clipping_never_or_always_binds,
    gradients_never_zeroed,
    scheduler_before_optimizer,
    scheduler_cadence,
    lr_not_logged,
)
COLUMNS = ("gradient_norm", "weight_norm", "update_norm", "changed", "unchanged_exact", "frozen")


def whole(micro: int, dead: bool, still: bool, dtype: str) -> Recording:
    run = Run()
    net = run.module("Net", {"body.weight": (8, 8), "body.bias": (8,), "head.weight": (2, 8)}, dtype=dtype)
    aux = run.module("Aux", {"weight": (3, 3)})
    adam = run.optimizer("AdamW", net[:2], compute_dtype=dtype, state_dtypes={"exp_avg_sq": dtype})
    other = run.optimizer("SGD", aux, lr=0.1)
    run.loader(20)
    run.scheduler(adam, cosine(40), 40)
    for _ in range(3):
        shares = []
        for _ in range(micro):
            run.batch().loss().backward()
            shares.append(len(run.events))
        run.clip(1.0, 2.0, parameters=tuple(net), n_tensors=3, with_gradient=2, scaled=still)
        run.step(
            adam,
            gradient={net[0]: 1.0, net[1]: None if dead else 0.5},
            moved=not still,
            carried=CarriedGradients((net[0],), 1, 1.0, 0.5) if dead else None,
            share_backwards=tuple(shares),
            share_products=((1.0,) * (micro + 1),) * (micro + 1),
        )
        run.step(other).zero(adam).zero(other).sched().log("loss", 1.0).log("accuracy", 0.5)
    run.unheld(net[2:])
    return run.recording()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_part_may_be_missing(data: st.DataObject) -> None:
    recording = whole(
        data.draw(st.integers(1, 3)),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    )
    kept = data.draw(st.sets(st.integers(0, len(recording.events) - 1)))
    missing = data.draw(st.sets(st.sampled_from(COLUMNS)))
    fields: dict[str, Any] = {
        "ending": Ending(data.draw(st.sampled_from(["steps", "exit", "timeout", "killed", "backward-cap"]))),
        "steps": tuple(dataclasses.replace(m, **dict.fromkeys(missing, ())) for m in recording.steps),
    }
    if data.draw(st.booleans()):
        fields["events"] = tuple(e for i, e in enumerate(recording.events) if i in kept)
    for name in data.draw(
        st.sets(st.sampled_from(["roots", "parameters", "optimizers", "schedulers", "loaders", "steps", "outsiders"]))
    ):
        fields[name] = None if name == "outsiders" else ()
    partial = dataclasses.replace(recording, **fields)
    for check in CHECKS:
        try:
            found = list(check(partial))
        except (NotApplicable, NotObserved):
            continue
        assert all(isinstance(f, Finding) and f.message and f.fix for f in found)
        assert found == list(check(partial))


def test_places_are_told_by_file_and_line() -> None:
    recording = whole(1, True, False, "float32")
    found = list(params_without_gradient(recording))
    assert found
    assert f"({at(5).file.rpartition('/')[2]}:5)" in found[0].message
