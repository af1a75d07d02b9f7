"""TL209: fused and foreach steps where they are known to fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from trainlint.checks.optimizer.fused_or_foreach_hazard import fused_or_foreach_hazard as check

from tests.checks.judging import findings, only
from tests.support.build import ADAM, Run
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import Costs, Ending, Program, ScalerEvent

NET = {"fc.weight": (1024, 1024)}
TWO = Program(world_size=2, torch="2.13.0")
GPU = Program(device="cuda:0", device_memory_bytes=8 * 2**30)
OUT = Ending(
    "exit",
    1,
    error="OutOfMemoryError: CUDA out of memory.",
    traceback=('  File "torch/optim/adam.py", line 700, in _multi_tensor_adam', "    torch._foreach_sqrt(...)"),
)


def _run(scaler: str = "ShardedGradScaler", enabled: bool = True, **hyper: Any) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET), hyper={**ADAM, "fused": None, "foreach": None, **hyper})
    run.backward().step(adam).scaler("step", optimizer=adam)
    event = run.events[-1]
    assert isinstance(event, ScalerEvent)
    run.events[-1] = dataclasses.replace(event, class_name=scaler, enabled=enabled)
    return run


def test_fused_under_the_sharded_scaler() -> None:
    severity, finding = only(check, _run(fused=True), program=TWO)
    assert severity == "warning"
    assert "in 2 processes" in finding.message and "2.13.0" in finding.message


@pytest.mark.parametrize(
    ("run", "program"),
    [
        (_run("GradScaler", fused=True), TWO),
        (_run(enabled=False, fused=True), TWO),
        (_run(fused=True), Program()),
        (_run(foreach=True), TWO),
    ],
)
def test_fused_steps_that_are_right(run: Run, program: Program) -> None:
    assert findings(check, run, program=program) == []


def test_foreach_ran_out_of_memory() -> None:
    run = Run()
    run.optimizer("AdamW", run.module("Net", NET), hyper={**ADAM, "fused": None, "foreach": None})
    severity, finding = only(check, run.backward(), program=GPU, ending=OUT)
    assert severity == "warning"
    assert "4 MiB" in finding.message and "8.0 GiB" in finding.message
    assert "foreach=False" in finding.fix


def test_memory_ran_out_elsewhere() -> None:
    run = Run()
    run.optimizer("AdamW", run.module("Net", NET), hyper={**ADAM, "fused": None, "foreach": None})
    ending = dataclasses.replace(OUT, traceback=('  File "train.py", line 3, in forward',))
    with pytest.raises(NotObserved):
        findings(check, run, program=GPU, ending=ending)


def test_neither_is_in_use() -> None:
    with pytest.raises(NotApplicable):
        findings(check, Run())
    with pytest.raises(NotApplicable):
        findings(check, _run(), program=TWO)
    run = Run()
    own = run.optimizer("Own", run.module("Net", NET), hyper={})
    with pytest.raises(NotApplicable):
        findings(check, run.backward().step(own), program=GPU)


def _costs(**fields: Any) -> Costs:
    known = {"memory_of": "device", "peak_bytes": 15 * 2**29, "peak_phase": "optimizer", "step_temporary_bytes": 2**30}
    return Costs(**{**known, **fields})


def test_a_foreach_step_that_fills_the_device() -> None:
    severity, finding = only(check, _run(foreach=True), program=GPU, costs=_costs())
    assert severity == "warning"
    assert "7.5 GiB of a device with 8.0 GiB, of which 1.0 GiB is temporary" in finding.message


@pytest.mark.parametrize(
    ("run", "costs"),
    [
        (_run(fused=True), _costs()),
        (_run(foreach=False), _costs()),
        (_run(foreach=True), _costs(peak_phase="backward")),
        (_run(foreach=True), _costs(peak_bytes=2**32)),
        (_run(foreach=True), _costs(step_temporary_bytes=0)),
        (_run(foreach=True), _costs(memory_of="process")),
    ],
)
def test_steps_that_leave_room(run: Run, costs: Costs) -> None:
    try:
        assert findings(check, run, program=GPU, costs=costs) == []
    except NotApplicable:
        pass  # neither fused nor foreach
