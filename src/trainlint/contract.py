"""What a check is: the only part of trainlint, beside the recording's schema, that a check may import.

A check is a generator function over one kind of facts. Its docstring is its page. It yields a :class:`Finding` for each
fault it can show, and yields nothing when it looked and found none. When it could not look it raises
:class:`NotObserved`; when the question does not arise on this run, :class:`NotApplicable`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union

from trainlint.recording.schema import ConfigFacts, Recording, SourceFacts, SourceLine

__all__ = [
    "Check",
    "ConfigFacts",
    "Finding",
    "Key",
    "NotApplicable",
    "NotObserved",
    "ParameterName",
    "Recording",
    "Severity",
    "SourceFacts",
    "SourceLine",
    "check",
]


class Severity(str, enum.Enum):
    """How well a finding is proven.

    ``error``: proven on this run, and it harms it. ``warning``: strong evidence. ``info``: worth knowing.
    """

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return ("error", "warning", "info").index(self.value)


class NotApplicable(Exception):
    """The question does not arise on this run; the text says why (``the program uses no scheduler``)."""


class NotObserved(Exception):
    """The check could not see what it needs; the text says why and what would let it see."""


@dataclass(frozen=True)
class Key:
    """Points at a config key by its dotted path; the engine finds file and line."""

    path: str


@dataclass(frozen=True)
class ParameterName:
    """Points at a parameter or module by name."""

    name: str


Where = Union[Key, SourceLine, ParameterName, None]


@dataclass(frozen=True)
class Finding:
    """One fault, as a person will read it.

    ``message``: what is wrong on this run and how it is known, with the measured numbers.
    ``fix``: what to change, in the vocabulary of the framework in use.
    ``evidence``: the numbers again, for machines (JSON values only).
    ``severity``: weaker than the check's own when the proof is weaker; never stronger.
    """

    message: str
    at: Where = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str = ""
    severity: Severity | str | None = None
    #: What tells this finding from others of its check, stable from run to run (a key, a parameter pattern).
    about: str = ""


Detector = Callable[[Any], Iterator[Finding]]
D = TypeVar("D", bound=Detector)


@dataclass(frozen=True)
class Check:
    """A registered detector. Two detectors may share a code (source level and run level)."""

    code: str
    name: str
    facts: type
    severity: Severity
    detector: Detector
    #: Names that other catalogs give it (``O17``).
    catalog: tuple[str, ...]
    title: str
    page: str
    #: File of the check, for ``trainlint rules`` and the tests.
    file: str
    family: str


_ATTRIBUTE = "__trainlint_check__"


@dataclass(frozen=True)
class Declaration:
    code: str
    facts: type
    severity: Severity
    catalog: tuple[str, ...]


def check(code: str, facts: type, *, severity: str, catalog: str = "") -> Callable[[D], D]:
    """Declare a check.

    Args:
        code: ``TL`` and three digits; the hundred is the family.
        facts: what it needs, and so what it costs: :class:`ConfigFacts` and :class:`SourceFacts` need no run,
            :class:`Recording` does.
        severity: the strongest severity it may give.
        catalog: names in other catalogs, separated by blanks.

    The check's name is that of its file with dashes. Nothing else needs to be registered.
    """

    def mark(detector: D) -> D:
        declared = Declaration(code, facts, Severity(severity), tuple(catalog.split()))
        setattr(detector, _ATTRIBUTE, declared)
        return detector

    return mark


def declaration(function: object) -> Declaration | None:
    """The declaration that :func:`check` left on a function, or ``None``."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else None
