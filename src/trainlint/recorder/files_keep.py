"""Keeping originals: under a second name, or aside with something else in their place."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

from .undo import Journal

#: Room that a copy must leave on the file system.
SPARE_BYTES = 64 << 20
_FICLONE = 0x40049409


class Refused(Exception):
    """The act cannot be undone; the text says why."""


def canonical(path: Any, dir_fd: int | None = None, follow: bool = False) -> str | None:
    """The absolute path without symbolic links, or ``None`` when the program's own call will fail.

    ``follow``: also resolve the last component (as ``open`` does); else only its directory (as ``unlink`` does).
    """
    if isinstance(path, int):
        try:
            path = os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return None
        return path if path.startswith("/") and not path.endswith(" (deleted)") else None
    p = os.fsdecode(path)
    if not p or "\0" in p:
        return None
    if not p.startswith("/"):
        try:
            base = os.getcwd() if dir_fd is None or dir_fd < 0 else os.readlink(f"/proc/self/fd/{dir_fd}")
        except OSError:
            return None
        p = base + "/" + p
    if follow:
        return os.path.realpath(p)
    head, tail = os.path.split(p.rstrip("/"))
    if tail in ("", ".", ".."):
        return os.path.realpath(p)
    return os.path.join(os.path.realpath(head), tail)


def lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def writable_directory(path: str) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def times_of(directory: str) -> list[int] | None:
    st = lstat(directory)
    return None if st is None else [st.st_atime_ns, st.st_mtime_ns]


class Keeper:
    """Sets originals aside. Every method is called with the journal entered, and writes its line first.

    Raises:
        Refused: the original cannot be kept.
    """

    def __init__(self, run_dir: str, run_id: str, journal: Journal) -> None:
        self.run_dir = run_dir
        self.run_id = run_id
        self.journal = journal
        self._good_aside: dict[str, str] = {}
        self._count = 0

    def _keep(self, path: str, st: os.stat_result, how: str, act: Callable[[str], None]) -> bool:
        """Write the line, then ``act(aside)``; try one place after the other. ``False`` when none will do."""
        parent = os.path.dirname(path)
        times = times_of(parent)
        for folder in self._aside_folders(parent):
            self._count += 1
            aside = os.path.join(folder, f"{os.getpid()}-{self._count}-{time.time_ns():x}")
            self.journal.write(
                {"op": "keep", "path": path, "aside": aside, "how": how, "ino": [st.st_dev, st.st_ino], "pt": times},
                durable=True,
            )
            try:
                act(aside)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise Refused("no room to keep a copy") from error
                continue
            self.journal.write({"op": "kept", "path": path, "how": how}, durable=False)
            self._good_aside[parent] = folder
            return True
        return False

    def link(self, path: str, st: os.stat_result) -> None:
        """Give the original a second name; the program's act then takes away the first."""

        def act(aside: str) -> None:
            try:
                os.link(path, aside, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise
                # No hard links here (or not to files of others): something else must be there to be deleted.
                os.rename(path, aside)
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

        if not self._keep(path, st, "link", act):
            raise Refused("no place on its file system where the original could be kept")

    def swap(self, path: str, st: os.stat_result, copy: bool) -> None:
        """Put a copy (or an empty file) in the place of the original, which goes aside."""

        def act(aside: str) -> None:
            new = aside + ".new"
            self._stand_in(path, new, st, copy)
            try:
                try:
                    os.link(path, aside)
                except OSError as error:
                    if error.errno == errno.EXDEV:
                        raise
                    os.rename(path, aside)
                os.rename(new, path)
            except OSError:
                os.unlink(new)
                raise

        if not self._keep(path, st, "swap", act):
            raise Refused("no place on its file system where the original could be kept")

    def directory(self, path: str, st: os.stat_result, how: str) -> bool:
        """Put an empty directory in the place of the original. ``False`` when it cannot be renamed away."""

        def act(aside: str) -> None:
            new = aside + ".new"
            os.mkdir(new, 0o700)
            try:
                os.chmod(new, stat.S_IMODE(st.st_mode))
                os.rename(path, aside)
            except OSError:
                os.rmdir(new)
                raise
            os.rename(new, path)

        return self._keep(path, st, how, act)

    def replace(self, path: str, st: os.stat_result, copy: bool) -> None:
        """Break a hard link to an original that is safe under another name."""
        for folder in self._aside_folders(os.path.dirname(path)):
            self._count += 1
            new = os.path.join(folder, f"{os.getpid()}-{self._count}-{time.time_ns():x}.new")
            try:
                self._stand_in(path, new, st, copy)
                os.rename(new, path)
                return
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise Refused("no room for a copy") from error
        raise Refused("it shares its content with a file that existed before")

    def _stand_in(self, path: str, new: str, st: os.stat_result, copy: bool) -> None:
        """Make ``new`` a copy of ``path``, or an empty file with its mode."""
        out = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if copy:
                source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    _copy(source, out, st.st_size)
                finally:
                    os.close(source)
            if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()):
                try:
                    os.fchown(out, st.st_uid, st.st_gid)
                except OSError:
                    pass
            os.fchmod(out, stat.S_IMODE(st.st_mode))
            if copy:
                os.utime(out, ns=(st.st_atime_ns, st.st_mtime_ns))
        except OSError:
            os.unlink(new)
            raise
        except Refused:
            os.unlink(new)
            raise
        finally:
            os.close(out)

    def _aside_folders(self, parent: str) -> Iterator[str]:
        """Folders on the file system of ``parent``, best first: the run's own, else as far up as may be written."""
        good = self._good_aside.get(parent)
        if good is not None:
            yield good
        device = os.stat(parent).st_dev
        own = os.path.join(self.run_dir, "aside")
        if own != good and device == self._own_device():
            yield own
        above, p = [], parent
        while os.stat(p).st_dev == device:
            above.append(p)
            if p == "/":
                break
            p = os.path.dirname(p)
        for p in reversed(above):
            folder = os.path.join(p, f".trainlint-aside-{self.run_id}")
            if folder == good or not writable_directory(p):
                continue
            if folder not in self.journal.state.asides:
                self.journal.write({"op": "aside", "path": folder, "pt": times_of(p)}, durable=True)
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                pass
            except OSError:
                continue
            yield folder

    def _own_device(self) -> int | None:
        st = lstat(os.path.join(self.run_dir, "aside"))
        return None if st is None else st.st_dev


def _copy(source: int, out: int, size: int) -> None:
    try:
        fcntl.ioctl(out, _FICLONE, source)
        return
    except OSError:
        pass
    room = os.fstatvfs(out)
    if room.f_bavail * room.f_frsize < size + SPARE_BYTES:
        raise Refused(f"no room for a copy of its {size} bytes")
    whole = True
    if hasattr(os, "copy_file_range"):
        try:
            while os.copy_file_range(source, out, 1 << 30):
                pass
            whole = False
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    if whole:
        os.lseek(source, 0, os.SEEK_SET)
        os.lseek(out, 0, os.SEEK_SET)
        while chunk := os.read(source, 1 << 20):
            view = memoryview(chunk)
            while view:
                view = view[os.write(out, view) :]
