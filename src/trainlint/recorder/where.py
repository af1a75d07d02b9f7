"""Lets the supervisor ask where the program is, also when it hangs in C code and Python runs no handler."""

from __future__ import annotations

import faulthandler
import os
import signal

from .core import Recorder
from .patching import ImportHooks

#: A real-time signal: programs and schedulers use USR1 and USR2. The file's name tells the supervisor which.
SIGNAL = int(signal.SIGRTMAX) - 3 if hasattr(signal, "SIGRTMAX") else int(signal.SIGUSR2)
#: Above what a program that closes or counts file descriptors looks at.
_HIGH_FD = 200


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """On ``SIGNAL``, write the stacks of all threads to ``stream/where-<pid>-<signal>.txt``."""
    path = os.path.join(recorder.settings.run_dir, "stream", f"where-{os.getpid()}-{SIGNAL}.txt")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        import fcntl

        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
        os.close(fd)
        fd = high
    except (OSError, ImportError):
        pass
    faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)
