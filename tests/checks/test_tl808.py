"""TL808: what a tracker will not show."""

from __future__ import annotations

import pytest
from trainlint.checks.numerics.dynamics_not_instrumented import dynamics_not_instrumented

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved


def program(*names: str, by: str = "tensorboard.add_scalar", norm: float = 1.25) -> Run:
    run = Run()
    run.optimizer("AdamW", run.module("Net", {"w": (8, 8)}), lr=3e-4)
    for n in range(3):
        run.batch().backward().clip(norm=norm).step(0)
        for name in names:
            run.log(name, {"g": norm, "rate": 3e-4}.get(name, 0.7 / (n + 1)), by)
    return run


def test_losses_and_metrics_only() -> None:
    severity, finding = only(dynamics_not_instrumented, program("loss", "accuracy", "rate", "epoch"))
    assert severity == "info"
    assert "3 values (accuracy, loss, rate)" in finding.message
    assert "what clip_grad_norm_ returns" in finding.fix


@pytest.mark.parametrize("name", ["grad_norm", "optim/update_ratio", "amp/loss_scale", "g", "weight_norm"])
def test_anything_of_the_dynamics_is_enough(name: str) -> None:
    assert not findings(dynamics_not_instrumented, program("loss", "accuracy", "lr", name))


def test_histograms_and_monitors() -> None:
    run = program("loss", "accuracy", "lr")
    run.log("layer.0", 0.0, "tensorboard.add_histogram")
    assert not findings(dynamics_not_instrumented, run)
    run = program("loss", "accuracy", by="lightning.log")
    run.framework("lightning", callbacks=["LearningRateMonitor", "GradNormLogger"], loggers=["CSVLogger"])
    assert not findings(dynamics_not_instrumented, run)


def test_lightning_in_its_own_words() -> None:
    run = program("loss", "accuracy", by="lightning.log")
    run.framework("lightning", callbacks=["LearningRateMonitor"], loggers=["CSVLogger"])
    assert "on_before_optimizer_step" in only(dynamics_not_instrumented, run)[1].fix
    with pytest.raises(NotApplicable):
        findings(dynamics_not_instrumented, program("loss", "accuracy", by="lightning.log").framework("lightning"))


def test_a_scaler_is_named() -> None:
    run = program("loss", "accuracy", "lr").scaler("step", skipped=False)
    finding = only(dynamics_not_instrumented, run)[1]
    assert "loss scale" in finding.message and "get_scale" in finding.fix


def test_when_the_question_does_not_arise() -> None:
    without = program("loss", "accuracy", "lr")
    without.events = [e for e in without.events if e.kind != "clip"]
    for run in (
        without,
        program("loss", "accuracy"),
        program(),
        program("loss"),
        program("loss", "epoch"),
        program("loss", "accuracy", by="csv"),
    ):
        with pytest.raises(NotApplicable):
            findings(dynamics_not_instrumented, run)
    assert not findings(dynamics_not_instrumented, program("loss", "accuracy", "lr").framework("transformers"))
    with pytest.raises(NotObserved):
        findings(dynamics_not_instrumented, Run())
