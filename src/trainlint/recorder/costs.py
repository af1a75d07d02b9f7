"""What a step costs: time and memory by phase, without the recorder's own work.

The instruments tell where a phase begins and ends: :meth:`Costs.pause` when they take over, :meth:`Costs.go` when the
program goes on. In between the program's clock stands still. On a CUDA device the clock is events in its stream, which
are read after the recorder has read numbers of that step anyway: nothing here waits for a device. Peaks of memory are
read off counters that the program may use as well, so they are never reset: a phase's peak is known when the highest
value so far was passed in it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import measure
from .core import Recorder

if TYPE_CHECKING:
    from .watch import Session

F = TypeVar("F", bound=Callable[..., None])

#: Steps whose costs are kept, and edges at which memory is read.
STEPS = 64
EDGES = 2000

#: A moment: seconds on the program's own clock, and an event in the stream of the device.
Moment = tuple[float, Any]


def _training_thread(method: F) -> F:
    """Nothing is measured in other threads, after the end, or after an error."""

    @functools.wraps(method)
    def call(self: Costs, *args: Any, **kwargs: Any) -> None:
        if self.closed or threading.get_ident() != self.session.training_thread:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.closed = True
            self.recorder.problem(f"measuring costs ({method.__name__})", error)

    return call  # type: ignore[return-value]


class Memory:
    """The memory of the process, or of one CUDA device."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        #: Phase -> most at its edges, and the last of the highest values so far that were passed in it.
        self.held: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.peak: int | None = None
        self.phase = "before"
        self.step: int | None = None
        self.before: int | None = None
        self.temporary: int | None = None
        self._current: int | None = None
        self._edges = 0

    def _read(self) -> tuple[int | None, int | None]:
        self._edges += 1
        if self._edges > EDGES:
            return None, None
        return measure.device_memory(self.device) if self.device is not None else measure.process_memory()

    def ended(self, phase: str, step: int) -> None:
        """A stretch of the program's own work in this phase ends."""
        current, peak = self._read()
        if current is not None:
            self.held[phase] = max(self.held.get(phase, 0), current, self._current or 0)
        if self._passed(peak, phase, step):
            assert peak is not None
            self.peaks[phase] = peak
            self.held[phase] = max(self.held.get(phase, 0), peak)
            if phase == "optimizer" and current is not None and self._current is not None:
                self.temporary = max(self.temporary or 0, peak - max(current, self._current))

    def goes_on(self, step: int) -> None:
        """The recorder's work, or what came before the training, ends."""
        self._current, peak = self._read()
        if self.before is None:
            self.before = self.peak = peak
        else:
            self._passed(peak, "trainlint", step)

    def _passed(self, peak: int | None, phase: str, step: int) -> bool:
        if peak is None or (self.peak is not None and peak <= self.peak):
            return False
        self.peak, self.phase, self.step = peak, phase, step
        return True

    def payload(self) -> dict[str, Any]:
        return {
            "memory_of": "process" if self.device is None else "device",
            "memory": [
                {"phase": phase, "at_least_bytes": held, "peak_bytes": self.peaks.get(phase)}
                for phase, held in self.held.items()
            ],
            "peak_bytes": self.peak,
            "peak_phase": self.phase,
            "peak_step": self.step,
            "before_bytes": self.before,
            "step_temporary_bytes": self.temporary,
            "reserved_bytes": None if self.device is None else measure.reserved_memory(self.device),
        }


class Costs:
    """The phases of the thread that trains, until the watch is complete."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.memory = Memory()
        self.closed = False
        #: Where the loss is; ``None`` before the first backward.
        self._device: Any = None
        #: Phases around the present one, outermost first, with what began them.
        self._around: list[tuple[str | None, Any]] = []
        #: The present phase. ``None``: to be told by what comes next.
        self._phase: str | None = None
        self._since: Moment | None = None
        #: Phase and the two ends of each stretch of this step; steps whose events were not read yet.
        self._stretches: list[tuple[str, Moment, Moment]] = []
        self._waiting: list[tuple[dict[str, Any], list[tuple[str, Moment, Moment]]]] = []
        self._steps: list[dict[str, Any]] = []
        self._backwards = 0
        self._forward = False
        self._whole = True
        self._graphs = 0
        self._made = 0
        self._own: float | None = None

    # -- what the instruments tell

    @_training_thread
    def pause(self, undecided: str = "other") -> None:
        """The program's work stops here; what it did last was ``undecided``, unless that is known already."""
        since, self._since = self._since, None
        if since is None:
            return
        phase = self._phase or undecided
        self._stretches.append((phase, since, self._now()))
        self.memory.ended(phase, self._made)

    @_training_thread
    def go(self) -> None:
        """The program goes on in the phase that it was in."""
        if self._own is None:
            self._own = self.recorder.own_seconds()
        self.memory.goes_on(self._made)
        self._since = self._now()

    @_training_thread
    def enter(self, phase: str | None, key: Any = None) -> None:
        """The program goes on in a phase of its own, inside the present one. ``None``: a closure, of any phases."""
        keys = [k for _, k in self._around]
        if key is not None and key in keys:  # it was left by an exception
            self._whole = False
            where = keys.index(key)
            self._phase, _ = self._around[where]
            del self._around[where:]
        self._around.append((self._phase, key))
        self._phase = phase
        self.go()

    @_training_thread
    def leave(self) -> None:
        """The program goes on in the phase around the one that ended."""
        if self._around:
            self._phase, _ = self._around.pop()
        self.go()

    @_training_thread
    def failed(self) -> None:
        """The program's work ended in an exception."""
        self._whole = False
        if self._around:
            self._phase, _ = self._around.pop()
        self._stretches.clear()
        self.go()

    @_training_thread
    def forward_begins(self) -> None:
        """The first forward since the last backward: what came before made the batch."""
        if not self._forward and not measure.capturing():
            self._forward = True
            self.pause()
            self.go()

    @_training_thread
    def backward_begins(self, tensors: Any) -> None:
        """``tensors``: what is differentiated, one or several."""
        self.pause("forward")
        if self._device is None:
            first = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else tensors
            if hasattr(first, "device"):
                self._look(first.device)

    @_training_thread
    def backward_ended(self) -> None:
        self.pause()
        self._backwards += 1
        self._forward = False

    @_training_thread
    def stepped(self, optimizer: int, index: int) -> None:
        """A step is over, and numbers of the device were read since."""
        stretches, self._stretches = self._stretches, []
        graphs = compiled_graphs()
        step = {
            "optimizer": optimizer,
            "index": index,
            "backwards": self._backwards,
            "compiled": graphs != self._graphs,
            "whole": self._whole,
        }
        self._waiting.append((step, stretches))
        self._graphs, self._backwards, self._whole, self._forward = graphs, 0, True, False
        self._made += 1
        self._settle()
        if self._made >= STEPS:
            self.close()

    def close(self) -> None:
        """Write what was measured. Nothing is measured after it."""
        if self.closed:
            return
        self.closed = True
        self._settle(last=True)
        if not self._steps and self._device is None:
            return
        own = self.recorder.own_seconds() - self._own if self._own is not None else None
        self.recorder.emit(
            "costs",
            {
                "device": str(self._device) if self._device is not None else "",
                "clock": "device" if self._on_cuda() else "wall",
                "no_phases": self._no_phases(),
                "steps": self._steps,
                "own_s": own,
                **self.memory.payload(),
            },
        )

    # -- inside

    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _no_phases(self) -> str:
        if self._device is None or self._device.type in ("cpu", "cuda"):
            return ""
        return f"{self._device.type} works on its own, and its clock is not read"

    def _look(self, device: Any) -> None:
        """Now it is known which device the program trains on."""
        self._device = device
        if device.type == "cuda":
            self.memory = Memory(device)

    def _now(self) -> Moment:
        event = None
        if self._on_cuda():
            import torch

            stream = torch.cuda.current_stream(self._device)
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return self.recorder.program_seconds(), event

    def _settle(self, *, last: bool = False) -> None:
        """Sum up the steps whose events have come to pass."""
        while self._waiting:
            step, stretches = self._waiting[0]
            ends = [end for _, _, (_, end) in stretches if end is not None]
            if ends and not ends[-1].query():
                if not last:
                    return
                ends[-1].synchronize()
            self._waiting.pop(0)
            seconds: dict[str, float] = {}
            for phase, begin, end in stretches:
                seconds[phase] = seconds.get(phase, 0.0) + _between(begin, end)
            self._steps.append({**step, "seconds": {k: round(v, 7) for k, v in seconds.items()}})


def _between(begin: Moment, end: Moment) -> float:
    if begin[1] is not None and end[1] is not None:
        return float(begin[1].elapsed_time(end[1])) / 1e3
    return end[0] - begin[0]


def compiled_graphs() -> int:
    """Graphs that torch.compile has built so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    counters = getattr(utils, "counters", None)
    if counters is None:
        return 0
    stats = counters.get("stats")  # a defaultdict: looking must not add to it
    return int(stats.get("unique_graphs", 0)) if stats else 0
