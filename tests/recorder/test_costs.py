"""Time and memory by phase: where the phases begin and end, and what a clock that runs by itself makes of them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.recorder.watching import watch
from trainlint.recorder import measure
from trainlint.recorder.costs import STEPS, Costs


class Fake:
    """A session whose clock, memory and stream are set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.held, self.peak = 100, 100
        self.emitted: list[dict[str, Any]] = []
        self.problems: list[str] = []
        recorder = SimpleNamespace(
            program_seconds=lambda: self.now,
            own_seconds=lambda: 0.0,
            emit=lambda tag, payload: self.emitted.append(payload),
            problem=lambda where, error: self.problems.append(f"{where}: {error}"),
        )
        self.costs = Costs(SimpleNamespace(recorder=recorder, training_thread=threading.get_ident()))  # type: ignore[arg-type]
        monkeypatch.setattr(measure, "process_memory", lambda: (self.held, self.peak))

    def works(self, seconds: float, *, holds: int | None = None, reaches: int = 0) -> None:
        """The program's own work."""
        self.now += seconds
        self.held = self.held if holds is None else holds
        self.peak = max(self.peak, self.held, reaches)

    def data(self, seconds: float) -> None:
        self.costs.pause()
        self.costs.enter("data")
        self.works(seconds)
        self.costs.pause()
        self.costs.leave()

    def backward(self, seconds: float, device: str = "cpu", **memory: int) -> None:
        self.costs.backward_begins([SimpleNamespace(device=SimpleNamespace(type=device))])
        self.costs.enter("backward")
        self.works(seconds, **memory)
        self.costs.backward_ended()
        self.costs.leave()

    def step(self, seconds: float, number: int = 0, index: int = 0, **memory: int) -> None:
        self.costs.pause()
        self.costs.enter("optimizer", number)
        self.works(seconds, **memory)
        self.ends(number, index)

    def ends(self, number: int = 0, index: int = 0) -> None:
        self.costs.pause()
        self.costs.stepped(number, index)
        self.costs.leave()

    def written(self) -> dict[str, Any]:
        self.costs.close()
        assert self.problems == []
        assert len(self.emitted) == 1
        return self.emitted[0]

    def seconds(self) -> list[dict[str, float]]:
        return [step["seconds"] for step in self.written()["steps"]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def test_a_plain_loop(fake: Fake) -> None:
    for i in range(2):
        fake.data(1)
        fake.works(2)
        fake.backward(3)
        fake.works(4)
        fake.step(5, index=i)
        fake.works(6)
    assert fake.seconds() == [
        {"data": 1, "forward": 2, "backward": 3, "other": 4, "optimizer": 5},
        {"other": 10, "data": 1, "forward": 2, "backward": 3, "optimizer": 5},
    ]
    assert [s["backwards"] for s in fake.emitted[0]["steps"]] == [1, 1]


def test_batches_fetched_ahead_and_an_evaluation_are_no_forward(fake: Fake) -> None:
    fake.data(1)
    fake.data(1)
    for _ in range(2):
        fake.works(2)
        fake.backward(3)
    fake.step(5)
    fake.data(1)
    fake.works(100)  # an evaluation: no backward follows
    fake.data(1)
    fake.works(2)
    fake.backward(3)
    fake.step(5)
    assert fake.seconds() == [
        {"data": 2, "other": 0, "forward": 4, "backward": 6, "optimizer": 5},
        {"other": 100, "data": 2, "forward": 2, "backward": 3, "optimizer": 5},
    ]


def test_without_a_loader_the_forward_hook_tells_where_it_begins(fake: Fake) -> None:
    fake.backward(1)
    fake.step(1)
    fake.works(7)  # makes the batch
    fake.costs.forward_begins()
    fake.works(1)
    fake.costs.forward_begins()  # a second model of the same loss
    fake.works(1)
    fake.backward(3)
    fake.step(5)
    assert fake.seconds()[1] == {"other": 7, "forward": 2, "backward": 3, "optimizer": 5}


def test_a_closure_inside_the_step(fake: Fake) -> None:
    for i in range(2):
        fake.costs.pause()
        fake.costs.enter("optimizer", 0)
        fake.works(1)
        fake.costs.pause()
        fake.costs.enter(None)
        fake.works(2)
        fake.backward(3)
        fake.works(4)
        fake.costs.pause()
        fake.costs.leave()
        fake.works(5)
        fake.ends(index=i)
    assert fake.seconds()[1] == {"other": 4, "optimizer": 6, "forward": 2, "backward": 3}


def test_a_step_inside_a_step(fake: Fake) -> None:
    """Sharpness-aware minimization: the outer optimizer's step calls that of the inner one."""
    fake.backward(1)
    fake.costs.pause()
    fake.costs.enter("optimizer", 0)
    fake.works(2)
    fake.step(3, number=1)
    fake.works(4)
    fake.ends(number=0)
    fake.works(1)
    fake.backward(1)
    assert fake.seconds() == [{"backward": 1, "other": 0, "optimizer": 5}, {"optimizer": 4}]


def test_a_step_that_an_exception_left_does_not_shift_what_follows(fake: Fake) -> None:
    fake.backward(1)
    fake.costs.pause()
    fake.costs.enter("optimizer", 0)
    fake.works(50)
    for i in range(2):
        fake.works(2)
        fake.backward(3)
        fake.step(5, index=i)
    written = fake.written()["steps"]
    assert [s["whole"] for s in written] == [False, True]
    assert written[1]["seconds"] == {"forward": 2, "backward": 3, "other": 0, "optimizer": 5}


def test_a_backward_that_raised(fake: Fake) -> None:
    fake.works(1)
    fake.costs.backward_begins([SimpleNamespace(device=SimpleNamespace(type="cpu"))])
    fake.costs.enter("backward")
    fake.works(9)
    fake.costs.failed()
    fake.works(2)
    fake.backward(3)
    fake.step(5)
    assert fake.written()["steps"][0]["whole"] is False
    assert fake.seconds()[0] == {"forward": 2, "backward": 3, "other": 0, "optimizer": 5}


def test_other_threads_are_not_measured(fake: Fake) -> None:
    fake.backward(1)
    thread = threading.Thread(target=fake.data, args=(10,))
    thread.start()
    thread.join()
    fake.step(1)
    assert fake.seconds() == [{"backward": 1, "other": 10, "optimizer": 1}]


def test_the_peak_is_of_the_phase_that_passed_it_last(fake: Fake) -> None:
    fake.data(1)
    fake.works(1, holds=150)
    fake.backward(1, holds=120, reaches=200)
    fake.step(1, holds=140, reaches=180)
    fake.works(1, holds=190)
    fake.backward(1, holds=160, reaches=230)
    fake.step(1, index=1, reaches=300)
    written = fake.written()
    assert (written["peak_bytes"], written["peak_phase"], written["peak_step"]) == (300, "optimizer", 1)
    assert written["before_bytes"] == 100
    assert written["memory_of"] == "process"
    assert {m["phase"]: m["peak_bytes"] for m in written["memory"]} == {
        "data": None, "forward": 150, "backward": 230, "other": None, "optimizer": 300
    }  # fmt: skip
    assert written["step_temporary_bytes"] == 140
    # The first step lay below the backward before it: only its edges are known.
    assert next(m for m in written["memory"] if m["phase"] == "forward")["at_least_bytes"] == 190


def test_what_the_recorder_needs_is_nobodys_phase(fake: Fake) -> None:
    fake.data(1)
    fake.costs.pause()
    fake.peak = 500
    fake.costs.go()
    fake.backward(1)
    fake.step(1)
    assert fake.written()["peak_phase"] == "trainlint"


def test_a_gpu_is_timed_by_events_of_its_stream(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device: events that have not come to pass yet are read later, the last at the end."""
    torch = pytest.importorskip("torch")
    device = {"now": 0.0, "done": -1.0}
    waited = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "the stream"
            self.at = device["now"]

        def query(self) -> bool:
            return self.at <= device["done"]

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    monkeypatch.setattr(measure, "device_memory", lambda device: (10, 20))
    monkeypatch.setattr(measure, "reserved_memory", lambda device: 30)
    fake.data(1)
    fake.backward(1, "cuda")
    fake.step(1)
    for i in (1, 2):
        device["now"] += 2
        fake.backward(0.1, "cuda")
        device["now"] += 3
        fake.step(0.1, index=i)
        assert waited == []
    written = fake.written()
    assert waited
    assert written["clock"] == "device"
    assert (written["memory_of"], written["peak_bytes"], written["reserved_bytes"]) == ("device", 20, 30)
    assert written["steps"][2]["seconds"] == {"forward": 2, "backward": 0, "other": 3, "optimizer": 0}


def test_an_error_of_the_measurement_ends_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no such file")

    monkeypatch.setattr(measure, "process_memory", broken)
    fake.backward(1)
    fake.step(1)
    assert len(fake.problems) == 1
    assert fake.costs.closed


def test_so_many_steps_and_no_more(fake: Fake) -> None:
    for i in range(STEPS + 10):
        fake.backward(1)
        fake.step(1, index=i)
    assert len(fake.seconds()) == STEPS


def test_a_watched_program(tmp_path: Path) -> None:
    recording = watch(
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        net = torch.nn.Linear(64, 64)
        opt = torch.optim.LBFGS(net.parameters(), max_iter=2)
        adam = torch.optim.AdamW(net.parameters())
        for x, in DataLoader(TensorDataset(torch.randn(64, 64)), 8):
            def closure():
                opt.zero_grad()
                loss = net(x).pow(2).mean()
                loss.backward()
                return loss
            opt.step(closure)
            closure()
            adam.step()
        """,
        tmp_path,
    )
    costs = recording.costs
    assert costs is not None
    assert recording.problems == ()
    assert [(s.optimizer, s.index) for s in costs.steps] == [(i % 2, i // 2) for i in range(6)]
    for step in costs.steps[2:]:
        assert set(step.seconds) >= {"forward", "backward", "optimizer", "other"}
        assert all(seconds >= 0 for seconds in step.seconds.values())
    assert [s.backwards >= 1 for s in costs.steps] == [True] * 6
    assert (costs.device, costs.clock, costs.memory_of) == ("cpu", "wall", "process")
    assert costs.peak_bytes is not None
    assert costs.own_s is not None
