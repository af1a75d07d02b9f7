"""TL305 wrong-mode, over recordings built by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from trainlint.checks.loop.wrong_mode import wrong_mode

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import (
    BatchFetched,
    Boundary,
    DropoutCall,
    Loader,
    LossCall,
    ModeCall,
    ModeChanged,
    ModeSensitive,
    ModeState,
)

DROP = ModeSensitive("body.drop", "Dropout", "dropout", 0.1)
NORM = ModeSensitive("body.norm", "BatchNorm1d", "norm")
HEAD_DROP = ModeSensitive("head.drop", "Dropout", "dropout", 0.5)
CROSSED = Boundary(outcome="crossed")


class Program(Run):
    """A network with a body and a head, dropout in both and a norm in the body; it trains everything."""

    def __init__(self, *, frozen: Sequence[str] = (), origin: str = "fresh") -> None:
        super().__init__()
        tensors = {"body.fc.weight": (8, 8), "body.norm.weight": (8,), "head.fc.weight": (2, 8)}
        self.ids = self.module("Net", tensors, frozen=frozen, origin=origin, mode_sensitive=(DROP, NORM, HEAD_DROP))
        self.adam = self.optimizer("AdamW", [i for i in self.ids if self.parameters[i].requires_grad])
        self.loader(20, at=at(60))

    def train_step(self, n: int = 1) -> Program:
        for _ in range(n):
            self.batch().loss().backward(40).step(self.adam)
        return self

    def modes(
        self,
        *in_eval: str,
        training: bool = True,
        how: str = "program",
        on: str = "Net",
        when: str = "backward",
        line: int = 12,
        seq: int | None = None,
        loader: int | None = None,
        tracked: int | None = 3,
    ) -> Program:
        calls = ()
        if in_eval and how:
            calls = (ModeCall(on, how, seq if seq is not None else len(self.events), in_eval, at(line)),)
        n = len(self.roots[0].mode_sensitive)
        self._emit(ModeState, root=0, when=when, training=training, loader=loader, in_eval=in_eval, n_eval=len(in_eval),
                   n_train=n - len(in_eval), calls=calls, batches_tracked=tracked)  # fmt: skip
        return self

    def everything_asleep(self, **fields: Any) -> Program:
        return self.modes("body.drop", "body.norm", "head.drop", training=False, **fields)

    def evaluate(self, *, grad: bool = False, loader: int = 7, batches: int = 2, losses: bool = True) -> Program:
        self.loaders[loader] = Loader(loader, batches=5, at=at(70))
        for _ in range(batches):
            self._emit(BatchFetched, loader=loader, size=8, at=at(70))
            if losses:
                self._emit(LossCall, function="cross_entropy", grad_enabled=grad, input_requires_grad=grad, at=at(72))
        return self

    def dropout(self, module: str = "body.drop", **fields: Any) -> Program:
        fields = {"active": True, "p": 0.1, "root": 0 if module else None, "class_name": "Dropout", **fields}
        self._emit(DropoutCall, module=module, grad_enabled=False, at=at(33), **fields)
        return self


def check(run: Program, **fields: Any) -> list[tuple[str, str]]:
    return [(severity, f.about) for severity, f in findings(wrong_mode, run, boundary=CROSSED, **fields)]


# ---------------------------------------------------------------------------------------------------- training


def test_eval_mode_left_behind_by_an_evaluation() -> None:
    run = Program().modes().train_step(3).evaluate().everything_asleep(line=55).train_step(2)
    severity, finding = only(wrong_mode, run, boundary=CROSSED)
    assert severity == "error"
    assert finding.message.startswith("After the evaluation Net goes on training in eval mode")
    assert "dropout is off in 2 modules (body.drop, head.drop; p=0.1 to 0.5)" in finding.message
    assert "1 norm (body.norm) uses its running statistics of 3 batches so far" in finding.message
    assert "3 backwards ran in train mode, then eval() was called (train.py:55)" in finding.message
    assert finding.at == at(55)
    assert "model.train()" in finding.fix


def test_a_loss_written_by_hand_is_not_seen_but_the_other_data_are() -> None:
    run = Program().modes().train_step(3).evaluate(losses=False).everything_asleep(line=55).train_step(2)
    assert check(run) == [("error", "left-in-eval")]


def test_without_an_evaluation_it_may_be_meant() -> None:
    assert check(Program().modes().train_step(3).everything_asleep().train_step(2)) == [("warning", "left-in-eval")]


def test_modes_that_alternate_are_on_purpose() -> None:
    run = Program().modes().train_step().everything_asleep().train_step().modes().train_step()
    assert check(run) == []
    run = Program().everything_asleep().train_step().modes().train_step().everything_asleep().train_step()
    assert check(run) == []


def test_from_pretrained_and_no_train() -> None:
    run = Program(origin="model.safetensors").everything_asleep(how="library", line=14).train_step(3)
    severity, finding = only(wrong_mode, run, boundary=CROSSED)
    assert severity == "error"
    assert "Net trains in eval mode, at every watched backward" in finding.message
    assert "(Net, train.py:14), as from_pretrained does" in finding.message
    assert finding.evidence["set_by"] == "library"


def test_only_a_part_came_in_eval_mode() -> None:
    run = Program().modes("body.drop", "body.norm", how="library", on="Body").train_step(3)
    _, finding = only(wrong_mode, run, boundary=CROSSED)
    assert finding.message.startswith("Parts of Net train in eval mode")


def test_an_evaluation_before_the_training_left_it_so() -> None:
    run = Program().evaluate().everything_asleep(seq=0).train_step(3)
    assert check(run) == [("error", "trained-in-eval")]


def test_the_program_put_it_in_eval_itself() -> None:
    assert check(Program().everything_asleep().train_step(3)) == [("warning", "trained-in-eval")]
    assert check(Program().everything_asleep(how="").train_step(3)) == [("warning", "trained-in-eval")]


def test_running_statistics_of_a_checkpoint_are_kept_on_purpose() -> None:
    run = Program(origin="model.pt")
    run.roots[0] = dataclasses.replace(run.roots[0], mode_sensitive=(NORM,))
    assert check(run.modes("body.norm", training=False).train_step(3)) == []
    run = Program()
    run.roots[0] = dataclasses.replace(run.roots[0], mode_sensitive=(NORM,))
    assert check(run.modes("body.norm", training=False, tracked=0).train_step(3)) == [("warning", "trained-in-eval")]


def test_what_is_meant() -> None:
    frozen = Program(frozen=["body"]).modes("body.drop", "body.norm", on="Body", how="library")
    assert check(frozen.train_step(3)) == []
    norms = Program().modes("body.norm", on="BatchNorm1d")
    assert check(norms.train_step(3)) == []
    norms_later = Program().modes().train_step(3).modes("body.norm", on="Body").train_step(2)
    assert check(norms_later) == []
    single = Program().modes("body.drop", on="Dropout")
    assert check(single.train_step(3)) == []
    override = Program().modes("body.drop", "body.norm", how="override")
    assert check(override.train_step(3)) == []


def test_a_model_that_nothing_trains() -> None:
    run = Program()
    teacher = run.module("Teacher", {"w": (4, 4)}, mode_sensitive=(ModeSensitive("drop", "Dropout", "dropout", 0.1),))
    run._emit(ModeState, root=1, when="backward", training=False, in_eval=("drop",), n_eval=1)
    assert teacher
    assert check(run.modes().train_step(3)) == []


# -------------------------------------------------------------------------------------------------- evaluation


def validated(
    *, training: bool = True, tracked: tuple[int, int] = (3, 3), drops: bool = True, **fields: Any
) -> Program:
    run = Program().modes().train_step(3)
    asleep = () if training else ("body.drop", "body.norm", "head.drop")
    run.modes(*asleep, training=training, when="batch", loader=7, tracked=tracked[0])
    if drops:
        run._emit(BatchFetched, loader=7, size=8, at=at(70))
        run.dropout()
    run.evaluate(**fields)
    return run.modes(*asleep, training=training, when="batch", loader=7, tracked=tracked[1])


def test_an_evaluation_in_train_mode() -> None:
    severity, finding = only(wrong_mode, validated(tracked=(3, 5)), boundary=CROSSED)
    assert severity == "error"
    assert "Net is evaluated in train mode: over 3 batches of the DataLoader opened at train.py:70" in finding.message
    assert "dropout dropped in 1 module (body.drop; p=0.1)" in finding.message
    assert "(3 updates before, 5 after)" in finding.message
    assert "Nothing called eval()" in finding.message
    assert finding.at == at(72)


def test_without_a_loss_it_is_a_warning() -> None:
    assert check(validated(losses=False)) == [("warning", "evaluated-in-train")]


def test_train_was_called_for_it() -> None:
    def explicit(losses: bool) -> Program:
        run = Program().modes().train_step(3)
        run._emit(ModeChanged, root=0, training=True, class_name="Net", at=at(66))
        run.modes(when="batch", loader=7).evaluate(batches=1, losses=losses).dropout().evaluate(losses=losses)
        return run

    severity, finding = only(wrong_mode, explicit(True), boundary=CROSSED)
    assert severity == "warning"
    assert "train() was called before it (train.py:66)" in finding.message
    assert check(explicit(False)) == []


def test_statistics_made_anew() -> None:
    assert check(validated(tracked=(0, 2), drops=False, losses=False)) == []


def test_single_modules_switched_on_under_a_model_in_eval() -> None:
    run = Program().modes().train_step(3)
    run.modes("body.norm", training=False, when="batch", loader=7).evaluate(batches=1).dropout().evaluate()
    assert check(run) == []


def test_a_loader_beside_the_training_is_no_evaluation() -> None:
    run = Program().modes()
    for _ in range(3):
        run.modes(when="batch", loader=7).evaluate(batches=1).dropout()
        run.train_step()
    assert check(run) == []


def test_dropout_without_training() -> None:
    call = {"class_name": "Net", "by_default": True, "owner_training": False, "p": 0.4}
    run = Program().modes().train_step(3)
    run.everything_asleep(when="batch", loader=7).evaluate(batches=1).dropout("", **call).evaluate()
    severity, finding = only(wrong_mode, run, boundary=CROSSED)
    assert (severity, finding.at) == ("error", at(33))
    assert "dropout (train.py:33, p=0.4) drops in eval mode too" in finding.message
    written_out = Program().modes().train_step(3)
    written_out.everything_asleep(when="batch", loader=7).evaluate(batches=1).dropout(
        "", **{**call, "by_default": False}
    )
    assert check(written_out.evaluate()) == []


def test_gradients_in_an_evaluation_cost_memory() -> None:
    run = Program().modes().train_step(3).everything_asleep(when="batch", loader=7).evaluate(grad=True)
    assert check(run) == [("info", "evaluated-with-gradients")]


def test_what_could_not_be_seen() -> None:
    with pytest.raises(NotObserved, match="no backward"):
        findings(wrong_mode, Program())
    with pytest.raises(NotObserved, match="no evaluation"):
        findings(wrong_mode, Program().modes().train_step(3))
    assert check(Program().modes().train_step(3)) == []
    plain = Program()
    plain.roots[0] = dataclasses.replace(plain.roots[0], mode_sensitive=())
    with pytest.raises(NotApplicable):
        findings(wrong_mode, plain.train_step(3))
