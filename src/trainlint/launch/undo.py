"""Undoes the journal of a watched run, last line first.

Every step may be repeated: it looks at what is there before it acts, and how far the undoing has come is on disk before
anything is put back, so that a file put back is never mistaken for one that the run made. Nothing that was born before
the run is removed, whatever the journal says, and symbolic links are never followed.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import struct
from typing import Any

Record = dict[str, Any]

#: File times come from a clock that may lag behind ``time.time_ns()`` by a timer tick.
_TICK_NS = 50_000_000


class Undoing:
    """One pass over the journal of ``run_dir``. Results are in the attributes after :meth:`run`."""

    def __init__(self, run_dir: str, started_ns: int) -> None:
        self.run_dir = run_dir
        self.restored = 0
        self.removed_files = 0
        self.problems: list[str] = []
        self._started_ns = started_ns
        self._progress = os.path.join(run_dir, "undone")
        self._unsynced_removals = False
        self._originals: set[tuple[int, int]] = set()

    def run(self) -> None:
        self._close_journal()
        records = self._read()
        limit = self._done_down_to()
        self._originals = {
            (r["ino"][0], r["ino"][1])
            for _, r in records
            if r["op"] in ("keep", "move", "size", "meta") and "ino" in r and not r.get("ours")
        }
        for offset, record in reversed(records):
            if limit is not None and offset > limit:
                continue
            step = _STEPS.get(record["op"])
            if step is None:
                continue
            try:
                if record["op"] != "create" and self._unsynced_removals:
                    self._write_progress(offset)
                step(self, record)
            except (OSError, KeyError, TypeError, ValueError) as error:
                self.problems.append(f"could not undo {_say(record)}: {error}")
            for key, path in (("pt", record.get("path") or record.get("src")), ("dpt", record.get("dst"))):
                if record.get(key) and path and not record.get("stay"):
                    _set_times(os.path.dirname(path), record[key])

    def kept_originals(self) -> list[str]:
        """Originals that are still aside."""
        return [r["aside"] for _, r in self._read() if r.get("op") == "keep" and os.path.lexists(r.get("aside", ""))]

    # -- the journal

    def _close_journal(self) -> None:
        """Tell processes that escaped the supervisor that they may not act any more."""
        try:
            fd = os.open(os.path.join(self.run_dir, "journal.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return
        try:
            os.write(fd, b'\n{"op":"closing"}\n')
        except OSError:
            pass
        finally:
            os.close(fd)

    def _read(self) -> list[tuple[int, Record]]:
        try:
            with open(os.path.join(self.run_dir, "journal.jsonl"), "rb") as f:
                data = f.read()
        except OSError:
            return []
        records, offset = [], 0
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("op"), str):
                    records.append((offset, record))
            except ValueError:
                pass
            offset += len(line) + 1
        return records

    def _done_down_to(self) -> int | None:
        """Lines after this offset were undone by an earlier pass."""
        try:
            with open(self._progress, "rb") as f:
                offsets = [int(line) for line in f.read().split(b"\n")[:-1] if line.isdigit()]
        except OSError:
            return None
        return min(offsets, default=None)

    def _write_progress(self, offset: int) -> None:
        fd = os.open(self._progress, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"%d\n" % offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._unsynced_removals = False

    # -- the steps

    def _create(self, record: Record) -> None:
        if record.get("stay"):
            return
        path = record["path"]
        st = _lstat(path)
        if st is None:
            return
        if (st.st_dev, st.st_ino) in self._originals and st.st_nlink == 1:
            self.problems.append(f"{path} was left in place: it is older than the run")
            return
        if path.startswith(self.run_dir + "/"):
            return  # goes with the folder
        if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
            return  # a link stands in the way: this is another file
        self._unsynced_removals = True
        if record.get("own") and stat.S_ISLNK(st.st_mode):
            os.unlink(path)
            return
        self._remove(path, st)

    def _keep(self, record: Record) -> None:
        aside, path = record["aside"], record["path"]
        kept = _lstat(aside)
        for left in (aside + ".new",):
            st = _lstat(left)
            if st is not None:
                os.rmdir(left) if stat.S_ISDIR(st.st_mode) else os.unlink(left)
        if kept is None:
            return
        there = _lstat(path)
        if there is not None and (there.st_dev, there.st_ino) == (kept.st_dev, kept.st_ino):
            os.unlink(aside)
            self.restored += 1
            return
        self._make_room(path, for_directory=stat.S_ISDIR(kept.st_mode))
        os.rename(aside, path)
        self.restored += 1

    def _move(self, record: Record) -> None:
        src, dst, ino = record["src"], record["dst"], record["ino"][1]
        moved, there = _lstat(dst), _lstat(src)
        if moved is None or moved.st_ino != ino:
            if there is None or there.st_ino != ino:
                self.problems.append(f"{src} was moved to {dst} and is not there any more")
            return
        if there is not None and there.st_ino == ino:
            return
        self._make_room(src, for_directory=stat.S_ISDIR(moved.st_mode))
        os.rename(dst, src)
        self.restored += 1

    def _size(self, record: Record) -> None:
        path, size = record["path"], record["size"]
        st = _lstat(path)
        if st is None or not stat.S_ISREG(st.st_mode) or st.st_ino != record["ino"][1]:
            return
        if st.st_size < size:
            self.problems.append(f"{path} is shorter than before the run ({st.st_size} bytes, was {size})")
            return
        if st.st_size > size:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
            self.restored += 1
        if st.st_mtime_ns != record["times"][1] or st.st_size > size:
            os.utime(path, ns=(record["times"][0], record["times"][1]), follow_symlinks=False)

    def _meta(self, record: Record) -> None:
        path = record["path"]
        st = _lstat(path)
        if st is None or st.st_ino != record["ino"][1] or stat.S_ISLNK(st.st_mode):
            return
        if [st.st_uid, st.st_gid] != record["owner"]:
            os.chown(path, *record["owner"], follow_symlinks=False)
        if stat.S_IMODE(st.st_mode) != record["mode"]:
            os.chmod(path, record["mode"])
        _set_times(path, record["times"])

    def _rmdir(self, record: Record) -> None:
        path = record["path"]
        st = _lstat(path)
        if st is not None:
            return
        self._make_parents(path)
        os.mkdir(path)
        os.chmod(path, record["mode"])
        try:
            os.chown(path, *record["owner"])
        except OSError:
            pass
        _set_times(path, record["times"])
        self.restored += 1

    def _aside(self, record: Record) -> None:
        path = record["path"]
        try:
            for name in os.listdir(path):
                if name.endswith(".new"):
                    left = os.path.join(path, name)
                    os.rmdir(left) if os.path.isdir(left) and not os.path.islink(left) else os.unlink(left)
            os.rmdir(path)
        except FileNotFoundError:
            pass

    # -- removing

    def _make_room(self, path: str, for_directory: bool) -> None:
        """Before an original returns to ``path``: what the run left there goes, what is older steps aside."""
        self._make_parents(path)
        there = _lstat(path)
        if there is None:
            return
        if not for_directory and not stat.S_ISDIR(there.st_mode) and not self._older(path, there):
            return  # the rename replaces it at once
        self._clear(path, there)

    def _make_parents(self, path: str) -> None:
        """The directories above ``path`` as real ones: the run may have put files and links in their place."""
        parent = os.path.dirname(path)
        if os.path.realpath(parent) == parent and os.path.isdir(parent):
            return
        above = []
        while parent != "/":
            above.append(parent)
            parent = os.path.dirname(parent)
        for folder in reversed(above):
            st = _lstat(folder)
            if st is not None and not stat.S_ISDIR(st.st_mode):
                self._clear(folder, st)
                st = None
            if st is None:
                os.mkdir(folder)

    def _clear(self, path: str, there: os.stat_result) -> None:
        self._remove(path, there)
        if os.path.lexists(path):
            beside = f"{path}.trainlint-{os.path.basename(self.run_dir)}"
            os.rename(path, beside)
            self.problems.append(f"what stood at {path} is older than the run and is now {beside}")

    def _older(self, path: str, st: os.stat_result) -> bool:
        """Whether the file's only name is ``path`` and it was born before the run."""
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            return False
        if not self._started_ns:
            return False
        born = _birth_ns(path)
        if born is None:
            # The file system does not say: a change time before the start is still proof.
            born = st.st_ctime_ns
        return born < self._started_ns - _TICK_NS

    def _remove(self, path: str, st: os.stat_result) -> None:
        """Remove a file or a whole tree; what is older than the run stays, and is a problem."""
        if self._older(path, st):
            self.problems.append(f"{path} was left in place: it is older than the run")
            return
        if not stat.S_ISDIR(st.st_mode):
            os.unlink(path)
            self.removed_files += 1
            return
        if stat.S_IMODE(st.st_mode) & 0o700 != 0o700:
            os.chmod(path, 0o700)
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            below = os.path.join(path, name)
            inner = _lstat(below)
            if inner is not None and inner.st_dev == st.st_dev:
                self._remove(below, inner)
        try:
            os.rmdir(path)
        except OSError as error:
            self.problems.append(f"{path} was left in place: {error.strerror}")


_STEPS = {
    "create": Undoing._create,
    "keep": Undoing._keep,
    "move": Undoing._move,
    "size": Undoing._size,
    "meta": Undoing._meta,
    "rmdir": Undoing._rmdir,
    "aside": Undoing._aside,
}


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _set_times(path: str, times: list[int]) -> None:
    try:
        os.utime(path, ns=(times[0], times[1]), follow_symlinks=False)
    except OSError:
        pass


def _say(record: Record) -> str:
    return f"{record.get('op')} of {record.get('path') or record.get('src')}"


def _birth_ns(path: str) -> int | None:
    """When the file was made (``statx``), or ``None`` when system or file system do not say."""
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    buffer = ctypes.create_string_buffer(256)
    at_fdcwd, symlink_nofollow, btime = -100, 0x100, 0x800
    if statx(at_fdcwd, os.fsencode(path), symlink_nofollow, btime, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & btime:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, 80)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
