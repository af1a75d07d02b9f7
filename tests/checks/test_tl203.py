"""TL203: an optimizer that holds tensors which are not the model's."""

from __future__ import annotations

import pytest
from trainlint.checks.optimizer.stale_optimizer import stale_optimizer as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved

NET = {"body.weight": (8, 8), "body.bias": (8,), "head.weight": (5, 8), "head.bias": (5,)}


def test_every_tensor_was_replaced() -> None:
    run = Run()
    net = run.module("Net", NET)
    adam = run.optimizer("Adam", [run.tensor((8, 8)), run.tensor((8,))])
    run.backward().step(adam, gradient=None, moved=False).unheld(net)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "nothing but 2 tensors" in finding.message
    assert finding.evidence["tensors"] == 4


def test_a_flattened_model() -> None:
    run = Run()
    flat = run.module("Net", {"_flat_param": (117,)}, wrappers=("FullyShardedDataParallel",))
    adam = run.optimizer("Adam", [run.tensor(shape) for shape in NET.values()])
    run.backward().step(adam, gradient=None, moved=False).unheld(flat)
    _, finding = only(check, run)
    assert "use_orig_params" in finding.fix


def test_a_head_of_another_size() -> None:
    run = Run()
    net = run.module("Net", NET)
    old = [run.tensor((10, 8)), run.tensor((10,))]
    adam = run.optimizer("Adam", [*net[:2], *old])
    run.backward().step(adam, gradient={net[0]: 1.0, net[1]: 1.0}).unheld(net[2:])
    severity, finding = only(check, run)
    assert severity == "error"
    assert "(10, 8) before, (5, 8) now" in finding.message
    assert "head.*" in finding.message


def test_a_module_that_lives_on_beside_its_copy() -> None:
    run = Run()
    old = run.module("Net", NET)
    new = run.module("Net", NET)
    sgd = run.optimizer("SGD", old)
    run.backward().step(sgd, gradient=None, moved=False).unheld(new)
    _, finding = only(check, run)
    assert "another Net" in finding.message


def test_a_learned_tensor_outside_of_modules() -> None:
    run = Run()
    net = run.module("Net", NET)
    alpha = run.tensor((1,))
    adam = run.optimizer("Adam", [*net, alpha])
    run.backward().step(adam)
    assert findings(check, run) == []


def test_a_tensor_whose_turn_has_not_come() -> None:
    run = Run()
    net = run.module("Net", NET)
    late = run.tensor((12,))
    adam = run.optimizer("Adam", [*net[:2], late])
    run.backward().step(adam, gradient={net[0]: 1.0, net[1]: 1.0}).unheld(net[2:])
    assert findings(check, run) == []  # the head was forgotten, not replaced: TL201


def test_master_copies() -> None:
    run = Run()
    net = run.module("Net", NET, dtype="bfloat16")
    masters = [run.tensor(shape) for shape in NET.values()]
    adam = run.optimizer("Adam", masters)
    run.backward().step(adam).unheld(net)
    assert findings(check, run) == []


def test_copies_that_an_optimizer_moves_without_gradients() -> None:
    run = Run()
    net = run.module("Net", NET)
    copies = [run.tensor(shape) for shape in NET.values()]
    own = run.optimizer("Evolution", copies)
    run.backward().step(own, gradient=None, moved=copies).unheld(net)
    assert findings(check, run) == []


def test_an_old_head_beside_the_new_one_in_a_group_of_its_own() -> None:
    run = Run()
    net = run.module("Net", NET)
    old = [run.tensor((10, 8)), run.tensor((10,))]
    adam = run.optimizer("Adam", [*net[:2], *old], net[2:])
    run.backward().step(adam, gradient=dict.fromkeys(net, 1.0))
    assert findings(check, run) == []


def test_shared_gradients_copied_to_the_module_that_is_stepped() -> None:
    run = Run()
    shared = run.module("Net", NET)
    local = run.module("Net", NET)
    adam = run.optimizer("Adam", shared)
    run.backward().step(adam).unheld(local)
    assert findings(check, run) == []


def test_nothing_to_look_at() -> None:
    with pytest.raises(NotApplicable):
        findings(check, Run())
    run = Run()
    run.optimizer("Adam", run.module("Net", NET))
    with pytest.raises(NotObserved):
        findings(check, run)
