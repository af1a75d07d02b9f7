"""Catalogs made of modules built in memory, for the judge's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trainlint.contract import ConfigFacts, Finding, Recording, SourceFacts, check
from trainlint.judge.catalog import Catalog, build_catalog

PAGE = "A title.\n\n    ## What goes wrong\n    Something.\n"
Detector = Callable[[Any], Iterator[Finding]]


def module(
    name: str,
    *detectors: tuple[str, type, Detector],
    severity: str = "error",
    family: str = "loop",
    page: str | None = PAGE,
    aliases: str = "",
) -> ModuleType:
    """A check's file: its name, and (code, facts, body) of each detector."""
    made = ModuleType(f"trainlint.checks.{family}.{name}")
    made.__file__ = f"checks/{family}/{name}.py"
    for number, (code, facts, body) in enumerate(detectors):

        def detector(given: Any, body: Detector = body) -> Iterator[Finding]:
            return body(given)

        detector.__doc__ = page
        detector.__module__ = made.__name__
        setattr(made, f"detector_{number}", check(code, facts, severity=severity, catalog=aliases)(detector))
    return made


def yields(*findings: Finding) -> Detector:
    def body(_: Any) -> Iterator[Finding]:
        yield from findings

    return body


def raises(error: Exception, *before: Finding) -> Detector:
    def body(_: Any) -> Iterator[Finding]:
        yield from before
        raise error

    return body


def one(body: Detector, *, facts: type = Recording, severity: str = "error", code: str = "TL301") -> Catalog:
    """A catalog of one check."""
    return build_catalog([module("a_check", (code, facts, body), severity=severity)])


__all__ = ["PAGE", "ConfigFacts", "Recording", "SourceFacts", "module", "one", "raises", "yields"]
