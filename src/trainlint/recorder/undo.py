"""The journal of what a watched program did to files: one line per act, on disk before the act.

All processes of one run append to ``<run_dir>/journal.jsonl``; the supervisor undoes it from the last line to the first
(``launch/journal.py``), also after its own death. A line is a JSON object; ``op`` says what it is:

``create``   ``path`` did not exist before (``kind``: ``f`` or ``d``); removed afterwards unless ``stay`` (a cache).
``keep``     what stood at ``path`` goes to ``aside`` (``how``: ``swap``, ``link``, ``tree``, ``dir``) and is put back.
``kept``     the same has been done: only from here on ``path`` belongs to the run.
``move``     ``src`` was renamed to ``dst``; renamed back afterwards.
``size``     ``path`` is written in place beyond ``size``; truncated afterwards and given back its ``times``.
``meta``     ``mode``, owner and ``times`` of ``path`` before they were changed.
``rmdir``    an empty directory that could only be removed for good, not set aside; made again afterwards.
``aside``    a folder for kept files outside the run folder, on the file system of what it keeps.
``closing``  written by the supervisor: the undoing has begun, nobody may act any more.

``ino`` is ``[st_dev, st_ino]`` of the original, ``pt`` the access and modification time (ns) of the directory it is in.
A line may stand without its act (a process was killed between the two), never the other way round: ``keep`` alone
therefore never makes anything less protected.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from types import TracebackType
from typing import Any

NAME = "journal.jsonl"

Inode = tuple[int, int]


class Closed(Exception):
    """The run is over: its journal is gone or being undone."""


class State:
    """What the journal says of paths, the same in every process that has read the same lines."""

    def __init__(self) -> None:
        #: Paths that this run made (or whose original is safely aside), and so everything below them.
        self.created: set[str] = set()
        #: Paths that an original was moved to: again something to protect, even below a created directory.
        self.moved: set[str] = set()
        #: Originals that are (or were about to be) kept aside.
        self.kept: dict[Inode, str] = {}
        #: Originals that the run gave a further name by a hard link.
        self.linked: set[Inode] = set()
        #: Originals that are written in place beyond this size.
        self.sized: dict[Inode, int] = {}
        self.meta: set[Inode] = set()
        self.asides: set[str] = set()
        self.closing = False

    def ours(self, path: str) -> bool:
        """Whether what stands at ``path`` was made by this run: its nearest ancestor that the journal knows decides."""
        created, moved = self.created, self.moved
        while True:
            if path in moved:
                return False
            if path in created:
                return True
            parent = os.path.dirname(path)
            if parent == path:
                return False
            path = parent

    def holds_moved(self, path: str) -> bool:
        """Whether an original was moved to somewhere below ``path``."""
        below = path.rstrip("/") + "/"
        return any(p.startswith(below) for p in self.moved)

    def apply(self, record: dict[str, Any]) -> None:
        op = record["op"]
        if op == "create":
            path = record["path"]
            self.created.add(path)
            self.moved.discard(path)
            if record.get("kind") == "d":
                self._forget_below(path, created=False)
            if "ino" in record:
                self.linked.add((record["ino"][0], record["ino"][1]))
        elif op == "keep":
            self.kept[(record["ino"][0], record["ino"][1])] = record["aside"]
        elif op == "kept":
            path = record["path"]
            self.created.add(path)
            self.moved.discard(path)
            if record["how"] in ("tree", "dir"):
                self._forget_below(path, created=True)
        elif op == "move":
            src, dst = record["src"], record["dst"]
            # ``src`` stays protected in case the rename fails: a later ``create`` there says that it did not.
            self._forget_below(dst, created=True)
            below = src.rstrip("/") + "/"
            for paths in (self.created, self.moved):
                paths.update([dst + p[len(src) :] for p in paths if p.startswith(below)])
            self.created.discard(dst)
            if not record.get("ours"):
                self.moved.add(dst)
            else:
                self.created.add(dst)
        elif op == "size":
            self.sized[(record["ino"][0], record["ino"][1])] = record["size"]
        elif op == "meta":
            self.meta.add((record["ino"][0], record["ino"][1]))
        elif op == "aside":
            self.asides.add(record["path"])
        elif op == "closing":
            self.closing = True

    def _forget_below(self, path: str, created: bool) -> None:
        below = path.rstrip("/") + "/"
        for paths in (self.moved, self.created) if created else (self.moved,):
            stale = [p for p in paths if p.startswith(below)]
            paths.difference_update(stale)


class Journal:
    """The journal as one process sees it. Use it as a context manager: inside, no other process of the run acts.

    On entry the lines of other processes are read, so :attr:`state` is up to date.

    Raises:
        Closed: on entry, when the run is over.
        OSError: the journal cannot be opened, read or locked.
    """

    def __init__(self, run_dir: str) -> None:
        self.path = os.path.join(run_dir, NAME)
        self.state = State()
        # The run's own scratch place is the program's to use.
        self.state.created.update(os.path.join(run_dir, name) for name in ("scratch", "shims"))
        self._fd = -1
        self._read = 0
        self._rest = b""
        self._lock = threading.RLock()

    def __enter__(self) -> State:
        self._lock.acquire()
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._refresh()
        except BaseException:
            self._lock.release()
            raise
        return self.state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._lock.release()

    def write(self, record: dict[str, Any], durable: bool) -> None:
        """Append one line (inside the context) and take it into :attr:`state`.

        ``durable``: it must survive a power cut before this returns, because data depends on it.
        """
        data = (json.dumps(record, separators=(",", ":")) + "\n").encode("ascii")
        if os.write(self._fd, data) != len(data):
            os.write(self._fd, b"\n")  # a torn line must not swallow the next
            raise OSError(28, "no room for the journal", self.path)
        self._read += len(data)
        if durable:
            os.fdatasync(self._fd)
        self.state.apply(record)

    def after_fork(self) -> None:
        """A forked child shares the parent's lock: it needs an open file description of its own."""
        self._lock = threading.RLock()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _refresh(self) -> None:
        st = os.fstat(self._fd)
        if st.st_nlink == 0:
            raise Closed
        if st.st_size > self._read:
            data = self._rest
            while self._read < st.st_size:
                chunk = os.pread(self._fd, st.st_size - self._read, self._read)
                if not chunk:
                    break
                self._read += len(chunk)
                data += chunk
            lines = data.split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                try:
                    record = json.loads(line)
                    self.state.apply(record)
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a kill or a power cut
        if self.state.closing:
            raise Closed
