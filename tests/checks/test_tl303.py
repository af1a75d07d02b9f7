"""TL303 wrong-step-order."""

from __future__ import annotations

import pytest
from trainlint.checks.loop.wrong_step_order import wrong_step_order as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Ending

NET = {"fc.weight": (8, 8)}


def one() -> tuple[Run, int]:
    run = Run()
    return run, run.optimizer("Adam", run.module("Net", NET))


# -- no step


def test_backwards_and_never_a_step() -> None:
    run, adam = one()
    for i in range(200):
        run.zero(adam, had=i and 1).backward()
    severity, finding = only(check, run, ending=Ending("backward-cap"))
    assert severity == "error"
    assert "200 backwards" in finding.message
    assert "cleared 199 times" in finding.message


def test_without_a_clearing_it_may_be_a_long_accumulation() -> None:
    run, _ = one()
    for _ in range(200):
        run.backward()
    assert only(check, run, ending=Ending("backward-cap"))[0] == "warning"


def test_a_program_that_ended_without_a_step() -> None:
    run, _ = one()
    for _ in range(10):
        run.backward()
    assert only(check, run, ending=Ending("exit", 0))[0] == "error"


def test_asked_accumulation_beyond_the_watch_is_not_observed() -> None:
    run, _ = one()
    run.plan(accumulation=256)
    for _ in range(200):
        run.backward()
    with pytest.raises(NotObserved):
        findings(check, run, ending=Ending("backward-cap"))


def test_a_scaler_that_is_still_calibrating() -> None:
    run, adam = one()
    for _ in range(4):
        run.backward().scaler("step", skipped=True).zero(adam)
    with pytest.raises(NotObserved):
        findings(check, run, ending=Ending("exit", 0))


def test_updates_by_something_else() -> None:
    run = Run()
    adam = run.optimizer("Adam", run.module("Net", NET), moved_without_steps=True)
    for _ in range(10):
        run.backward().zero(adam)
    with pytest.raises(NotApplicable):
        findings(check, run, ending=Ending("exit", 0))


def test_gradient_descent_by_hand() -> None:
    run = Run()
    run.module("Net", NET)
    for _ in range(10):
        run.backward().zero(root=0)
    with pytest.raises(NotApplicable):
        findings(check, run, ending=Ending("exit", 0))


# -- steps that find nothing


def test_step_before_backward() -> None:
    run, adam = one()
    for i in range(3):
        run.batch().zero(adam, had=i and 1, line=8).step(adam, gradient=None, line=9).backward(line=10)
    severity, finding = only(check, run)
    assert severity == "error"
    assert "steps before backward" in finding.message
    assert "2 of 3 steps found no gradient" in finding.message


def test_zero_grad_between_backward_and_step() -> None:
    run, adam = one()
    for _ in range(3):
        run.batch().backward(line=10).zero(adam, line=11).step(adam, gradient=None, line=12)
    severity, finding = only(check, run)
    assert severity == "error"
    assert (
        "zero_grad (train.py:11) comes between backward (train.py:10) and Adam's step (train.py:12)" in finding.message
    )


def test_zeroed_in_place_counts_as_no_gradient() -> None:
    run, adam = one()
    for _ in range(3):
        run.backward().zero(adam, line=11).step(adam, gradient=0.0, moved=False)
    assert only(check, run)[0] == "error"


def test_the_right_order_in_its_variants() -> None:
    for order in ("zero first", "zero last", "twice", "by module"):
        run, adam = one()
        for i in range(3):
            if order in ("zero first", "twice"):
                run.zero(adam, had=i and 1)
            run.batch().backward().step(adam)
            if order in ("zero last", "twice"):
                run.zero(adam)
            if order == "by module":
                run.zero(root=0)
        assert findings(check, run) == []


def test_the_rotated_loop_uses_the_gradients_of_the_batch_before() -> None:
    run, adam = one()
    for i in range(4):
        run.step(adam, gradient=1.0 if i else None).zero(adam, had=i and 1).batch().backward()
    assert findings(check, run) == []


def test_a_first_step_that_quiets_the_schedulers_warning() -> None:
    run, adam = one()
    run.step(adam, gradient=None)
    for _ in range(3):
        run.backward().step(adam).zero(adam)
    assert findings(check, run) == []


def test_one_batch_skipped_on_purpose() -> None:
    run, adam = one()
    run.backward().step(adam).zero(adam)
    run.backward().zero(adam).step(adam, gradient=None)
    run.backward().step(adam).zero(adam)
    assert findings(check, run) == []


def test_closures_run_inside_the_step() -> None:
    run, lbfgs = one()
    for _ in range(3):
        began = run.begin()
        for _ in range(4):
            run.zero(lbfgs).backward()
        run.step(lbfgs, began=began)
    assert findings(check, run) == []


def test_a_gan_clears_the_other_models_gradients() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    for _ in range(3):
        run.zero(opt_d).backward(10).backward(11).step(opt_d, line=12)
        run.zero(opt_g).backward(14).step(opt_g, line=15)
    assert findings(check, run) == []


def test_sharpness_aware_steps_clear_between_their_two_backwards() -> None:
    run, adam = one()
    for _ in range(3):
        run.batch().forward("x").backward().zero(adam).forward("x").backward().step(adam)
    assert findings(check, run) == []


# -- clearing at every micro-batch


def accumulate(n: int, *, fresh: bool = True, used: float | None = None, lines: bool = False) -> Run:
    run, adam = one()
    for step in range(3):
        for i in range(n):
            run.batch("new" if fresh else None) if fresh else run.forward("same")
            run.zero(adam, had=int(step + i > 0)).backward(10 + (i if lines else 0))
        run.step(adam, total=used or 1.0, after=1.0, line=14)
    return run


def test_only_the_last_micro_batch_counts() -> None:
    severity, finding = only(check, accumulate(4))
    assert severity == "error"
    assert "3 of 4 micro-batches are thrown away" in finding.message
    assert finding.evidence["micro_batches_per_step"] == 4


def test_several_backwards_of_one_batch_are_something_else() -> None:
    assert findings(check, accumulate(4, fresh=False)) == []
    assert findings(check, accumulate(2, lines=True)) == []


def test_gradients_put_together_by_hand() -> None:
    assert findings(check, accumulate(4, used=2.5)) == []


def test_accumulation_done_right() -> None:
    run, adam = one()
    for _ in range(3):
        for _ in range(4):
            run.batch().backward(divided_by=4.0)
        run.step(adam).zero(adam)
    assert findings(check, run) == []


def test_a_critic_that_steps_several_times_per_round() -> None:
    run = Run()
    g, d = run.module("G", NET), run.module("D", {"conv.weight": (3, 3)})
    opt_g, opt_d = run.optimizer("Adam", g), run.optimizer("Adam", d)
    for _ in range(3):
        for _ in range(5):
            run.batch().zero(opt_d).backward(10).step(opt_d, line=11)
        run.zero(opt_g).backward(14).step(opt_g, line=15)
    assert findings(check, run) == []
