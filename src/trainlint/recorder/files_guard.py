"""What is done before each act of the program on files, so that it can be undone: set aside, link, remember.

The program must see a file system that behaves, so nothing is refused that can be undone. Every method is called just
before the real act, with canonical paths (:func:`canonical`), and leaves the act to the program:

- truncating or updating a file in place: the original is renamed aside and a placeholder or copy takes its name;
- deleting, or renaming over: the original gets a second name aside by a hard link;
- ``rmtree`` and ``rmdir``: the directory is renamed aside and an empty one takes its name;
- what is new is remembered and removed afterwards.

An *original* is whatever the journal does not say this run made. A file that some writer outside Python made meanwhile
therefore counts as an original: it is kept rather than lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .undo import Closed, Journal, State

#: Larger files that are appended to are not copied but truncated back (no copy-on-write on their file system).
APPEND_COPY_BYTES = 64 << 20
#: Room that a copy must leave on the file system.
SPARE_BYTES = 64 << 20
_FICLONE = 0x40049409

Emit = Callable[[str, str, str], None]


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


class Guard:
    """The guard of one process. ``caches``: directories whose new files may stay. ``emit(action, target, detail)``."""

    def __init__(self, run_dir: str, run_id: str, caches: Callable[[], tuple[str, ...]], emit: Emit) -> None:
        self.run_dir = os.path.realpath(run_dir)
        self.run_id = run_id or os.path.basename(self.run_dir)
        self.journal = Journal(self.run_dir)
        self._free = tuple(os.path.join(self.run_dir, name) + "/" for name in ("scratch", "shims"))
        self._find_caches = caches
        self._caches: tuple[str, ...] | None = None
        self._emit = emit
        self._reported: set[tuple[str, str]] = set()
        self._good_aside: dict[str, str] = {}
        self._count = 0

    # -- the acts

    def open_write(self, path: str, flags: int, mode: str = "") -> None:
        """Before a file is opened for writing. ``flags``: those of ``open(2)``."""
        if self._outside(path):
            return
        st = lstat(path)
        if st is None:
            if flags & os.O_CREAT:
                self._create(path, "f")
            return
        if not stat.S_ISREG(st.st_mode) or flags & os.O_EXCL and flags & os.O_CREAT:
            return
        if not os.access(path, os.W_OK) or (flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC):
            return
        if flags & os.O_TRUNC:
            self._in_place(path, st, "w")
        else:
            self._in_place(path, st, "a" if flags & os.O_APPEND else "r+")

    def truncate(self, path: str, length: int) -> None:
        st = lstat(path)
        if self._outside(path) or st is None or not stat.S_ISREG(st.st_mode) or not os.access(path, os.W_OK):
            return
        self._in_place(path, st, "w" if length == 0 else "r+")

    def remove(self, path: str) -> None:
        """Before ``unlink``."""
        st = lstat(path)
        if st is None or stat.S_ISDIR(st.st_mode) or self._inside(path):
            return
        if not writable_directory(os.path.dirname(path)):
            return
        with self.journal as state:
            if self._safe(state, path, st):
                return
            self._keep_link(path, st)
        self._report("delete", path)

    def rmdir(self, path: str) -> None:
        st = lstat(path)
        if st is None or not stat.S_ISDIR(st.st_mode) or self._inside(path) or not _removable(path):
            return
        with self.journal as state:
            if self._safe(state, path, st):
                return
            if not self._keep_directory(path, st, "dir"):
                self._note_directory_goes(path, st)
        self._report("delete", path, "empty directory")

    def directory_goes(self, path: str) -> None:
        """Before a directory that is still full is emptied and removed by a command."""
        st = lstat(path)
        if st is not None and stat.S_ISDIR(st.st_mode):
            with self.journal:
                self._note_directory_goes(path, st)

    def _note_directory_goes(self, path: str, st: os.stat_result) -> None:
        self.journal.write(
            {"op": "rmdir", "path": path, "mode": stat.S_IMODE(st.st_mode), "owner": [st.st_uid, st.st_gid],
             "times": [st.st_atime_ns, st.st_mtime_ns], "pt": _times(os.path.dirname(path))},
            durable=True,
        )

    def rmtree(self, path: str) -> None:
        """Before a whole directory tree is deleted file by file: those deletes then find an empty directory."""
        st = lstat(path)
        if st is None or not stat.S_ISDIR(st.st_mode) or self._inside(path):
            return
        if (self.run_dir + "/").startswith(path.rstrip("/") + "/") or not writable_directory(os.path.dirname(path)):
            return  # file by file
        with self.journal as state:
            if self._safe(state, path, st) and not state.holds_moved(path):
                return
            if not self._keep_directory(path, st, "tree"):
                return
        self._report("delete", path, "directory tree")

    def rename(self, src: str, dst: str) -> None:
        ss, ds = lstat(src), lstat(dst)
        if ss is None or src == dst or self._inside(src) or self._inside(dst):
            return
        if ds is not None and (ss.st_dev, ss.st_ino) == (ds.st_dev, ds.st_ino):
            return
        if not writable_directory(os.path.dirname(src)) or not writable_directory(os.path.dirname(dst)):
            return
        is_dir = stat.S_ISDIR(ss.st_mode)
        if ds is not None and (stat.S_ISDIR(ds.st_mode) != is_dir or is_dir and not _removable(dst)):
            return
        overwritten = moved = False
        with self.journal as state:
            if ds is not None and not self._safe(state, dst, ds):
                if is_dir:
                    if not self._keep_directory(dst, ds, "dir"):
                        raise Refused(f"cannot set aside the directory {dst}")
                else:
                    self._keep_link(dst, ds)
                overwritten = True
            ino = (ss.st_dev, ss.st_ino)
            if state.ours(src) and not self._needs_keep_inode(state, ino) and not state.holds_moved(src):
                if not state.ours(dst):
                    self._note_created(dst, "d" if is_dir else "f")
            else:
                self.journal.write(
                    {"op": "move", "src": src, "dst": dst, "ino": ino, "ours": int(state.ours(src)),
                     "pt": _times(os.path.dirname(src)), "dpt": _times(os.path.dirname(dst))},
                    durable=True,
                )
                moved = True
        if overwritten:
            self._report("overwrite", dst, f"renamed over by {os.path.basename(src)}")
        if moved:
            self._report("move", src, f"to {dst}")

    def make(self, path: str, kind: str = "f") -> None:
        """Before a name comes into being: ``mkdir``, ``symlink``, ``mkfifo``, ``bind``. ``kind``: ``f`` or ``d``."""
        if not self._outside(path) and lstat(path) is None:
            self._create(path, kind)

    def made(self, path: str) -> None:
        """After a file came into being that nothing announced. Not for one that may have existed before."""
        st = lstat(path)
        if self._outside(path) or st is None or not stat.S_ISREG(st.st_mode):
            return
        with self.journal as state:
            if not state.ours(path) and (st.st_dev, st.st_ino) not in state.kept:
                self._note_created(path, "f")

    def link(self, src: str, dst: str) -> None:
        """Before a hard link: writing to the new name would write to the original."""
        ss = lstat(src)
        if ss is None or lstat(dst) is not None or not writable_directory(os.path.dirname(dst)):
            return
        with self.journal as state:
            record: dict[str, Any] = {}
            if not self._outside(src) and not state.ours(src):
                record["ino"] = [ss.st_dev, ss.st_ino]
            if record or not (self._outside(dst) or state.ours(dst)):
                self._note_created(dst, "f", **record)

    def meta(self, path: str) -> None:
        """Before mode, owner or times change."""
        st = lstat(path)
        if st is None or self._outside(path):
            return
        with self.journal as state:
            key = (st.st_dev, st.st_ino)
            if key in state.meta or (state.ours(path) and key not in state.linked and key not in state.kept):
                return
            self.journal.write(
                {"op": "meta", "path": path, "ino": key, "mode": stat.S_IMODE(st.st_mode),
                 "owner": [st.st_uid, st.st_gid], "times": [st.st_atime_ns, st.st_mtime_ns]},
                durable=True,
            )

    def note_directory(self, path: str) -> None:
        """Remember mode and times of a directory before a command changes what is in it."""
        st = lstat(path)
        if st is not None and stat.S_ISDIR(st.st_mode):
            self.meta(path)

    def report_upload(self, words: Sequence[str]) -> None:
        self._report("upload", " ".join(words[:8])[:200], "the command was not run")

    # -- what needs protection

    def _outside(self, path: str) -> bool:
        """Not a file of this machine's disks, or of the run itself."""
        if path.startswith(("/dev/", "/proc/", "/sys/")) and not path.startswith("/dev/shm/"):
            return True
        return path.startswith(self.run_dir + "/") and not path.startswith(self._free)

    def _inside(self, path: str) -> bool:
        """For deletes and renames: ``True`` when there is nothing to protect.

        Raises:
            Refused: for the run folder itself: the journal lives there.
        """
        if path.startswith(self._free):
            return False
        if path == self.run_dir or path.startswith(self.run_dir + "/"):
            raise Refused("the folder holds what is needed to undo this run")
        if ".trainlint-aside-" in path:
            raise Refused("the folder holds what is needed to undo a run")
        return self._outside(path)

    def in_cache(self, path: str) -> bool:
        if self._caches is None:
            self._caches = tuple(p.rstrip("/") + "/" for p in self._find_caches())
        return path.startswith(self._caches)

    def _needs_keep_inode(self, state: State, ino: tuple[int, int]) -> bool:
        """This original was about to be kept when a process died: it is still unprotected."""
        aside = state.kept.get(ino)
        if aside is None:
            return False
        st = lstat(aside)
        return st is None or (st.st_dev, st.st_ino) != ino

    def _safe(self, state: State, path: str, st: os.stat_result) -> bool:
        """Whether the name ``path`` may go: what it names was made by this run, or has its second name aside."""
        ino = (st.st_dev, st.st_ino)
        if ino in state.kept:
            return not self._needs_keep_inode(state, ino)
        return state.ours(path) or (self.in_cache(path) and path.endswith(".pyc"))

    # -- keeping

    def _in_place(self, path: str, st: os.stat_result, how: str) -> None:
        """The content of the regular file at ``path`` is about to change (``w``: to nothing, ``a``, ``r+``)."""
        ino = (st.st_dev, st.st_ino)
        detail = ""
        with self.journal as state:
            if ino in state.kept and not self._needs_keep_inode(state, ino):
                self._replace(path, st, copy=how != "w")
                return
            if ino not in state.kept and state.ours(path):
                if ino in state.linked:
                    self._replace(path, st, copy=how != "w")
                return
            if state.sized.get(ino) == 0 or (self.in_cache(path) and path.endswith(".pyc")):
                return
            if st.st_size == 0:
                # Lock files are opened like this: other programs must go on seeing the same file.
                self._keep_size(path, st)
                return
            if how == "a" and st.st_size > APPEND_COPY_BYTES:
                if ino not in state.sized:
                    self._keep_size(path, st)
                    detail = f"only what is added after {st.st_size} bytes is taken away again"
            else:
                self._keep_swap(path, st, copy=how != "w")
        if how == "r+":
            detail = "opened for reading and writing; the program worked on a copy"
        self._report("append" if how == "a" else "overwrite", path, detail)

    def _keep_size(self, path: str, st: os.stat_result) -> None:
        self.journal.write(
            {"op": "size", "path": path, "ino": [st.st_dev, st.st_ino], "size": st.st_size,
             "times": [st.st_atime_ns, st.st_mtime_ns], "mode": stat.S_IMODE(st.st_mode)},
            durable=True,
        )

    def _keep(self, path: str, st: os.stat_result, how: str, act: Callable[[str], None]) -> bool:
        """Write the line, then ``act(aside)``; try one place after the other. ``False`` when none will do."""
        parent = os.path.dirname(path)
        times = _times(parent)
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

    def _keep_link(self, path: str, st: os.stat_result) -> None:
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

    def _keep_swap(self, path: str, st: os.stat_result, copy: bool) -> None:
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

    def _keep_directory(self, path: str, st: os.stat_result, how: str) -> bool:
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

    def _replace(self, path: str, st: os.stat_result, copy: bool) -> None:
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

    # -- places

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
                self.journal.write({"op": "aside", "path": folder, "pt": _times(p)}, durable=True)
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

    def _create(self, path: str, kind: str) -> None:
        if path.endswith(".pyc") and self.in_cache(path):
            return
        if not writable_directory(os.path.dirname(path)):
            return  # the program's own call will fail
        with self.journal as state:
            if not state.ours(path):
                self._note_created(path, kind)

    def _note_created(self, path: str, kind: str, **more: Any) -> None:
        record: dict[str, Any] = {"op": "create", "path": path, "kind": kind, **more}
        if self.in_cache(path):
            record["stay"] = 1
        else:
            record["pt"] = _times(os.path.dirname(path))
        self.journal.write(record, durable=False)

    def _report(self, action: str, path: str, detail: str = "") -> None:
        if path.startswith(self._free) or "/__pycache__/" in path or (action != "delete" and self.in_cache(path)):
            return
        if (action, path) in self._reported or len(self._reported) > 1000:
            return
        self._reported.add((action, path))
        self._emit(action, path, detail)


def _removable(path: str) -> bool:
    """An empty directory in a writable one: ``rmdir`` will work."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None and writable_directory(os.path.dirname(path))
    except OSError:
        return False


def _times(directory: str) -> list[int] | None:
    st = lstat(directory)
    return None if st is None else [st.st_atime_ns, st.st_mtime_ns]


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


__all__ = ["Closed", "Guard", "Refused", "canonical", "lstat"]
