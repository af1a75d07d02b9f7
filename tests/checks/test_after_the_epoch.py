"""TL201 and TL202 over the first steps of the next epoch."""

from __future__ import annotations

import dataclasses

from trainlint.checks.optimizer.frozen_but_optimized import frozen_but_optimized
from trainlint.checks.optimizer.params_not_in_optimizer import params_not_in_optimizer

from tests.checks.judging import findings, only
from tests.support.build import Run
from tests.support.epochs import Crossed

NET = {"body.weight": (8, 8), "head.weight": (4, 8)}


def head_only() -> tuple[Run, list[int], int]:
    run = Run()
    net = run.module("Net", NET, frozen=("body",))
    adam = run.optimizer("AdamW", net[1:])
    run.loader()
    for _ in range(3):
        run.batch().backward().step(adam)
    return run, net, adam


def test_unfrozen_and_in_no_group() -> None:
    run, net, adam = head_only()
    crossed = Crossed(run)
    run.change(net[:1], requires_grad=True)
    crossed.next_epoch()
    for _ in range(2):
        run.batch().backward().step(adam)
    run.unheld(net[:1], gradient=0.25)
    severity, finding = only(params_not_in_optimizer, crossed)
    assert severity == "error"
    assert "unfrozen at the end of the epoch: body.weight" in finding.message
    assert "norm 0.25" in finding.message
    assert "first 2 steps" in finding.message
    assert "add_param_group" in finding.fix


def test_unfrozen_and_added_to_the_optimizer() -> None:
    run, net, adam = head_only()
    crossed = Crossed(run)
    run.change(net[:1], requires_grad=True)
    group = dataclasses.replace(run.optimizers[adam].groups[0], index=1, parameters=(net[0],))
    run.optimizers[adam] = dataclasses.replace(run.optimizers[adam], groups=(*run.optimizers[adam].groups, group))
    crossed.next_epoch()
    for _ in range(2):
        run.batch().backward().step(adam)
    assert findings(params_not_in_optimizer, crossed) == []


def test_unfrozen_and_moved_by_hand() -> None:
    run, net, adam = head_only()
    crossed = Crossed(run)
    run.change(net[:1], requires_grad=True)
    crossed.next_epoch()
    run.batch().backward().step(adam)
    run.unheld(net[:1], moved=True)
    assert findings(params_not_in_optimizer, crossed) == []


def test_unfrozen_when_no_next_epoch_was_seen() -> None:
    run, net, _ = head_only()
    crossed = Crossed(run, outcome="ended")
    run.change(net[:1], requires_grad=True).unheld(net[:1])
    assert findings(params_not_in_optimizer, crossed) == []


def both() -> tuple[Run, list[int], int]:
    run = Run()
    net = run.module("Net", NET)
    sgd = run.optimizer("SGD", net, hyper={"momentum": 0.9, "dampening": 0, "nesterov": False})
    run.loader()
    for _ in range(3):
        run.batch().backward().step(sgd, gradient=2.0)
    return run, net, sgd


def test_frozen_and_moved_on() -> None:
    run, net, sgd = both()
    crossed = Crossed(run)
    run.change(net[:1], requires_grad=False)
    crossed.next_epoch()
    for _ in range(2):
        run.batch().backward().step(sgd, gradient={net[0]: 0.0, net[1]: 1.0}, frozen=net[:1])
    severity, finding = only(frozen_but_optimized, crossed)
    assert severity == "error"
    assert "frozen at the end of the epoch" in finding.message
    assert "in 2 steps" in finding.message
    assert "momentum=0.9" in finding.message


def test_frozen_and_still() -> None:
    run, net, sgd = both()
    crossed = Crossed(run)
    run.change(net[:1], requires_grad=False)
    crossed.next_epoch()
    for _ in range(2):
        run.batch().backward().step(sgd, gradient={net[0]: None, net[1]: 1.0}, moved=net[1:], frozen=net[:1])
    assert findings(frozen_but_optimized, crossed) == []


def test_what_the_watch_shows_is_reported_once() -> None:
    run, net, sgd = both()
    run.change(net[:1], requires_grad_later=False)
    for _ in range(2):
        run.batch().backward().step(sgd, gradient={net[0]: 0.0, net[1]: 1.0}, frozen=net[:1])
    crossed = Crossed(run).next_epoch()
    run.batch().backward().step(sgd, gradient={net[0]: 0.0, net[1]: 1.0}, frozen=net[:1])
    assert "at the end of the epoch" not in only(frozen_but_optimized, crossed)[1].message
