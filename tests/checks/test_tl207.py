"""TL207: weight decay on norms and biases, and splits that miss them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from trainlint.checks.optimizer.decay_on_wrong_parameters import decay_on_wrong_parameters as check

from tests.checks.judging import findings, only
from tests.support.build import ADAM, SGD, Run
from trainlint.contract import NotApplicable, NotObserved

NET = {
    "embed.weight": (30, 8),
    "a.norm.weight": (8,),
    "a.norm.bias": (8,),
    "a.fc.weight": (8, 8),
    "a.fc.bias": (8,),
    "b.norm.weight": (8,),
    "b.norm.bias": (8,),
    "b.fc.weight": (8, 8),
    "b.fc.bias": (8,),
}
KINDS = {"embed.weight": "embedding", **{n: "norm" for n in NET if "norm" in n}}


def _net(run: Run) -> dict[str, int]:
    ids = dict(zip(NET, run.module("Net", NET), strict=True))
    for name, i in ids.items():
        kind = KINDS.get(name, "bias" if name.endswith("bias") else "weight")
        run.change([i], kind=kind)
    return ids


def _grouped(run: Run, *groups: tuple[list[int], float], class_name: str = "AdamW", **fields: Any) -> int:
    own = SGD if class_name == "SGD" else ADAM
    fields.setdefault("defined_in", f"torch.optim.{class_name.lower()}")
    number = run.optimizer(class_name, *[ids for ids, _ in groups], hyper=own, **fields)
    made = run.optimizers[number]
    changed = tuple(
        dataclasses.replace(g, hyperparameters={**g.hyperparameters, "weight_decay": decay})
        for g, (_, decay) in zip(made.groups, groups, strict=True)
    )
    run.optimizers[number] = dataclasses.replace(made, groups=changed)
    return number


def _split(free: list[str], decay: float = 0.1) -> Run:
    run = Run()
    net = _net(run)
    adam = _grouped(run, ([i for n, i in net.items() if n not in free], decay), ([net[n] for n in free], 0.0))
    run.backward().step(adam)
    return run


def test_biases_are_spared_and_norms_are_not() -> None:
    severity, finding = only(check, _split([n for n in NET if n.endswith("bias")]))
    assert severity == "warning"
    assert "a.norm.weight" in finding.message and "no norm" in finding.message


def test_some_norms_are_missed() -> None:
    free = [n for n in NET if n.startswith("a.norm") or n.endswith("bias")]
    _, finding = only(check, _split(free))
    assert "misses b.norm.weight" in finding.message


def test_the_group_without_decay_is_empty() -> None:
    severity, finding = only(check, _split([]))
    assert severity == "warning"
    assert "is empty" in finding.message


def test_the_group_with_decay_is_empty() -> None:
    severity, finding = only(check, _split(list(NET)))
    assert severity == "warning"
    assert "nothing is decayed" in finding.message


@pytest.mark.parametrize(
    "free",
    [
        [n for n in NET if "norm" in n or n.endswith("bias")],
        [n for n in NET if "norm" in n or n.endswith("bias") or n.startswith("embed")],
        [n for n in NET if "norm" in n],
        ["a.fc.weight", "a.fc.bias"],
        ["embed.weight"],
    ],
)
def test_splits_that_are_what_they_seem(free: list[str]) -> None:
    assert findings(check, _split(free)) == []


def test_only_biases_train() -> None:
    run = Run()
    net = _net(run)
    run.change([i for n, i in net.items() if not n.endswith("bias")], requires_grad=False)
    adam = _grouped(run, ([], 0.1), ([i for n, i in net.items() if n.endswith("bias")], 0.0))
    run.backward().step(adam)
    assert findings(check, run) == []


def _one_group(decay: float, steps: int | None, class_name: str = "AdamW", default: float = 0.01) -> Run:
    run = Run()
    net = _net(run)
    adam = _grouped(
        run, (list(net.values()), decay), class_name=class_name, signature_defaults={"weight_decay": default}
    )
    for _ in range(3):
        run.backward().step(adam)
    return run.plan(optimizer_steps=steps, source="the trainer") if steps else run


def test_decay_of_everything_over_a_long_run() -> None:
    severity, finding = only(check, _one_group(0.1, 20_000))
    assert severity == "info"
    # 1 - (1 - 1e-3 * 0.1) ** 20000
    assert finding.evidence["shrink"] == pytest.approx(1 - (1 - 1e-4) ** 20_000, rel=1e-3)
    assert finding.evidence["norms"] == 4 and finding.evidence["biases"] == 2


def test_sgd_by_its_rate() -> None:
    shrink = only(check, _one_group(0.01, 20_000, "SGD", 0.0))[1].evidence["shrink"]
    assert shrink == pytest.approx(1 - (1 - 1e-5) ** 20_000, rel=1e-3)


@pytest.mark.parametrize(("decay", "steps"), [(0.1, 100), (0.1, None), (0.01, 10_000), (0.0001, 10_000)])
def test_too_little_to_speak_of(decay: float, steps: int | None) -> None:
    assert findings(check, _one_group(decay, steps)) == []


def test_an_optimizer_whose_formula_is_not_known() -> None:
    run = _one_group(0.1, 20_000)
    run.optimizers[0] = dataclasses.replace(run.optimizers[0], defined_in="lion")
    assert findings(check, run) == []


def test_no_decay_and_no_step() -> None:
    with pytest.raises(NotApplicable):
        findings(check, _one_group(0.0, 1000))
    with pytest.raises(NotApplicable):
        findings(check, Run())
    run = Run()
    _grouped(run, (list(_net(run).values()), 0.1))
    with pytest.raises(NotObserved):
        findings(check, run)
