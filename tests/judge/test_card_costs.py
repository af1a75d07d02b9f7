"""Time and memory in the run card."""

from __future__ import annotations

from typing import Any

import pytest

from trainlint.judge import card_costs
from trainlint.recording.schema import Costs, Program, Recording, StepCost
from trainlint.recording.schema.costs import PhaseMemory

GIB = 2**30


def step(index: int, *, optimizer: int = 0, backwards: int = 1, factor: float = 1.0, **fields: Any) -> StepCost:
    seconds = {"data": 0.01, "forward": 0.08, "backward": 0.17, "optimizer": 0.04, "other": 0.0}
    return StepCost(optimizer, index, {k: v * factor for k, v in seconds.items()}, backwards, **fields)


def time(*steps: StepCost, **fields: Any) -> tuple[str, dict[str, Any]]:
    lines, data = card_costs.time(Recording(costs=Costs(steps=steps, **fields)))
    return (lines[0].observed if lines else ""), data


def memory(device_bytes: int | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    program = Program(device="cuda:0" if device_bytes else "cpu", device_memory_bytes=device_bytes)
    lines, data = card_costs.memory(Recording(program=program, costs=Costs(**fields)))
    return lines[0].observed, data


def test_the_first_step_is_left_out() -> None:
    text, data = time(step(0, factor=50), step(1), step(2))
    assert text == "0.30 s a step: waiting for data 3.3%, forward 27%, backward 57%, optimizer 13%"
    assert data["step_s"] == pytest.approx(0.30)
    assert data["phase_s"]["backward"] == pytest.approx(0.17)
    assert data["includes_start_up"] is False


def test_a_phase_that_never_was_is_left_out() -> None:
    seconds = {"forward": 0.1, "backward": 0.3}
    text, _ = time(*(StepCost(0, i, seconds, 1) for i in range(3)))
    assert text == "0.40 s a step: forward 25%, backward 75%"


def test_one_step_alone_says_what_it_includes() -> None:
    text, data = time(step(0))
    assert text.endswith("(the first step: start-up is part of it)")
    assert data["includes_start_up"] is True


def test_steps_that_compiled_or_broke_off_are_left_out() -> None:
    text, _ = time(step(0), step(1, factor=100, compiled=True), step(2, factor=0.01, whole=False), step(3))
    assert text.startswith("0.30 s a step:")
    assert "compilation is part of every step" in time(step(0, compiled=True), step(1, compiled=True))[0]


def test_times_that_differ_are_a_range() -> None:
    assert time(step(0), step(1), step(2, factor=3))[0].startswith("0.30 s to 0.90 s a step")


def test_micro_batches_of_a_step() -> None:
    assert time(*(step(i, backwards=8) for i in range(3)))[0].startswith("0.30 s a step of 8 micro-batches")


def test_several_optimizers_make_one_round() -> None:
    """A critic that steps three times as often: a round is three of its steps and one of the generator's."""
    order = [0, 0, 0, 1] * 3
    text, data = time(*(step(i, optimizer=o) for i, o in enumerate(order)))
    assert text.startswith("1.2 s a step of each optimizer")
    assert data["steps_measured"] == 2


def test_the_phases_of_a_tiny_step_are_noise() -> None:
    text, data = time(*(step(i, factor=0.005) for i in range(3)))
    assert text == "1.5 ms a step: too short for its phases to be told apart"
    assert data["phase_share"]["backward"] == pytest.approx(0.17 / 0.3)


def test_a_device_whose_clock_is_not_read_has_no_phases() -> None:
    text, data = time(*(step(i) for i in range(3)), no_phases="mps works on its own, and its clock is not read")
    assert text == "0.30 s a step: mps works on its own, and its clock is not read"
    assert data["phase_s"] is None


def test_nothing_measured_is_nothing_said() -> None:
    assert card_costs.time(Recording()) == ([], None)
    assert card_costs.memory(Recording(costs=Costs())) == ([], None)


def test_a_gpu_tells_its_share() -> None:
    text, data = memory(
        139 * GIB, memory_of="device", peak_bytes=21 * GIB, peak_phase="backward", peak_step=1, before_bytes=GIB,
        memory=(PhaseMemory("optimizer", 20 * GIB), PhaseMemory("forward", 19 * GIB, 19 * GIB)),
    )  # fmt: skip
    assert text == "peak 21.0 GiB in backward (15% of 139 GiB)"
    assert list(data["phases"]) == ["forward", "optimizer"]
    assert data["step_is_peak"] is False


def test_the_optimizer_step_is_the_peak() -> None:
    text, data = memory(80 * GIB, memory_of="device", peak_bytes=70 * GIB, peak_phase="optimizer",
                        reserved_bytes=76 * GIB)  # fmt: skip
    assert text == "peak 70.0 GiB in the optimizer step (88% of 80 GiB; 76.0 GiB with the allocator's reserve)"
    assert data["step_is_peak"] is True


@pytest.mark.parametrize(
    ("peak", "phase", "text"),
    [
        (3 * GIB, "forward", "peak 3.0 GiB in forward of the process"),
        (3 * GIB, "before", "peak 3.0 GiB of the process, to which the watched steps added 2.0 GiB"),
        (GIB + (20 << 20), "forward", "peak 1.0 GiB of the process, to which the watched steps added 20 MiB"),
        (GIB, "before", "peak 1.0 GiB of the process, reached before the first step"),
    ],
)
def test_a_process_tells_what_training_added(peak: int, phase: str, text: str) -> None:
    assert memory(memory_of="process", peak_bytes=peak, peak_phase=phase, before_bytes=GIB)[0] == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0041, "4.1 ms"), (0.042, "42 ms"), (0.31, "0.31 s"), (3.14, "3.1 s"), (72.4, "72 s")]
)
def test_seconds_as_a_person_writes_them(seconds: float, text: str) -> None:
    assert card_costs.seconds_text(seconds) == text
