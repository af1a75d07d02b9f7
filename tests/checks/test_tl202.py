"""TL202 frozen-but-optimized."""

from __future__ import annotations

import pytest
from trainlint.checks.optimizer.frozen_but_optimized import frozen_but_optimized as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotObserved

NET = {"body.weight": (8, 8), "head.weight": (4, 8)}


def test_decay_over_zeroed_gradients_moves_a_frozen_layer() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("AdamW", net)
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: 0.0, net[1]: 1.0}, frozen=net[:1], update=0.01)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "body.weight" in finding.message
    assert "weight_decay=0.01" in finding.message
    assert finding.evidence["drift"]["body.weight"] == pytest.approx(0.01 * 3**0.5)


def test_frozen_in_the_middle_of_the_watch() -> None:
    run = Run()
    net = run.module("Net", NET)
    sgd = run.optimizer("SGD", net, hyper={"momentum": 0.9, "dampening": 0, "nesterov": False})
    run.backward().step(sgd, gradient=2.0)
    for _ in range(2):
        run.backward().step(sgd, gradient={net[0]: 0.0, net[1]: 1.0}, frozen=net[:1])
    run.change(net[:1], requires_grad_later=False)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "momentum=0.9" in finding.message


def test_adamw_over_all_parameters_of_a_partly_frozen_model_is_harmless() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("AdamW", net)
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: None, net[1]: 1.0}, moved=[net[1]], frozen=net[:1])
    assert findings(check, run) == []


def test_evolution_strategies_fill_gradients_by_hand() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body", "head"))
    adam = run.optimizer("Adam", net)
    for norm in (1.0, 1.3, 0.9):
        run.step(adam, gradient=norm, frozen=net)
    assert findings(check, run) == []


def test_toggled_optimizers_move_only_what_is_trainable_at_their_own_step() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    for _ in range(3):
        run.backward().step(opt_g).backward().step(opt_d)
    # As left by the last toggle: the generator frozen while the discriminator stepped.
    run.change(g, requires_grad_later=False)
    assert findings(check, run) == []


def test_it_will_move_once_the_rate_leaves_zero() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("AdamW", net, lr=0.0)
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: 0.0, net[1]: 1.0}, moved=[], frozen=net[:1])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "once the rate rises" in finding.message


def test_unfrozen_later_is_trained() -> None:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("AdamW", net)
    for _ in range(3):
        run.backward().step(adam)
    run.change(net[:1], requires_grad_later=True)
    assert findings(check, run) == []


def test_without_measurements_it_is_not_observed() -> None:
    run = Run()
    run.optimizer("Adam", run.module("Net", NET))
    with pytest.raises(NotObserved):
        findings(check, run)
