"""What a renderer gets: everything computed, nothing left to find out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "trainlint.report/1"


@dataclass(frozen=True)
class Location:
    """Where a finding points: a file and line, and the config key when it is one."""

    file: str | None
    line: int | None
    key: str | None = None


@dataclass(frozen=True)
class ReportFinding:
    code: str
    name: str
    severity: str
    message: str
    location: Location | None
    evidence: Mapping[str, Any]
    fix: str
    #: Stable from run to run: code, place and subject, no measured numbers.
    fingerprint: str
    #: The reason given for suppressing it, or ``None``.
    suppressed: str | None = None


@dataclass(frozen=True)
class Verdict:
    """``verdict``: passed, failed, not-applicable, not-observed, crashed."""

    code: str
    name: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class CardLine:
    """One line of the run card: a setting as configured and as observed.

    ``agrees``: ``True``/``False`` when both are known and were compared, else ``None``.
    """

    label: str
    observed: str
    configured: str = ""
    agrees: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A learning-rate curve over optimizer steps, for one param group (or several that agree)."""

    label: str
    #: (optimizer step, learning rate), increasing in step.
    points: tuple[tuple[int, float], ...]
    #: ``observed`` (watched steps), ``projected`` (schedule on a copy, at the observed cadence), ``configured``.
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """The curves of one experiment: lines of kind ``projected``, marked points of kind ``observed``."""

    title: str
    curves: tuple[Curve, ...]
    #: What stands at the horizontal axis: (place in the numbers of the curves' points, text), increasing.
    ticks: tuple[tuple[int, str], ...] = ()
    #: Lines below it.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunCard:
    """What this run will really do. ``sections`` maps the fixed names of the JSON report to lines.

    Names: ``launch``, ``device``, ``model``, ``optimizers``, ``schedule``, ``precision``, ``accumulation``,
    ``clipping``, ``batches``, ``loss``, ``resume``, ``logging``, ``length``, ``time``, ``memory``.
    """

    sections: Mapping[str, tuple[CardLine, ...]] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    plots: tuple[Plot, ...] = ()
    #: Machine-readable counterpart of the sections.
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreventedAct:
    action: str
    target: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    version: str
    card: RunCard
    verdicts: tuple[Verdict, ...]
    #: Worst first; suppressed ones included and marked.
    findings: tuple[ReportFinding, ...]
    prevented: tuple[PreventedAct, ...]
    exit_code: int
    #: What went wrong with the job itself (program died before its first step ...): text, what to do.
    troubles: tuple[str, ...] = ()
    #: Lines that belong to the coverage line or below it (steps watched, epoch boundary not watched, ...).
    notes: tuple[str, ...] = ()
    #: Last lines of the program's own output, when it failed.
    program_output: tuple[str, ...] = ()
    created_files: int = 0


@dataclass(frozen=True)
class CheckPage:
    """A check as its documentation shows it. ``needs``: ``config``, ``source``, ``run``, cheapest first."""

    code: str
    name: str
    title: str
    severity: str
    family: str
    needs: tuple[str, ...]
    #: Names in other catalogs (``O17``).
    catalog: tuple[str, ...]
    #: Markdown: the check's docstring.
    page: str
    file: str = ""
