"""Reads ``[tool.trainlint]`` of the nearest pyproject.toml that has it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainlint.launch.model import LaunchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

load_toml = tomllib.loads

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class ToolTable:
    """The project's settings. Everything is ``None`` or empty when there is no table."""

    command: str | None = None
    entry: str | None = None
    python: str | None = None
    steps: int | None = None
    #: Seconds.
    timeout: float | None = None
    #: Watch the end of the epoch as well.
    boundary: bool | None = None
    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    fail_on: str | None = None
    #: ``[[tool.trainlint.suppress]]`` as it stands: each a table with ``code`` and ``reason`` at least.
    suppress: tuple[Mapping[str, Any], ...] = ()
    #: The pyproject.toml it was read from; relative paths and the command start from its folder.
    file: Path | None = None
    #: Sentences about keys that mean nothing.
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        return self.file.parent if self.file is not None else Path.cwd()


#: TOML key -> the types it may have.
_KEYS: Mapping[str, tuple[type, ...]] = {
    "command": (str,),
    "entry": (str,),
    "python": (str,),
    "steps": (int,),
    "timeout": (int, float),
    "boundary": (bool,),
    "select": (list,),
    "ignore": (list,),
    "fail-on": (str,),
    "suppress": (list,),
}


def read_tool_table(start: Path) -> ToolTable:
    """The ``[tool.trainlint]`` table of the nearest pyproject.toml at or above ``start`` that has one.

    Raises:
        LaunchError: the file that should hold it cannot be read as TOML, or a setting has the wrong type.
    """
    start = start.resolve()
    warnings: list[str] = []
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        try:
            text = file.read_bytes().decode("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            warnings.append(f"{file} cannot be read ({_why(error)}); its settings, if any, are not used.")
            continue
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            # A broken file that does not concern us is its owner's business.
            if "tool.trainlint" in text:
                raise LaunchError(
                    f"{file} is not valid TOML: {error}", "Correct that line; trainlint reads [tool.trainlint] from it."
                ) from None
            warnings.append(f"{file} is not valid TOML ({error}).")
            continue
        tool = data.get("tool")
        if isinstance(tool, dict) and "trainlint" in tool:
            return _table(tool["trainlint"], file, text, warnings)
    return ToolTable(warnings=tuple(warnings))


def _why(error: Exception) -> str:
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else (getattr(error, "strerror", None) or str(error))


def _line(text: str, key: str) -> int:
    """1-based line of a key of the table, or of the table's header."""
    in_table = False
    header = 1
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            in_table = bool(re.match(r"\[\[?\s*tool\s*\.\s*trainlint\b", stripped))
            if in_table:
                header = number
                if re.search(rf"\b{re.escape(key)}\s*\]", stripped):
                    return number
        elif in_table and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*[.=]", stripped):
            return number
    return header


def _table(raw: Any, file: Path, text: str, warnings: list[str]) -> ToolTable:
    if not isinstance(raw, dict):
        raise LaunchError(f"{file}: tool.trainlint must be a table.", "Write it as [tool.trainlint].")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("_", "-")
        where = f"{file}:{_line(text, key)}"
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            meant = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(_KEYS)}."
            warnings.append(f"{where}: [tool.trainlint] has no setting {key!r}; it is not used.{meant}")
            continue
        kinds = _KEYS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = {str: "text", int: "a whole number", float: "a number", list: "a list", bool: "true or false"}
            wanted = words[kinds[-1]]
            raise LaunchError(f"{where}: {key} must be {wanted}, not {value!r}.", "Correct [tool.trainlint].")
        values[name] = value
    for key in ("select", "ignore"):
        for code in values.get(key, ()):
            if not isinstance(code, str):
                raise LaunchError(f"{file}:{_line(text, key)}: {key} must be a list of codes, not {code!r}.")
    for item in values.get("suppress", ()):
        if not isinstance(item, dict):
            raise LaunchError(
                f"{file}:{_line(text, 'suppress')}: suppress must be a list of tables.",
                'Write [[tool.trainlint.suppress]] with code = "TL…" and reason = "…".',
            )
    if values.get("steps", 1) < 1 or values.get("timeout", 1) <= 0:
        raise LaunchError(f"{file}: steps and timeout in [tool.trainlint] must be above zero.")
    fail_on = values.get("fail-on")
    if fail_on is not None and fail_on not in SEVERITIES:
        raise LaunchError(
            f"{file}:{_line(text, 'fail-on')}: fail-on must be one of {', '.join(SEVERITIES)}, not {fail_on!r}."
        )
    timeout = values.get("timeout")
    return ToolTable(
        command=values.get("command"),
        entry=values.get("entry"),
        python=values.get("python"),
        steps=values.get("steps"),
        timeout=float(timeout) if timeout is not None else None,
        boundary=values.get("boundary"),
        select=tuple(values["select"]) if "select" in values else None,
        ignore=tuple(values.get("ignore", ())),
        fail_on=fail_on,
        suppress=tuple(values.get("suppress", ())),
        file=file,
        warnings=tuple(warnings),
    )
