"""Writers that no audit hook sees, because C++ or Rust code opens the file: wrapped when their library is imported.

To cover another one, add a line to :data:`WRITERS`: module, dotted name in it, name and position of the path argument
(counted without ``self`` for methods), and how it opens the file.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from . import files
from .files_keep import canonical
from .patching import ImportHooks, wrap

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_UPDATE = os.O_RDWR | os.O_CREAT


class Writer(NamedTuple):
    module: str
    name: str
    #: Name and position (with ``self``) of the argument that is a path; other types (open files) are left alone.
    argument: str
    position: int
    #: ``open(2)`` flags, or the position and name of the argument that holds an ``open()``-like mode.
    flags: int | tuple[str, int, str] = _WRITE


WRITERS: tuple[Writer, ...] = (
    # Everything of torch's zip format: torch.save, torch.export.save, torch.package.
    Writer("torch", "_C.PyTorchFileWriter.__init__", "file_name", 1),
    Writer("torch", "_C.ScriptModule.save", "f", 1),
    Writer("torch", "_C.ScriptFunction.save", "f", 1),
    Writer("torch", "_C._autograd._ProfilerResult.save", "path", 1),
    Writer("torch.distributed", "FileStore.__init__", "file_name", 1, _UPDATE),
    Writer("safetensors", "serialize_file", "filename", 1),
    Writer("tokenizers", "Tokenizer.save", "path", 1),
    Writer("h5py", "File.__init__", "name", 1, ("mode", 2, "r")),
    Writer("tables.file", "File.__init__", "filename", 1, ("mode", 2, "r")),
    Writer("netCDF4", "Dataset.__init__", "filename", 1, ("mode", 2, "r")),
    Writer("pyarrow.parquet.core", "ParquetWriter.__init__", "where", 1),
    Writer("pyarrow.feather", "write_feather", "dest", 1),
    Writer("pyarrow.csv", "write_csv", "output_file", 1),
    Writer("pyarrow.orc", "write_table", "where", 1),
    Writer("polars", "DataFrame.write_csv", "file", 1),
    Writer("polars", "DataFrame.write_parquet", "file", 1),
    Writer("polars", "DataFrame.write_ipc", "file", 1),
    Writer("polars", "DataFrame.write_ndjson", "file", 1),
    Writer("polars", "LazyFrame.sink_parquet", "path", 1),
    Writer("polars", "LazyFrame.sink_csv", "path", 1),
    Writer("polars", "LazyFrame.sink_ipc", "path", 1),
    Writer("cv2", "imwrite", "filename", 0),
    Writer("soundfile", "write", "file", 0),
    Writer("torchaudio", "save", "uri", 0),
    Writer("xgboost.core", "Booster.save_model", "fname", 1),
    Writer("lightgbm.basic", "Booster.save_model", "filename", 1),
)


def install(hooks: ImportHooks) -> None:
    for module in {w.module for w in WRITERS}:
        hooks.on_import(module, _installer([w for w in WRITERS if w.module == module]))
    hooks.on_import("numpy", _numpy)
    hooks.on_import("tensorboard.summary.writer.event_file_writer", _tensorboard)


def _installer(writers: list[Writer]) -> Callable[[ModuleType], None]:
    def installer(module: ModuleType) -> None:
        for writer in writers:
            *owners, name = writer.name.split(".")
            owner: Any = module
            for step in owners:
                owner = getattr(owner, step, None)
            if owner is None:
                continue
            try:
                wrap(owner, name, _watching(writer))
            except TypeError:
                continue  # a class that cannot be changed

    return installer


def _watching(writer: Writer) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            path = kwargs.get(writer.argument, args[writer.position] if len(args) > writer.position else None)
            if isinstance(path, (str, bytes, os.PathLike)):
                flags = writer.flags
                if isinstance(flags, tuple):
                    name, position, default = flags
                    mode = kwargs.get(name, args[position] if len(args) > position else default)
                    flags = _mode_flags(mode)
                if flags:
                    files.write_ahead(path, flags)
            return original(*args, **kwargs)

        return replacement

    return make


def _mode_flags(mode: Any) -> int:
    """Flags for a mode of h5py, PyTables or netCDF4; 0 for reading."""
    if not isinstance(mode, str):
        return 0
    if mode.startswith("w"):
        return _WRITE
    if mode.startswith("x"):
        return _WRITE | os.O_EXCL
    return _UPDATE if mode.startswith(("a", "r+")) else 0


def _numpy(module: ModuleType) -> None:
    """A large array mapped for update is mapped copy-on-write instead: the file may be too large to copy.

    ``r+`` is numpy's default, also where a program only reads.
    """
    memmap = module.memmap
    original = memmap.__new__
    signature = inspect.signature(original)

    def __new__(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        filename, mode = bound.arguments.get("filename"), bound.arguments.get("mode", "r+")
        if mode in ("r+", "readwrite") and isinstance(filename, (str, os.PathLike)) and _too_large(filename):
            bound.arguments["mode"] = "c"
        return original(*bound.args, **bound.kwargs)

    memmap.__new__ = staticmethod(__new__)


def _too_large(filename: Any) -> bool:
    guard = files.guard
    try:
        if guard is None or os.stat(filename).st_size < 64 << 20:
            return False
        path = canonical(filename, follow=True)
        if path is None:
            return False
        with guard.journal as state:
            return not state.ours(path)
    except Exception:
        return False


def _tensorboard(module: ModuleType) -> None:
    """With TensorFlow installed its own C++ file system makes the folder and the event file."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Any, logdir: Any, *args: Any, **kwargs: Any) -> None:
            folder = os.fspath(logdir)
            if "://" not in str(folder):
                while folder and not os.path.isdir(folder):
                    parent = os.path.dirname(os.path.abspath(folder))
                    if os.path.isdir(parent):
                        files.protect(files._mkdir, (folder, 0o777, -1), "os.mkdir")
                        break
                    folder = parent
            original(self, logdir, *args, **kwargs)
            made = getattr(self, "_file_name", None)
            if isinstance(made, (str, bytes)) and os.path.isfile(os.fsdecode(made)):
                files.note_created(made)

        return __init__

    wrap(module.EventFileWriter, "__init__", make)
