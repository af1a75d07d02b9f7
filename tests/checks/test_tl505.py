"""TL505 nll-without-log-softmax."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loss.nll_without_log_softmax import nll_without_log_softmax as check

from tests.checks.judging import findings, only
from tests.checks.loss_events import INDICES, LOG_PROBABILITIES, PROBABILITIES, SCORES, trained
from trainlint.contract import NotApplicable, NotObserved


def nll(given: dict[str, Any] | None, function: str = "nll_loss", **fields: Any) -> list[tuple[str, str]]:
    return [(s, f.about) for s, f in findings(check, trained(function, given, INDICES, **fields))]


def test_log_probabilities() -> None:
    assert nll(LOG_PROBABILITIES) == []
    assert nll({**LOG_PROBABILITIES, "made_by": "log", "row_logsumexp_max": 1e-4}) == []


def test_raw_scores() -> None:
    assert nll(SCORES) == [("error", "scores")]
    assert nll({**SCORES, "made_by": ""}) == [("warning", "scores")], "log-densities may be above 0"
    assert nll(SCORES, added=2.0) == [("warning", "scores")], "beside a normaliser of its own they are right"


def test_scores_that_are_all_negative() -> None:
    assert nll({**SCORES, "maximum": -0.1}) == [("error", "scores")]


def test_log_probabilities_with_classes_left_out() -> None:
    given = {**LOG_PROBABILITIES, "row_logsumexp_min": -1.0, "row_logsumexp_max": -0.1}
    assert nll(given) == []
    assert nll({**given, "made_by": ""}) == []


def test_probabilities() -> None:
    given = {**PROBABILITIES, "made_by": "softmax", "gradient_kept": 0.2}
    _, finding = only(check, trained("nll_loss", given, INDICES))
    assert "between -1 and 0" in finding.message
    assert "20% is left" in finding.message
    assert nll(PROBABILITIES) == [("error", "probabilities")]


def test_only_picking_values() -> None:
    assert nll(SCORES, reduction="none") == []


def test_over_another_dimension() -> None:
    given = {**LOG_PROBABILITIES, "made_over": 0, "row_logsumexp_min": -2.3, "row_logsumexp_max": -1.9}
    assert nll(given) == [("error", "dimension")]


def test_a_divergence() -> None:
    assert nll(LOG_PROBABILITIES, "kl_div") == []
    assert nll({**PROBABILITIES, "made_by": "softmax"}, "kl_div") == [("error", "probabilities")]
    assert nll(SCORES, "kl_div") == [("error", "scores")]
    assert nll({**SCORES, "made_by": ""}, "kl_div") == [], "not every kl_div is over the last dimension"


def test_what_was_not_seen_is_said() -> None:
    with pytest.raises(NotObserved):
        nll(None)
    with pytest.raises(NotApplicable):
        nll(SCORES, "cross_entropy")
