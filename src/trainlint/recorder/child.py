"""Work in a forked child of the watched process: a copy of everything it holds, and nothing it does comes back.

Random number generators, caches and datasets of the program stay as they are, whatever the child draws from them; files
are guarded in it as in any process of the program. The child writes its results to a pipe as it finds them, and is
ended with all its own workers when its time is up.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

#: Writes one result.
Tell = Callable[[Any], None]
#: Of its own memory, a larger process is not copied: the page tables of 4 GB already take 0.2 s.
MOST_BYTES = 24 << 30


def possible() -> str:
    """Why no child can be forked here; empty when one can."""
    if not hasattr(os, "fork") or not sys.platform.startswith("linux"):
        return "this platform cannot copy a running process"
    if sys.is_finalizing():
        return "the program was at its end"
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except (OSError, ValueError):
        return ""
    if (resident - shared) * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        return "the process holds too much memory to be copied in short"
    return ""


def run(work: Callable[[Tell], None], limit_s: float) -> tuple[list[Any], str]:
    """What ``work`` told before it was done or its time was up, and why it is not all (empty when it is).

    Never raises for what happens in the child.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads; the program's own loaders fork all the same
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            return [], f"no child process could be started: {error.strerror}"
    if pid == 0:
        _live(work, writing, limit_s)
    os.close(writing)
    try:
        data, ended = _read(reading, time.monotonic() + limit_s)
    finally:
        os.close(reading)
        _end(pid)
    told = []
    for line in data.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            told.append(json.loads(line))
    last = told[-1] if told else None
    if isinstance(last, dict) and "done" in last:
        return told[:-1], str(last["done"])
    return told, "the child process died" if ended else f"it took longer than {limit_s:.1f} s"


def _live(work: Callable[[Tell], None], writing: int, limit_s: float) -> None:
    """The child's whole life. It never returns into the program's code."""
    try:
        gc.disable()  # no finalizer of the program's runs here
        os.setpgid(0, 0)
        _follow_parent(limit_s)
        sink = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(sink, fd)

        def tell(result: Any) -> None:
            data = json.dumps(result).encode() + b"\n"
            while data:
                data = data[os.write(writing, data) :]

        why = ""
        try:
            import torch

            torch.set_num_threads(1)  # the parent's thread pool did not come along
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work(tell)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
        tell({"done": why})
    except BaseException:
        pass
    finally:
        os._exit(0)


def _follow_parent(limit_s: float) -> None:
    """The child goes when its parent does, and at the latest a second after its time."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, OSError):
            signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit_s + 1.0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _read(reading: int, deadline: float) -> tuple[bytes, bool]:
    """All that comes until the last line, the end or the deadline; whether the other side is gone."""
    data = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return data, False
        ready, _, _ = select.select([reading], [], [], left)
        if not ready:
            return data, False
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            return data, True
        data += chunk
        if data.endswith(b"\n") and b'"done"' in data[data[:-1].rfind(b"\n") + 1 :]:
            return data, False


def _end(pid: int) -> None:
    """Kill what is left of the child and its workers, and wait until it is gone."""
    for kill, target in ((os.killpg, pid), (os.kill, pid)):
        with contextlib.suppress(OSError):
            kill(target, signal.SIGKILL)
    while True:
        try:
            os.waitpid(pid, 0)
            return
        except InterruptedError:
            continue
        except ChildProcessError:
            return  # a handler of the program's waited for it
