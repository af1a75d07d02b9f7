"""TL809: memory that nobody wrote."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.numerics.uninitialised_parameters import uninitialised_parameters

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotObserved
from trainlint.recording.schema import Numerics, UnwrittenTensors


def program() -> Run:
    run = Run()
    run.optimizer("AdamW", run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8)}))
    return run.batch().backward().step(0)


def unwritten(how: str = "to_empty", **fields: Any) -> dict[str, Any]:
    record = UnwrittenTensors(how, "Net", at(7), tensors=4, matrices=2, **fields)
    return {"numerics": Numerics(unwritten=(record,))}


def test_garbage_is_an_error() -> None:
    for how in ("to_empty", "torch.empty"):
        found = unwritten(how, unwritten=("a.weight", "a.bias"), garbage=("a.weight",), matrices_unwritten=1)
        severity, finding = only(uninitialised_parameters, program(), **found)
        assert severity == "error"
        assert finding.message.startswith("a.weight was never initialised") and "train.py:7" in finding.message


def test_buffers_and_non_finite_values_are_named() -> None:
    found = unwritten(
        unwritten=("rope.freqs",), garbage=("rope.freqs",), buffers=("rope.freqs",), non_finite=("rope.freqs",)
    )
    message = only(uninitialised_parameters, program(), **found)[1].message
    assert "this buffer" in message and "NaN" in message


def test_zeros_after_to_empty_count_only_when_nothing_was_written() -> None:
    assert not findings(uninitialised_parameters, program(), **unwritten(unwritten=("a.bias",)))
    assert not findings(uninitialised_parameters, program(), **unwritten(unwritten=("a.weight",), matrices_unwritten=1))
    found = unwritten(unwritten=("a.weight", "b.weight"), matrices_unwritten=2)
    assert only(uninitialised_parameters, program(), **found)[0] == "error"


def test_zeros_of_an_own_parameter_are_a_warning() -> None:
    found = unwritten("torch.empty", unwritten=("a.weight",), matrices_unwritten=1)
    severity, finding = only(uninitialised_parameters, program(), **found)
    assert severity == "warning" and "happened to be zero" in finding.message


def test_silence() -> None:
    assert not findings(uninitialised_parameters, program())
    with pytest.raises(NotObserved):
        findings(uninitialised_parameters, Run())
