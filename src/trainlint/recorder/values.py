"""What framework instruments share: plain values out of a framework's objects, and ``logged`` events."""

from __future__ import annotations

import enum
import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from .core import Recorder, scalar

#: Names written per call of a logger; a histogram given as a thousand numbers is not a thousand metrics.
NAMES_PER_CALL = 200

_SECRET_NAME = re.compile(
    r"(^|_)(hub_token|auth_token|api_?key|access_key|secret|password|passwd|credentials?)($|_)", re.I
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_MISSING = object()


def setting(value: Any) -> Any:
    """A framework's setting as schema ``Value``: enums by value, mappings as text, credentials in URLs removed."""
    if isinstance(value, enum.Enum):
        value = value.value
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        value = str(value)
    if isinstance(value, Mapping):
        if not value:
            return None
        value = ", ".join(f"{k}={setting(v)!r}" for k, v in value.items() if not _SECRET_NAME.search(str(k)))
    elif isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    result = scalar([setting(v) for v in value] if isinstance(value, (list, tuple)) else value)
    return _CREDENTIALS.sub("", result) if isinstance(result, str) else result


def read(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """``{name: setting}`` for those attributes of ``owner`` that exist and can be read."""
    found: dict[str, Any] = {}
    for name in names:
        if _SECRET_NAME.search(name):
            continue
        try:
            value = getattr(owner, name, _MISSING)
        except Exception:
            continue
        if value is not _MISSING:
            found[name] = setting(value)
    return found


def attribute(owner: Any, *path: str) -> Any:
    """``owner.a.b.c`` or ``None`` when a link is missing or raises."""
    for name in path:
        try:
            owner = getattr(owner, name, None)
        except Exception:
            return None
        if owner is None:
            return None
    return owner


def integer(value: Any) -> int | None:
    """A finite number as ``int``; ``None`` for anything else (``inf``: an endless loader)."""
    plain = None if isinstance(value, bool) else number(value)
    return int(plain) if plain is not None and math.isfinite(plain) else None


def known(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is ``None``: a partial line does not take back what an earlier one said."""
    return {name: value for name, value in fields.items() if value is not None}


def class_name(value: Any) -> str:
    return type(value).__name__


def version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", "") or "")


def compiling() -> bool:
    """torch.compile is tracing the caller: instruments keep out of the graph."""
    # Half of torch is there while it is being imported.
    compiler: Any = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and bool(compiler.is_compiling())


def outside(frame: FrameType | None, wrappers: tuple[str, ...] = ()) -> FrameType | None:
    """The frame that called an instrumented function: the first at or outside ``frame`` that is not the recorder's.

    ``wrappers``: further modules whose functions only pass the call on (``torch.manual_seed`` is wrapped by dynamo).
    """
    ours = (__package__ or "") + "."
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith((ours, *wrappers)):
        frame = frame.f_back
    return frame


def log_values(recorder: Recorder, values: Any, by: str, step: Any = None) -> None:
    """Write one ``logged`` event per number in ``values``; numbers one level deeper get ``outer/inner`` as name."""
    if not isinstance(values, Mapping):
        return
    numbers_found = [(name, value) for name, value in _flat(values) if _loggable(value)][:NAMES_PER_CALL]
    if not numbers_found:
        return
    at = recorder.user_line()
    for name, value in numbers_found:
        log_value(recorder, name, value, by, step, at)


def log_value(recorder: Recorder, name: Any, value: Any, by: str, step: Any, at: dict[str, Any] | None) -> None:
    """One ``logged`` event. A tensor on a device is read with the next optimizer step, so that nothing waits for it."""
    tensor: Any = None
    if _is_tensor(value):
        # Subclasses (fake, functional, distributed tensors) may not be readable, or only by all ranks together.
        readable = type(value).__name__ in ("Tensor", "Parameter") and value.numel() == 1
        tensor, value = (value.detach().reshape(()) if readable else None), None
        if tensor is not None and tensor.device.type == "cpu":
            tensor, value = None, tensor.item()
    seq = recorder.event("logged", at, name=str(name), value=number(value), by=by, step=integer(step))
    if tensor is not None and tensor.device.type != "meta":
        # A copy: the program may write into its tensor before it is read.
        recorder.later(seq, "value", tensor.clone())


def number(value: Any) -> float | None:
    """A Python or numpy number as ``float``, else ``None``."""
    if isinstance(value, numbers.Real):
        return float(value)
    if getattr(value, "ndim", None) == 0 and type(value).__module__ == "numpy":
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return None


def _is_tensor(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _loggable(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return number(value) is not None or (_is_tensor(value) and value.numel() == 1)


def _flat(values: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, deep in value.items():
                yield f"{name}/{inner}", deep
        else:
            yield str(name), value
