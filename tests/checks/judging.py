"""Running one check over one recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.support.build import Run
from trainlint.contract import Finding, Severity, declaration


def findings(check: Callable[[Any], Iterator[Finding]], run: Run, **fields: Any) -> list[tuple[str, Finding]]:
    """(severity, finding) of everything the check yields; its NotApplicable and NotObserved pass through."""
    declared = declaration(check)
    assert declared is not None
    out = []
    for finding in check(run.recording(**fields)):
        severity = Severity(finding.severity or declared.severity)
        assert severity.rank >= declared.severity.rank, "a finding may be weaker than its check, never stronger"
        assert len(finding.message) < 700
        assert finding.fix
        out.append((severity.value, finding))
    return out


def only(check: Callable[[Any], Iterator[Finding]], run: Run, **fields: Any) -> tuple[str, Finding]:
    found = findings(check, run, **fields)
    assert len(found) == 1, [f.message for _, f in found]
    return found[0]
