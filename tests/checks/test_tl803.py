"""TL803: layers whose units are zero or saturated for the whole batch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Replay, ReplayedForward, UnitUse

check = import_module("trainlint.checks.numerics.dead_activations").dead_activations


def use(**fields: Any) -> UnitUse:
    known = {"function": "relu", "module": "act", "layer": "hidden", "layer_class": "Linear", "units": 64,
             "fan_in": 64, "samples": 32, "values": 32}  # fmt: skip
    return UnitUse(**{**known, **fields})


def replay(*units: UnitUse) -> Replay:
    return Replay(forwards=(ReplayedForward("Net", "Net", "replayed"),), units=units)


def test_a_layer_that_is_dead_as_a_whole() -> None:
    severity, found = only(check, Run(), replay=replay(use(dead=64, at=at(20)), use(dead=3)))
    assert severity == "warning"
    assert "64 of 64 units of hidden (Linear) (100%) under relu (train.py:20)" in found.message
    assert "learns nothing" in found.message


def test_most_of_a_layer() -> None:
    assert "50 of 64" in only(check, Run(), replay=replay(use(dead=50)))[1].message


def test_saturated_ends() -> None:
    _, found = only(check, Run(), replay=replay(use(function="tanh", dead=60)))
    assert found.message.startswith("Saturated")


def test_all_layers_in_one_finding() -> None:
    _, found = only(check, Run(), replay=replay(*(use(layer=f"h{i}", dead=64) for i in range(5))))
    assert "2 more layers" in found.message


@pytest.mark.parametrize(
    "units",
    [
        use(dead=0),
        use(dead=38),  # 59%: what chance leaves in the deep layers of a plain network
        use(dead=12, units=16),  # 75%, which chance may leave of 16
        use(dead=4, units=4),  # a narrow head
        use(dead=64, samples=2),
        use(dead=64, values=8),
        use(dead=500, units=512, fan_in=24),  # a dictionary
        use(dead=60, samples=4, values=64),
    ],
)
def test_what_is_ordinary_passes(units: UnitUse) -> None:
    assert findings(check, Run(), replay=replay(units)) == []


def test_pretrained_layers_may_be_sparse() -> None:
    run = Run()
    ids = run.module("Net", {"hidden.weight": (64, 64)}, origin="model.safetensors")
    assert findings(check, run, replay=replay(use(dead=60, weight=ids[0]))) == []
    assert findings(check, run, replay=replay(use(dead=64, weight=ids[0])))


def test_what_could_not_be_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        findings(check, Run())
    left = Replay(forwards=(ReplayedForward("Net", "Net", "left-out", "it raised KeyError"),))
    with pytest.raises(NotObserved, match="KeyError"):
        findings(check, Run(), replay=left)
    with pytest.raises(NotApplicable):
        findings(check, Run(), replay=replay())
