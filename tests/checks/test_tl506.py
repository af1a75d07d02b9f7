"""TL506 class-imbalance-unweighted."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loss.class_imbalance_unweighted import class_imbalance_unweighted as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import trained
from tests.support.build import Run
from trainlint.contract import NotObserved

RARE = {"positions": 1000, "minimum": 0.0, "maximum": 1.0, "integral": True, "positives": 20, "samples": 1000}


def bce(target: dict[str, Any] = RARE, **fields: Any) -> Run:
    return trained("binary_cross_entropy_with_logits", None, target, **fields)


def test_two_positives_in_a_hundred() -> None:
    severity, finding = only(check, bce())
    assert severity == "info"
    assert "60 of 3,000" in finding.message
    assert finding.evidence["negatives_per_positive"] == 49


@pytest.mark.parametrize("fields", [{"options": {"pos_weight": 1}}, {"options": {"weight": 9}}, {"reduction": "none"}])
def test_the_loss_knows(fields: dict[str, Any]) -> None:
    assert findings(check, bce(**fields)) == []


def test_common_enough_or_none_at_all() -> None:
    assert findings(check, bce({**RARE, "positives": 100})) == []
    assert findings(check, bce({**RARE, "positives": 0})) == []


def test_one_positive_per_row() -> None:
    assert findings(check, bce({**RARE, "positions": 5000, "samples": 50, "positives": 50})) == []


def test_too_few_to_say() -> None:
    with pytest.raises(NotObserved):
        findings(check, bce({**RARE, "positions": 32, "positives": 1}))
