"""Findings that the project has looked at and accepts: ``[[tool.trainlint.suppress]]``, always with a reason."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainlint.judge.catalog import Catalog
from trainlint.judge.errors import UsageError
from trainlint.judge.selection import covered
from trainlint.report.model import Location

_FIELDS = ("code", "reason", "key", "file", "about")
_EXAMPLE = 'Write code = "TL204" and reason = "..."; key, file and about are optional.'


@dataclass(frozen=True)
class Suppression:
    """Accepts the findings of ``code`` that fit. ``key``, ``file`` and ``about`` are patterns (``training.*``)."""

    code: str
    reason: str
    key: str | None = None
    file: str | None = None
    about: str | None = None

    def fits(self, location: Location | None, about: str) -> bool:
        for pattern, value in (
            (self.key, location.key if location else None),
            (self.file, location.file if location else None),
            (self.about, about or None),
        ):
            if pattern is not None and (value is None or not _matches(value, pattern)):
                return False
        return True

    @property
    def text(self) -> str:
        """``TL204 (key training.lr)``."""
        limits = [f"{n} {v}" for n, v in (("key", self.key), ("file", self.file), ("about", self.about)) if v]
        return f"{self.code} ({', '.join(limits)})" if limits else self.code


def _matches(value: str, pattern: str) -> bool:
    # A subject may itself hold brackets or stars (``layers[0].size``, ``head.*``).
    return value == pattern or fnmatch.fnmatchcase(value, pattern)


def suppressions_from(tables: Iterable[Mapping[str, Any]], catalog: Catalog) -> tuple[Suppression, ...]:
    """Suppressions from the tables of ``[[tool.trainlint.suppress]]``.

    Raises:
        UsageError: a table without code or reason, with a field or a code that does not exist.
    """
    out = []
    for number, table in enumerate(tables, 1):
        where = f"[[tool.trainlint.suppress]] number {number}"
        for name in table:
            if name not in _FIELDS:
                near = difflib.get_close_matches(str(name), _FIELDS, n=1)
                hint = f"Did you mean {near[0]}?" if near else _EXAMPLE
                raise UsageError(f"{where} has a field {name!r} that does not exist.", hint)
        code, reason = table.get("code"), table.get("reason")
        if not isinstance(code, str) or not code.strip():
            raise UsageError(f"{where} has no code.", _EXAMPLE)
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"{where} ({code}) gives no reason.", _EXAMPLE)
        for name in ("key", "file", "about"):
            if not isinstance(table.get(name, ""), str):
                raise UsageError(f"{where} ({code}): {name} must be text.", _EXAMPLE)
        covered(catalog, code.strip())
        out.append(Suppression(code.strip(), reason.strip(), table.get("key"), table.get("file"), table.get("about")))
    return tuple(out)
