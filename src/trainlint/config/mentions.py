"""Where the names of config keys stand in the source that a program had loaded.

A word search, on purpose: a name that stands nowhere, not even in pieces, cannot be read by that code. What it finds is
no proof of use.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from trainlint.config.read_places import read_places
from trainlint.recorder.core import FRAMEWORKS
from trainlint.recording.schema import NameMention, NameRead

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
    for names that the program's own files do not hold, and only until a first place is found. Files that cannot be
    read, or larger than 2 MB, are left out.
    """
    wanted = [n for n in dict.fromkeys(names) if n]
    own: list[str] = []
    library: list[str] = []
    for file in sorted(set(files)):
        package = package_of(file)
        is_own = is_own_file(file) and (packages is None or not package or package in packages)
        (own if is_own else library).append(file)
    found = _search(wanted, own)
    in_libraries = _search_libraries([n for n in wanted if n not in found], library)
    out = []
    for name in wanted:
        if name in found:
            out.append(found[name].mention(name))
        elif name in in_libraries:
            file, access = in_libraries[name]
            out.append(NameMention(name, (file,), access=access, own=False, reads=()))
        else:
            out.append(NameMention(name, (), access=False, own=False, reads=()))
    return tuple(out)


@dataclass
class _Found:
    files: list[str] = field(default_factory=list)
    access: bool = False
    reads: list[NameRead] = field(default_factory=list)
    #: It stands somewhere other than after ``self.``.
    elsewhere: bool = False
    #: ``self.NAME = ...`` stands somewhere.
    assigned: bool = False

    def mention(self, name: str) -> NameMention:
        return NameMention(name, tuple(self.files[:PLACES]), access=self.access, own=True, reads=tuple(self.reads))


def _search(names: Sequence[str], files: Sequence[str]) -> dict[str, _Found]:
    """The program's own files: every place that could read a name, and whether it stands there at all."""
    found: dict[str, _Found] = {}
    copying = False
    raw = {n.encode("utf-8"): n for n in names}
    pieces = {n: _pieces(n) for n in names}
    for file in files:
        text = _text(file)
        if text is None:
            continue
        copying = copying or any(way in text for way in _COPYING)
        among = _words_of(text)
        here = [raw[r] for r in _standing(raw, text, among)]
        tree, code = _code(text) if here else (None, text)
        accessed = []
        for name in here:
            matches = [code[m.start() - 1 : m.start()] for m in _word(name).finditer(code)]
            if not matches:
                continue
            entry = found.setdefault(name, _Found())
            entry.files.append(file)
            own_attribute = _own_attribute(name)
            entry.elsewhere = entry.elsewhere or len(own_attribute.findall(code)) < len(matches)
            entry.assigned = entry.assigned or _assigned(name).search(code) is not None
            if any(before in (b"'", b'"', b".") for before in matches):
                entry.access = True
                accessed.append(name)
        if tree is not None and accessed:
            for name, reads in read_places(file, text.decode("utf-8", "replace"), tree, accessed).items():
                found[name].reads += reads
        for name, built in pieces.items():
            if any(part in among and piece in text for part, piece in built):
                entry = found.setdefault(name, _Found())
                entry.access = entry.elsewhere = True
                if file not in entry.files:
                    entry.files.append(file)
    # An attribute that an object sets itself (`self.loss_fn = nn.MSELoss()`) is not the config's.
    return found if copying else {n: e for n, e in found.items() if e.elsewhere or not e.assigned}


def _search_libraries(names: Sequence[str], files: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """The first library file that holds each name, and whether it stands there in quotes or after a dot."""
    found: dict[str, tuple[str, bool]] = {}
    open_ = {n.encode("utf-8"): n for n in names}
    for file in files:
        if not open_:
            break
        if _NO_CONFIG.search(file):
            continue
        text = _text(file)
        if text is None:
            continue
        for raw in _standing(open_, text, _words_of(text)):
            code = _IMPORT.sub(b"", text)
            match = _word(open_[raw]).search(code)
            if match is not None:
                found[open_[raw]] = (file, code[match.start() - 1 : match.start()] in (b"'", b'"', b"."))
                del open_[raw]
    return found


#: A blank for every byte that is part of no word.
_WORDS_ONLY = bytes(c if chr(c).isascii() and (chr(c).isalnum() or c == 95) else 32 for c in range(256))
_IS_WORD = re.compile(rb"[A-Za-z0-9_]+")
#: Parts of libraries that are handed no settings of a training run by name: numerics, and torch's compiler.
_NO_CONFIG = re.compile(
    r"[\\/](?:site|dist)-packages[\\/](?:(?:numpy|scipy|sympy|mpmath|networkx|pandas)|torch[\\/]_\w+)[\\/]"
)


def _words_of(text: bytes) -> frozenset[bytes]:
    """Every word of a text. Looking names up in it is five times faster than a search for each."""
    return frozenset(text.translate(_WORDS_ONLY).split())


def _standing(names: Collection[bytes], text: bytes, among: frozenset[bytes]) -> list[bytes]:
    """The names that stand in a text as words (those that are no plain words: that stand in it at all)."""
    return [n for n in names if (n in among if _IS_WORD.fullmatch(n) else n in text)]


def _text(file: str) -> bytes | None:
    try:
        with open(file, "rb") as f:
            text = f.read(SIZE_CAP + 1)
    except OSError:
        return None
    return text if len(text) <= SIZE_CAP else None


def _code(text: bytes) -> tuple[ast.Module | None, bytes]:
    """The syntax tree, and the text without import lines, comments and docstrings."""
    lines = text.splitlines(keepends=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, _IMPORT.sub(b"", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, min(node.end_lineno or node.lineno, len(lines))):
                lines[row] = b"\n"
    return tree, _COMMENT.sub(b"", _IMPORT.sub(b"", b"".join(lines)))


#: Code that may put every key of a config on an object, so that ``self.NAME`` reads it.
_COPYING = (
    b"setattr(",
    b"__dict__",
    b"vars(",
    b"__getattr__",
    b"__getattribute__",
    b"Namespace",
    b"attrs",
    b"pydantic",
)


@lru_cache(maxsize=1024)
def _own_attribute(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"\bself\s?\.\s?" + re.escape(name.encode("utf-8")) + rb"(?![A-Za-z0-9_])")


@lru_cache(maxsize=1024)
def _assigned(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"\bself\." + re.escape(name.encode("utf-8")) + rb"\s*(?::[^=\n]+)?=(?!=)")


@lru_cache(maxsize=1024)
def _word(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(name.encode("utf-8")) + rb"(?![A-Za-z0-9_])")


def _pieces(name: str) -> tuple[tuple[bytes, bytes], ...]:
    """How code may put the name together: ``f"{stage}_freq"``, ``f"val_{what}"``, ``stage + "_freq"``.

    Each with the part of the name in it, which stands there as a word.
    """
    out: list[tuple[bytes, bytes]] = []
    for at in (i for i, c in enumerate(name) if c == "_"):
        head, tail = name[: at + 1].encode(), name[at:].encode()
        for quote in (b'"', b"'"):
            out += [(tail, b"}" + tail + quote), (tail, quote + tail + quote)]
            out += [(head, quote + head + b"{"), (head, quote + head + quote)]
    return tuple(out)
