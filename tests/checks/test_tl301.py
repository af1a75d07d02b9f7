"""TL301: what came of one batch, given again and again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from trainlint.checks.loop.cannot_overfit_one_batch import cannot_overfit_one_batch

from tests.checks.judging import findings, only
from tests.checks.loss_events import INDICES, SCORES, trained
from tests.support.build import Run
from tests.support.experiments import curve, falling, overfit
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Ending, Experiment, ExperimentLoss


def program(weights: int = 4000, frozen: tuple[str, ...] = (), **scores: Any) -> Run:
    run = Run()
    shapes = {"body.weight": (weights // 10, 8), "head.weight": (weights // 10, 2)}
    net = run.module("Net", shapes, frozen=frozen)
    adam = run.optimizer("AdamW", net)
    trained("cross_entropy", {**SCORES, **scores}, INDICES, run=run)
    for _ in range(3):
        run.step(adam)
    return run


def judged(run: Run, made: Experiment) -> list[tuple[str, str]]:
    return [(s, f.about) for s, f in findings(cannot_overfit_one_batch, run, experiments=(made,))]


def test_a_batch_that_was_learned() -> None:
    assert judged(program(), overfit(curve(falling(2.3, 0.05), "reached"))) == []
    # A second rate did what the first did not.
    made = overfit(curve(falling(2.3, 2.0)), curve(falling(2.3, 0.05), "reached", 1e-2))
    assert judged(program(), made) == []


def test_a_loss_that_never_changes_is_an_error() -> None:
    severity, finding = only(cannot_overfit_one_batch, program(), experiments=(overfit(curve([2.3] * 30, "constant")),))
    assert severity == "error"
    assert "2.3 to the last bit" in finding.message


def test_a_known_cause_is_named() -> None:
    run = Run()
    net = run.module("Net", {"body.weight": (400, 8), "head.weight": (10, 400)})
    adam = run.optimizer("AdamW", net[:1])
    run.outsider[net[1]] = (0.5, False)
    trained("cross_entropy", SCORES, INDICES, run=run)
    for _ in range(3):
        run.step(adam)
    severity, finding = only(cannot_overfit_one_batch, run, experiments=(overfit(curve(falling(2.3, 0.4))),))
    assert severity == "error"
    assert "TL201" in finding.message
    assert finding.evidence["causes"] == ["TL201"]
    assert "TL201" in finding.fix


def test_without_a_cause_it_is_a_warning_and_only_for_models_with_room() -> None:
    stuck = overfit(curve(falling(2.3, 2.0)), curve(falling(2.3, 2.0), rate=1e-2))
    assert judged(program(), stuck) == [("warning", "one-batch")]
    with pytest.raises(NotObserved, match="cannot be told"):
        judged(program(weights=40), stuck)  # a table of bigrams, a line through points
    with pytest.raises(NotObserved, match="cannot be told"):
        judged(program(frozen=("body",)), stuck)  # an adapter, a head on frozen weights
    with pytest.raises(NotObserved, match="cannot be told"):
        judged(program(made_by=""), stuck)  # similarities over a temperature


def test_what_is_still_falling_is_not_judged() -> None:
    slow = [2.3 - 0.002 * i for i in range(300)]
    with pytest.raises(NotObserved, match="still falling"):
        judged(program(), overfit(curve(slow)))


def test_losses_without_a_known_floor() -> None:
    loss = ExperimentLoss("gaussian_nll_loss", 2.0, alone=True, calls=1, floor=None, positions=32)
    with pytest.raises(NotObserved, match="not known"):
        judged(program(), overfit(curve(falling(2.3, 2.0)), loss=loss))
    several = ExperimentLoss("cross_entropy", 2.0, alone=False, calls=2, floor=0.0, positions=32)
    with pytest.raises(NotObserved, match="not known"):
        judged(program(), overfit(curve(falling(2.3, 2.0)), loss=several))
    by_hand = overfit(curve([0.7] * 30, "constant"), loss=None)
    assert judged(program(), by_hand) == [("warning", "one-batch")]


def test_what_remains_of_smoothed_labels_is_not_missed() -> None:
    loss = ExperimentLoss("cross_entropy", 2.3, alone=True, calls=1, floor=1.1, positions=32, label_smoothing=0.3)
    assert judged(program(), overfit(curve(falling(2.3, 1.15), "reached"), loss=loss)) == []
    assert judged(program(), overfit(curve(falling(2.3, 1.5)), loss=loss)) == []


def test_a_model_that_begins_where_it_should_end() -> None:
    assert judged(program(), overfit(curve([0.011 + 0.001 * (i % 2) for i in range(250)], "plateau"))) == []


def test_a_loss_that_blows_up_at_every_rate() -> None:
    blown = overfit(*(curve([2.3, 90.0, math.nan], "diverged", rate) for rate in (1e-3, 1e-4, 1e-5)))
    assert judged(program(), blown) == [("warning", "one-batch")]


def test_why_nothing_can_be_said() -> None:
    with pytest.raises(NotObserved, match="--deep"):
        findings(cannot_overfit_one_batch, program())
    with pytest.raises(NotApplicable, match="take turns"):
        judged(program(), Experiment("overfit", "left-out", "2 optimizers take turns"))
    with pytest.raises(NotObserved, match="interrupted"):
        judged(program(), Experiment("overfit", "left-out", "interrupted"))
    with pytest.raises(NotObserved, match="disk is full"):
        judged(program(), Experiment("overfit", "failed", "RuntimeError: disk is full"))
    with pytest.raises(NotObserved, match="7 different"):
        judged(program(), overfit(curve(falling(2.3, 0.1)), repeated_by="random", different_batches=7))
    with pytest.raises(NotObserved, match="by hand"):
        judged(program(), overfit(curve(falling(2.3, 0.1)), repeated_by="random", different_batches=None))
    ended = curve([2.3, 2.2, 2.1], "program-ended", reason="the program came to its own end after 3 steps")
    with pytest.raises(NotObserved, match="own end"):
        judged(program(), overfit(ended))


def first_loss(value: float, tied: tuple[str, ...] = (), **fields: Any) -> Run:
    run = Run()
    net = run.module("Net", {"head.weight": (400, 8)}, origin=fields.pop("origin", "fresh"))
    run.parameters[net[0]] = dataclasses.replace(run.parameters[net[0]], tied=tied)
    adam = run.optimizer("AdamW", net)
    trained("cross_entropy", {**SCORES, **fields.pop("scores", {})}, INDICES, run=run, value=value, **fields)
    run.step(adam)
    return run


LEARNED = overfit(curve(falling(9.0, 0.05), "reached"))


def test_a_first_loss_far_above_guessing() -> None:
    assert judged(first_loss(9.0), LEARNED) == [("warning", "first-loss")]
    assert judged(first_loss(9.0, tied=("embedding.weight",)), LEARNED) == [("info", "first-loss")]
    assert judged(first_loss(4.0), LEARNED) == []
    assert judged(first_loss(9.0, origin="loaded:model.pt"), LEARNED) == []
    assert judged(first_loss(9.0, scores={"made_by": ""}), LEARNED) == []  # margins and scales (ArcFace)
    assert judged(first_loss(9.0, reduction="sum"), LEARNED) == []
    assert judged(first_loss(9.0, options={"weight": 4}), LEARNED) == []


def test_it_ends_in_order_when_the_run_was_interrupted() -> None:
    assert findings(cannot_overfit_one_batch, program(), experiments=(LEARNED,), ending=Ending(how="interrupted")) == []
