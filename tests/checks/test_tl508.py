"""TL508 broadcast-in-the-loss."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loss.broadcast_in_the_loss import broadcast_in_the_loss as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import trained
from tests.support.build import Run, at
from trainlint.contract import NotObserved
from trainlint.recording.schema import OuterDifference


def mse(given: tuple[int, ...], target: tuple[int, ...], **fields: Any) -> Run:
    return trained("mse_loss", input_shape=given, target_shape=target, target_dtype="float32", **fields)


@pytest.mark.parametrize(("given", "target"), [((32, 1), (32,)), ((32,), (32, 1)), ((1, 32, 1), (1, 32))])
def test_a_column_against_a_row(given: tuple[int, ...], target: tuple[int, ...]) -> None:
    severity, finding = only(check, mse(given, target))
    assert severity == "error"
    assert "1,024 differences instead of 32" in finding.message


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ((32, 1), (32, 1)),
        ((32,), (32,)),
        ((1, 1), (1,)),
        ((32, 1), (1, 32)),
        ((32, 1), (7,)),
        ((32, 3), (3,)),
        ((32, 3), (32, 1)),
        ((32, 1, 8), (1, 16, 8)),
        ((32,), ()),
    ],
    ids=str,
)
def test_shapes_that_fit_or_are_meant(given: tuple[int, ...], target: tuple[int, ...]) -> None:
    assert findings(check, mse(given, target)) == []


def test_unreduced_it_may_be_meant() -> None:
    assert only(check, mse((32, 1), (32,), reduction="none"))[0] == "warning"


def by_hand(**fields: Any) -> Run:
    run = Run()
    for _ in range(3):
        run._emit(OuterDifference, operand_shape=(32, 1), shape=(32, 32), at=at(9), **fields)
        run.backward()
    return run


def test_written_by_hand() -> None:
    severity, finding = only(check, by_hand())
    assert severity == "error"
    assert "squeeze(-1)" in finding.fix
    assert "mean of squared differences" in finding.message


def test_absolute_differences_may_be_a_term() -> None:
    assert "median" in only(check, by_hand(power="absolute"))[1].message
    assert findings(check, by_hand(power="absolute", alone=False)) == []


def test_squares_beside_other_terms_may_be_a_distance_between_distributions() -> None:
    assert only(check, by_hand(alone=False))[0] == "warning"


def test_what_was_not_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        findings(check, Run())
    with pytest.raises(NotObserved, match=r"torch\.compile"):
        findings(check, Run().backward(grad_fn="CompiledFunctionBackward"))
    assert findings(check, Run().backward(grad_fn="MeanBackward0")) == []
