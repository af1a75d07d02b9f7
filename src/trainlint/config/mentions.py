"""Where the names of config keys stand in the source that a program had loaded.

A word search, on purpose: a name that stands nowhere, not even in pieces, cannot be read by that code. What it finds is
no proof of use.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache

from trainlint.recorder.core import FRAMEWORKS
from trainlint.recording.schema import NameMention

SIZE_CAP = 2 * 1024 * 1024
#: Files kept per name.
PLACES = 5

_IMPORT = re.compile(rb"^[ \t]*(?:import|from)[ \t][^\n]*$", re.MULTILINE)
#: A comment to the end of the line; one that holds quotes could be part of a text and stays.
_COMMENT = re.compile(rb"(?:^|(?<=[ \t]))#[^\n\"']*$|^[ \t]*#[^\n]*$", re.MULTILINE)
_STDLIB = re.compile(r"[\\/]lib[\\/]python3(?:\.\d+)?t?[\\/](?!site-packages|dist-packages)")


@lru_cache(maxsize=16384)
def is_own_file(file: str) -> bool:
    """Whether a source file is the program's own: not the standard library, not a training framework.

    Judged from the path alone, because the program may run in another interpreter than this one.
    """
    package = package_of(file)
    if package:
        return package not in FRAMEWORKS
    return _STDLIB.search(file) is None and not file.startswith("<")


def package_of(file: str) -> str:
    """The installed top package that a file belongs to; empty for a file of a project."""
    parts = re.split(r"[\\/]", file)
    for marker in ("site-packages", "dist-packages"):
        if marker in parts:
            position = len(parts) - 1 - parts[::-1].index(marker)
            return parts[position + 1].removesuffix(".py") if position + 1 < len(parts) else ""
    return ""


def find_mentions(
    names: Sequence[str], files: Iterable[str], packages: frozenset[str] | None = None
) -> tuple[NameMention, ...]:
    """Search ``files`` for each name as a word; one entry per name, also for those that stand nowhere.

    ``packages``: installed packages that count as the program's own, beside its project's files; ``None``: every one
    that is not a training framework. Import lines, comments and docstrings do not count. Libraries are searched only
    for names that the program's own files do not hold. Files that cannot be read, or larger than 2 MB, are left out.
    """
    wanted = [n for n in dict.fromkeys(names) if n]
    own: list[str] = []
    library: list[str] = []
    for file in sorted(set(files)):
        package = package_of(file)
        is_own = is_own_file(file) and (packages is None or not package or package in packages)
        (own if is_own else library).append(file)
    found = _search(wanted, own, pieces=True)
    rest = [n for n in wanted if n not in found]
    in_libraries = _search(rest, library, pieces=False) if rest else {}
    out = []
    for name in wanted:
        if name in found:
            places, access = found[name]
            out.append(NameMention(name, tuple(places), access=access, own=True))
        elif name in in_libraries:
            places, access = in_libraries[name]
            out.append(NameMention(name, tuple(places), access=access, own=False))
        else:
            out.append(NameMention(name, (), access=False, own=False))
    return tuple(out)


def _search(names: Sequence[str], files: Sequence[str], pieces: bool) -> dict[str, tuple[list[str], bool]]:
    found: dict[str, tuple[list[str], bool]] = {}
    needles = [(n, n.encode("utf-8"), _word(n), _pieces(n) if pieces else ()) for n in names]
    for file in files:
        try:
            if os.path.getsize(file) > SIZE_CAP:
                continue
            with open(file, "rb") as f:
                text = f.read()
        except OSError:
            continue
        stripped: bytes | None = None
        for name, raw, word, built in needles:
            places, access = found.get(name, ([], False))
            if len(places) >= PLACES and access:
                continue
            here, readable = False, False
            if raw in text:
                if stripped is None:
                    stripped = _code(text, documented=pieces)
                for match in word.finditer(stripped):
                    here = True
                    before = stripped[match.start() - 1 : match.start()]
                    if before in (b"'", b'"', b"."):
                        readable = True
                        break
            if not here and any(piece in text for piece in built):
                here = readable = True
            if here:
                found[name] = ([*places, file] if len(places) < PLACES else places, access or readable)
    return found


def _code(text: bytes, documented: bool) -> bytes:
    """The text without import lines and, for the program's own files, without comments and docstrings."""
    text = _IMPORT.sub(b"", text)
    if not documented:
        return text
    lines = text.splitlines(keepends=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[row] = b"\n"
    return _COMMENT.sub(b"", b"".join(lines))


def _word(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(name.encode("utf-8")) + rb"(?![A-Za-z0-9_])")


def _pieces(name: str) -> tuple[bytes, ...]:
    """How code may put the name together: ``f"{stage}_freq"``, ``f"val_{what}"``, ``stage + "_freq"``."""
    out: list[bytes] = []
    for at in (i for i, c in enumerate(name) if c == "_"):
        head, tail = name[: at + 1].encode(), name[at:].encode()
        for quote in (b'"', b"'"):
            out += [b"}" + tail + quote, quote + tail + quote, quote + head + b"{", quote + head + quote]
    return tuple(out)
