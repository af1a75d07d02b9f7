"""Which operation of a forward makes the first value that is not finite."""

from __future__ import annotations

import math
from typing import Any

from . import measure
from .replay_calls import tensors
from .replay_trace import Path, here

#: What hands out memory as it finds it, or writes a constant: an infinity there is meant, a NaN is none yet.
_MEMORY = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "resize_",
    "set_",
    "empty_permuted",
)
_CONSTANTS = ("full", "full_like", "new_full", "fill", "fill_", "masked_fill", "masked_fill_", "where", "scalar_tensor",
              "lift_fresh", "copy_", "_to_copy", "clone", "zero_", "index_put_", "masked_scatter", "constant_pad_nd",
              "tril", "triu", "finfo")  # fmt: skip
#: Views and moves make nothing.
_NAMES = 12


class Search:
    """Looks at every operation while :meth:`mode` is on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nan: dict[str, Any] | None = None
        self.inf: dict[str, Any] | None = None

    def mode(self) -> Any:
        from torch.utils import _python_dispatch

        base: Any = _python_dispatch.TorchDispatchMode
        look = self._look

        class Mode(base):  # type: ignore[misc]
            supports_higher_order_operators = True

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                look(func, args, kwargs or {}, result)
                return result

        return Mode()

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.nan is not None:
            return
        schema = getattr(func, "_schema", None)
        name = str(schema.name).rpartition("::")[2] if schema is not None else getattr(func, "__name__", str(func))
        out = next(tensors(result), None)
        if out is None or not _floating(out) or name in _MEMORY:
            return
        if bool(out.isfinite().all()):
            return
        given = [t for t in tensors([*args, *kwargs.values()]) if _floating(t)]
        in_place = schema is not None and schema.is_mutable
        if bool(out.isnan().any()):
            # What an in-place operation was given is overwritten; whether it held a NaN is known from the one before.
            if in_place or not any(bool(t.isnan().any()) for t in given):
                self.nan = self._made(name, "nan", out, given)
        elif self.inf is None and name not in _CONSTANTS and (in_place or all(bool(t.isfinite().all()) for t in given)):
            self.inf = self._made(name, "inf", out, given)

    def _made(self, name: str, kind: str, out: Any, given: list[Any]) -> dict[str, Any]:
        infinite = kind == "nan" and any(bool(t.isinf().any()) for t in given)
        masked = 0
        if infinite and "softmax" in name and given:
            masked = int((given[0] == -math.inf).all(dim=-1).sum())
        return {
            "function": name.strip("_").removesuffix("_"),
            "kind": kind,
            "module": self.path.name,
            "class_name": self.path.class_name,
            "count": int((out.isnan() if kind == "nan" else out.isinf()).sum()),
            "elements": out.numel(),
            "from_infinite": infinite,
            "masked_rows": masked,
            "dtype": str(out.dtype).removeprefix("torch."),
            "at": here(3),
        }


def _floating(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta")


def finite(values: Any) -> bool:
    """Every floating tensor in nested outputs is finite."""
    return all(bool(t.isfinite().all()) for t in tensors(values) if _floating(t))


def holding(named: list[tuple[str, Any]], *, nan_only: bool = False) -> list[str]:
    """Names of the tensors that hold NaN or infinities. One transfer per device and dtype for those that are clean."""
    import torch

    groups: dict[Any, list[tuple[str, Any]]] = {}
    for name, tensor in named:
        tensor = measure.local(tensor)
        if _floating(tensor) and tensor.layout == torch.strided and not measure.emptied(tensor):
            groups.setdefault((tensor.device, tensor.dtype), []).append((name, tensor))
    found = []
    for items in groups.values():
        # A sum is NaN or infinite when a value is; when it only ran over, the second look tells.
        sums = torch.stack([t.sum(dtype=torch.float32) for _, t in items]).isfinite().tolist()
        for (name, tensor), clean in zip(items, sums, strict=True):
            if not clean and bool((tensor.isnan() if nan_only else ~tensor.isfinite()).any()):
                found.append(name)
    return found


def report_names(names: list[str]) -> list[str]:
    return names[:_NAMES]
