"""Recording <-> JSON, driven by the dataclasses' own type hints.

Non-finite floats are written as the strings ``"nan"``, ``"inf"``, ``"-inf"`` (JSON has none). Defaults are left out,
unknown fields are ignored on reading, so that a recording of a newer minor version still loads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Optional, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from trainlint.recording.schema import EVENT_TYPES, SCHEMA, Event, Recording

T = TypeVar("T")
Decoder = Callable[[Any], Any]


class RecordingError(ValueError):
    """The file is not a recording that this version reads."""


# --------------------------------------------------------------------------------------------- writing


def encode(value: Any) -> Any:
    """Any schema value as JSON data."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return value if math.isfinite(value) else repr(value)
    if dataclasses.is_dataclass(value):
        out: dict[str, Any] = {}
        tag = getattr(kind, "kind", None)
        if isinstance(tag, str) and tag in EVENT_TYPES:
            out["kind"] = tag
        for name, default in _defaults(cast(Any, kind)):
            item = getattr(value, name)
            if item is default or (default is not _NO_DEFAULT and item == default and type(item) is type(default)):
                continue
            out[name] = encode(item)
        return out
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    return str(value)


_NO_DEFAULT = object()


@functools.cache
def _defaults(cls: type) -> tuple[tuple[str, Any], ...]:
    out = []
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            out.append((f.name, f.default))
        elif f.default_factory is not dataclasses.MISSING:
            out.append((f.name, f.default_factory()))
        else:
            out.append((f.name, _NO_DEFAULT))
    return tuple(out)


def dumps(recording: Recording, *, indent: int | None = None) -> str:
    """The recording as JSON text; always states its schema."""
    data = encode(recording)
    return json.dumps({"schema": recording.schema, **data}, indent=indent, ensure_ascii=False, allow_nan=False)


# --------------------------------------------------------------------------------------------- reading


def _float(value: Any) -> float:
    # A rate may be None (Adafactor without one); a column of numbers keeps its place.
    return math.nan if value is None else float(value)


def _same(value: Any) -> Any:
    return value


# Measurements are columns of tens of thousands of numbers: no call per element where it is a float already.
def _floats(values: Any) -> tuple[float, ...]:
    return tuple([v if v.__class__ is float else _float(v) for v in values])


def _floats_or_none(values: Any) -> tuple[float | None, ...]:
    return tuple([v if v is None or v.__class__ is float else float(v) for v in values])


@functools.cache
def decoder(hint: Hashable) -> Decoder:
    """A function that turns JSON data into a value of the type ``hint``."""
    if hint is Any or hint in (str, int, bool, type(None)):
        return _same
    if hint is float:
        return _float
    if hint == Event:
        return _event
    origin = get_origin(hint)
    if origin is Union or origin is types.UnionType:
        options = [a for a in get_args(hint) if a is not type(None)]
        if len(options) == 1:
            inner = decoder(options[0])
            return lambda v: None if v is None else inner(v)
        if any(get_origin(a) is tuple for a in options):
            return lambda v: tuple(v) if isinstance(v, list) else v
        return _same
    if origin is tuple:
        args = get_args(hint)
        if args[0] in (str, int, bool):
            return tuple
        if args[0] is float:
            return _floats
        if args[0] == Optional[float]:
            return _floats_or_none
        item = decoder(args[0])
        return lambda v: tuple([item(x) for x in v])
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner = decoder(get_args(hint)[1])
        return lambda v: {k: inner(x) for k, x in v.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass_decoder(hint)
    raise TypeError(f"no decoder for {hint!r}")


def _dataclass_decoder(cls: type) -> Decoder:
    hints = {k: v for k, v in get_type_hints(cls).items() if get_origin(v) is not ClassVar}
    decoders: dict[str, Decoder] = {}

    def decode(data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise RecordingError(f"expected an object for {cls.__name__}, found {type(data).__name__}")
        fields: dict[str, Any] = {}
        for name, value in data.items():
            read = decoders.get(name)
            if read is None:
                if name not in hints:
                    continue
                read = decoders[name] = decoder(hints[name])
            fields[name] = read(value)
        try:
            return cls(**fields)
        except TypeError as error:
            raise RecordingError(f"incomplete {cls.__name__}: {error}") from error

    return decode


def _event(data: Any) -> Any:
    cls = EVENT_TYPES.get(data.get("kind", "")) if isinstance(data, Mapping) else None
    if cls is None:
        raise RecordingError(f"unknown event kind {data.get('kind') if isinstance(data, Mapping) else data!r}")
    return decoder(cls)(data)


def decode(cls: type[T], data: Any) -> T:
    """JSON data as a value of the schema class ``cls``.

    Raises:
        RecordingError: when the data does not fit the class.
    """
    try:
        return cast(T, decoder(cast(Any, cls))(data))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RecordingError):
            raise
        raise RecordingError(f"not a valid {cls.__name__}: {error}") from error


def loads(text: str) -> Recording:
    """A recording from JSON text.

    Raises:
        RecordingError: not JSON, not a recording, or of another major version.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordingError(f"not JSON: {error}") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("trainlint.recording/"):
        raise RecordingError("not a trainlint recording (no schema field)")
    if data["schema"] != SCHEMA:
        raise RecordingError(f"recording has schema {data['schema']}, this version reads {SCHEMA}")
    return decode(Recording, data)


def save(recording: Recording, path: Path) -> None:
    path.write_text(dumps(recording, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Recording:
    """Read a recording from a file. Raises RecordingError or OSError."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecordingError(f"not UTF-8 text: {error}") from error
