"""TL308 clipping-ineffective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from trainlint.checks.loop.clipping_ineffective import clipping_ineffective as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved

NET = {"body.weight": (8, 8), "head.weight": (2, 8)}


def clip(
    run: Run, parameters: tuple[int, ...] = (0, 1), norm: float | None = 4.0, had: int | None = None, **f: Any
) -> Run:
    threshold = f.pop("threshold", 1.0)
    n = f.pop("n_tensors", len(parameters))
    return run.clip(threshold, norm, parameters=parameters, n_tensors=n, with_gradient=n if had is None else had, **f)


def loop(body: Callable[[Run, int], Any], times: int = 3, **modules: Any) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(times):
        body(run, adam)
    return run


def test_clipping_before_the_step_passes() -> None:
    assert not findings(check, loop(lambda r, o: clip(r.batch().backward()).step(o, total=1.0, after=4.0).zero(o)))


def test_after_the_step_is_an_error_when_the_steps_were_above_the_threshold() -> None:
    run = loop(lambda r, o: clip(r.batch().backward().step(o, gradient=2.0), norm=2.0 * 2**0.5).zero(o))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "comes after AdamW's step" in finding.message
    assert "The threshold is 1, the steps used a gradient norm of 2.83" in finding.message
    assert "between loss.backward() and optimizer.step()" in finding.fix


def test_after_the_step_with_small_gradients_is_a_warning() -> None:
    run = loop(lambda r, o: clip(r.batch().backward().step(o, gradient=0.1), norm=0.1 * 2**0.5).zero(o))
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "So far nothing would have been clipped" in finding.message


def test_before_backward_there_is_nothing_to_clip() -> None:
    run = loop(lambda r, o: clip(r.zero(o), norm=0.0, had=0).batch().backward().step(o, gradient=5.0))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "comes before backward" in finding.message
    assert "no gradients yet" in finding.message


def test_gradients_from_elsewhere_are_not_misplaced() -> None:
    run = loop(lambda r, o: clip(r.batch(), norm=30.0).backward().step(o, gradient=0.5).zero(o))
    assert not findings(check, run)


@pytest.mark.parametrize(("threshold", "scale", "faulty"), [(1.0, 65536.0, True), (65536.0, 65536.0, False),
                                                          (0.5 * 1024, 1024.0, False), (100.0, 65536.0, True),
                                                          (1.0, 8.0, False)])  # fmt: skip
def test_before_unscale(threshold: float, scale: float, faulty: bool) -> None:
    def body(r: Run, o: int) -> None:
        r.batch().backward(loss_scale=scale)
        clip(r, norm=2.0 * scale, scaled=True, threshold=threshold).step(o, gradient=threshold / scale).zero(o)

    found = findings(check, loop(body))
    assert bool(found) == faulty
    if faulty:
        assert found[0][0] == "error"
        assert "loss scale of 65,536" in found[0][1].message
        assert "unscale_" in found[0][1].fix


def test_a_generator_that_is_used_up() -> None:
    run = loop(lambda r, o: clip(r.batch().backward(), (), norm=0.0).step(o, gradient=3.0).zero(o))
    severity, finding = only(check, run)
    assert severity == "error"
    assert "no tensors at all in 3 of 3 calls" in finding.message


def test_a_generator_that_the_first_call_uses_up() -> None:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for i in range(3):
        clip(run.batch().backward(), () if i else (0, 1), norm=3.0 if not i else 0.0).step(adam, gradient=3.0).zero(
            adam
        )
    severity, finding = only(check, run)
    assert severity == "error"
    assert "used up by the first (2 tensors)" in finding.message


def test_tensors_without_a_gradient() -> None:
    run = Run()
    run.module("Net", NET)
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for _ in range(3):
        clip(run.batch().backward(), (0, 1), norm=0.0, had=0).step(adam, gradient=3.0).zero(adam)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "2 tensors without any gradient" in finding.message


def test_where_no_gradient_arrives_at_all_clipping_is_not_why() -> None:
    nothing = {0: None, 1: None}
    assert not findings(check, loop(lambda r, o: clip(r.batch().backward(), norm=0.0, had=0).step(o, gradient=nothing)))


def test_a_network_whose_turn_it_is_not() -> None:
    run = Run()
    d = run.optimizer("Adam", run.module("D", NET))
    g = run.optimizer("Adam", run.module("G", NET))
    for _ in range(3):
        clip(run.batch().backward(), (0, 1)).step(d).zero(d)
        clip(run.batch().backward(), (0, 1), norm=0.0, had=0).step(g, gradient=3.0).zero(g)
    assert not findings(check, run)


def micro(norms: list[float]) -> Run:
    def body(r: Run, o: int) -> None:
        for norm in norms:
            clip(r.batch().backward(divided_by=2.0), norm=norm)
        r.step(o, gradient=0.5).zero(o)

    return loop(body)


def test_at_every_micro_batch() -> None:
    severity, finding = only(check, micro([5.0, 4.0, 3.0]))
    assert severity == "error"
    assert finding.evidence["weight_of_the_first"] == pytest.approx([0.05] * 3)
    assert only(check, micro([1.25, 4.0]))[0] == "warning"
    assert not findings(check, micro([0.5, 0.8, 2.0]))


def part(covered: tuple[int, ...], gradient: dict[int, float], n_tensors: int | None = None) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", {"body.weight": (4, 8), "head.weight": (16, 8)}))
    run.tensor((3,))
    for _ in range(3):
        clip(run.batch().backward(), covered, n_tensors=n_tensors or len(covered)).step(adam, gradient=gradient).zero(
            adam
        )
    return run


def test_most_of_the_weights_left_out_is_worth_knowing() -> None:
    severity, finding = only(check, part((0,), {0: 0.5, 1: 6.0}))
    assert severity == "info"
    assert "leaves out 1 of the 2 gradients" in finding.message
    assert "head.weight" in finding.message


def test_a_list_with_tensors_of_no_optimizer_is_a_warning() -> None:
    severity, finding = only(check, part((0, 2), {0: 0.5, 1: 6.0}))
    assert severity == "warning"
    assert "1 tensor that no optimizer holds" in finding.message


def test_a_part_on_purpose_passes() -> None:
    assert not findings(check, part((1,), {0: 6.0, 1: 0.5}))
    assert not findings(check, part((0,), {0: 0.5, 1: 0.9}))


def test_an_infinite_threshold_measures_only() -> None:
    run = loop(lambda r, o: clip(r.batch().backward().step(o), threshold=float("inf")).zero(o))
    with pytest.raises(NotApplicable):
        findings(check, run)


def test_steps_are_needed() -> None:
    with pytest.raises(NotObserved):
        findings(check, loop(lambda r, o: clip(r.batch().backward())))


def test_clipping_by_value_is_judged_by_its_place_only() -> None:
    def late(r: Run, o: int) -> Run:
        return clip(r.batch().backward().step(o, gradient=9.0), norm=None, method="value").zero(o)

    severity, finding = only(check, loop(late))
    assert severity == "warning"
    assert "norm" not in finding.message.replace("clip_grad_norm_", "")
