"""Reads a config file without running anything in it, and keeps the line of every key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainlint.config.errors import ConfigError
from trainlint.config.meanings import meaning_of
from trainlint.recorder.config_paths import KEY_CAP, join, kept, leaves, split
from trainlint.recording.schema import ConfigFacts, ConfigKey, SourceLine

#: A file beyond this is data; reading it as a config would take longer than the run.
SIZE_CAP = 64 * 1024 * 1024

Lines = dict[str, int]


@dataclass(frozen=True)
class LoadedConfig:
    """A config as facts for the judge and as the plain data that the program would see."""

    facts: ConfigFacts
    #: The parsed mapping with real values, secrets included: for launching only, never for a report.
    data: dict[str, Any]


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML, JSON or TOML config and apply ``key=value`` overrides.

    The path syntax of keys is described in :mod:`trainlint.recorder.config_paths`. The format follows the file's suffix
    (``.json``, ``.toml``, everything else is YAML).

    Raises:
        ConfigError: the file cannot be read as a config, or an override does not fit it.
    """
    text = _read(path)
    suffix = path.suffix.lower()
    data: Any
    lines: Lines
    if suffix == ".json":
        data, lines = _json(text)
    elif suffix == ".toml":
        data, lines = _toml(text)
    else:
        from trainlint.config.yaml_nodes import parse_yaml

        data, lines = parse_yaml(text)
    _require_mapping(data, path)
    groups = _hydra_groups(data)
    overridden = apply_overrides(data, [text for text in overrides if not _chooses(text, groups)])
    file = str(path.absolute())
    keys = []
    for key_path, raw in leaves(data):
        by_override = any(_inside(key_path, o) for o in overridden)
        value, kind, secret = kept(key_path, raw)
        line = None if by_override else _line(lines, key_path)
        keys.append(
            ConfigKey(
                path=key_path,
                value=value,
                type=kind,
                at=SourceLine(file, line) if line is not None else None,
                origin="override" if by_override else "file",
                secret=secret,
                meaning=meaning_of(key_path, raw),
            )
        )
    if len(keys) >= KEY_CAP:
        raise ConfigError(
            f"the config has more than {KEY_CAP:,} values",
            "This looks like data, not settings: name the file that the training program reads its settings from.",
        )
    files = (file, "command line") if overridden else (file,)
    kind = {".json": "json", ".toml": "toml"}.get(suffix, "yaml")
    return LoadedConfig(ConfigFacts(files=files, kind=kind, keys=tuple(keys)), data)


def _hydra_groups(data: dict[str, Any]) -> frozenset[str]:
    """Groups that the defaults list of a Hydra config chooses from: ``model`` of ``- override /model@pkg: large``."""
    listed = data.get("defaults")
    entries = listed if isinstance(listed, list) else []
    names = [str(name) for entry in entries if isinstance(entry, dict) for name in entry]
    return frozenset(n.removeprefix("optional ").removeprefix("override ").strip(" /").partition("@")[0] for n in names)


def _chooses(override: str, groups: frozenset[str]) -> bool:
    """Whether ``trainer=cpu`` chooses another file of a group, which sets no key of this one."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0] in groups


def _inside(path: str, top: str) -> bool:
    return path == top or path.startswith((top + ".", top + "["))


def _line(lines: Lines, path: str) -> int | None:
    """The line of a leaf, or of the nearest section above it whose line is known."""
    while path:
        found = lines.get(path)
        if found is not None:
            return found
        cut = max(path.rfind("."), path.rfind("["))
        path = path[: max(cut, 0)]
    return None


# --------------------------------------------------------------------------------------------- the file


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= SIZE_CAP else b""
    except IsADirectoryError:
        run = path / ".hydra" / "config.yaml"
        hint = f"It holds a Hydra run: name {run}." if run.is_file() else "Name the config file in it."
        raise ConfigError(f"{path} is a directory", hint) from None
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", _near(path)) from None
    except PermissionError:
        raise ConfigError(f"{path} cannot be read: permission denied", "Check the file's permissions.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "Check the path.") from None
    if size > SIZE_CAP:
        raise ConfigError(
            f"{path} has {size / 2**20:.0f} MiB", "A config of this size is data: name the file with the settings."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            try:
                return raw.decode("utf-16")
            except UnicodeDecodeError:
                pass
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line})",
            "Save the file as UTF-8, or name another file: this one may be a checkpoint or an archive.",
            line,
        ) from None


def _near(path: Path) -> str:
    """A file that may have been meant."""
    import difflib

    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml", ".json", ".toml")]
    except OSError:
        return f"There is no folder {path.parent} either." if not path.parent.exists() else "Check the path."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else "Check the path."


def _require_mapping(data: Any, path: Path) -> None:
    if data is None or data == {}:
        raise ConfigError(f"{path} is empty", "A config holds settings as `key: value`.")
    if isinstance(data, list):
        raise ConfigError(
            f"{path} holds a list at the top, not settings",
            "A config is a mapping (`key: value`) at the top. A sweep or a list of runs: name one of them.",
            1,
        )
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a single {type(data).__name__}, not settings",
            "A config is a mapping (`key: value`) at the top.",
            1,
        )


# --------------------------------------------------------------------------------------------- json, toml


def _json(text: str) -> tuple[Any, Lines]:
    if not text.strip():
        return None, {}
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg} at line {error.lineno}: {_text_of(text, error.lineno)}",
            "JSON wants double quotes, no comments and no comma after the last entry.",
            error.lineno,
        ) from None
    except RecursionError:
        raise ConfigError("the JSON is nested too deeply to read", "Name the file with the settings.") from None
    return data, json_lines(text)


_JSON_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|[{}\[\]:,\n]')


def json_lines(text: str) -> Lines:
    """Line of every key of valid JSON, by path."""
    lines: Lines = {}
    line = 1
    #: One entry per open container: path, and the element index or -1 for an object.
    stack: list[tuple[str, int]] = []
    pending: str | None = None  # path of the value that comes next
    text_before: tuple[str, int] | None = None
    for token in _JSON_TOKEN.finditer(text):
        mark = token.group()
        if mark == "\n":
            line += 1
        elif mark[0] == '"':
            text_before = (token.group(1), line)
        elif mark == ":" and text_before is not None and stack:
            key = json.loads(f'"{text_before[0]}"', strict=False)
            pending = join(stack[-1][0], key)
            lines[pending] = text_before[1]
        elif mark in "{[":
            if pending is None and stack and stack[-1][1] >= 0:
                pending = f"{stack[-1][0]}[{stack[-1][1]}]"
                lines.setdefault(pending, line)
            stack.append((pending or "", 0 if mark == "[" else -1))
            pending = None
        elif mark in "}]":
            if stack:
                stack.pop()
            pending = None
        elif mark == ",":
            pending = None
            if stack and stack[-1][1] >= 0:
                stack[-1] = (stack[-1][0], stack[-1][1] + 1)
    return lines


def _toml(text: str) -> tuple[Any, Lines]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError
        found = re.search(r"line (\d+)", str(error))
        line = int(found.group(1)) if found else None
        where = f": {_text_of(text, line)}" if line else ""
        raise ConfigError(f"not valid TOML: {error}{where}", "Check the line, and quotes around text.", line) from None
    except RecursionError:
        raise ConfigError("the TOML is nested too deeply to read", "Name the file with the settings.") from None
    return data, toml_lines(text)


_TOML_KEY = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_TOML_DOTTED = re.compile(rf"\s*({_TOML_KEY}(?:\s*\.\s*{_TOML_KEY})*)\s*=")
_TOML_TABLE = re.compile(rf"\s*(\[\[?)\s*({_TOML_KEY}(?:\s*\.\s*{_TOML_KEY})*)\s*\]")


def toml_lines(text: str) -> Lines:
    """Line of every key of valid TOML as far as a line search can tell (inline tables have the line of their key)."""
    lines: Lines = {}
    prefix = ""
    counts: dict[str, int] = {}
    quote = ""  # inside a multi-line string
    for number, line in enumerate(text.splitlines(), 1):
        if quote:
            if quote in line:
                quote = ""
            continue
        table = _TOML_TABLE.match(line)
        if table:
            prefix = _toml_path("", table.group(2), counts)
            if table.group(1) == "[[":
                index = counts.get(prefix, 0)
                counts[prefix] = index + 1
                prefix = f"{prefix}[{index}]"
            lines.setdefault(prefix, number)
            continue
        key = _TOML_DOTTED.match(line)
        if key:
            lines.setdefault(_toml_path(prefix, key.group(1), {}), number)
            for mark in ('"""', "'''"):
                if line.count(mark) % 2:
                    quote = mark
    return lines


def _toml_path(prefix: str, dotted: str, counts: dict[str, int]) -> str:
    path = prefix
    for part in re.findall(_TOML_KEY, dotted):
        path = join(path, part[1:-1] if part[0] in "\"'" else part)
        if path in counts and path != join(prefix, dotted):
            path = f"{path}[{counts[path] - 1}]" if dotted.strip() != part else path
    return path


def _text_of(text: str, line: int | None) -> str:
    rows = text.splitlines()
    return rows[line - 1].strip()[:120] if line and 0 < line <= len(rows) else ""


# --------------------------------------------------------------------------------------------- overrides

_OVERRIDE = re.compile(r"([+~]{0,2})([^=]+?)=(.*)", re.DOTALL)


def parse_override(text: str) -> tuple[str, Any, bool]:
    """``key=value`` as (path, value, delete). ``+`` and ``++`` before the key are accepted as Hydra writes them.

    Raises:
        ConfigError: not of that form.
    """
    if text.startswith("~") and "=" not in text:
        return text[1:], None, True
    found = _OVERRIDE.fullmatch(text)
    if found is None or not found.group(2).strip():
        raise ConfigError(
            f"{text!r} is not an override",
            "Write key=value, for example training.lr=3e-5; a command to start comes after `--`.",
        )
    return found.group(2).strip(), scalar_of(found.group(3)), found.group(1).startswith("~")


_FLOAT = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def scalar_of(text: str) -> Any:
    """The value of a setting on a command line: a number (``1e-4`` too), true/false, null, ``[a, b]``, or text."""
    stripped = text.strip()
    lowered = stripped.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("null", "none", "~", ""):
        return None if lowered != "" else ""
    if re.fullmatch(r"[+-]?\d+", stripped):
        return int(stripped)
    if _FLOAT.fullmatch(stripped):
        return float(stripped)
    if stripped[0] in "[{":
        return _flow(stripped)
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'":
        return stripped[1:-1]
    return stripped


def _flow(text: str) -> Any:
    from trainlint.config.yaml_nodes import parse_yaml

    try:
        data, _ = parse_yaml(text)
    except ConfigError:
        return text
    return _numbers(data)


def _numbers(data: Any) -> Any:
    """Text such as ``1e-4``, which YAML 1.1 does not take for a number, as the number it means on a command line."""
    if isinstance(data, dict):
        return {k: _numbers(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_numbers(v) for v in data]
    if isinstance(data, str) and _FLOAT.fullmatch(data):
        return float(data)
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> tuple[str, ...]:
    """Change ``data`` in place and return the paths that were set.

    Raises:
        ConfigError: an override is malformed or does not fit the config.
    """
    paths: list[str] = []
    for text in overrides:
        path, value, delete = parse_override(text)
        parts = split(path)
        if not parts:
            raise ConfigError(f"{text!r} is not an override", "Write key=value, for example training.lr=3e-5.")
        paths.append(_set(data, parts, value, delete, text))
    return tuple(paths)


def _set(data: dict[str, Any], parts: list[str | int], value: Any, delete: bool, text: str) -> str:
    node: Any = data
    path = ""
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(part, str) and part.isdigit() and isinstance(node, list):
            part = int(part)
        here = f"{path}[{part}]" if isinstance(part, int) else join(path, part)
        if isinstance(part, int):
            if not isinstance(node, list) or part >= len(node):
                size = f"has {len(node)} elements" if isinstance(node, list) else "is not a list"
                raise ConfigError(f"override {text!r}: {path} {size}", "Check the index.")
        elif not isinstance(node, dict):
            raise ConfigError(
                f"override {text!r}: {path} holds a value, not a section", f"Set {path} itself, or check the path."
            )
        if last:
            return _assign(node, part, here, value, delete, text)
        path = here
        if isinstance(node, dict):
            if node.get(part) is None:
                node[str(part)] = {}
            node = node[part]
        else:
            node = node[part]
    return path


def _assign(node: Any, part: str | int, here: str, value: Any, delete: bool, text: str) -> str:
    old = node.get(part) if isinstance(node, dict) else node[part]
    if delete:
        if isinstance(node, dict):
            node.pop(part, None)
        return here
    if isinstance(old, dict) and old and not isinstance(value, dict):
        raise ConfigError(
            f"override {text!r}: {here} is a section with {len(old)} keys, not a value",
            f"Set one of its keys, for example {join(here, next(iter(old)))}=...; "
            "a Hydra group choice belongs on the program's own command, after `--`.",
        )
    node[part] = value
    return here
