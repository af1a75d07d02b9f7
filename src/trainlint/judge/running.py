"""Runs the detectors of a check over the facts there are, and joins what they say into one verdict."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainlint.contract import Check, Finding, NotApplicable, NotObserved, Recording, Severity
from trainlint.judge.catalog import CatalogEntry

PASSED, FAILED, CRASHED = "passed", "failed", "crashed"
NOT_APPLICABLE, NOT_OBSERVED = "not-applicable", "not-observed"


@dataclass(frozen=True)
class Outcome:
    """What one detector, or a whole check, came to. Findings have their final severity."""

    verdict: str
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    #: The full traceback of a crash.
    traceback: str = ""


@dataclass(frozen=True)
class Facts:
    """Facts by their type, and for those that do not exist why not and what would let them be seen."""

    known: Mapping[type, Any]
    missing: Mapping[type, str]
    #: Why the recording is too short to clear anything (the program died first); empty when it is not. What it shows is
    #: still evidence; what it does not show is no claim that it is not there.
    cut_short: str = ""


def run_check(entry: CatalogEntry, facts: Facts) -> Outcome:
    """Every detector of the check that has its facts; the evidence of the run wins over that of config and source."""
    static: list[Outcome] = []
    at_run: list[Outcome] = []
    for check in entry.detectors:
        (at_run if check.facts is Recording else static).append(_run(check, facts))
    decisive = [o for o in at_run if o.verdict not in (NOT_OBSERVED, CRASHED)]
    return _join(decisive) if decisive else _join(static + at_run)


def _run(check: Check, facts: Facts) -> Outcome:
    if check.facts not in facts.known:
        return Outcome(NOT_OBSERVED, facts.missing.get(check.facts, "its facts were not gathered"))
    findings: list[Finding] = []
    try:
        for finding in check.detector(facts.known[check.facts]):
            if not isinstance(finding, Finding):
                raise TypeError(f"yielded a {type(finding).__name__}, not a Finding")
            findings.append(_settled(finding, check.severity))
    except (NotObserved, NotApplicable) as reason:
        if not findings:
            if isinstance(reason, NotApplicable) and not (check.facts is Recording and facts.cut_short):
                return Outcome(NOT_APPLICABLE, str(reason) or "no reason given")
            text = str(reason) if isinstance(reason, NotObserved) else facts.cut_short
            return Outcome(NOT_OBSERVED, text or "no reason given")
    except Exception as error:
        return Outcome(CRASHED, _in_one_line(error), tuple(findings), traceback.format_exc())
    if findings:
        return Outcome(FAILED, "", tuple(findings))
    if check.facts is Recording and facts.cut_short:
        return Outcome(NOT_OBSERVED, facts.cut_short)
    return Outcome(PASSED)


def _settled(finding: Finding, strongest: Severity) -> Finding:
    """The finding with its severity: its own when it is weaker than the check's, never stronger."""
    own = Severity(finding.severity) if finding.severity is not None else strongest
    return replace(finding, severity=own if own.rank >= strongest.rank else strongest)


def _join(outcomes: list[Outcome]) -> Outcome:
    """One outcome of several of equal standing. What could not be seen is never passed."""
    findings = tuple(f for o in outcomes for f in o.findings)

    def reasons(verdict: str) -> str:
        return "; ".join(dict.fromkeys(o.reason for o in outcomes if o.verdict == verdict and o.reason))

    verdicts = {o.verdict for o in outcomes}
    if CRASHED in verdicts:
        tracebacks = "\n".join(o.traceback for o in outcomes if o.traceback)
        return Outcome(CRASHED, reasons(CRASHED), findings, tracebacks)
    if findings:
        return Outcome(FAILED, "", findings)
    if NOT_OBSERVED in verdicts:
        reason = reasons(NOT_OBSERVED)
        if PASSED in verdicts:
            reason = f"nothing found without a run; {reason}"
        return Outcome(NOT_OBSERVED, reason)
    if PASSED in verdicts:
        return Outcome(PASSED)
    return Outcome(NOT_APPLICABLE, reasons(NOT_APPLICABLE))


def _in_one_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"


def order(code: str, finding: Finding, file: str | None, line: int | None, key: str | None) -> tuple[Any, ...]:
    """Sorts findings: worst first, then by code, place and subject; total, so that no order is left to chance."""
    severity = finding.severity
    rank = severity.rank if isinstance(severity, Severity) else math.inf
    place = (file is None, file or "", line or 0, key or "")
    evidence = repr(sorted(finding.evidence.items(), key=repr))
    return (rank, code, *place, finding.about, finding.message, finding.fix, evidence)
