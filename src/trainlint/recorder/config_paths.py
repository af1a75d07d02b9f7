"""What a config key is called, what counts as one leaf, and which values must never be kept.

Shared by the recorder and by ``trainlint.config``, so that a key read in the watched process and the same key in the
file have the same path. Standard library only.

Paths: segments are joined by dots (``training.lr``), list elements are ``[0]`` (``layers[0].size``). A segment that
could be mistaken for several (it holds a dot, a bracket, a quote or a blank, or is empty) is written as ``["a.b"]``, a
JSON string in brackets. Keys that are not text are written as YAML would write them (``1``, ``true``, ``null``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: A flat list of scalars up to this long is one leaf; longer or nested lists have one leaf per element.
SHORT_LIST = 32
#: Keys kept of one config; more than this is data, not settings.
KEY_CAP = 20_000
#: Text values are cut here: a prompt or a template in a config is not compared with anything.
TEXT_CAP = 500

SECRET = "<secret>"


def words(text: str) -> frozenset[str]:
    """The words of a text as a set: long tables stay readable."""
    return frozenset(text.split())


_PLAIN = re.compile(r"[^.\[\]\"'\s]+")
_SCALARS = (bool, int, float, str)

_SECRET_WORDS = words(
    """password passwd pwd passphrase secret secrets token apikey credential credentials authorization bearer
    privatekey accesskey secretkey authkey pat webhook"""
)
#: Names that end in ``token`` but name a vocabulary entry or a flag, not a credential.
_HARMLESS = words(
    """bos eos pad unk sep cls mask special extra end start image audio video user assistant batch class confidence
    per num n max min tokens bot eot eod system think tool prefix suffix mem register new added latent"""
)
_PAIRS = frozenset(
    ("api", "access", "private", "secret", "auth", "account", "client", "encryption", "signing", "ssh", "license")
)
_URL_WITH_CREDENTIALS = re.compile(r"://(?:[^/\s:@]*:[^/\s@]+|[^/\s:@]{16,})@")
_SECRET_VALUE = re.compile(
    r"(?:^|[\s=:\"'])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9\-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_\-]{30,}|eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}\.)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def segment(key: Any) -> str:
    """One key as it stands in a path."""
    if isinstance(key, str):
        return key if _PLAIN.fullmatch(key) else json.dumps([key])
    if key is None:
        return "null"
    if isinstance(key, bool):
        return "true" if key else "false"
    text = str(key)
    return text if _PLAIN.fullmatch(text) else json.dumps([text])


def join(prefix: str, key: Any) -> str:
    """The path of ``key`` in the section ``prefix`` (empty for the top)."""
    part = segment(key)
    if not prefix:
        return part
    return prefix + part if part.startswith("[") else f"{prefix}.{part}"


def element(prefix: str, index: int) -> str:
    """The path of a list element."""
    return f"{prefix}[{index}]"


def last_name(path: str) -> str:
    """The last key of a path, without list indices: ``layers[0].size`` -> ``size``, ``betas[1]`` -> ``betas``."""
    parts = split(path)
    for part in reversed(parts):
        if isinstance(part, str):
            return part
    return ""


def split(path: str) -> list[str | int]:
    """A path as keys and list indices."""
    out: list[str | int] = []
    for found in re.finditer(r"\[(\d+)\]|\[(\"(?:[^\"\\]|\\.)*\")\]|([^.\[\]]+)", path):
        index, quoted, plain = found.groups()
        if index is not None:
            out.append(int(index))
        elif quoted is not None:
            try:
                out.append(json.loads(quoted))
            except ValueError:
                out.append(quoted)
        else:
            out.append(plain)
    return out


def is_short_list(value: Any) -> bool:
    """Whether a list is one leaf: flat, of scalars, and short."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= SHORT_LIST
        and all(v is None or isinstance(v, _SCALARS) for v in value)
    )


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and raw value of every leaf, in order; empty sections and lists are leaves. Stops at :data:`KEY_CAP`.

    Each container is walked through ``dict``'s own methods, so that looking here is not a read of a tracked section.
    """
    left, visits = KEY_CAP, 8 * KEY_CAP  # a YAML anchor can make a section contain itself
    stack: list[tuple[str, Any]] = [(prefix, data)]
    while stack and visits:
        visits -= 1
        path, value = stack.pop()
        if isinstance(value, dict) and value:
            stack.extend((join(path, k), v) for k, v in reversed(list(dict.items(value))))
        elif isinstance(value, (list, tuple)) and value and not is_short_list(value):
            stack.extend((element(path, i), v) for i, v in reversed(list(enumerate(value))[:KEY_CAP]))
        else:
            if not path:
                continue
            yield path, value
            left -= 1
            if left <= 0:
                return


def type_name(value: Any) -> str:
    """The type of a leaf: ``int``, ``float``, ``bool``, ``str``, ``null``, ``list``, ``dict``, or the class's name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind.__name__
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, Mapping):
        return "dict"
    return type(value).__name__


def leaf_value(value: Any) -> Any:
    """A leaf as a schema ``Value``: scalars as they are, lists as tuples, everything else as text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, str):
        return value if len(value) <= TEXT_CAP else value[:TEXT_CAP] + "..."
    if isinstance(value, (list, tuple)):
        return tuple(leaf_value(v) if not isinstance(v, (list, tuple, dict)) else "..." for v in value[:SHORT_LIST])
    if isinstance(value, Mapping):
        return "{}" if not value else "{...}"
    try:
        text = str(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= TEXT_CAP else text[:TEXT_CAP] + "..."


def is_secret(name: str, value: Any) -> bool:
    """Whether a value must never be kept: by the name of its key, or because the value itself is a credential."""
    if isinstance(value, (list, tuple)):
        return any(is_secret(name, v) for v in value)
    if isinstance(value, str):
        head = value[:4096]
        if ("://" in head and _URL_WITH_CREDENTIALS.search(head)) or _SECRET_VALUE.search(head):
            return True
        inner, given, rest = head.partition("=")  # an override kept as text: wandb.api_key=...
        if given and rest and len(inner) < 200 and is_secret(inner.rpartition(".")[2].lstrip("+-"), rest):
            return True
    elif not isinstance(value, int) or isinstance(value, bool):
        return False
    if isinstance(value, str) and (not value or (value.startswith(("${", "$")) and "}" in value[-1:])):
        return False
    words = [w.lower() for w in _WORD.findall(name)]
    if not words:
        return False
    joined = "".join(words)
    if joined in _SECRET_WORDS:
        return True
    last = words[-1]
    if last == "key" and len(words) > 1 and words[-2] in _PAIRS:
        return True
    if last in (
        "id",
        "path",
        "file",
        "name",
        "type",
        "length",
        "len",
        "dim",
        "size",
        "count",
        "weight",
        "idx",
        "index",
    ):
        return False
    if last == "token" or last == "pat":
        return isinstance(value, str) and not (len(words) > 1 and words[-2] in _HARMLESS)
    return last in _SECRET_WORDS and last != "token"


def kept(path: str, value: Any) -> tuple[Any, str, bool]:
    """Value to keep, its type, and whether it was withheld as a secret."""
    if is_secret(last_name(path), value):
        return SECRET, type_name(value), True
    return leaf_value(value), type_name(value), False
