"""TL602 over recordings built by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.finetuning.one_lr_for_pretrained_and_new import one_lr_for_pretrained_and_new

from tests.support.build import Run, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import AdaptedModel, Adapters, Provenance, WeightLoad

FILE = "/data/bert.pt"
BODY = {f"body.layer.{i}.weight": (64, 64) for i in range(4)}
HEAD = {"head.weight": (3, 64)}
DECODER = {f"decoder.{i}.weight": (64, 64) for i in range(4)}


def loaded(**fields: Any) -> dict[str, Any]:
    return {"provenance": Provenance(loads=(WeightLoad(FILE, root=0, **fields),))}


def run_of(tensors: Mapping[str, tuple[int, ...]], lr: float, *, relative: float = 1e-3, **module: Any) -> Run:
    """One optimizer over everything; a step moves each tensor by ``relative`` of its norm."""
    run = Run()
    net = run.module("Net", tensors, origin={"body": FILE}, **module)
    adam = run.optimizer("AdamW", net, lr=lr)
    for _ in range(3):
        run.batch().backward().step(adam, update=relative * 64)
    return run


def test_a_rate_that_undoes_the_pretraining() -> None:
    severity, finding = only(one_lr_for_pretrained_and_new, run_of({**BODY, **HEAD}, 1e-3, relative=0.02), **loaded())
    assert severity == "warning"
    assert "0.001" in finding.message and "2%" in finding.message and "bert.pt" in finding.message
    assert '"lr": 0.0001' in finding.fix and 'n.startswith("head.weight")' in finding.fix
    assert "model.body.layer" in finding.fix
    assert finding.evidence["relative_step"] == pytest.approx(0.02)


def test_a_fresh_decoder_at_the_rate_of_the_encoder() -> None:
    severity, finding = only(one_lr_for_pretrained_and_new, run_of({**BODY, **DECODER}, 2e-5), **loaded())
    assert severity == "warning"
    assert "decoder.*" in finding.message and "50%" in finding.message
    assert '"lr": 2e-5' in finding.fix and '"lr": 0.0002' in finding.fix


def test_the_step_is_scaled_to_the_peak_of_a_warm_up() -> None:
    run = Run()
    net = run.module("Net", {**BODY, **HEAD}, origin={"body": FILE})
    adam = run.optimizer("AdamW", net, lr=1e-3)
    warm = run.scheduler(adam, linear(10, 100), 100)
    for _ in range(3):
        run.batch().backward().step(adam, update=1e-3 * 64 * run.rates[adam][0] / 1e-4).sched(warm)
    severity, finding = only(one_lr_for_pretrained_and_new, run, **loaded())
    assert severity == "warning"
    assert finding.evidence["relative_step"] == pytest.approx(0.01)


def test_a_middling_part_is_information() -> None:
    tensors = {**BODY, "head.weight": (20, 64)}
    assert only(one_lr_for_pretrained_and_new, run_of(tensors, 2e-5), **loaded())[0] == "info"


def test_a_small_head_at_a_small_rate() -> None:
    assert not findings(one_lr_for_pretrained_and_new, run_of({**BODY, **HEAD}, 2e-5), **loaded())


def test_rates_of_their_own() -> None:
    run = Run()
    net = run.module("Net", {**BODY, **HEAD}, origin={"body": FILE})
    adam = run.optimizer("AdamW", net[:4], net[4:], lr=[1e-4, 1e-3])
    run.batch().backward().step(adam, update=2.0)
    assert not findings(one_lr_for_pretrained_and_new, run, **loaded())


def test_layer_wise_rates() -> None:
    run = Run()
    net = run.module("Net", {**BODY, **HEAD}, origin={"body": FILE})
    adam = run.optimizer("AdamW", *([i] for i in net), lr=[1e-4, 2e-4, 5e-4, 1e-3, 1e-3])
    run.batch().backward().step(adam, update=2.0)
    assert not findings(one_lr_for_pretrained_and_new, run, **loaded())


def test_decay_groups_are_no_rates_of_their_own() -> None:
    run = Run()
    net = run.module("Net", {**BODY, "body.bias": (64,), **HEAD}, origin={"body": FILE})
    adam = run.optimizer("AdamW", [n for n in net if n != 4], [4], lr=1e-3)
    run.batch().backward().step(adam, update=2.0)
    finding = only(one_lr_for_pretrained_and_new, run, **loaded())[1]
    assert "2 groups" in finding.message and len(finding.evidence["groups"]) == 2


def test_adapters_on_a_frozen_base() -> None:
    tensors = {**BODY, "body.bias": (64,), **DECODER}
    run = Run()
    net = run.module("Net", tensors, origin={"body": FILE}, frozen=("body.layer",))
    adam = run.optimizer("AdamW", net[4:], lr=1e-3)
    run.batch().backward().step(adam, update=2.0)
    assert not findings(one_lr_for_pretrained_and_new, run, **loaded())


def test_a_resumed_run() -> None:
    assert not findings(
        one_lr_for_pretrained_and_new, run_of({**BODY, **DECODER}, 1e-3, relative=0.05), **loaded(resumed=True)
    )


def test_two_models_of_one_optimizer() -> None:
    run = Run()
    generator = run.module("Generator", BODY, origin=FILE)
    critic = run.module("Critic", DECODER)
    adam = run.optimizer("Adam", [*generator, *critic], lr=1e-3)
    run.batch().backward().step(adam, update=2.0)
    assert not findings(one_lr_for_pretrained_and_new, run, **loaded())


def test_nothing_to_compare() -> None:
    with pytest.raises(NotApplicable):
        findings(one_lr_for_pretrained_and_new, run_of({**BODY, **HEAD}, 1e-3))
    run = Run()
    run.optimizer("AdamW", run.module("Net", BODY, origin=FILE))
    with pytest.raises(NotObserved):
        findings(one_lr_for_pretrained_and_new, run, **loaded())


def test_adapters_are_no_fresh_part() -> None:
    factors = {f"body.layer.{i}.lora_{which}": (8, 64) for i in range(4) for which in "AB"}
    run = run_of({**BODY, **factors}, 2e-5)
    run.change(range(4, 12), origin="fresh")
    assert only(one_lr_for_pretrained_and_new, run, **loaded())[0] == "warning"
    adapted = AdaptedModel(root=0, library="peft", parameters=tuple(range(4, 12)))
    assert not findings(one_lr_for_pretrained_and_new, run, adapters=Adapters(models=(adapted,)), **loaded())
