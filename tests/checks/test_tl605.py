"""TL605 trained-modules-not-saved."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.finetuning.trained_modules_not_saved import trained_modules_not_saved as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import AdaptedModel, Adapters, Save

TENSORS = {"base.weight": (8, 8), "lora.a": (2, 8), "lora.b": (8, 2), "classifier.weight": (2, 8)}


def peft(*, trained: tuple[str, ...] = ("lora", "classifier"), saves: tuple[Save, ...] = (), **fields: Any) -> Run:
    run = Run()
    net = run.module("PeftModel", TENSORS, frozen=[n for n in TENSORS if not n.startswith(trained or ("\0",))])
    adam = run.optimizer("AdamW", [i for i in net if run.parameters[i].requires_grad])
    for _ in range(3):
        run.backward().step(adam)
    given = {"saved": (1, 2), "inference_mode": False, **fields}
    model = AdaptedModel(root=0, class_name="PeftModel", library="peft", method="LORA", parameters=(1, 2),
                         members=tuple(net), **given)  # fmt: skip
    run.fields["adapters"] = Adapters(models=(model,), saves=saves)
    return run


def test_a_head_outside_modules_to_save_under_the_trainer() -> None:
    severity, finding = only(check, peft().framework("transformers").framework("peft"))
    assert severity == "error"
    assert "1 tensor moved in the watched steps and would not be in the adapter file" in finding.message
    assert "classifier.weight" in finding.message
    assert "Put classifier into modules_to_save" in finding.fix


def test_where_it_is_not_known_how_the_program_saves() -> None:
    assert only(check, peft())[0] == "warning"
    assert findings(check, peft().framework("lightning")) == []
    assert findings(check, peft(saved=(1, 2, 3))) == []
    assert findings(check, peft(trained=("lora",))) == []
    assert findings(check, peft(trained=("lora",), saved=())) == [], "prompts are saved as what they are turned into"
    assert findings(check, peft(saved=None, not_saved_because="sharded")) == []


def test_a_base_that_trains_below_its_adapters_is_left_to_tl604() -> None:
    assert findings(check, peft(trained=("base", "lora"), adapted_weights=(0,))) == []


def test_a_file_with_everything_was_seen() -> None:
    whole = Save("torch.save", "m.pt", (0, 1, 2, 3))
    adapters = Save("safetensors.save_file", "a.safetensors", (1, 2))
    assert findings(check, peft(saves=(whole,))) == []
    assert only(check, peft(saves=(adapters,)))[0] == "error"


def test_norms_of_the_base_that_drift() -> None:
    severity, finding = only(check, peft(trained=("lora",), drifting_norms=("base.bn1", "base.bn2")))
    assert severity == "warning"
    assert "running statistics of 2 norms" in finding.message


def test_an_adapter_loaded_for_inference() -> None:
    severity, finding = only(check, peft(trained=("classifier",), inference_mode=True, saved=(1, 2)))
    assert severity == "warning"
    assert "is_trainable=True" in finding.fix
    dead = Run()
    dead.module("PeftModel", TENSORS, frozen=("base", "lora", "classifier"))
    model = AdaptedModel(root=0, class_name="PeftModel", library="peft", method="LORA", parameters=(1, 2),
                         members=(0, 1, 2, 3), inference_mode=True)  # fmt: skip
    dead.fields["adapters"] = Adapters(models=(model,))
    severity, finding = only(check, dead)
    assert severity == "error"
    assert "nothing in this run can train" in finding.message


def test_a_frozen_reference_beside_the_model_that_trains() -> None:
    run = peft(trained=("classifier",), inference_mode=True)
    other = run.module("Student", {"fc.weight": (4, 4)})
    run.optimizers.clear()
    run.measured.clear()
    adam = run.optimizer("AdamW", other)
    run.step(adam)
    assert findings(check, run) == []


def plain(*saves: Save, tensors: tuple[str, ...] = ("encoder.weight", "head.weight")) -> Run:
    run = Run()
    net = run.module("Net", dict.fromkeys(tensors, (4, 4)))
    adam = run.optimizer("AdamW", net)
    for _ in range(3):
        run.backward().step(adam)
    run.fields["adapters"] = Adapters(saves=saves)
    return run


def test_a_checkpoint_without_the_head() -> None:
    severity, finding = only(check, plain(Save("torch.save", "last.pt", (0,), True, at(30))))
    assert severity == "warning"
    assert "torch.save at train.py:30 saves 1 tensor of the 2 that the optimizer moves" in finding.message
    assert "head.weight" in finding.message


def test_all_files_count_together() -> None:
    assert findings(check, plain(Save("torch.save", "a.pt", (0,)), Save("torch.save", "b.pt", (1,)))) == []


def test_parts_that_serve_the_training_only() -> None:
    names = ("encoder.weight", "projector.weight")
    assert findings(check, plain(Save("torch.save", "e.pt", (0,)), tensors=names)) == []
    assert only(check, plain(Save("torch.save", "e.pt", (0,), True), tensors=names))[0] == "warning"


def test_a_root_that_nobody_saves_is_not_judged() -> None:
    run = plain(Save("torch.save", "generator.pt", (0, 1)))
    critic = run.module("Critic", {"fc.weight": (4, 4)})
    run.step(run.optimizer("Adam", critic))
    assert findings(check, run) == []


def test_nothing_to_judge() -> None:
    with pytest.raises(NotObserved):
        findings(check, Run())
    with pytest.raises(NotApplicable):
        findings(check, plain())
