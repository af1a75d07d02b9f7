"""Which source lines only show values: ``print(...)``, ``logger.info(...)``."""

from __future__ import annotations

import ast
import os
import warnings

from trainlint.config.mentions import SIZE_CAP
from trainlint.recorder.config_paths import words

_SHOWING = frozenset(("print", "pprint", "rprint"))
_LOG_METHODS = frozenset(("debug", "info", "warning", "warn", "error", "log", "print", "write", "pprint"))
_LOG_OBJECTS = frozenset(
    ("log", "logger", "logging", "_logger", "_log", "log_", "console", "tqdm", "stdout", "stderr", "pprint", "rich")
)
#: Calls inside a printed expression that change nothing but its look.
_HARMLESS = words(
    """str repr len type int float bool round sorted list dict tuple set format get join items keys values upper lower
    title strip ljust rjust center dumps to_yaml pformat replace"""
)


def printing_lines(file: str) -> frozenset[int]:
    """Lines of statements that print or log and call nothing else. Empty when the file cannot be read or parsed."""
    try:
        if os.path.getsize(file) > SIZE_CAP:
            return frozenset()
        with open(file, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    showing: set[int] = set()
    other: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or hasattr(node, "body"):
            continue
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        (showing if _only_shows(node) else other).update(lines)
    return frozenset(showing - other)


def _only_shows(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call) or not _is_show(node.value.func):
        return False
    inner = [n for part in [*node.value.args, *node.value.keywords] for n in ast.walk(part)]
    if any(isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)) for n in inner):
        return False
    return all(_name(n.func) in _HARMLESS for n in inner if isinstance(n, ast.Call))


def _is_show(called: ast.expr) -> bool:
    if isinstance(called, ast.Name):
        return called.id in _SHOWING
    if isinstance(called, ast.Attribute) and called.attr in _LOG_METHODS:
        owner = _name(called.value).lower()
        return owner in _LOG_OBJECTS or owner.endswith(("logger", "_log"))
    return False


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
