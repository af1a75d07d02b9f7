"""TL204 params-without-gradient."""

from __future__ import annotations

import pytest
from trainlint.checks.optimizer.params_without_gradient import params_without_gradient as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotObserved


def steps(run: Run, optimizer: int, dead: list[int], n: int = 3, held: list[int] | None = None) -> Run:
    ids = held if held is not None else list(run.parameters)
    for _ in range(n):
        run.backward().step(optimizer, gradient={i: None if i in dead else 1.0 for i in ids})
    return run


def test_a_decoder_outside_the_loss_is_named_with_its_share() -> None:
    run = Run()
    tensors = {"encoder.weight": (10, 10), "out.weight": (20, 10)}
    decoder = {f"gene_decoder.{i}.{k}": (10, 10) for i in range(7) for k in ("weight", "bias")}
    net = run.module("State", {**tensors, **decoder})
    adam = run.optimizer("Adam", net)
    steps(run, adam, net[2:])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "gene_decoder.*: 14 tensors, 82% of the trainable weights" in finding.message
    assert "2 other tensors did get gradients" in finding.message
    assert finding.evidence["tensors"] == 14


def test_a_zero_gradient_is_a_gradient() -> None:
    run = Run()
    net = run.module("Lora", {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4)})
    adam = run.optimizer("AdamW", net)
    for _ in range(3):
        run.backward().step(adam, gradient={net[0]: 0.0, net[1]: 1.0})
    assert findings(check, run) == []


def test_experts_that_were_not_chosen() -> None:
    run = Run()
    net = run.module(
        "MoE",
        {"router.weight": (4, 8), **{f"experts.{i}.fc.weight": (8, 8) for i in range(4)}},
        classes={"experts": "ModuleList"},
    )
    adam = run.optimizer("AdamW", net)
    router, experts = net[0], net[1:]
    for chosen in (0, 1, 0):
        norms = {e: 1.0 if k == chosen else None for k, e in enumerate(experts)}
        run.backward().step(adam, gradient={router: 1.0, **norms})
    assert findings(check, run) == []


def test_task_heads_in_a_module_dict() -> None:
    run = Run()
    net = run.module(
        "Multi", {"enc.weight": (8, 8), "out.a.weight": (2, 8), "out.b.weight": (5, 8)}, classes={"out": "ModuleDict"}
    )
    steps(run, run.optimizer("AdamW", net), [net[2]])
    assert findings(check, run) == []


def test_a_layer_left_out_of_a_stack_is_reported() -> None:
    run = Run()
    net = run.module("Net", {f"layers.{i}.weight": (8, 8) for i in range(4)}, classes={"layers": "ModuleList"})
    steps(run, run.optimizer("AdamW", net), [net[3]])
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "layers.3.weight" in finding.message


def test_an_unused_head_beside_a_projection_is_reported() -> None:
    run = Run()
    net = run.module("Net", {"proj.weight": (8, 8), "head.weight": (8, 8)})
    steps(run, run.optimizer("AdamW", net), [net[1]])
    assert only(check, run)[0] == "warning"


def test_a_small_pretrained_pooler_is_worth_knowing_only() -> None:
    run = Run()
    net = run.module("Bert", {"encoder.weight": (100, 100), "pooler.weight": (5, 5)}, origin="/bert.safetensors")
    steps(run, run.optimizer("AdamW", net), [net[1]])
    assert only(check, run)[0] == "info"


def test_no_gradient_anywhere_is_the_loops_fault() -> None:
    run = Run()
    net = run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8)})
    steps(run, run.optimizer("AdamW", net), net)
    assert findings(check, run) == []


def test_frozen_and_sharded_away_parameters_do_not_count() -> None:
    run = Run()
    net = run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8), "c.weight": (0,)}, frozen=("b",))
    steps(run, run.optimizer("AdamW", net), net[1:])
    assert findings(check, run) == []


def test_optimizers_in_backward_hold_one_parameter_each() -> None:
    run = Run()
    net = run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8)})
    first, second = run.optimizer("AdamW", net[:1]), run.optimizer("AdamW", net[1:])
    for _ in range(3):
        run.backward().step(first).step(second)
    assert findings(check, run) == []


def test_one_step_is_not_enough() -> None:
    run = Run()
    net = run.module("Net", {"a.weight": (8, 8), "b.weight": (8, 8)})
    steps(run, run.optimizer("AdamW", net), net[1:], n=1)
    with pytest.raises(NotObserved):
        findings(check, run)


def two_networks(*, reaches: bool = True, cleared: bool = False) -> Run:
    """An encoder and a decoder with an optimizer each; no gradient arrives in the encoder."""
    run = Run()
    encoder, decoder = run.module("Encoder", {"fc.weight": (8, 8)}), run.module("Decoder", {"fc.weight": (8, 8)})
    first, second = run.optimizer("Adam", encoder), run.optimizer("Adam", decoder)
    for _ in range(3):
        run.zero(first).zero(second).backward(reaches_parameters=reaches)
        if cleared:
            run.zero(first)
        run.step(first, gradient=dict.fromkeys(encoder)).step(second, gradient=dict.fromkeys(decoder, 1.0))
    return run


def test_an_optimizer_that_finds_nothing_while_others_train() -> None:
    severity, finding = only(check, two_networks())
    assert severity == "warning"
    assert "all in other optimizers: this one trains nothing" in finding.message


@pytest.mark.parametrize("how", [{"reaches": False}, {"cleared": True}])
def test_an_optimizer_that_finds_nothing_for_the_loops_own_faults(how: dict[str, bool]) -> None:
    assert findings(check, two_networks(**how)) == []
