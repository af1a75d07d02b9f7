"""The report as one JSON object: what CI gates and scripts read."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from typing import Any

from trainlint.report.model import SCHEMA, Report, ReportFinding, RunCard
from trainlint.report.terminal import strip_escapes

#: Keys of ``run`` that are always there; ``null`` when nothing is known.
RUN = (
    "launch",
    "command",
    "device",
    "model",
    "optimizers",
    "schedule",
    "precision",
    "accumulation",
    "clipping",
    "loss",
    "resume",
    "logging",
)


def render_json(report: Report) -> str:
    """The report as JSON text, ending in a newline. Same report, same text.

    Floats that JSON cannot hold are the strings ``"nan"``, ``"inf"``, ``"-inf"``.
    """
    return json.dumps(as_object(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_object(report: Report) -> dict[str, Any]:
    """The report as JSON data: the fields of ``trainlint.report/1``."""
    return {
        "schema": SCHEMA,
        "version": report.version,
        "run": _run(report.card),
        "verdicts": [
            {"code": v.code, "name": v.name, "verdict": v.verdict, "reason": plain(v.reason)} for v in report.verdicts
        ],
        "findings": [_finding(f) for f in report.findings],
        "prevented": [plain(p) for p in report.prevented],
        "created_files": report.created_files,
        "troubles": plain(report.troubles),
        "program_output": plain(report.program_output),
        "notes": plain(report.notes),
        "exit_code": report.exit_code,
    }


def _run(card: RunCard) -> dict[str, Any]:
    run: dict[str, Any] = {name: plain(card.data.get(name)) for name in RUN}
    run.update({name: plain(value) for name, value in card.data.items() if name not in run})
    run["card"] = {name: plain(lines) for name, lines in card.sections.items()}
    run["curves"] = plain(card.curves)
    run["plots"] = plain(card.plots)
    return run


def _finding(finding: ReportFinding) -> dict[str, Any]:
    place = finding.location
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "message": plain(finding.message),
        "location": None if place is None else {"file": plain(place.file), "line": place.line, "key": plain(place.key)},
        "evidence": plain(finding.evidence),
        "fix": plain(finding.fix),
        "suppressed": plain(finding.suppressed),
        "fingerprint": finding.fingerprint,
    }


def plain(value: Any) -> Any:
    """Any value as JSON data; strings without terminal escape sequences or undecodable characters."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return strip_escapes(value).encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(str(value))
