"""TL201 params-not-in-optimizer."""

from __future__ import annotations

import pytest
from trainlint.checks.optimizer.params_not_in_optimizer import params_not_in_optimizer as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from tests.support.epochs import Crossed
from trainlint.contract import NotApplicable, NotObserved

NET = {"body.weight": (8, 8), "body.bias": (8,), "head.weight": (4, 8), "head.bias": (4,)}


def trained(held: slice, **module: object) -> tuple[Run, list[int], int]:
    run = Run()
    net = run.module("Net", NET, **module)  # type: ignore[arg-type]
    adam = run.optimizer("AdamW", net[held])
    for _ in range(3):
        run.backward().step(adam).zero(adam)
    return run, net, adam


def test_a_forgotten_head_is_an_error() -> None:
    run, net, _ = trained(slice(0, 2))
    run.unheld(net[2:], gradient=0.42)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "head.*: 2 tensors, 33% of the trainable weights" in finding.message
    assert "norm 0.42" in finding.message
    assert "3 steps of AdamW (train.py:5)" in finding.message
    assert finding.evidence["tensors"] == 2


@pytest.mark.parametrize(
    ("gradient", "moved"),
    [(0.5, True), (None, False), (0.0, False), (0.5, None)],
    ids=["moves anyway", "no gradient", "zero gradient", "not looked at"],
)
def test_without_gradient_or_standstill_nothing_is_proven(gradient: float | None, moved: bool | None) -> None:
    run, net, _ = trained(slice(0, 2))
    run.unheld(net[2:], gradient=gradient, moved=moved)
    assert findings(check, run) == []


def test_frozen_parameters_are_left_out_rightly() -> None:
    run, net, _ = trained(slice(0, 2), frozen=("head",))
    run.unheld(net[2:])
    assert findings(check, run) == []


def test_a_pretrained_backbone_left_out_as_a_whole_may_be_meant() -> None:
    run, net, _ = trained(slice(2, 4), origin={"body": "/ckpt.pt"})
    run.unheld(net[:2])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "requires_grad_(False)" in finding.fix


def test_pretrained_weights_split_within_a_layer_are_not_meant() -> None:
    run = Run()
    net = run.module("Net", NET, origin="/ckpt.pt")
    adam = run.optimizer("AdamW", [net[0], net[2]])
    run.backward().step(adam)
    run.unheld([net[1], net[3]])
    assert only(check, run)[0] == "error"


def test_each_model_of_a_gan_in_its_own_optimizer() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    for _ in range(3):
        run.backward().step(opt_d).backward().step(opt_g)
    assert findings(check, run) == []


def test_an_optimizer_that_has_not_stepped_yet_holds_too() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g = run.optimizer("Adam", g)
    run.optimizer("Adam", d)
    run.backward().step(opt_g).unheld(d)
    assert findings(check, run) == []


def test_style_transfer_optimizes_a_tensor_of_no_module() -> None:
    run = Run()
    vgg = run.module("VGG", NET)
    image = run.tensor((1, 3, 8, 8))
    adam = run.optimizer("Adam", [image])
    run.backward().step(adam).unheld(vgg)
    assert findings(check, run) == []


def test_master_weights_that_have_not_shown_in_the_model_yet() -> None:
    run = Run()
    net = run.module("Net", NET, dtype="bfloat16")
    masters = [run.tensor(shape) for shape in NET.values()]
    adam = run.optimizer("Adam", masters)
    run.backward().step(adam).unheld(net)
    assert findings(check, run) == []


def test_what_an_optimizer_holds_outdated_twins_of_is_the_other_check_s() -> None:
    run = Run()
    net = run.module("Net", NET)
    old = run.tensor((10, 8))
    adam = run.optimizer("Adam", [*net[:2], old])
    run.backward().step(adam, gradient={net[0]: 1.0, net[1]: 1.0, old: None}).unheld(net[2:])
    assert findings(check, run) == []


def test_nothing_to_train() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("Adam", net[:2])
    run.backward().step(adam, gradient=None, moved=False).unheld(net[2:])
    severity, finding = only(check, run)
    assert severity == "error"
    assert "trains nothing" in finding.message
    assert "head.*" in finding.message


def test_an_empty_optimizer() -> None:
    run = Run()
    net = run.module("Net", NET)
    adam = run.optimizer("Adam", [])
    run.backward().step(adam).unheld(net)
    assert "param groups are empty" in only(check, run)[1].message


def test_gradients_written_by_hand_on_frozen_weights_train_something() -> None:
    run, _, _ = trained(slice(0, 4), frozen=("body", "head"))
    assert findings(check, run) == []


def test_a_loss_head_of_its_own_is_a_warning() -> None:
    run, _, _ = trained(slice(0, 4))
    head = run.module("ArcFace", {"weight": (16, 10)})
    run.unheld(head)
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "ArcFace" in finding.message


@pytest.mark.parametrize("kind", ["eval mode", "pretrained", "teacher copy"])
def test_fixed_networks_beside_the_trained_one(kind: str) -> None:
    run, _, _ = trained(slice(0, 4))
    tensors = NET if kind == "teacher copy" else {"features.weight": (3, 3)}
    other = run.module(
        "Other", tensors, training=kind != "eval mode", origin="/vgg.pt" if kind == "pretrained" else "fresh"
    )
    run.unheld(other)
    assert findings(check, run) == []


def test_layers_in_a_plain_list_are_one_error() -> None:
    run, _, _ = trained(slice(0, 4))
    for i in range(3):
        run.unheld(run.module("Linear", {"weight": (8, 8)}, unregistered_in=f"Net.layers[{i}]"))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "Net.layers[0], Net.layers[1], Net.layers[2]" in finding.message
    assert "ModuleList" in finding.fix


def test_frameworks_speak_their_own_words() -> None:
    run, net, _ = trained(slice(0, 2))
    run.framework("lightning").unheld(net[2:])
    assert "configure_optimizers" in only(check, run)[1].fix


def test_without_an_optimizer_it_does_not_apply() -> None:
    run = Run()
    run.module("Net", NET)
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_without_a_step_it_is_not_observed() -> None:
    run = Run()
    run.optimizer("Adam", run.module("Net", NET))
    with pytest.raises(NotObserved):
        findings(check, run)


def test_what_is_unfrozen_in_stages_is_held_from_the_next_epoch_on() -> None:
    run = Run()
    ids = run.module("Net", {"body.0.weight": (4, 4), "body.1.weight": (4, 4), "head.weight": (2, 4)})
    adam = run.optimizer("AdamW", ids[2:])
    run.batch().backward().step(adam).unheld(ids[:2])
    assert findings(check, run)
    crossed = Crossed(run).next_epoch()
    whole = run.optimizer("AdamW", ids[:2])
    run.batch().backward().step(adam).step(whole)
    assert not list(check(crossed.recording()))
