"""TL804: units that are copies of each other, and zeros that cannot move."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotObserved
from trainlint.recording.schema import Distribution, Replay

check = import_module("trainlint.checks.numerics.degenerate_distributions").degenerate_distributions


def program(steps: int = 3, **step: Any) -> Run:
    run = Run()
    net = run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8)})
    adam = run.optimizer("AdamW", net, lr=step.pop("lr", 1e-3))
    for _ in range(steps):
        run.batch().backward().step(adam, **step)
    return run


def seen(what: str, low: float, high: float, name: str = "a.weight", same: bool = True) -> Distribution:
    return Distribution(what, name, "Linear", (8, 8), 64, low, high, identical_rows=same)


def replay(*found: Distribution) -> Replay:
    return Replay(distributions=found or (seen("weight", -1.0, 1.0, same=False),))


def test_random_weights_pass() -> None:
    assert findings(check, program(), replay=replay()) == []


@pytest.mark.parametrize("gradient", [(-0.5, 0.5), (0.25, 0.25)])
def test_units_that_are_copies(gradient: tuple[float, float]) -> None:
    severity, found = only(check, program(), replay=replay(seen("weight", 0.1, 0.2), seen("gradient", *gradient)))
    assert severity == "warning"
    assert "All 8 rows of a.weight" in found.message


def test_rows_with_gradients_of_their_own_part_soon() -> None:
    apart = seen("gradient", -1.0, 1.0, same=False)
    assert findings(check, program(), replay=replay(seen("weight", 0.1, 0.2), apart)) == []


def test_rows_that_nothing_has_moved_yet_pass() -> None:
    both = replay(seen("weight", 0.1, 0.2), seen("gradient", -0.5, 0.5))
    assert findings(check, program(moved=False), replay=both) == []
    assert findings(check, program(lr=0.0), replay=both) == []


def test_zeros_without_a_gradient_are_stuck() -> None:
    zeros = [seen("weight", 0.0, 0.0, name) for name in ("a.weight", "b.weight")]
    _, found = only(check, program(gradient=0.0, moved=False), replay=replay(*zeros))
    assert "a.weight, b.weight hold zeros only" in found.message
    assert "3 watched steps" in found.message


@pytest.mark.parametrize(
    "step", [{"gradient": 0.5}, {"gradient": None}, {"gradient": 0.0, "steps": 2}, {"gradient": 0.0, "lr": 0.0}]
)
def test_zeros_that_may_yet_move_pass(step: dict[str, Any]) -> None:
    assert findings(check, program(moved=False, **step), replay=replay(seen("weight", 0.0, 0.0))) == []


def test_frozen_weights_pass() -> None:
    run = program(gradient=0.0, moved=False)
    run.change(range(2), requires_grad=False)
    assert findings(check, run, replay=replay(seen("weight", 0.0, 0.0))) == []


def test_what_could_not_be_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        findings(check, program())
