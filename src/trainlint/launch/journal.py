"""The folder of one watched run, and the undoing of what the program did to files.

The program's processes write down each act before they do it (``recorder/undo.py`` has the format). :class:`RunFolder`
makes the folder, undoes the journal from its last line to its first, and deletes the folder. Undoing may be interrupted
at any point and run again; :func:`recover_abandoned` does it for runs whose supervisor died.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .undo import Undoing

#: Longest path of a temporary folder below which ``pymp-xxxxxxxx/listener-xxxxxxxx`` still fits in a socket's address.
_SHORT_BYTES = 60

_COMMANDS_HOME = Path(__file__).resolve().parent.parent / "recorder"


@dataclass(frozen=True)
class RestoreResult:
    """``restored``: originals put back or repaired. ``removed_files``: files of the run that are gone again.

    ``problems``: what could not be undone, one sentence each, with the paths; empty when all is as it was.
    """

    restored: int = 0
    removed_files: int = 0
    problems: tuple[str, ...] = ()
    run_id: str = ""


def state_dir() -> Path:
    """Where run folders live: ``$TRAINLINT_STATE_DIR``, ``$XDG_STATE_HOME/trainlint``, ``~/.local/state/trainlint``.

    A folder of the user's own under the temporary directory when that place cannot be written.
    """
    chosen = os.environ.get("TRAINLINT_STATE_DIR")
    if chosen:
        wanted = Path(chosen)
    else:
        base = os.environ.get("XDG_STATE_HOME")
        wanted = (Path(base) if base else Path(os.path.expanduser("~/.local/state"))) / "trainlint"
    if wanted.is_absolute() and _usable(wanted):
        return wanted
    fallback = Path(tempfile.gettempdir()) / f"trainlint-{os.getuid()}"
    if _usable(fallback):
        return fallback
    return Path(tempfile.mkdtemp(prefix="trainlint-"))


def _usable(folder: Path) -> bool:
    """Exists or can be made, is a real directory of this user, and takes files."""
    try:
        (folder / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
        st = os.lstat(folder)
        return stat.S_ISDIR(st.st_mode) and st.st_uid == os.geteuid() and os.access(folder / "runs", os.W_OK | os.X_OK)
    except OSError:
        return False


class RunFolder:
    """``<state dir>/runs/<run id>/`` with ``stream``, ``scratch``, ``aside``, ``shims`` and the journal.

    Args:
        state: the state folder; by default :func:`state_dir`.

    Raises:
        OSError: no place can be written.
    """

    def __init__(self, state: Path | None = None) -> None:
        state = state_dir() if state is None else state
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}"
        self.path = Path(os.path.realpath(state)) / "runs" / self.run_id
        self.started_ns = time.time_ns()
        self.path.mkdir(mode=0o700, parents=True)
        self._result: RestoreResult | None = None
        self._lock = os.open(self.path / "owner.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        owner = {
            "run": self.run_id,
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "boot": _boot_id(),
            "host": socket.gethostname(),
            "started_ns": self.started_ns,
        }
        os.write(self._lock, json.dumps(owner).encode())
        for name in ("stream", "scratch", "aside", "shims"):
            (self.path / name).mkdir(mode=0o700)
        journal = os.open(self.path / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for fd in (self._lock, journal):
            os.fsync(fd)
        os.close(journal)
        _sync_folder(self.path)
        _sync_folder(self.path.parent)
        self._write_stand_ins()
        self._shorten_temporary()

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def shims(self) -> Path:
        """Put this folder first on the program's ``PATH``: commands that delete or upload pass through it."""
        return self.path / "shims"

    @property
    def temporary(self) -> Path:
        """The program's temporary folder: :attr:`scratch`, by a short name where its own is long."""
        try:
            return Path((self.path / "tmpdir").read_text(encoding="utf-8"))
        except OSError:
            return self.scratch

    def _shorten_temporary(self) -> None:
        """Sockets are made in the temporary folder (DataLoader workers), and their paths may have 107 bytes only."""
        if len(os.fsencode(self.scratch)) <= _SHORT_BYTES:
            return
        short = f"{tempfile.gettempdir()}/tl-{secrets.token_hex(4)}"
        if len(short) > _SHORT_BYTES:
            return
        line = json.dumps({"op": "create", "path": os.path.realpath(short), "kind": "f", "own": 1}) + "\n"
        try:
            with open(self.path / "journal.jsonl", "ab") as journal:
                journal.write(line.encode())
                journal.flush()
                os.fsync(journal.fileno())
            os.symlink(self.scratch, short)
            (self.path / "tmpdir").write_text(short, encoding="utf-8")
        except (OSError, UnicodeError):
            pass

    def _write_stand_ins(self) -> None:
        names = _stand_in_names()
        for name in names:
            line = " ".join(_quoted(w) for w in (sys.executable, "-I", "-S", str(_COMMANDS_HOME / "shim.py")))
            script = f'#!/bin/sh\nexec {line} {_quoted(str(self.path))} {name} "$@"\n'
            path = self.shims / name
            path.write_text(script)
            path.chmod(0o700)

    def restore(self) -> RestoreResult:
        """Undo the journal. Call it when every process of the run is dead; calling it again does nothing more."""
        if self._result is None or self._result.problems:
            self._result = _restore(self.path, self.run_id, self.started_ns, self._result)
        return self._result

    def close(self) -> RestoreResult:
        """Restore, then delete the run folder, unless an original is still in it: then the problems name it."""
        result = self.restore()
        if not _delete(self.path):
            note = f"what could not be put back is kept in {self.path}"
            if note not in result.problems:
                result = RestoreResult(result.restored, result.removed_files, (*result.problems, note), result.run_id)
                self._result = result
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        return result


def recover_abandoned(state: Path | None = None) -> list[RestoreResult]:
    """Undo runs whose supervisor died without doing it. One result for each such run that had anything to undo.

    Never raises for a damaged run folder: that is a problem in its result.
    """
    runs = (state_dir() if state is None else state) / "runs"
    results = []
    try:
        folders = sorted(p for p in runs.iterdir() if p.is_dir() and not p.is_symlink())
    except OSError:
        return []
    for folder in folders:
        try:
            result = _recover(folder)
        except OSError as error:
            result = RestoreResult(problems=(f"{folder}: {error}",), run_id=folder.name)
        if result is not None and (result.restored or result.removed_files or result.problems):
            results.append(result)
    return results


def _recover(folder: Path) -> RestoreResult | None:
    """``None`` when the run still has its supervisor, belongs to another machine or was never begun."""
    try:
        lock = os.open(folder / "owner.json", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if time.time() - folder.stat().st_mtime > 60:
            _delete(folder)
        return None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        try:
            owner: dict[str, Any] = json.loads(os.read(lock, 1 << 16))
        except ValueError:
            owner = {}
        if owner.get("host", socket.gethostname()) != socket.gethostname() or _alive(owner):
            return None
        if not owner and time.time() - folder.stat().st_mtime < 60:
            return None  # it is just being made
        _stop_leftovers(folder)
        result = _restore(folder, folder.name, int(owner.get("started_ns", 0)), None)
        if not _delete(folder):
            note = f"what could not be put back is kept in {folder}"
            result = RestoreResult(result.restored, result.removed_files, (*result.problems, note), folder.name)
        return result
    finally:
        os.close(lock)


def _restore(folder: Path, run_id: str, started_ns: int, before: RestoreResult | None) -> RestoreResult:
    undoing = Undoing(str(folder), started_ns)
    undoing.run()
    restored, removed = undoing.restored, undoing.removed_files
    if before is not None:
        restored, removed = restored + before.restored, removed + before.removed_files
    return RestoreResult(restored, removed, tuple(undoing.problems), run_id)


def _delete(folder: Path) -> bool:
    """Delete a run folder whose journal is undone. ``False``, and nothing deleted, while an original is still in it."""
    if Undoing(str(folder), 0).kept_originals():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


# --------------------------------------------------------------------------------------------- processes


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; ``None`` when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _alive(owner: dict[str, Any]) -> bool:
    if not owner or owner.get("boot") != _boot_id():
        return False
    start = _process_start(int(owner.get("pid", 0)))
    return start is not None and start == owner.get("process_start")


def _stop_leftovers(folder: Path) -> None:
    """End processes of an abandoned run: they would go on training, and on writing what is being undone."""
    wanted = b"TRAINLINT_RUN_DIR=" + os.fsencode(folder)
    for _ in range(50):
        found = list(_with_environment(wanted))
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.05)


def _with_environment(wanted: bytes) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as f:
                if wanted in f.read().split(b"\0"):
                    yield int(entry)
        except OSError:
            continue


# --------------------------------------------------------------------------------------------- helpers


def _stand_in_names() -> list[str]:
    from ..recorder import files_commands

    return sorted(files_commands.COMMANDS)


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems do not sync directories
    finally:
        os.close(fd)
