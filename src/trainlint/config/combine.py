"""One set of config facts out of what the files say and what the watched process did with them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainlint.config.command_line import command_line_keys
from trainlint.config.errors import ConfigError
from trainlint.config.handed_on import OwnCode
from trainlint.config.load import load_config
from trainlint.config.meanings import meaning_of, number
from trainlint.config.mentions import find_mentions, is_own_file, package_of
from trainlint.config.printing import printing_lines
from trainlint.recorder.config_paths import last_name
from trainlint.recording.schema import ConfigFacts, ConfigKey, SourceLine, Value

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


def combine(
    static: ConfigFacts | None,
    tracked: ConfigFacts | None,
    *,
    command: Sequence[str] = (),
    sources: Iterable[str] = (),
) -> ConfigFacts | None:
    """Merge file facts and run facts by path.

    Args:
        static: from :func:`trainlint.config.load.load_config`; ``None`` when no config was named.
        tracked: the ``config`` of a recording; ``None`` when nothing was followed.
        command: the launch command, for settings that stand only there.
        sources: source files that the program had loaded, to look up names of keys that nobody was seen to read.

    A key that both know has the value that the program saw, the reads of the run, and the line of the file when the
    file says the same. A key that only the file has keeps ``reads=None``: it was not followed. Returns ``None`` when
    there is nothing at all.
    """
    given = command_line_keys(command)
    if static is None and tracked is None:
        if not given:
            return None
        return ConfigFacts(files=("command line",), kind="command line", keys=given)
    keys = _merged(static, tracked)
    keys.update(_only_given(given, keys))
    facts = ConfigFacts(
        files=tuple(dict.fromkeys([*(static.files if static else ()), *(tracked.files if tracked else ())])),
        kind=(tracked.kind if tracked and tracked.kind else "") or (static.kind if static else ""),
        keys=tuple(keys.values()),
        missing=tracked.missing if tracked else (),
        tracked_by=tracked.tracked_by if tracked else "",
        mentions=tracked.mentions if tracked else None,
    )
    return with_mentions(without_printing(facts), sources)


def with_mentions(facts: ConfigFacts, sources: Iterable[str]) -> ConfigFacts:
    """Look up the names of the keys that were followed and not read one by one."""
    files = [f for f in sources if f]
    names = {last_name(k.path) for k in facts.keys if k.reads is not None and all(r.how == "bulk" for r in k.reads)}
    names.discard("")
    if not files or not names:
        return facts
    packages = frozenset(package_of(r.at.file) for k in facts.keys for r in k.reads or () if r.at is not None)
    mentions = find_mentions(sorted(names), files, packages or None)
    keys = _with_ways(facts.keys, {m.name for m in mentions if m.files and not m.own}, files)
    return dataclasses.replace(facts, keys=keys, mentions=mentions)


def _with_ways(keys: tuple[ConfigKey, ...], names: set[str], files: Sequence[str]) -> tuple[ConfigKey, ...]:
    """Keys of names that only libraries know: note of every ``**`` whether it stays in the program's own code."""
    code = OwnCode(f for f in files if not package_of(f) and is_own_file(f))
    kept: dict[tuple[str, int], bool] = {}
    out = []
    for key in keys:
        if key.reads and last_name(key.path) in names:
            reads = []
            for read in key.reads:
                if read.by == "**" and read.at is not None:
                    place = (read.at.file, read.at.line)
                    if place not in kept:
                        kept[place] = code.keeps(*place)
                    read = dataclasses.replace(read, kept=kept[place])
                reads.append(read)
            key = dataclasses.replace(key, reads=tuple(reads))
        out.append(key)
    return tuple(out)


def without_printing(facts: ConfigFacts) -> ConfigFacts:
    """A key that is only printed or logged is not used: such reads count as bulk reads by ``print``."""
    printed: dict[str, frozenset[int]] = {}
    keys = []
    for key in facts.keys:
        reads = []
        for read in key.reads or ():
            if read.how != "bulk" and read.at is not None:
                lines = printed.get(read.at.file)
                if lines is None:
                    lines = printed[read.at.file] = printing_lines(read.at.file)
                if read.at.line in lines:
                    read = dataclasses.replace(read, how="bulk", by="print")
            reads.append(read)
        keys.append(dataclasses.replace(key, reads=tuple(reads)) if key.reads else key)
    return dataclasses.replace(facts, keys=tuple(keys))


def _merged(static: ConfigFacts | None, tracked: ConfigFacts | None) -> dict[str, ConfigKey]:
    in_files = {k.path: k for k in static.keys} if static else {}
    elsewhere: dict[str, ConfigKey] | None = None
    keys: dict[str, ConfigKey] = {}
    for key in tracked.keys if tracked else ():
        declared = in_files.pop(key.path, None)
        if declared is None and key.origin == "file" and tracked is not None:
            if elsewhere is None:
                elsewhere = _composed(tracked.files, set(static.files) if static else set())
            declared = elsewhere.get(key.path)
        keys[key.path] = _one(key, declared)
    ordered = {k.path: keys.get(k.path, k) for k in static.keys} if static else {}
    return {**ordered, **keys}


def _one(seen: ConfigKey, declared: ConfigKey | None) -> ConfigKey:
    """A key as the program saw it, with the place where it is declared."""
    same = declared is not None and (seen.secret or same_value(seen.value, declared.value))
    at: SourceLine | None = seen.at
    origin = seen.origin
    if declared is not None and same:
        at = declared.at
        if declared.origin == "override" or origin == "default":
            origin = declared.origin
    elif declared is not None and declared.origin == "file" and origin == "file":
        # The program changed the value between reading and composing (defaults, scaling): the line is still the place.
        at = declared.at
    meaning = seen.meaning or meaning_of(seen.path, seen.value)
    return dataclasses.replace(seen, at=at, origin=origin, meaning=meaning)


def same_value(a: Value, b: Value) -> bool:
    """Equal settings; ``1e-3`` read as text equals 0.001."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if a == b and isinstance(a, bool) == isinstance(b, bool):
        return True
    x, y = number(a), number(b)
    return x is not None and x == y


def _only_given(given: Iterable[ConfigKey], keys: dict[str, ConfigKey]) -> dict[str, ConfigKey]:
    """Settings on the command line: those known by path become overrides, the others are added unfollowed."""
    out: dict[str, ConfigKey] = {}
    sections = {p[: m.start()] for p in keys for m in re.finditer(r"[.\[]", p)}
    for key in given:
        known = keys.get(key.path)
        if known is not None:
            if known.origin != "override" and same_value(known.value, key.value):
                out[key.path] = dataclasses.replace(known, origin="override")
            elif known.origin == "file" and known.reads is None and "." in key.path:
                # The program was not seen to hold it; a flag named by the whole path (Lightning's CLI) wins.
                out[key.path] = dataclasses.replace(key, meaning=known.meaning or key.meaning)
        elif key.path not in sections:  # a Hydra group choice (model=large) names a section
            out[key.path] = key
    return out


def _composed(files: Sequence[str], known: set[str]) -> dict[str, ConfigKey]:
    """Keys of the files of a Hydra composition (the primary config first), at the path where they are composed."""
    out: dict[str, ConfigKey] = {}
    if not files:
        return out
    root = os.path.dirname(files[0])
    for file in files[:200]:
        if file in known:
            continue
        try:
            facts = load_config(Path(file)).facts
            header = _PACKAGE.search(Path(file).read_text(encoding="utf-8")[:2000])
        except (ConfigError, OSError, ValueError):
            continue
        group = os.path.relpath(os.path.dirname(file), root).replace(os.sep, ".")
        package = header.group(1) if header else group
        prefix = "" if package in (".", "_global_") or package.startswith("..") else package.replace("_group_", group)
        for key in facts.keys:
            path = f"{prefix}.{key.path}" if prefix else key.path
            out[path] = dataclasses.replace(key, path=path)
    return out
