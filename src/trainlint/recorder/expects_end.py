"""Whether the code that asks a DataLoader for a batch expects that there may be none left.

A ``for`` loop does, and so does ``next(it)`` inside ``try ... except StopIteration``. ``next(it)`` alone does not:
there the end of the data is an exception that ends the program, and its own handlers would report a crash that is none.
"""

from __future__ import annotations

import ast
import functools
import linecache
import os
from types import CodeType, FrameType

from .core import is_user_file

_GENERATORS = 0x20 | 0x80 | 0x200  # generator, coroutine, asynchronous generator
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
#: Statements in a ``try`` that catches everything and still counts as one around the fetch alone.
_SHORT = 3
DEPTH = 64


def unprepared(frame: FrameType | None) -> FrameType | None:
    """The frame of the user's code that a ``StopIteration`` raised below ``frame`` would surprise; ``None``: no one.

    Libraries are taken to know what they do; code whose source is not there is not.
    """
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    asked: FrameType | None = None
    for _ in range(DEPTH):
        if frame is None:
            return asked
        code, line = frame.f_code, frame.f_lineno
        if not is_user_file(code.co_filename):
            return asked
        by_name, by_all, fetches, in_loop = _look(code.co_filename, line)
        # What catches everything around a call of the training is no answer to the end of the data.
        if by_name or (by_all and fetches):
            return None
        if asked is None and not fetches:
            if in_loop or not code.co_flags & _GENERATORS:
                return None  # a for loop, list(...), zip(...)
            # A generator that ends with its data: whoever asks it decides.
            frame = frame.f_back
            continue
        asked = asked or frame
        if code.co_flags & _GENERATORS:
            return asked  # becomes a RuntimeError here
        if code.co_name == "__next__":
            asked = None  # the iterator protocol: whoever asked this iterator decides
        frame = frame.f_back
    return asked


def describe(frame: FrameType) -> str:
    code: CodeType = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"


@functools.lru_cache(maxsize=64)
def _tree(filename: str) -> ast.Module | None:
    text = "".join(linecache.getlines(filename))
    try:
        return ast.parse(text) if text else None
    except (SyntaxError, ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=256)
def _look(filename: str, line: int) -> tuple[bool, bool, bool, bool]:
    """Of a line: ``StopIteration`` is caught by name, or with everything; it calls ``next``; a loop is around it."""
    tree = _tree(filename)
    if tree is None:
        return False, False, True, False
    by_name = by_all = fetches = in_loop = False
    for node in ast.walk(tree):
        if not (getattr(node, "lineno", line + 1) <= line <= (getattr(node, "end_lineno", None) or 0)):
            continue
        if isinstance(node, ast.Call) and _fetches(node):
            fetches = True
        elif isinstance(node, ast.Try) and _within(node.body, line):
            names = _caught(node)
            by_name = by_name or "StopIteration" in names
            by_all = by_all or (bool(names & {"Exception", "BaseException"}) and len(node.body) <= _SHORT)
        elif isinstance(node, (ast.With, ast.AsyncWith)) and _within(node.body, line):
            by_name = by_name or any("StopIteration" in ast.dump(item) for item in node.items)
        elif isinstance(node, (ast.For, ast.While)):
            in_loop = in_loop or _within(node.body, line)
    return by_name, by_all, fetches, in_loop


def _fetches(call: ast.Call) -> bool:
    """``next(it)`` without a default, ``it.__next__()``, ``it.next()``."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "next" and len(call.args) == 1
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("__next__", "next")


def _within(body: list[ast.stmt], line: int) -> bool:
    return bool(body) and body[0].lineno <= line <= (body[-1].end_lineno or 0)


def _caught(node: ast.Try) -> set[str]:
    """Names of the exceptions that its handlers name; ``Exception`` for a bare ``except``."""
    names: set[str] = set()
    for handler in node.handlers:
        if handler.type is None:
            names.add("Exception")
            continue
        for part in ast.walk(handler.type):
            if isinstance(part, (ast.Name, ast.Attribute)):
                names.add(part.id if isinstance(part, ast.Name) else part.attr)
    return names
