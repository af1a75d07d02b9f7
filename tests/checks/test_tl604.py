"""TL604 adapters-not-attached."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.finetuning.adapters_not_attached import adapters_not_attached as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable
from trainlint.recording.schema import AdaptedModel, Adapters, AdapterSite, AdapterTarget

FROZEN = ("q", "mlp", "emb")


def adapted(*, moved: tuple[str, ...] = ("lora",), frozen: tuple[str, ...] = FROZEN, origin: str = "fresh",
            gradients: bool = True, **fields: Any) -> Run:  # fmt: skip
    """A model of two layers; tensors that train are in the optimizer, those whose name begins with ``moved`` move."""
    run = Run()
    tensors = {f"{k}.{i}.weight": (8, 8) for i in range(2) for k in ("q", "mlp")}
    tensors.update({f"lora.{i}.{k}": (2, 8) for i in range(2) for k in ("a", "b")}, **{"head.weight": (2, 8)})
    net = run.module("Peft", tensors, frozen=frozen, origin={"q": origin})
    names = {run.parameters[i].name: i for i in net}
    own = tuple(i for n, i in names.items() if n.startswith("lora"))
    adam = run.optimizer("AdamW", [i for i in net if run.parameters[i].requires_grad] or [net[-1]])
    moving = [i for n, i in names.items() if n.startswith(moved)]
    for _ in range(3):
        run.backward().step(adam, moved=moving)
    run.change(own, gradient_seen=gradients)
    given = {"library": "peft", "named": True, "method": "LORA", **fields}
    model = AdaptedModel(
        root=0, class_name="Peft", parameters=own, members=tuple(net),
        adapted_weights=tuple(i for n, i in names.items() if n.startswith("q")), **given,
    )  # fmt: skip
    run.fields["adapters"] = Adapters(models=(model,))
    return run


def test_adapters_done_right() -> None:
    sites = (AdapterSite("q", "Linear", ("q.0", "q.1")),)
    assert findings(check, adapted(sites=sites, targets=(AdapterTarget("q", 2),), moved=("lora", "head"))) == []
    with pytest.raises(NotApplicable):
        findings(check, Run())


def test_a_base_that_moves_below_its_adapters() -> None:
    severity, finding = only(check, adapted(frozen=(), moved=("lora", "q", "mlp")))
    assert severity == "error"
    assert "2 of 2 weights that the LORA adapters sit on moved" in finding.message
    assert "The adapters are 20% of the weights that train" in finding.message


@pytest.mark.parametrize(
    ("origin", "named", "expected"),
    [("pretrained.pt", False, ["error"]), ("fresh", True, ["warning"]), ("fresh", False, [])],
)
def test_by_hand_a_base_counts_where_it_was_loaded(origin: str, named: bool, expected: list[str]) -> None:
    run = adapted(frozen=(), moved=("lora", "q"), origin=origin, library="", named=named, method="low-rank")
    assert [severity for severity, _ in findings(check, run)] == expected


def test_most_matrices_beside_the_adapters_move() -> None:
    run = Run()
    net = run.module("Net", {f"mlp.{i}.weight": (8, 8) for i in range(5)} | {"lora.a": (2, 8)})
    run.backward().step(run.optimizer("AdamW", net))
    run.change(net[5:], gradient_seen=True)
    model = AdaptedModel(root=0, library="peft", method="LORA", parameters=(net[5],), members=tuple(net))
    run.fields["adapters"] = Adapters(models=(model,))
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "5 of 5 matrices of the base move beside the LORA adapters" in finding.message


def test_a_target_that_fits_nothing_beside_one_of_nearly_its_name() -> None:
    targets = (AdapterTarget("q_proj", 2), AdapterTarget("out_proj", 0, ("o_proj",)), AdapterTarget("c_attn"))
    severity, finding = only(check, adapted(targets=targets))
    assert severity == "warning"
    assert "target_modules names out_proj, which fits no layer of Peft; o_proj exists" in finding.message
    assert findings(check, adapted(targets=(AdapterTarget("out_proj", 0, ("o_proj",)),))) == [], "not understood"


LAYERS = [f"blocks.{i}.fc" for i in range(12)]


@pytest.mark.parametrize(
    ("chosen", "reported"),
    [([0], True), ([0, 1], True), ([3, 4, 7], True), ([11], False), ([8, 9, 10, 11], False), ([0, 3, 6, 9], False),
     (list(range(8)), False)],
)  # fmt: skip
def test_few_of_many_equal_layers(chosen: list[int], reported: bool) -> None:
    site = AdapterSite(
        "fc", "Linear", tuple(LAYERS[i] for i in chosen), tuple(n for i, n in enumerate(LAYERS) if i not in chosen)
    )
    found = findings(check, adapted(sites=(site,), library="", method="low-rank"))
    assert [severity for severity, _ in found] == (["warning"] if reported else [])
    assert findings(check, adapted(sites=(site,), layers_asked=True)) == []
    assert findings(check, adapted(sites=(site,), target_pattern=r".*\.0\.fc")) == []


def test_frozen_adapters_while_the_head_trains() -> None:
    run = adapted(frozen=(*FROZEN, "lora"), moved=("head",), gradients=False, inference_mode=False)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "None of the 4 tensors of the LORA adapters is trainable" in finding.message
    assert (
        findings(check, adapted(frozen=(*FROZEN, "lora"), moved=("head",), gradients=False, inference_mode=True)) == []
    )


@pytest.mark.parametrize(("state", "fix"), [("merged", "unmerge_adapter"), ("disabled", "enable_adapter_layers")])
def test_adapters_that_take_no_part(state: str, fix: str) -> None:
    severity, finding = only(check, adapted(gradients=False, moved=("head",), looks=3, **{state: 3}))
    assert severity == "error"
    assert "at each of 3 backwards" in finding.message
    assert fix in finding.fix
    assert findings(check, adapted(looks=3, **{state: 1})) == []


def test_a_model_that_is_not_trained_may_have_its_adapters_as_it_likes() -> None:
    run = adapted(frozen=(*FROZEN, "lora", "head"), moved=(), gradients=False, looks=3, disabled=3)
    run.optimizers.clear()
    assert findings(check, run) == []
