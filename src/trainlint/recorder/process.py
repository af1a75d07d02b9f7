"""The process itself: tells the supervisor when it starts, fails and finishes."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from types import TracebackType

from .core import Recorder
from .patching import ImportHooks


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """``armed`` now; ``error`` when an exception ends the program; ``finished`` at a normal interpreter exit."""
    recorder.mark("armed", pid=os.getpid(), ppid=os.getppid(), argv=[str(a) for a in sys.orig_argv][:64])
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
            recorder.mark("error", type=kind.__name__, text=str(error)[:2000], traceback=lines[-60:], pid=os.getpid())
        except Exception:
            pass
        previous(kind, error, trace)

    sys.excepthook = excepthook
    atexit.register(lambda: recorder.mark("finished", pid=os.getpid()))
