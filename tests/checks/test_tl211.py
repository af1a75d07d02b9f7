"""TL211: an averaged or teacher copy that does not follow the model."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.optimizer.shadow_model_never_updated import shadow_model_never_updated as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Shadow


def _run() -> Run:
    run = Run()
    adam = run.optimizer("Adam", run.module("Net", {"fc.weight": (4, 4)}))
    return run.backward().step(adam)


def _shadow(**fields: Any) -> tuple[Shadow, ...]:
    own = {"tensors": 4, "weights": 500, "dtype": "float32", "of": "Net", "sampled": 400, "distance": 0.12, **fields}
    return (Shadow(0, "Teacher", "Net", **own),)


def test_a_used_copy_whose_updates_do_nothing() -> None:
    severity, finding = only(check, _run(), shadows=_shadow(idle_updates=3, due=200, forwards=2, saved="/tmp/ema.pt"))
    assert severity == "error"
    assert "3 updates in place changed none" in finding.message
    assert "used in 2 forward passes and was saved to ema.pt" in finding.message


def test_a_copy_that_nobody_used_yet() -> None:
    assert only(check, _run(), shadows=_shadow(idle_updates=2, due=200))[0] == "warning"


def test_an_average_in_half_precision() -> None:
    severity, finding = only(check, _run(), shadows=_shadow(dtype="bfloat16", idle_updates=2, forwards=1))
    assert severity == "warning"
    assert "float32" in finding.fix


def test_an_average_that_stopped_following() -> None:
    shadows = _shadow(calls=4, effective_updates=1, idle_updates=3, due=100, forwards=1, moved=True)
    _, finding = only(check, _run(), shadows=shadows)
    assert "the last 3 calls of update_parameters" in finding.message


def test_an_average_that_was_never_updated() -> None:
    severity, finding = only(check, _run(), shadows=_shadow(calls=0, forwards=1))
    assert severity == "warning"
    assert "never updated" in finding.message


@pytest.mark.parametrize(
    "fields",
    [
        {"forwards": 3, "saved": "ref.pt"},  # a reference
        {"calls": 0},  # an average that starts late
        {"calls": 3, "effective_updates": 3, "moved": True, "forwards": 1},
        {"idle_updates": 1, "due": 50, "effective_updates": 2, "forwards": 1},  # a hard copy now and then
    ],
)
def test_copies_that_are_right(fields: dict[str, Any]) -> None:
    assert findings(check, _run(), shadows=_shadow(**fields)) == []


def test_nothing_to_look_at() -> None:
    with pytest.raises(NotObserved):
        findings(check, Run())
    with pytest.raises(NotApplicable):
        findings(check, _run())
