"""TL907: samples of a batch that depend on each other."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Mixing, Replay, ReplayedForward

check = import_module("trainlint.checks.data.samples_mix_in_the_batch").samples_mix_in_the_batch


def replay(**fields: Any) -> Replay:
    mixing = Mixing(**{"forward": "Net", "outcome": "mixed", "samples": 8, "changed": 7, "ratio": 0.2, **fields})
    return Replay(forwards=(ReplayedForward("Net", "Net", "replayed"),), mixing=(mixing,))


def attention(**fields: Any) -> Replay:
    known = {"module": "attention", "class_name": "MultiheadAttention", "batch_first": False, "given": (8, 12, 32)}
    return replay(**{**known, **fields})


def test_samples_that_stay_apart_pass() -> None:
    assert findings(check, Run(), replay=replay(outcome="apart")) == []


def test_batch_in_the_place_of_the_sequence_is_an_error() -> None:
    severity, found = only(check, Run(), replay=attention(at=at(30)))
    assert severity == "error"
    assert "batch_first=False" in found.message
    assert "(8, 12, 32)" in found.message
    assert "batch_first=True" in found.fix


@pytest.mark.parametrize(
    "fields",
    [
        {"apart": ("columns (MultiheadAttention)",)},  # rows and columns in turn, as tables are read
        {"given": (8, 32)},  # a set of samples on purpose
        {"given": (12, 8, 32)},
        {"given": (8, 1, 32)},
    ],
)
def test_what_may_be_meant_is_a_warning(fields: dict[str, Any]) -> None:
    assert only(check, Run(), replay=attention(**fields))[0] == "warning"


def test_other_mixing_names_the_function() -> None:
    severity, found = only(check, Run(), replay=replay(class_name="Pool", module="pool", function="softmax", at=at(9)))
    assert severity == "warning"
    assert "softmax in pool (Pool) (train.py:9)" in found.message


def test_faint_influences_pass() -> None:
    assert findings(check, Run(), replay=replay(class_name="Linear", module="head", ratio=0.002)) == []


@pytest.mark.parametrize("name", ["MoELayer", "SyncBatchNorm", "Linear8bitLt", "SwitchRouter"])
def test_what_mixes_on_purpose_is_not_judged(name: str) -> None:
    with pytest.raises(NotApplicable):
        findings(check, Run(), replay=replay(class_name=name, module="part"))


def test_what_could_not_be_seen_is_said() -> None:
    with pytest.raises(NotObserved, match="repeated"):
        findings(check, Run())
    with pytest.raises(NotObserved, match="one sample"):
        findings(check, Run(), replay=replay(outcome="left-out", reason="the batch has one sample"))
    left = Replay(forwards=(ReplayedForward("Net", "Net", "left-out", "its weights are sharded"),))
    with pytest.raises(NotObserved, match="sharded"):
        findings(check, Run(), replay=left)
