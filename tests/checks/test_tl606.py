"""TL606 everything-frozen-below, and what TL204 leaves to it."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.finetuning.everything_frozen_below import everything_frozen_below as check
from trainlint.checks.optimizer.params_without_gradient import params_without_gradient

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotObserved
from trainlint.recording.schema import AdaptedModel, Adapters, GradientCut, RootModule

BLOCKS = {f"blocks.{i}.{k}": (8, 8) for i in range(3) for k in ("fc.weight",)}


def run_with(cut: GradientCut | None, lost: list[int], *, frozen: tuple[str, ...] = (), **adapters: Any) -> Run:
    """Three equal blocks and a head; ``lost`` get no gradient in three steps."""
    run = Run()
    net = run.module("Net", {**BLOCKS, "head.weight": (2, 8)}, frozen=frozen)
    held = [i for i in net if run.parameters[i].requires_grad]
    adam = run.optimizer("AdamW", held)
    for _ in range(3):
        run.backward().step(adam, gradient={i: None if i in lost else 1.0 for i in held})
    run.change([i for i in held if i not in lost], gradient_seen=True).change(lost, gradient_seen=False)
    run.fields["adapters"] = Adapters(cuts=(cut,) if cut else (), **adapters)
    return run


def checkpoint(*lost: int) -> GradientCut:
    return GradientCut("checkpoint", ("blocks.0", "blocks.1"), "Block", lost, calls=6, at=at(20))


def test_reentrant_checkpointing_is_an_error_and_says_where() -> None:
    run = run_with(checkpoint(0, 1), [0, 1])
    severity, finding = only(check, run)
    assert severity == "error"
    assert "stops the gradient at Block (blocks.0, blocks.1) at train.py:20" in finding.message
    assert "2 trainable tensors below it, in AdamW (train.py:5), got no gradient in 3 backwards" in finding.message
    assert "use_reentrant=False" in finding.fix
    assert findings(params_without_gradient, run) == []


def test_checkpointed_tensors_that_do_get_gradients_are_in_order() -> None:
    assert findings(check, run_with(checkpoint(0, 1), [])) == []


def test_a_no_grad_over_an_unfrozen_layer_among_frozen_ones_like_it() -> None:
    cut = GradientCut("no_grad", ("blocks.2",), "Block", (2,), calls=2, at=at(14))
    run = run_with(cut, [2], frozen=("blocks.0", "blocks.1"))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "Block (blocks.2) runs with gradients switched off (no_grad) at train.py:14" in finding.message


@pytest.mark.parametrize("cause", ["no_grad", "leaves", "inference_mode"])
def test_a_cut_that_may_be_meant_is_left_to_tl204_which_names_it(cause: str) -> None:
    cut = GradientCut(cause, ("blocks.0",), "Block", (0,), function="Tensor.detach" if cause == "leaves" else "",
                      at=at(14))  # fmt: skip
    run = run_with(cut, [0])
    assert findings(check, run) == []
    _, finding = only(params_without_gradient, run)
    by = "Tensor.detach()" if cause == "leaves" else cause
    assert f"The path to them is cut by {by} at train.py:14." in finding.message


def test_adapters_behind_a_detach() -> None:
    cut = GradientCut("leaves", ("blocks.0",), "Block", (0,), function="Tensor.detach", at=at(14))
    model = AdaptedModel(root=0, parameters=(0,))
    severity, finding = only(check, run_with(cut, [0], models=(model,)))
    assert severity == "error"
    assert "Tensor.detach() at train.py:14 takes what Block (blocks.0) computed out of the graph" in finding.message


def test_a_copy_of_what_does_train_may_be_kept_out_of_the_graph() -> None:
    run = Run()
    net = run.module("Moco", {"encoder_q.1.weight": (8, 8), "encoder_k.0.weight": (8, 8), "encoder_k.1.weight": (8, 8)},
                     frozen=("encoder_k.0",))  # fmt: skip
    adam = run.optimizer("SGD", [net[0], net[2]])
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: 1.0, net[2]: None})
    run.change([net[0]], gradient_seen=True).change([net[2]], gradient_seen=False)
    run.fields["adapters"] = Adapters(cuts=(GradientCut("no_grad", ("encoder_k",), "Encoder", (net[2],)),))
    assert findings(check, run) == []


def test_the_death_at_the_first_backward_is_explained() -> None:
    run = Run()
    net = run.module("Net", {"embed.weight": (9, 8), "blocks.0.lora.weight": (2, 8)}, frozen=("embed",))
    run.optimizer("AdamW", net[1:])
    run.backward(raised="RuntimeError: element 0 of tensors does not require grad", requires_grad=False)
    run.fields["adapters"] = Adapters(cuts=(GradientCut("checkpoint", ("blocks.0",), "Block", (net[1],), 1),))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "raised RuntimeError: element 0" in finding.message


def test_what_no_optimizer_holds_is_not_missed() -> None:
    run = Run()
    net = run.module("Net", {"trunk.weight": (8, 8), "head.weight": (2, 8)})
    adam = run.optimizer("AdamW", net[1:])
    run.backward().step(adam)
    run.fields["adapters"] = Adapters(cuts=(GradientCut("checkpoint", ("trunk",), "Linear", (net[0],), 1),))
    assert findings(check, run) == []


def test_nothing_is_said_without_a_backward_or_of_a_compiled_model() -> None:
    with pytest.raises(NotObserved, match="backward"):
        findings(check, Run())
    run = run_with(None, [0])
    run.roots[0] = RootModule(0, "Net", wrappers=("OptimizedModule",))
    with pytest.raises(NotObserved, match="compiled"):
        findings(check, run)
