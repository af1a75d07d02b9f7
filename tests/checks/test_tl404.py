"""TL404 lr-not-logged."""

from __future__ import annotations

import pytest
from trainlint.checks.schedule.lr_not_logged import lr_not_logged as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at, cosine
from trainlint.contract import Key, NotApplicable, NotObserved
from trainlint.recording.schema import SourceFacts

NET = {"fc.weight": (8, 8)}


def train(*names: str, scheduled: bool = True, rate: str | None = None, by: str = "wandb.log") -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET), lr=1e-3)
    if scheduled:
        run.scheduler(adam, cosine(100), 100)
    for step in range(3):
        run.backward().step(adam)
        for name in names:
            run.log(name, 2.0 + step, by)
        if rate is not None:
            run.log(rate, run.rates[adam][0], by)
        if scheduled:
            run.sched()
    return run


def test_a_changing_rate_is_missing_from_the_tracker() -> None:
    severity, finding = only(check, train("loss", "accuracy"))
    assert severity == "warning"
    assert "CosineAnnealingLR" in finding.message
    assert "2 values (accuracy, loss)" in finding.message
    assert "get_last_lr" in finding.fix


@pytest.mark.parametrize("name", ["lr", "train/lr", "learning_rate", "lr-AdamW", "speed"])
def test_a_logged_rate_by_name_or_by_value(name: str) -> None:
    assert findings(check, train("loss", "accuracy", rate=name)) == []


def test_a_constant_rate_is_worth_knowing_only() -> None:
    assert only(check, train("loss", "accuracy", scheduled=False))[0] == "info"


def test_the_loss_alone_is_no_tracking() -> None:
    assert findings(check, train("loss")) == []


def test_the_config_asks_for_it() -> None:
    run = train("loss").config(log_lr=True)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert finding.at == Key("training.log_lr")
    assert findings(check, train("loss").config(log_lr=False)) == []


def test_nothing_logged_does_not_apply() -> None:
    with pytest.raises(NotApplicable):
        findings(check, train())


def test_a_logger_that_got_nothing_yet_is_not_observed() -> None:
    with pytest.raises(NotObserved):
        findings(check, train().framework("accelerate", loggers=["tensorboard"]))


def test_lightnings_monitor_logs_it_at_its_own_interval() -> None:
    run = train("train_loss", "acc", by="lightning.log")
    run.framework("lightning", callbacks=["LearningRateMonitor"], loggers=["CSVLogger"])
    assert findings(check, run) == []


def test_lightning_without_the_monitor() -> None:
    run = train("train_loss", "acc", by="lightning.log").framework("lightning", loggers=["CSVLogger"])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "LearningRateMonitor" in finding.fix


def test_lightning_without_a_logger_does_not_apply() -> None:
    with pytest.raises(NotApplicable):
        findings(check, train("train_loss", "acc", by="lightning.log").framework("lightning"))


def test_transformers_logs_it_by_itself() -> None:
    assert findings(check, train("loss", "grad_norm", by="transformers.log").framework("transformers")) == []


def test_a_program_that_reads_the_rate_logs_it_somewhere() -> None:
    source = SourceFacts(files=("/home/user/train.py",), rate_reads=(at(50),))
    assert findings(check, train("loss", "accuracy"), source=source) == []
