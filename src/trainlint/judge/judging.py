"""Facts in, report out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainlint
from trainlint.contract import ConfigFacts, Finding, Recording, Severity, SourceFacts
from trainlint.judge.card import build_card
from trainlint.judge.catalog import Catalog, CatalogEntry, load_catalog
from trainlint.judge.errors import UsageError
from trainlint.judge.locate import Locator, fingerprint
from trainlint.judge.running import CRASHED, NOT_OBSERVED, Facts, Outcome, order, run_check
from trainlint.judge.scrub import clean, clean_command
from trainlint.judge.selection import covered, select
from trainlint.judge.suppression import Suppression, suppressions_from
from trainlint.judge.troubles import Course, course
from trainlint.report.model import Location, PreventedAct, Report, ReportFinding, RunCard, Verdict

#: Set to anything, the report holds the full traceback of a check that crashed.
DEBUG = "TRAINLINT_DEBUG"


@dataclass(frozen=True)
class JudgeOptions:
    """What to judge, and how strictly."""

    select: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    #: The weakest severity that makes the exit status 1.
    fail_on: str = "error"
    exit_zero: bool = False
    #: Tables of ``[[tool.trainlint.suppress]]``.
    suppress: tuple[Mapping[str, Any], ...] = ()
    #: Files below it are named relative to it.
    cwd: Path | None = None
    #: How the run was found, for the card.
    route: str = ""
    #: Why there is no run, and what would give one: the reason of every check that needs it.
    no_run: str = "the program was not started"
    #: Why there are no config or source facts.
    no_config: str = "no config file was given"
    no_source: str = "the program's source was not read"
    #: What to do about a program that made no step, when whoever started it knows better.
    hint: str = ""
    #: What already failed before judging (an unreadable config); makes the exit status 2.
    troubles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    catalog: Catalog | None = None


@dataclass(frozen=True)
class _Found:
    """A finding on its way into the report."""

    entry: CatalogEntry
    finding: Finding
    location: Location | None
    suppressed: str | None = None
    key: tuple[Any, ...] = field(default=(), compare=False)


def judge(
    recording: Recording | None, config: ConfigFacts | None, source: SourceFacts | None, options: JudgeOptions
) -> Report:
    """Run the selected checks over the facts there are.

    A check whose facts are missing is *not observed*; one that raises is *crashed*, and the rest is still judged.

    Args:
        recording: what was watched, complete or not; ``None`` when no program was started.
        config: config facts, best those of the files combined with those of the recording; the recording's alone are
            used when there are none.
        source: source facts; likewise.
        options: selection, strictness, suppressions.

    Raises:
        UsageError: a code that does not exist, a suppression without a reason, an unknown severity.
        CatalogError: the catalog itself is broken.
    """
    catalog = options.catalog if options.catalog is not None else load_catalog()
    selected = select(catalog, select=options.select, extend_select=options.extend_select, ignore=options.ignore)
    suppressions = suppressions_from(options.suppress, catalog)
    fail_on = _severity(options.fail_on)
    source = source or (recording.source if recording else None)
    tracked = recording.config if recording is not None else None
    if recording is not None:
        recording = dataclasses.replace(recording, config=_of_the_run(tracked, config), source=source)
    config = config or tracked
    locator = Locator(recording, (config, tracked), options.cwd or Path.cwd())

    went = course(recording, options.hint) if recording is not None else Course()
    facts = _facts(recording, config, source, options, went)
    outcomes = [(entry, run_check(entry, facts)) for entry in selected]
    found, notes = _suppressed(_gathered(outcomes, locator), outcomes, suppressions, catalog)
    troubles = (*options.troubles, *went.troubles, *_crashes(outcomes))
    failing = any(f.suppressed is None and Severity(f.finding.severity or "info").rank <= fail_on.rank for f in found)
    crashed = any(o.verdict == CRASHED for _, o in outcomes)
    # A program that went on and on without a step is explained by a finding, when a check has proven why.
    impossible = went.no_step and not (went.never_stepped and failing)
    exit_code = 2 if crashed or options.troubles or impossible else int(failing and not options.exit_zero)
    card, undrawn = _card(recording, config, options.route, locator)
    report = Report(
        version=trainlint.__version__,
        card=card,
        verdicts=tuple(Verdict(e.code, e.name, o.verdict, o.reason) for e, o in outcomes),
        findings=_reported(found),
        prevented=_prevented(recording),
        exit_code=exit_code,
        troubles=troubles,
        notes=(*options.notes, *went.notes, *notes, *undrawn),
        program_output=went.output,
        created_files=recording.created_files if recording is not None else 0,
    )
    return clean(_with_clean_command(report))


def _of_the_run(tracked: ConfigFacts | None, given: ConfigFacts | None) -> ConfigFacts | None:
    """The config facts for run-level checks: what was followed in the run is not lost to facts from files alone."""
    if given is None or tracked is None:
        return given or tracked

    def followed(facts: ConfigFacts) -> bool:
        return bool(facts.tracked_by) or any(key.reads is not None for key in facts.keys)

    return tracked if followed(tracked) and not followed(given) else given


def _severity(word: str) -> Severity:
    try:
        return Severity(word)
    except ValueError:
        raise UsageError(f"--fail-on {word!r} is not a severity.", "Give error, warning or info.") from None


def _facts(
    recording: Recording | None,
    config: ConfigFacts | None,
    source: SourceFacts | None,
    options: JudgeOptions,
    went: Course,
) -> Facts:
    given: dict[type, tuple[Any, str]] = {
        Recording: (recording, options.no_run),
        ConfigFacts: (config, options.no_config),
        SourceFacts: (source, options.no_source),
    }
    missing = {kind: why for kind, (value, why) in given.items() if value is None}
    known = {kind: value for kind, (value, _) in given.items() if value is not None}
    if recording is not None and recording.ending.how == "not-started" and not recording.events:
        del known[Recording]
        missing[Recording] = "the program could not be started"
    # A program that went through many backwards without a step has shown how it trains; one that died has not.
    short = went.no_step and not went.never_stepped
    return Facts(known, missing, "the program made no optimizer step; it has to reach one" if short else "")


def _gathered(outcomes: Sequence[tuple[CatalogEntry, Outcome]], locator: Locator) -> list[_Found]:
    """All findings with their place, in their final order, each once."""
    out = []
    for entry, outcome in outcomes:
        for finding in outcome.findings:
            at = locator.locate(finding)
            key = order(entry.code, finding, at.file if at else None, at.line if at else None, at.key if at else None)
            out.append(_Found(entry, finding, at, key=key))
    out.sort(key=lambda f: f.key)
    return [f for i, f in enumerate(out) if i == 0 or f.key != out[i - 1].key]


def _suppressed(
    found: list[_Found],
    outcomes: Sequence[tuple[CatalogEntry, Outcome]],
    suppressions: Sequence[Suppression],
    catalog: Catalog,
) -> tuple[list[_Found], list[str]]:
    """The findings with the reasons of those that are accepted, and a note for each suppression that fits nothing."""
    judged = {entry.code for entry, o in outcomes if o.verdict not in (NOT_OBSERVED, CRASHED)}
    codes = [covered(catalog, s.code)[1] for s in suppressions]
    used: set[int] = set()
    out = []
    for f in found:
        fitting = [
            i for i, s in enumerate(suppressions) if f.entry.code in codes[i] and s.fits(f.location, f.finding.about)
        ]
        used.update(fitting)
        out.append(dataclasses.replace(f, suppressed=suppressions[fitting[0]].reason) if fitting else f)
    # What was not judged this time cannot show that its suppression is stale.
    stale = [s.text for i, s in enumerate(suppressions) if i not in used and codes[i] <= judged]
    return out, [f"The suppression of {text} fits no finding; remove it." for text in stale]


def _reported(found: Sequence[_Found]) -> tuple[ReportFinding, ...]:
    out = []
    seen: dict[str, int] = {}
    for f in found:
        known = fingerprint(f.entry.code, f.location, f.finding)
        seen[known] = seen.get(known, 0) + 1
        if seen[known] > 1:
            known = f"{known}-{seen[known]}"
        out.append(
            ReportFinding(
                code=f.entry.code,
                name=f.entry.name,
                severity=Severity(f.finding.severity or "info").value,
                message=f.finding.message,
                location=f.location,
                evidence=f.finding.evidence,
                fix=f.finding.fix,
                fingerprint=known,
                suppressed=f.suppressed,
            )
        )
    return tuple(out)


def _crashes(outcomes: Sequence[tuple[CatalogEntry, Outcome]]) -> list[str]:
    out = []
    for entry, outcome in outcomes:
        if outcome.verdict == CRASHED:
            detail = f"\n{outcome.traceback}" if os.environ.get(DEBUG) and outcome.traceback else ""
            more = "" if detail else f" Set {DEBUG}=1 for the traceback."
            out.append(f"The check {entry.code} ({entry.name}) crashed: {outcome.reason}.{more}{detail}")
    return out


def _card(
    recording: Recording | None, config: ConfigFacts | None, route: str, locator: Locator
) -> tuple[RunCard, tuple[str, ...]]:
    """The card; a recording that it cannot be drawn from (edited by hand, of another version) costs no finding."""
    try:
        return build_card(recording, config, route=route, locator=locator), ()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return RunCard(), (f"The run card could not be drawn: {type(error).__name__}: {error}.",)


def _prevented(recording: Recording | None) -> tuple[PreventedAct, ...]:
    return tuple(PreventedAct(p.action, p.target, p.detail) for p in recording.prevented) if recording else ()


def _with_clean_command(report: Report) -> Report:
    """Only in the list of arguments is it plain which value follows ``--api-key``."""
    command = report.card.data.get("command")
    if not isinstance(command, (list, tuple)):
        return report
    data = {**report.card.data, "command": list(clean_command([str(a) for a in command]))}
    return dataclasses.replace(report, card=dataclasses.replace(report.card, data=data))
