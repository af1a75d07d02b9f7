"""The file guard: while watched, a program destroys nothing that existed before.

Armed at interpreter start in every Python process of the watched tree. An audit hook sees the acts of Python code just
before they happen (:mod:`.files_guard` makes them undoable). Writers in C++ and Rust are wrapped when their library is
imported (:mod:`.files_writers`). Commands such as ``rm`` and ``mv`` are looked at in :mod:`.files_commands`, through
the ``subprocess`` audit events and, for shell scripts, through small programs of the same name that the supervisor puts
first on ``PATH`` (:mod:`.shim`).

What still escapes:

- writes and deletes in C, C++, Rust or Go that the table of :mod:`.files_writers` does not name (also by ``ctypes``);
- other commands than those of :mod:`.files_commands`, shell redirections (``sh -c '... > f'``), and the named commands
  where a shell script calls them by their absolute path;
- ``python -I``, ``-S`` or ``-E``, containers and remote machines;
- ``truncate()`` of an open file larger than 64 MiB that was opened to append: its growth is undone, a cut is not;
- extended attributes, and memory maps that other processes share.

The program works on a copy of a non-empty file that it opens for update or to append, so a lock on such a file does
not reach programs outside the run.
"""

from __future__ import annotations

import _thread
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from .core import Recorder
from .files_guard import Guard
from .files_keep import Refused, canonical
from .patching import ImportHooks
from .undo import Closed

Handler = Callable[[Guard, tuple[Any, ...]], None]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

#: The guard of this process, for the wrapped writers.
guard: Guard | None = None
_busy: set[int] = set()
_recorder: Recorder | None = None
#: ``dir_fd`` of the ``os.open`` call in progress, by thread: the audit event does not carry it.
_open_dir_fd: dict[int, int] = {}


# --------------------------------------------------------------------------------------------- audit events


def _open(guard: Guard, args: tuple[Any, ...]) -> None:
    path, _mode, flags = args
    if isinstance(path, int):
        return
    where = canonical(path, _open_dir_fd.get(_thread.get_ident()), follow=not flags & getattr(os, "O_NOFOLLOW", 0))
    if where is not None:
        guard.open_write(where, flags)


def _remove(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], args[1])
    if path is not None:
        guard.remove(path)


def _rmdir(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], args[1])
    if path is not None:
        guard.rmdir(path)


def _rmtree(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], args[1] if len(args) > 1 else None)
    if path is not None and not os.path.islink(path):
        guard.rmtree(path)


def _mkdir(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], args[2])
    if path is not None:
        guard.make(path, "d")


def _rename(guard: Guard, args: tuple[Any, ...]) -> None:
    src, dst = canonical(args[0], args[2]), canonical(args[1], args[3])
    if src is not None and dst is not None:
        guard.rename(src, dst)


def _symlink(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[1], args[2])
    if path is not None:
        guard.make(path)


def _link(guard: Guard, args: tuple[Any, ...]) -> None:
    src, dst = canonical(args[0], args[2], follow=True), canonical(args[1], args[3])
    if src is not None and dst is not None:
        guard.link(src, dst)


def _truncate(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], follow=True)
    # Through a descriptor the file was opened for writing, and so made safe, before.
    if path is not None and not isinstance(args[0], int):
        guard.truncate(path, args[1])


def _meta(guard: Guard, args: tuple[Any, ...]) -> None:
    dir_fd = args[-1] if isinstance(args[-1], int) else None
    path = canonical(args[0], dir_fd, follow=True)
    if path is not None:
        guard.meta(path)


def _sqlite(guard: Guard, args: tuple[Any, ...]) -> None:
    database = os.fsdecode(args[0])
    if database.startswith("file:"):
        name, _, query = database[5:].partition("?")
        if "mode=ro" in query or "mode=memory" in query or "immutable=1" in query:
            return
        from urllib.parse import unquote

        database = unquote(name[name.find("/", 2) :] if name.startswith("//") else name)
    path = None if database in ("", ":memory:") else canonical(database, follow=True)
    if path is not None:
        for suffix in ("-wal", "-shm", "-journal", ""):
            guard.open_write(path + suffix, os.O_RDWR | os.O_CREAT)


def _bind(guard: Guard, args: tuple[Any, ...]) -> None:
    address = args[1]
    if isinstance(address, (str, bytes)) and address and address[0] not in ("\0", 0):
        path = canonical(address)
        if path is not None:
            guard.make(path)


def _popen(guard: Guard, args: tuple[Any, ...]) -> None:
    from . import files_commands

    executable, argv, cwd, env = args
    if isinstance(argv, (str, bytes, os.PathLike)):
        argv = [argv]
    files_commands.before(guard, executable, argv, cwd, env)


def _spawn(guard: Guard, args: tuple[Any, ...]) -> None:
    from . import files_commands

    files_commands.before(guard, args[0], args[1], None, args[2])


HANDLERS: dict[str, Handler] = {
    "open": _open,
    "os.remove": _remove,
    "os.rmdir": _rmdir,
    "os.mkdir": _mkdir,
    "os.rename": _rename,
    "os.symlink": _symlink,
    "os.link": _link,
    "os.truncate": _truncate,
    "os.chmod": _meta,
    "os.chown": _meta,
    "os.utime": _meta,
    "shutil.rmtree": _rmtree,
    "sqlite3.connect": _sqlite,
    "socket.bind": _bind,
    "subprocess.Popen": _popen,
    "os.exec": _spawn,
    "os.posix_spawn": _spawn,
}

#: Acts that only bring something new: never refused when the guard itself has trouble.
_HARMLESS = frozenset({"os.mkdir", "os.symlink", "socket.bind", "os.chmod", "os.chown", "os.utime"})


def audit(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook. Costs a flag test for an ``open`` that reads and a dictionary look-up for other events."""
    if event == "open":
        if not args[2] & _WRITING:
            return
    handler = HANDLERS.get(event)
    if handler is not None:
        protect(handler, args, event)


def protect(handler: Handler, args: tuple[Any, ...], event: str) -> None:
    """Run ``handler(guard, args)`` unless this thread is already in the guard.

    Raises:
        PermissionError: the act could not be made safe.
    """
    me = _thread.get_ident()
    if me in _busy or guard is None:
        return
    _busy.add(me)
    try:
        handler(guard, args)
    except Refused as error:
        _refuse(event, args, str(error))
    except Closed:
        if event not in _HARMLESS:
            _refuse(event, args, "the watch is over")
    except (ValueError, TypeError, UnicodeError):
        return  # a path that is none: the program's own call will say so
    except Exception as error:
        if _recorder is not None:
            _recorder.problem(f"file guard, {event}", error)
        if event not in _HARMLESS and _exists(args):
            _refuse(event, args, f"it could not be made undoable ({type(error).__name__}: {error})")
    finally:
        _busy.discard(me)


def _exists(args: tuple[Any, ...]) -> bool:
    try:
        return any(os.path.lexists(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike)))
    except Exception:
        return True


def _refuse(event: str, args: tuple[Any, ...], why: str) -> None:
    target = args[0] if args else ""
    text = os.fsdecode(target) if isinstance(target, (str, bytes, os.PathLike)) else repr(target)
    if _recorder is not None:
        _recorder.problem("file guard", f"refused {event} of {text}: {why}")
    raise PermissionError(errno.EPERM, f"trainlint: refused {event} while watching: {why}", text)


# --------------------------------------------------------------------------------------------- installing


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Arm the guard in this process."""
    global guard, _recorder
    if guard is not None:
        return
    _recorder = recorder
    settings = recorder.settings
    start = os.getcwd()

    def emit(action: str, target: str, detail: str) -> None:
        at = recorder.user_line()
        recorder.emit("prevented", {"action": action, "target": target, "detail": detail, "at": at})

    guard = Guard(settings.run_dir, settings.run_id, lambda: cache_folders(start), emit)
    _wrap_unaudited()
    os.register_at_fork(after_in_child=_after_fork)
    sys.addaudithook(audit)
    from . import files_writers

    files_writers.install(hooks)


def _after_fork() -> None:
    _busy.clear()
    _open_dir_fd.clear()
    if guard is not None:
        guard.journal.after_fork()


def _wrap_unaudited() -> None:
    """What raises no audit event, or one that lacks the directory that a relative path starts from."""
    real_open = os.open

    def open(path, flags, mode=0o777, *, dir_fd=None):  # type: ignore[no-untyped-def]
        if dir_fd is None:
            return real_open(path, flags, mode)
        me = _thread.get_ident()
        _open_dir_fd[me] = dir_fd
        try:
            return real_open(path, flags, mode, dir_fd=dir_fd)
        finally:
            _open_dir_fd.pop(me, None)

    def made(real: Callable[..., Any]) -> Callable[..., Any]:
        def make(path: Any, *args: Any, **kwargs: Any) -> Any:
            protect(_make_node, (path, kwargs.get("dir_fd")), "os.symlink")
            return real(path, *args, **kwargs)

        return make

    for name, wrapped in (("open", open), ("mkfifo", made(os.mkfifo)), ("mknod", made(os.mknod))):
        real = getattr(os, name)
        wrapped.__name__ = wrapped.__qualname__ = name
        wrapped.__doc__ = real.__doc__
        for supports in (os.supports_dir_fd, os.supports_fd, os.supports_effective_ids, os.supports_follow_symlinks):
            if real in supports:
                supports.add(wrapped)
        setattr(os, name, wrapped)


def _make_node(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], args[1])
    if path is not None:
        guard.make(path)


def write_ahead(path: Any, flags: int = os.O_WRONLY | os.O_CREAT | os.O_TRUNC) -> None:
    """Tell the guard that a writer outside Python is about to open ``path`` with ``flags``.

    Raises:
        PermissionError: the original could not be made safe.
    """
    protect(_open, (path, None, flags), "open")


def note_created(path: Any) -> None:
    """Tell the guard of a file that a writer outside Python has just made."""
    protect(_note_created, (path,), "os.symlink")


def _note_created(guard: Guard, args: tuple[Any, ...]) -> None:
    path = canonical(args[0], follow=True)
    if path is not None:
        guard.made(path)


# --------------------------------------------------------------------------------------------- caches

_CACHE_VARIABLES = """
    HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HF_ASSETS_CACHE HF_XET_CACHE HUGGINGFACE_HUB_CACHE
    TRANSFORMERS_CACHE
    HF_MODULES_CACHE HF_EVALUATE_CACHE XDG_CACHE_HOME TORCH_HOME TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR
    TORCHINDUCTOR_CACHE_DIR NUMBA_CACHE_DIR CUDA_CACHE_PATH MPLCONFIGDIR PIP_CACHE_DIR UV_CACHE_DIR NLTK_DATA
    KERAS_HOME TIKTOKEN_CACHE_DIR DATA_GYM_CACHE_DIR TFDS_DATA_DIR KAGGLEHUB_CACHE PYTHONPYCACHEPREFIX""".split()
_CACHE_FOLDERS = """~/.cache ~/.triton ~/.nv ~/.torch ~/.keras ~/nltk_data ~/.config/matplotlib ~/.ipython
    ~/.astropy""".split()


def cache_folders(start: str) -> tuple[str, ...]:
    """Folders whose new files may stay: caches and installed packages. Never one that the program was started in."""
    import getpass
    import sysconfig

    found = [os.environ[name] for name in _CACHE_VARIABLES if os.environ.get(name)]
    found += [os.path.expanduser(p) for p in _CACHE_FOLDERS]
    found += [sysconfig.get_paths().get(name, "") for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
    try:
        found.append(f"/tmp/torchinductor_{getpass.getuser()}")
    except (KeyError, OSError):
        pass
    found.append(os.path.dirname(os.path.abspath(__file__)))  # compiled modules of the recorder itself
    real_start = os.path.realpath(start) + "/"
    folders = {os.path.realpath(p) for p in found if p and os.path.isabs(p)}
    return tuple(p for p in folders if p != "/" and not real_start.startswith(p.rstrip("/") + "/"))
