"""When to stop: counts the optimizer steps of this process and parks it when enough were seen."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from . import config_access
from .boundary import Boundary
from .core import Recorder
from .costs import Costs

#: A program whose optimizers step at different rates (a GAN's critic) is watched until the slowest has made its steps,
#: but no longer than this many times the wanted steps of the fastest.
PATIENCE = 10
#: An optimizer that was built and has not stepped may yet do so; how many times the wanted steps to wait for it.
IDLE_PATIENCE = 2


class Session:
    """What the torch instruments of one process share."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        #: Optimizer number -> steps made in the watch.
        self.steps: dict[int, int] = {}
        #: Optimizers that were constructed, by number.
        self.constructed: set[int] = set()
        self.backwards = 0
        self.batches = 0
        self.done = False
        self.training_thread = threading.main_thread().ident
        #: Most steps of one optimizer when the watch was complete.
        self.made_in_watch = 0
        #: What follows the wanted steps: the end of the epoch.
        self.boundary = Boundary(self)
        #: Called once when the wanted steps were made, to write what is only known then.
        self.closers: list[Callable[[], None]] = []
        self._closed = False
        #: Time and memory of the steps.
        self.costs = Costs(self)
        self.closers.append(self.costs.close)
        #: Set by the instruments that others ask: ``modules.Modules``, ``optimizers.Optimizers``.
        self.modules: Any = None
        self.optimizers: Any = None
        self.schedulers: Any = None
        #: ``batches.Inputs``: what the model was given lately.
        self.inputs: Any = None
        #: Path of the last checkpoint file that was read.
        self.last_loaded: str | None = None
        #: Scale that a GradScaler put on the losses since its last update, and whether it was taken off again.
        self.loss_scale: float | None = None
        self.unscaled = False

    # -- counting

    def stepped(self, optimizer: int) -> None:
        """Count one step of an optimizer and decide whether the watch is complete."""
        self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        self.boundary.stepped(optimizer)
        if self.boundary.began is not None:
            config_access.flush(self.recorder)
            self._require_supervisor()
            return
        wanted = self.recorder.settings.steps
        fewest, most = min(self.steps.values()), max(self.steps.values())
        idle = bool(self.constructed - set(self.steps))
        enough = fewest >= wanted and (not idle or most >= IDLE_PATIENCE * wanted)
        if not self.done and (enough or most >= PATIENCE * wanted):
            self.done = True
        self.made_in_watch = most
        self.recorder.mark(
            "step", optimizer=optimizer, index=self.steps[optimizer] - 1, done=self.done, pid=os.getpid(), rank=rank()
        )
        if self.done:
            self.close()
        else:
            config_access.flush(self.recorder)
        self._require_supervisor()

    def _require_supervisor(self) -> None:
        supervisor = self.recorder.settings.supervisor
        if supervisor and not alive(supervisor):
            # Nobody is left to end this program: it must not train on unwatched.
            os._exit(1)

    def close(self) -> None:
        """Write what is only known at the end. Safe to call more than once; the last state wins."""
        with self.recorder.working():
            if self.boundary.began is not None:
                try:
                    self.boundary.before_close()
                except Exception as error:
                    self.recorder.problem("closing the boundary", error)
            for closer in self.closers:
                try:
                    closer()
                except Exception as error:
                    self.recorder.problem(f"closing {getattr(closer, '__qualname__', closer)}", error)
            config_access.flush(self.recorder)
            self.recorder.flush_later()
        self.recorder.mark("closed", pid=os.getpid(), rank=rank())
        self._closed = True

    def reopen(self) -> None:
        """The boundary begins: what is written from here on is not part of the watch."""
        self._closed = False
        self.recorder.count_anew()

    # -- parking

    def activity(self) -> None:
        """A backward begins: with the watch complete, the end of the epoch is next, or the program is parked here."""
        if threading.get_ident() == self.training_thread:
            self.boundary.backward()

    def park(self, reason: str) -> None:
        """Flush, tell the supervisor, and sleep until this process is killed. No user code runs after this."""
        if not self._closed or reason != "steps":
            self.close()
        sleep_until_killed(self.recorder, reason)


def sleep_until_killed(recorder: Recorder, reason: str) -> NoReturn:
    """Tell the supervisor that this process is parked, and sleep: no user code runs after this."""
    recorder.mark("parked", reason=reason, pid=os.getpid(), rank=rank())
    supervisor = recorder.settings.supervisor
    while True:
        try:
            time.sleep(0.25)
            if supervisor and not alive(supervisor):
                os._exit(1)
        except BaseException:  # a signal handler of the program's must not wake it
            continue


def rank() -> int:
    """Rank of this process in the distributed job, 0 when there is none."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
    except Exception:
        pass
    return 0


def world_size() -> int:
    """Number of processes of the distributed job."""
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_world_size())
    except Exception:
        pass
    value = os.environ.get("WORLD_SIZE", "")
    return int(value) if value.isdigit() else 1


def alive(pid: int) -> bool:
    """Whether a process exists (a zombie counts as gone)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[:1] != [b"Z"]
    except OSError:
        return True
