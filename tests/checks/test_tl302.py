"""TL302 loss-detached, over recordings built by hand."""

from __future__ import annotations

import pytest
from trainlint.checks.loop.loss_detached import loss_detached

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Adapters, Ending, GradientCut, LossCall

LEAF = {"grad_fn": None, "reaches_parameters": False, "leaves": 1, "gradients_changed": 0, "divided_by": None}
CUT = {"grad_fn": "SumBackward0", "reaches_parameters": False, "leaves": 1, "gradients_changed": 0}
WHOLE = {"grad_fn": "NllLossBackward0", "reaches_parameters": True}
REFUSED = "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"


def program() -> tuple[Run, int]:
    run = Run()
    net = run.module("Net", {"body.weight": (8, 8), "head.weight": (2, 8)})
    return run, run.optimizer("AdamW", net)


def loss(run: Run, **fields: object) -> Run:
    run._emit(LossCall, function="cross_entropy", at=at(31, "loss_of"), **fields)
    return run


def test_a_leaf_names_the_loss_that_ran_without_gradients() -> None:
    run, adam = program()
    for value in (0.7, 0.6, 0.65):
        loss(run, value=value, grad_enabled=False, input_requires_grad=False)
        run.backward(40, value=value, **LEAF).step(adam, gradient=None)
    severity, finding = only(loss_detached, run)
    assert severity == "error"
    assert "is a leaf" in finding.message
    assert "all 3 backwards" in finding.message
    assert "3 steps of AdamW (train.py:5) found none" in finding.message
    assert "cross_entropy (train.py:31) ran with gradients switched off" in finding.message
    assert finding.at == at(31, "loss_of")
    assert "requires_grad_()" in finding.fix
    assert finding.evidence["cause"] == "no-grad"


def test_a_loss_that_lost_its_graph_on_the_way() -> None:
    run, adam = program()
    for value in (0.7, 0.6):
        loss(run, value=value)
        run.backward(40, value=value, **LEAF).step(adam, gradient=None)
    _, finding = only(loss_detached, run)
    assert "had a graph" in finding.message
    assert "same value, 0.6" in finding.message
    assert finding.evidence["cause"] == "between"
    assert finding.at == at(40)


def test_an_input_without_a_graph() -> None:
    run, adam = program()
    loss(run, value=0.7, input_requires_grad=False)
    run.backward(40, value=0.7, **LEAF).step(adam, gradient=None)
    assert only(loss_detached, run)[1].evidence["cause"] == "input"


def test_a_constant_zero_may_stand_for_a_batch_without_targets() -> None:
    run, adam = program()
    run.backward(40, value=0.0, **LEAF).step(adam, gradient=None)
    assert only(loss_detached, run)[0] == "warning"
    run.backward(40, **WHOLE).step(adam)
    assert findings(loss_detached, run) == []


def test_a_leaf_beside_losses_that_train() -> None:
    run, adam = program()
    run.backward(7, value=1.0, **LEAF)  # a device warming up
    for _ in range(3):
        run.backward(40, **WHOLE).step(adam)
    assert findings(loss_detached, run) == []
    run, adam = program()
    for value in (0.3, 0.2, 0.25):
        loss(run, value=value)
        run.backward(38, value=value, **LEAF).backward(40, **WHOLE).step(adam)
    severity, finding = only(loss_detached, run)
    assert severity == "warning"
    assert "adds nothing to the gradients that other losses give" in finding.message


def test_a_graph_that_leads_to_no_parameter() -> None:
    run, adam = program()
    for _ in range(2):
        loss(run, value=0.7)
        run.backward(40, value=1.4, **CUT).step(adam, gradient=None)
    severity, finding = only(loss_detached, run)
    assert severity == "error"
    assert "ends in 1 tensor, none of them a parameter" in finding.message
    assert finding.evidence["steps_without_gradient"] == 2


def test_backwards_for_an_input_before_the_one_that_trains() -> None:
    run, adam = program()
    for _ in range(3):
        run.backward(38, **CUT).backward(40, **WHOLE).step(adam)
    assert findings(loss_detached, run) == []


def test_gradients_put_in_place_by_hand() -> None:
    run, adam = program()
    for _ in range(3):
        run.backward(38, **CUT).step(adam, gradient=1.0)
    assert findings(loss_detached, run) == []


def test_backwards_of_another_optimizer_are_its_own() -> None:
    run = Run()
    one, other = run.module("G", {"w": (4, 4)}), run.module("D", {"w": (4, 4)})
    generator, critic = run.optimizer("Adam", one), run.optimizer("Adam", other, line=6)
    for _ in range(3):
        run.backward(20, **CUT).step(critic, gradient=None)
        run.backward(30, **WHOLE).step(generator)
    _, finding = only(loss_detached, run)
    assert "Adam (train.py:6) found none" in finding.message


def test_a_custom_function_may_hold_the_graph() -> None:
    hidden = {"grad_fn": "CheckpointFunctionBackward", "hidden": "CheckpointFunctionBackward", "leaves": 1}
    run, adam = program()
    run.backward(40, gradients_changed=4, **hidden).step(adam)
    assert findings(loss_detached, run) == []
    run, adam = program()
    run.backward(40, gradients_changed=0, **hidden).step(adam, gradient=None)
    severity, finding = only(loss_detached, run)
    assert severity == "warning"
    assert "CheckpointFunctionBackward" in finding.message


@pytest.mark.parametrize(("value", "severity"), [(0.7, "error"), (0.0, "warning")])
def test_a_program_that_died_before_its_first_step(value: float, severity: str) -> None:
    run, _ = program()
    run.backward(40, value=value, **CUT).backward(40, value=value, **CUT)
    error = "RuntimeError: Expected !nested_tensorlist[0].empty() to be true"
    found, finding = only(loss_detached, run, ending=Ending("exit", 1, error=error))
    assert found == severity
    assert (
        "No gradient changed in 2 backwards, and the program died before its first optimizer step." in finding.message
    )


def test_a_program_that_died_of_something_else() -> None:
    run, _ = program()
    run.backward(40, **CUT).backward(40, **WHOLE)
    assert not findings(loss_detached, run, ending=Ending("exit", 1, error="RuntimeError: out of memory"))


def test_a_program_that_died_of_it_is_explained() -> None:
    run, adam = program()
    run.backward(40, **WHOLE).step(adam)
    loss(run, value=0.5, grad_enabled=False)
    run.backward(40, value=0.5, requires_grad=False, grad_fn=None, reaches_parameters=False, raised=REFUSED)
    severity, finding = only(loss_detached, run, ending=Ending("exit", 1, error=REFUSED))
    assert severity == "error"
    assert "after 1 backward that had one" in finding.message
    assert "train.py:31" in finding.message


def test_a_refusal_whose_cause_is_known_is_left_to_tl606() -> None:
    run, _ = program()
    loss(run, value=0.5)
    run.backward(40, value=0.5, requires_grad=False, grad_fn=None, reaches_parameters=False, raised=REFUSED)
    run.change([0, 1], gradient_seen=False)
    cut = GradientCut("checkpoint", ("body",), "Linear", (0, 1), calls=1, at=at(20))
    with pytest.raises(NotApplicable, match="TL606"):
        findings(loss_detached, run, ending=Ending("exit", 1, error=REFUSED), adapters=Adapters(cuts=(cut,)))


def test_a_refusal_that_the_program_took_in_its_stride() -> None:
    run, adam = program()
    run.backward(39, requires_grad=False, grad_fn=None, raised=REFUSED)
    run.backward(40, **WHOLE).step(adam)
    assert findings(loss_detached, run, ending=Ending("steps")) == []


def test_every_parameter_is_frozen() -> None:
    run = Run()
    net = run.module("Net", {"w": (2, 2)}, frozen=["w"])
    run.optimizer("AdamW", net)
    loss(run, value=0.5, input_requires_grad=False)
    run.backward(40, value=0.5, requires_grad=False, grad_fn=None, reaches_parameters=False, raised=REFUSED)
    _, finding = only(loss_detached, run, ending=Ending("exit", 1, error=REFUSED))
    assert finding.evidence["cause"] == "all-frozen"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("AttributeError: 'float' object has no attribute 'backward'", "number"),
        ("AttributeError: 'numpy.float64' object has no attribute 'backward'", "number"),
        (
            "RuntimeError: Setting requires_grad=True on inference tensor outside InferenceMode is not allowed.",
            "inference",
        ),
    ],
)
def test_a_program_that_died_before_backward(error: str, kind: str) -> None:
    run, _ = program()
    loss(run, value=0.5)
    traceback = ("Traceback (most recent call last):", '  File "/home/user/train.py", line 44, in main', error)
    _, finding = only(loss_detached, run, ending=Ending("exit", 1, error=error, traceback=traceback))
    assert finding.evidence["kind"] == kind
    assert finding.at == at(44)


def test_nothing_to_see() -> None:
    run, adam = program()
    with pytest.raises(NotObserved, match="no backward"):
        findings(loss_detached, run)
    run.backward(40).step(adam)  # the graph was not followed
    with pytest.raises(NotObserved, match="could not be followed"):
        findings(loss_detached, run)
