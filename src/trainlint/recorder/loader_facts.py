"""What a DataLoader reads from and how: its sampler, its workers, the generators and files that its dataset keeps."""

from __future__ import annotations

import random
import sys
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .core import is_user_file

#: Objects looked through for random number generators, and how deep.
OBJECTS = 400
DEPTH = 4


def batches_in(loader: Any) -> int | None:
    """Batches of one pass over a loader; ``None`` when it does not know."""
    # torch notes that an IterableDataset's length was asked for, and then warns when it delivers more.
    asked = getattr(loader, "_IterableDataset_len_called", None)
    try:
        return len(loader)
    except Exception:
        return None
    finally:
        if hasattr(loader, "_IterableDataset_len_called"):
            loader._IterableDataset_len_called = asked


def innermost_sampler(loader: Any) -> Any:
    """The sampler that gives single positions, below batch samplers and the wrappers that accelerate puts around."""
    batches_of: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(batches_of, "sampler", None) or getattr(loader, "sampler", None)
    for _ in range(3):
        inner = getattr(getattr(sampler, "batch_sampler", None), "sampler", None)
        inner = inner or getattr(getattr(batches_of, "batch_sampler", None), "sampler", None)
        if inner is None or inner is sampler:
            break
        sampler, batches_of = inner, None
    return sampler


def is_mapped(dataset: Any) -> bool:
    import torch

    return hasattr(dataset, "__len__") and not isinstance(dataset, torch.utils.data.IterableDataset)


def start_method(loader: Any) -> str:
    import torch.multiprocessing

    context = getattr(loader, "multiprocessing_context", None)
    method = context.get_start_method() if context is not None else torch.multiprocessing.get_start_method()
    return str(method)


def name_of(function: Any) -> str:
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", type(inner).__name__))


def line_of_function(function: Any) -> dict[str, Any] | None:
    inner = getattr(function, "func", function)
    call: Any = getattr(inner, "__code__", None) or vars(type(inner)).get("__call__")
    code = getattr(call, "__code__", call)
    if not isinstance(code, CodeType) or not is_user_file(code.co_filename):
        return None
    return {"file": code.co_filename, "line": code.co_firstlineno, "function": name_of(inner)}


def generators_in(roots: dict[str, Any]) -> list[str]:
    """Random number generators below objects, by where they are: ``dataset.transform.rng (numpy Generator)``."""
    return [f"{path} ({kind})" for path, item in _walk(roots) if (kind := _generator(item))][:8]


def holds_files(roots: dict[str, Any]) -> bool:
    """Whether an open file, or an object around one, is kept below objects."""
    return any(
        hasattr(item, "fileno") and hasattr(item, "seek")
        or type(item).__module__.partition(".")[0] in ("h5py", "zipfile", "tarfile", "lmdb", "sqlite3")
        for _, item in _walk(roots)
    )  # fmt: skip


def _generator(item: Any) -> str:
    import torch

    if isinstance(item, torch.Generator):
        return "torch.Generator"
    if isinstance(item, random.Random):
        return "random.Random"
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "random" in vars(numpy):
        if isinstance(item, numpy.random.Generator):
            return "numpy Generator"
        if isinstance(item, numpy.random.RandomState):
            return "numpy RandomState"
    return ""


def _walk(roots: dict[str, Any]) -> list[tuple[str, Any]]:
    """Objects below attributes, small containers, closures and the globals that functions of the program name."""
    found: list[tuple[str, Any]] = []
    known: set[int] = set()
    queue = [(path, item, 0) for path, item in roots.items()]
    while queue and len(found) < OBJECTS:
        path, item, depth = queue.pop(0)
        if item is None or isinstance(item, (str, bytes, int, float, type, ModuleType)) or id(item) in known:
            continue
        known.add(id(item))
        found.append((path, item))
        if depth < DEPTH:
            queue += [(p, part, depth + 1) for p, part in _below(path, item)]
    return found


def _below(path: str, item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, dict):
        return [(f"{path}[{k!r}]", v) for k, v in list(item.items())[:32] if isinstance(k, (str, int))]
    if isinstance(item, (list, tuple)):
        return [(f"{path}[{k}]", v) for k, v in enumerate(item[:32])]
    if isinstance(item, partial):
        return [(path, item.func), *((f"{path}.{k}", v) for k, v in item.keywords.items())]
    if isinstance(item, FunctionType):
        if not is_user_file(item.__code__.co_filename):
            return []
        free = zip(item.__code__.co_freevars, item.__closure__ or (), strict=False)
        inner = [(name, cell.cell_contents) for name, cell in free if cell is not None]
        return inner + [(n, item.__globals__[n]) for n in item.__code__.co_names if n in item.__globals__]
    below = list(getattr(item, "__dict__", {}).items())[:64]
    out = [(f"{path}.{name}", value) for name, value in below]
    for name in ("__getitem__", "__call__", "forward"):
        method = getattr(type(item), name, None)
        if isinstance(method, FunctionType) and is_user_file(method.__code__.co_filename):
            out.append((f"{type(item).__name__}.{name}", method))
    return out
