"""The processes of a watched program: found however they were started, and ended so that none is left.

A process group is not enough: torchrun puts its workers into sessions of their own, and a daemon leaves its parent. A
process belongs to the program when it descends from the one that was started, when it was once seen to, or when its
environment carries the run's id.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

_PROC = sys.platform.startswith("linux")


@dataclass(frozen=True)
class Process:
    """``started`` tells a process from a later one with the same id; ``zombie``: dead, not yet waited for."""

    pid: int
    ppid: int
    started: str
    zombie: bool


def snapshot() -> dict[int, Process]:
    """All processes of the machine that can be seen, by id."""
    return _from_proc() if _PROC else _from_ps()


def _from_proc() -> dict[int, Process]:
    found: dict[int, Process] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            process = look(int(name))
            if process is not None:
                found[process.pid] = process
    return found


def look(pid: int) -> Process | None:
    """One process, or ``None`` when it is gone."""
    if not _PROC:
        return _from_ps().get(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold blanks and parentheses.
            fields = file.read().rpartition(b")")[2].split()
        return Process(pid, int(fields[1]), fields[19].decode(), fields[0] in (b"Z", b"X"))
    except (OSError, IndexError, ValueError):
        return None


def _from_ps() -> dict[int, Process]:
    found: dict[int, Process] = {}
    try:
        lines = subprocess.run(
            ["ps", "-axo", "pid=,ppid=,stat=,lstart="], capture_output=True, text=True, timeout=10, check=False
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return found
    for line in lines:
        fields = line.split(None, 3)
        if len(fields) == 4 and fields[0].isdigit() and fields[1].isdigit():
            found[int(fields[0])] = Process(int(fields[0]), int(fields[1]), fields[3], fields[2].startswith("Z"))
    return found


def environment_of(pid: int) -> dict[bytes, bytes]:
    """The environment that a process was started with; empty when it may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
            return {name: value for name, _, value in pairs}
    except OSError:
        return {}


class Tree:
    """The processes of one run.

    Args:
        root: process id of the program that was started.
        run_id: value of ``TRAINLINT_RUN_ID`` in its environment.
    """

    def __init__(self, root: int, run_id: str) -> None:
        self.root = root
        self._mark = b"TRAINLINT_RUN_ID=" + run_id.encode()
        #: Everything that ever belonged: a daemon is adopted by init, and an exec may drop the environment.
        self._seen: dict[int, str] = {}
        #: Process id -> (start, belongs): environments do not change, so each is read once.
        self._read: dict[int, tuple[str, bool]] = {}
        first = look(root)
        if first is not None:
            self._seen[root] = first.started

    def members(self) -> list[Process]:
        """The living processes of the run; never this one."""
        everything = snapshot()
        children: dict[int, list[int]] = {}
        for process in everything.values():
            children.setdefault(process.ppid, []).append(process.pid)
        marked = self._marked_by_ps() if not _PROC else frozenset()
        todo = [
            pid
            for pid, process in everything.items()
            if pid == self.root or self._seen.get(pid) == process.started or pid in marked or self._carries(process)
        ]
        members: dict[int, Process] = {}
        while todo:
            pid = todo.pop()
            if pid in members or pid == os.getpid() or pid not in everything:
                continue
            members[pid] = everything[pid]
            todo.extend(children.get(pid, ()))
        for pid, process in members.items():
            self._seen[pid] = process.started
        return [process for process in members.values() if not process.zombie]

    def _carries(self, process: Process) -> bool:
        known = self._read.get(process.pid)
        if known is not None and known[0] == process.started and known[1]:
            return True
        # Read again while it does not belong: between fork and exec a process still has its parent's environment.
        try:
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                belongs = self._mark in file.read().split(b"\0")
        except OSError:
            belongs = False
        self._read[process.pid] = (process.started, belongs)
        return belongs

    def _marked_by_ps(self) -> frozenset[int]:
        try:
            lines = subprocess.run(
                ["ps", "-axEww", "-o", "pid=,command="], capture_output=True, timeout=10, check=False
            ).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return frozenset()
        return frozenset(int(line.split(None, 1)[0]) for line in lines if self._mark in line)

    def end(self, patience_s: float = 10.0) -> list[int]:
        """End every process of the run without letting any of it run on; ids of those that could not be ended.

        The launcher is stopped first, so that it does not react to its workers' death (restart them, write error
        files), then all are stopped, then killed, until a look finds none.
        """
        deadline = time.monotonic() + patience_s
        send([self.root] if self._is_ours(self.root) else [], signal.SIGSTOP)
        while True:
            members = self.members()
            if not members:
                return []
            pids = [process.pid for process in members]
            send(pids, signal.SIGSTOP)
            # Those that were forked between the look and the stop.
            pids += [process.pid for process in self.members()]
            send(pids, signal.SIGKILL)
            if time.monotonic() > deadline:
                return sorted({process.pid for process in self.members()})
            time.sleep(0.005)

    def _is_ours(self, pid: int) -> bool:
        process = look(pid)
        return process is not None and self._seen.get(pid) == process.started


def send(pids: Iterable[int], number: int) -> None:
    """Signal processes; those that are gone or not ours to signal are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError:
            continue
