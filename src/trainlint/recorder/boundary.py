"""Across the end of an epoch: once the wanted steps are made, the training data runs dry early.

The program then goes through whatever it does between two epochs (schedulers, evaluation, callbacks, checkpoints) and
begins the next one within seconds. Everything from the ``boundary`` line of the stream on belongs to this part; what
was recorded before it is not touched any more. The length that loaders report stays what it was.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from . import expects_end
from .passes import Pass, Passes

if TYPE_CHECKING:
    from .watch import Session

#: It may cost as long as the watch up to then, but at least and at most this long.
LEAST_S = 3.0
MOST_S = 60.0
#: Optimizer steps to see in the next epoch: two, so that one whole interval lies between them.
NEXT_STEPS = 2
#: Where optimizers step at different rates, the fastest makes at most this many times as many.
PATIENCE = 4
#: Batches that a loader opened after the watch delivers without a backward: enough for an evaluation to be one, and for
#: a loader that is read one batch ahead to be recognised as feeding the training.
EVALUATION_BATCHES = 2
#: Steps to wait for the training to ask its loader again (data read far ahead, several steps per batch).
WAIT_STEPS = 10


class EpochEnd(Protocol):
    """A framework that counts batches by itself and so must be told that an epoch is over."""

    def batches_left(self, loader: int) -> int | None:
        """Batches of a training loader to deliver before it runs dry; ``None``: not this framework's loader."""

    def refusal(self, loader: int) -> str:
        """Why the epoch of this loader cannot be shortened; empty when it can."""

    def stepped(self) -> None:
        """An optimizer stepped while the data runs dry."""


#: Frameworks that were imported; each adds itself.
EPOCH_ENDS: list[EpochEnd] = []
#: The boundary of this process, for frameworks to tell that their training is over.
current: Boundary | None = None


class Boundary:
    """The end of the epoch, of one process. Begins at the first thing that the program begins after its watch."""

    def __init__(self, session: Session) -> None:
        global current
        current = self
        self.session = session
        self.recorder = session.recorder
        self.passes = Passes()
        self.began: float | None = None
        self._deadline = 0.0
        #: A pass of the training was made to end, and the optimizer's steps since then.
        self._ended = False
        #: A pass opened afterwards feeds the training.
        self._resumed = False
        #: Batches that were read ahead when the data ran dry.
        self._ahead = 0
        self._active: set[int] = set()
        self._steps: dict[int, int] = {}
        self._lock = threading.RLock()
        #: Batches with a backward of their own in the last whole step.
        self.batches_per_step = 1
        self._windows_before = 0

    # -- what the instruments tell, outside of Recorder.quiet: nothing here raises into the program

    def fetching(self, one: Pass) -> bool:
        """A batch is asked for: whether there is none. Parks when the boundary is over or cannot be."""
        return bool(self._safely(self._fetching, one))

    def backward(self) -> None:
        """A backward begins, in the thread that trains."""
        self._safely(self._backward)

    def stepped(self, optimizer: int) -> None:
        """An optimizer made a step."""
        self._safely(self._stepped, optimizer)

    def training_over(self) -> None:
        """A framework's training loop is over: nothing that comes after it is wanted."""
        if self.began is not None:
            self._safely(self._finish, "ended", "the training came to its end with this epoch")

    def _safely(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            self.recorder.problem(f"the epoch boundary ({function.__name__})", error)
            return None

    def _fetching(self, one: Pass) -> bool:
        if not self.session.done:
            return False
        if threading.get_ident() == self.session.training_thread:
            self._reached(one)
        return self.began is not None and self._dry(one)

    def _backward(self) -> None:
        if self.session.done:
            self._reached(None)
        self._fed()

    def _stepped(self, optimizer: int) -> None:
        self._fed()
        if self.began is None:
            self.batches_per_step = max(1, self.passes.windows - self._windows_before)
            self._windows_before = self.passes.windows
            return
        if self._ended or self._resumed:
            self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if self._ended and not self._resumed:
            for framework in EPOCH_ENDS:
                framework.stepped()

    def _fed(self) -> None:
        used = self.passes.backward()
        if used and self.began is not None and used[-1].after_watch and not self._resumed:
            self._resumed = True
            self._steps = {}
            feeding, training = used[-1], self.passes.training()
            # Loaders that are fetched from together; not an evaluation on the training's own loader before.
            begun = [one for one in used if one is feeding or (one.after_watch and one.loader != feeding.loader)]
            first = [one.first_seq for one in begun if one.loader in training and one.first_seq is not None]
            self.recorder.emit("boundary", {"next_epoch": min(first, default=None)})
            self._watch_outsiders_anew()

    # -- beginning

    def _reached(self, one: Pass | None) -> None:
        if self.began is None:
            if one is not None and one.delivered == 0:
                one.after_watch = True
            why = self._refusal(one)
            if why:
                self.recorder.emit("boundary", {"outcome": "left-out", "reason": why})
                self.session.park("steps")
            self._begin(one)
        self._look()

    def _refusal(self, one: Pass | None) -> str:
        if not self.recorder.settings.boundary:
            return "switched off"
        if not self.passes.fed:
            return "no DataLoader feeds the training"
        if self.passes.began_anew():
            return "the training began another pass over its data within the watched steps"
        if self.passes.used < 2 and sum(self.session.steps.values()) > 1:
            return "the steps ask the DataLoader for no new batches"
        for framework in EPOCH_ENDS:
            why = framework.refusal(self.passes.fed[-1].loader)
            if why:
                return why
        return self._surprise(one) if one is not None and self._to_end(one) else ""

    def _surprise(self, one: Pass) -> str:
        """Why ending this pass here would only crash the program."""
        if one.finished:
            return ""
        frame = expects_end.unprepared(sys._getframe(1))
        if frame is None:
            return ""
        return f"{expects_end.describe(frame)} asks for batches with next() and is not prepared for their end"

    def _begin(self, one: Pass | None) -> None:
        now = time.time()
        budget = min(MOST_S, max(LEAST_S, now - self.recorder.settings.started))
        self.began, self._deadline = now, now + budget
        self._active = {n for n, steps in self.session.steps.items() if steps}
        self.session.reopen()
        feeding = one if one is not None and self._to_end(one) else self.passes.fed[-1]
        self.recorder.emit("boundary", {"began": True, "time": now, **_counts(feeding)})
        self.recorder.mark("boundary", budget_s=budget, pid=os.getpid())
        for known in {p.loader: p for p in self.passes.fed}.values():
            self.recorder.emit("loader", known.payload)

    # -- running dry

    def _to_end(self, one: Pass) -> bool:
        """A pass of the training that was under way when the watch was complete."""
        return not one.after_watch and one.delivered > 0 and one.loader in self.passes.training()

    def _dry(self, one: Pass) -> bool:
        with self._lock:
            if one.dry:
                return True
            if one.delivered == 0:
                one.after_watch = True  # opened before, never asked
            if one.after_watch:
                if not one.fed and one.silent >= self._allowance(one):
                    one.dry = True
                return one.dry
            if not self._to_end(one):
                return False
            if one.left is None:
                one.left = self._batches_left(one)
                self._ended = True
                self._ahead = max(self._ahead, one.delivered - one.windows)
                self.recorder.emit("boundary", _counts(one))
            if one.left > 0:
                one.left -= 1
                return False
            if one.finished:
                return False  # it says so itself, and ends its workers
            why = self._surprise(one)
            if why and threading.get_ident() == self.session.training_thread:
                self._finish("left-out", why)
            one.dry = not why
            return one.dry

    def _batches_left(self, one: Pass) -> int:
        """The end comes at once, or where a framework can take it."""
        for framework in EPOCH_ENDS:
            left = framework.batches_left(one.loader)
            if left is not None:
                return left
        return 0

    def _allowance(self, one: Pass) -> int:
        """Batches without a backward: of the training's data as many as are fetched ahead, of others a few."""
        known = one.loader in self.passes.training() or one.dataset in self.passes.datasets()
        return EVALUATION_BATCHES + (self.passes.longest if known else 0)

    # -- ending

    def _look(self) -> None:
        """Park when enough was seen, or when it has taken long enough."""
        assert self.began is not None
        most = max(self._steps.values(), default=0)
        if self._resumed:
            all_made = set(self._steps) >= self._active and min(self._steps.values()) >= NEXT_STEPS
            if all_made or most >= PATIENCE * NEXT_STEPS:
                self._finish("crossed")
        elif self._ended:
            if most >= NEXT_STEPS + 2 + self._ahead:
                self._finish("crossed", "the training went on without opening its loader again")
        elif max((n for n in self.session.steps.values()), default=0) >= self._limit():
            self._finish("left-out", f"the training did not ask its loader again within {WAIT_STEPS} optimizer steps")
        if time.time() > self._deadline:
            self._finish("timeout", f"it was not over after {self._deadline - self.began:.0f} s")

    def _limit(self) -> int:
        return self.session.made_in_watch + WAIT_STEPS

    def _finish(self, outcome: str, reason: str = "") -> None:
        assert self.began is not None
        self.session.close()
        duration = round(time.time() - self.began, 3)
        training = sorted(self.passes.training())
        self.recorder.emit(
            "boundary", {"outcome": outcome, "reason": reason, "duration_s": duration, "training": training}
        )
        self.session.park("steps")

    def before_close(self) -> None:
        """Have the objects written as they are now, not as they were first seen."""
        session = self.session
        session.modules.scan()
        for watched in list(session.optimizers.watched.values()):
            session.optimizers.describe(watched)
        for scheduler in list(session.schedulers.watched.values()):
            # The curve was made at the end of the watch, and making it is what takes time.
            scheduler.snapshot, scheduler.missing = None, "made at the end of the watch"

    def _watch_outsiders_anew(self) -> None:
        """Parameters that became trainable in between: followed from the next step on."""
        optimizers = self.session.optimizers
        optimizers.outsiders = type(optimizers.outsiders)(self.session)


def _counts(one: Pass) -> dict[str, Any]:
    delivered = one.delivered + (one.left or 0)
    return {"loader": one.loader, "batches_delivered": delivered, "batches_meant": one.batches}
