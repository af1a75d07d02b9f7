"""What is done before each act of the program on files, so that it can be undone: set aside, link, remember.

The program must see a file system that behaves, so nothing is refused that can be undone. Every method is called just
before the real act, with canonical paths (:func:`.files_keep.canonical`), and leaves the act to the program:

- truncating or updating a file in place: the original is renamed aside and a placeholder or copy takes its name;
- deleting, or renaming over: the original gets a second name aside by a hard link;
- ``rmtree`` and ``rmdir``: the directory is renamed aside and an empty one takes its name;
- what is new is remembered and removed afterwards.

An *original* is whatever the journal does not say this run made. A file that some writer outside Python made meanwhile
therefore counts as an original: it is kept rather than lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from .files_keep import Keeper, Refused, lstat, times_of, writable_directory
from .undo import Journal, State

#: Larger files that are appended to are not copied but truncated back (no copy-on-write on their file system).
APPEND_COPY_BYTES = 64 << 20

Emit = Callable[[str, str, str], None]


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
        self.keeper = Keeper(self.run_dir, self.run_id, self.journal)

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
            self.keeper.link(path, st)
        self._report("delete", path)

    def rmdir(self, path: str) -> None:
        st = lstat(path)
        if st is None or not stat.S_ISDIR(st.st_mode) or self._inside(path) or not _removable(path):
            return
        with self.journal as state:
            if self._safe(state, path, st):
                return
            if not self.keeper.directory(path, st, "dir"):
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
            {
                "op": "rmdir",
                "path": path,
                "mode": stat.S_IMODE(st.st_mode),
                "owner": [st.st_uid, st.st_gid],
                "times": [st.st_atime_ns, st.st_mtime_ns],
                "pt": times_of(os.path.dirname(path)),
            },
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
            if not self.keeper.directory(path, st, "tree"):
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
                    if not self.keeper.directory(dst, ds, "dir"):
                        raise Refused(f"cannot set aside the directory {dst}")
                else:
                    self.keeper.link(dst, ds)
                overwritten = True
            ino = (ss.st_dev, ss.st_ino)
            if state.ours(src) and not self._needs_keep_inode(state, ino) and not state.holds_moved(src):
                if not state.ours(dst):
                    self._note_created(dst, "d" if is_dir else "f")
            else:
                self.journal.write(
                    {
                        "op": "move",
                        "src": src,
                        "dst": dst,
                        "ino": ino,
                        "ours": int(state.ours(src)),
                        "pt": times_of(os.path.dirname(src)),
                        "dpt": times_of(os.path.dirname(dst)),
                    },
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
                {
                    "op": "meta",
                    "path": path,
                    "ino": key,
                    "mode": stat.S_IMODE(st.st_mode),
                    "owner": [st.st_uid, st.st_gid],
                    "times": [st.st_atime_ns, st.st_mtime_ns],
                },
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
                self.keeper.replace(path, st, copy=how != "w")
                return
            if ino not in state.kept and state.ours(path):
                if ino in state.linked:
                    self.keeper.replace(path, st, copy=how != "w")
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
                self.keeper.swap(path, st, copy=how != "w")
        if how == "r+":
            detail = "opened for reading and writing; the program worked on a copy"
        self._report("append" if how == "a" else "overwrite", path, detail)

    def _keep_size(self, path: str, st: os.stat_result) -> None:
        self.journal.write(
            {
                "op": "size",
                "path": path,
                "ino": [st.st_dev, st.st_ino],
                "size": st.st_size,
                "times": [st.st_atime_ns, st.st_mtime_ns],
                "mode": stat.S_IMODE(st.st_mode),
            },
            durable=True,
        )

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
            record["pt"] = times_of(os.path.dirname(path))
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
