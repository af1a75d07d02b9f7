"""TL306 accumulation-not-divided."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loop.accumulation_not_divided import accumulation_not_divided as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable

NET = {"fc.weight": (8, 8)}


def accumulate(
    n: int = 4, optimizer: str = "AdamW", *, feed: str = "batch", step: dict[str, Any] | None = None, **backward: Any
) -> Run:
    run = Run()
    number = run.optimizer(optimizer, run.module("Net", NET), lr=0.01)
    for s in range(3):
        for i in range(n):
            if feed == "batch":
                run.batch()
            elif feed == "input":
                run.forward(f"x{s}.{i}")
            elif feed == "same input":
                run.forward(f"x{s}")
            elif feed == "loaders":
                run.batch(loader=i)
            run.backward(**backward)
        run.step(number, **(step or {})).zero(number)
    return run


def test_undivided_means_are_an_error_with_the_factor() -> None:
    severity, finding = only(check, accumulate(8, "SGD"))
    assert severity == "error"
    assert "8 times too large" in finding.message
    assert "0.01 acts like 0.08" in finding.message
    assert finding.evidence["factor"] == 8
    assert finding.fix == "(loss / 8).backward()."


def test_adam_is_told_what_really_changes() -> None:
    run = accumulate()
    assert "Adam's step size hardly changes" in only(check, run)[1].message


def test_clipping_says_what_its_threshold_means() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        for _ in range(4):
            run.batch().backward()
        run.clip(1.0, norm=8.0).step(adam, total=1.0, after=8.0).zero(adam)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "Clipping at 1 acts like 0.25" in finding.message


@pytest.mark.parametrize(
    "backward",
    [
        {"divided_by": 4.0},
        {"reduction": "sum", "divided_by": 512.0},
        {"reduction": "sum"},
        {"reduction": None, "divided_by": None},
        {"gradient_argument": 0.25},
    ],
    ids=["divided", "token weighted", "sum", "unknown loss", "gradient argument"],
)
def test_what_is_divided_or_summed_on_purpose(backward: dict[str, Any]) -> None:
    assert findings(check, accumulate(**backward)) == []


def test_gradients_divided_before_the_step() -> None:
    assert findings(check, accumulate(step={"total": 1.0, "after": 4.0})) == []


def test_gradients_divided_and_then_clipped() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        for _ in range(4):
            run.batch().backward()
        run.clip(1.0, norm=2.0).step(adam, total=1.0, after=8.0).zero(adam)
    assert findings(check, run) == []


def test_loss_scaling_is_no_division() -> None:
    run = accumulate(loss_scale=1024.0, step={"total": 1.0, "after": 1024.0})
    assert only(check, run)[0] == "error"


def test_without_the_graph_the_values_decide() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        for value in (1.5, 1.25):
            run.batch().loss(value).backward(value=value, divided_by=None)
        run.step(adam).zero(adam)
    assert only(check, run)[0] == "error"
    other = Run()
    adam = other.optimizer("AdamW", other.module("Net", NET))
    for _ in range(3):
        for value in (1.5, 1.25):
            other.batch().loss(value).backward(value=value / 2, divided_by=None)
        other.step(adam).zero(adam)
    assert findings(check, other) == []


def test_several_losses_of_one_batch_from_several_lines() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        run.batch().backward(10, retain_graph=True).backward(11).step(adam).zero(adam)
    assert findings(check, run) == []


@pytest.mark.parametrize(("doubtful", "expected"), [(1, "error"), (3, "")])
def test_an_experts_first_turn_within_a_window_speaks_for_neither(doubtful: int, expected: str) -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    run.loader(100)
    for window in range(3):
        run.batch().backward(10, new_gradients=2)
        run.batch().backward(10, new_gradients=1 if window < doubtful else 0).step(adam).zero(adam)
    assert [severity for severity, _ in findings(check, run)] == ([expected] if expected else [])


@pytest.mark.parametrize("feed", ["same input", "loaders", "nothing"])
def test_backwards_that_are_not_micro_batches(feed: str) -> None:
    assert findings(check, accumulate(feed=feed)) == []


def test_chunks_known_by_the_models_input_only() -> None:
    run = accumulate(feed="input")
    assert only(check, run)[0] == "warning"
    run.config(accumulation=4)
    assert only(check, run)[0] == "error"
    assert findings(check, accumulate(2, feed="input")) == []


def test_a_gans_critic_between_the_generators_steps() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    for _ in range(3):
        for _ in range(5):
            run.batch().backward(10).step(opt_d).zero(opt_d)
        run.backward(14).step(opt_g).zero(opt_g)
    assert findings(check, run) == []


def test_a_short_last_window_counts_too() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for n in (4, 4, 2):
        for _ in range(n):
            run.batch().backward()
        run.step(adam).zero(adam)
    assert only(check, run)[1].evidence["factor"] == 4


@pytest.mark.parametrize(
    ("framework", "words"), [("accelerate", "accelerator.accumulate"), ("lightning", "accumulate_grad_batches=4")]
)
def test_the_repair_speaks_the_frameworks_words(framework: str, words: str) -> None:
    run = accumulate()
    run.framework(framework)
    assert words in only(check, run)[1].fix


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_accepts_loss_kwargs": True}, "model.accepts_loss_kwargs = False"),
        ({"model_accepts_loss_kwargs": True, "overridden": ["compute_loss"]}, "model.accepts_loss_kwargs = False"),
        ({"model_accepts_loss_kwargs": True, "overridden": ["training_step"]}, "training_step"),
        ({"model_accepts_loss_kwargs": True, "compute_loss_func": True}, "num_items_in_batch"),
    ],
)
def test_who_should_have_divided_under_the_transformers_trainer(settings: dict[str, Any], words: str) -> None:
    run = accumulate()
    run.framework("transformers", **settings)
    finding = only(check, run)[1]
    assert words in (finding.fix or "")
    assert ("leaves the division to a forward" in finding.message) == ("accepts_loss_kwargs" in words)


def test_one_backward_per_step_does_not_apply() -> None:
    with pytest.raises(NotApplicable):
        findings(check, accumulate(1))


def test_the_switch_is_the_base_model_s_under_peft() -> None:
    run = accumulate()
    run.framework("peft").framework("transformers", model_accepts_loss_kwargs=True)
    assert "model.get_base_model().accepts_loss_kwargs = False" in (only(check, run)[1].fix or "")
