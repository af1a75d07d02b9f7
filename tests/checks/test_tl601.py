"""TL601 over recordings built by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.finetuning.frozen_norm_drifts import frozen_norm_drifts

from tests.support.build import Run
from tests.support.epochs import Crossed
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import NormDrift, Provenance, Shadow

DRIFT = NormDrift(
    "backbone.norm",
    "BatchNorm2d",
    0,
    inside="backbone",
    inside_tensors=6,
    inside_loaded=6,
    origin="/data/resnet.pt",
    frozen=True,
    mean_shift_max=0.4,
    mean_shift_median=0.1,
    variance_ratio=1.3,
    batches=2,
)
ALONE = {"inside": "backbone.norm", "inside_tensors": 0, "inside_loaded": 0}


def seen(*norms: NormDrift, compared: int | None = 4, untrained: int = 2, **fields: Any) -> dict[str, Any]:
    return {"provenance": Provenance(norms=norms, norms_compared=compared, norms_untrained=untrained), **fields}


@pytest.fixture
def run() -> Run:
    made = Run()
    net = made.module("Net", {"backbone.conv.weight": (8, 3), "backbone.norm.weight": (8,), "head.weight": (2, 8)},
                      frozen=("backbone",), origin={"backbone": "/data/resnet.pt"})  # fmt: skip
    adam = made.optimizer("AdamW", net[2:])
    made.batch().backward().step(adam)
    return made


def test_a_frozen_loaded_backbone_whose_statistics_move(run: Run) -> None:
    severity, finding = only(frozen_norm_drifts, run, **seen(DRIFT))
    assert severity == "error"
    assert "backbone.norm" in finding.message and "resnet.pt" in finding.message and "0.4" in finding.message
    assert finding.evidence["batches"] == 2


def test_all_norms_of_one_module_are_one_finding(run: Run) -> None:
    more = [dataclasses.replace(DRIFT, name=f"backbone.{i}.norm") for i in range(5)]
    assert "5 norms" in only(frozen_norm_drifts, run, **seen(*more))[1].message


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"origin": "fresh"}, "warning"),
        ({"origin": "fresh", "inside_loaded": 0}, "info"),
        (ALONE, "warning"),
        ({**ALONE, "origin": "fresh"}, "info"),
        ({"affine": False}, "error"),
        ({"whole": True, "inside": ""}, "error"),
    ],
)
def test_how_much_is_proven(run: Run, changes: dict[str, Any], severity: str) -> None:
    assert only(frozen_norm_drifts, run, **seen(dataclasses.replace(DRIFT, **changes)))[0] == severity


@pytest.mark.parametrize(
    "changes", [{"parameters_moved": True}, {"training": False}, {**ALONE, "frozen": False}, {**ALONE, "affine": False}]
)
def test_norms_that_are_meant_to_move(run: Run, changes: dict[str, Any]) -> None:
    assert not findings(frozen_norm_drifts, run, **seen(dataclasses.replace(DRIFT, **changes)))


def test_copies_of_a_trained_module(run: Run) -> None:
    shadow = Shadow(0, "Net.backbone", "Backbone", of="Net.online")
    assert not findings(frozen_norm_drifts, run, **seen(DRIFT, shadows=(shadow,)))


def test_nothing_moved(run: Run) -> None:
    assert not findings(frozen_norm_drifts, run, **seen())


def test_what_cannot_be_told(run: Run) -> None:
    with pytest.raises(NotObserved):
        findings(frozen_norm_drifts, run)
    with pytest.raises(NotObserved):
        findings(frozen_norm_drifts, run, **seen(compared=None))
    with pytest.raises(NotApplicable):
        findings(frozen_norm_drifts, run, **seen(compared=0))
    with pytest.raises(NotApplicable):
        findings(frozen_norm_drifts, run, **seen(untrained=0))


def test_norms_left_trainable_where_the_layers_around_them_are_frozen() -> None:
    run = Run()
    net = run.module("Net", {"backbone.conv.weight": (8, 3), "backbone.norm.weight": (8,), "head.weight": (2, 8)},
                     frozen=("backbone.conv",), origin={"backbone": "/data/resnet.pt"})  # fmt: skip
    run.batch().backward().step(run.optimizer("AdamW", net[2:]))
    assert not findings(frozen_norm_drifts, run, **seen(dataclasses.replace(DRIFT, frozen=False)))


def test_a_backbone_unfrozen_with_the_next_epoch(run: Run) -> None:
    assert findings(frozen_norm_drifts, run, **seen(DRIFT))
    crossed = Crossed(run).next_epoch()
    run.change([0, 1], requires_grad=True)
    adam = run.optimizer("AdamW", [0, 1])
    run.batch().backward().step(adam)
    recording = crossed.recording(**seen(DRIFT))
    assert not list(frozen_norm_drifts(recording))


def test_lightning_never_calls_train(run: Run) -> None:
    run.framework("lightning")
    fix = only(frozen_norm_drifts, run, **seen(DRIFT))[1].fix
    assert fix is not None and fix.startswith("In on_train_epoch_start: self.backbone.eval()")
