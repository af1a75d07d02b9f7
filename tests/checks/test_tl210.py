"""TL210: one parameter that is stepped twice with the same gradient."""

from __future__ import annotations

import dataclasses

import pytest
from trainlint.checks.optimizer.parameter_held_twice import parameter_held_twice as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import OptimizerStep

NET = {"body.weight": (8, 8), "head.weight": (5, 8), "head.bias": (5,)}
TORCH = "torch.optim.adamw"


def _two(**fields: str) -> tuple[Run, int, int]:
    run = Run()
    net = run.module("Net", NET)
    fields = {"defined_in": TORCH, **fields}
    return run, run.optimizer("AdamW", net, **fields), run.optimizer("AdamW", net[1:], lr=1e-2, line=6, **fields)


def test_both_step_after_one_backward() -> None:
    run, a, b = _two()
    for _ in range(3):
        run.batch().backward().step(a).step(b).zero(a).zero(b)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "head.*" in finding.message
    assert finding.evidence["iterations"] == 3


def test_the_order_may_change() -> None:
    run, a, b = _two()
    run.backward().step(a).step(b).zero(a).backward().step(b).step(a)
    assert only(check, run)[1].evidence["iterations"] == 2


def test_a_third_optimizer_steps_in_between() -> None:
    run, a, b = _two()
    other = run.optimizer("SGD", run.module("Loss", {"margin": (3,)}))
    run.backward().step(a).step(other).step(b)
    assert only(check, run)[0] == "error"


def test_each_after_its_own_backward() -> None:
    run, a, b = _two()
    for _ in range(3):
        run.batch().backward().step(a).zero(a).backward().step(b).zero(b)
    assert findings(check, run) == []


def test_one_of_them_moves_nothing() -> None:
    run, a, b = _two()
    run.backward().step(a).step(b, moved=False)
    assert findings(check, run) == []


def test_gradients_are_cleared_in_between() -> None:
    run, a, b = _two()
    run.backward().step(a).zero(a).step(b, gradient=None, moved=False)
    assert findings(check, run) == []


def test_an_optimizer_inside_another() -> None:
    run, a, b = _two(defined_in="sam")
    run.backward().step(b).step(a)
    outer = next(i for i, e in enumerate(run.events) if isinstance(e, OptimizerStep) and e.optimizer == a)
    inner = next(e for e in run.events if isinstance(e, OptimizerStep) and e.optimizer == b)
    step = run.events[outer]
    assert isinstance(step, OptimizerStep)
    run.events[outer] = dataclasses.replace(step, began=inner.seq - 1)
    assert findings(check, run) == []


def test_a_projection_of_one_s_own() -> None:
    run, a, b = _two(defined_in="manifold")
    run.backward().step(a).step(b)
    assert only(check, run)[0] == "warning"


def test_twice_in_one_list() -> None:
    run = Run()
    net = run.module("Net", NET)
    run.change(net[:1], tied=("out.weight",))
    adam = run.optimizer("Adam", [*net, net[0]], defined_in="torch.optim.adam")
    run.backward().step(adam)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "twice" in finding.message and "tied" in finding.message


def test_in_two_groups() -> None:
    run = Run()
    net = run.module("Net", NET)
    adam = run.optimizer("Adam", net, net[1:], defined_in="torch.optim.adam")
    run.backward().step(adam)
    assert only(check, run)[1].evidence["groups"] == [0, 1]


def test_nothing_to_look_at() -> None:
    with pytest.raises(NotApplicable):
        findings(check, Run())
    run, _, _ = _two()
    with pytest.raises(NotObserved):
        findings(check, run)
