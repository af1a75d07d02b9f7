"""The path of ``trainlint check``: find the program, watch it, judge what was seen, report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from trainlint.cli import output
from trainlint.cli.arguments import Target
from trainlint.cli.failure import Failure
from trainlint.config.errors import ConfigError
from trainlint.config.load import LoadedConfig, load_config
from trainlint.judge import JudgeOptions, UsageError, judge
from trainlint.launch.model import LaunchError
from trainlint.launch.pyproject import ToolTable, read_tool_table
from trainlint.recording.schema import Recording, SourceFacts
from trainlint.report.model import Report

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class CheckOptions:
    """The command line of ``trainlint check``. ``None``: not given, so the project's settings decide."""

    target: Target
    #: Experiments to make after the watch, and what is to be said about those that cannot be.
    experiments: tuple[str, ...] = ()
    deep_note: str = ""
    steps: int | None = None
    timeout_s: float | None = None
    boundary: bool | None = None
    device: str = "auto"
    entry: str | None = None
    python: str | None = None
    yes: bool = False
    save_recording: Path | None = None
    recording: Path | None = None
    static: bool = False
    select: tuple[str, ...] | None = None
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fail_on: str | None = None
    exit_zero: bool = False
    format: str = "text"
    output_file: Path | None = None
    verbose: bool = False
    quiet: bool = False


@dataclass
class Evidence:
    """What there is to judge, and why the rest is missing."""

    recording: Recording | None = None
    config: LoadedConfig | None = None
    source: SourceFacts | None = None
    route: str = ""
    no_run: str = ""
    no_source: str = ""
    no_config: str = ""
    hint: str = ""
    troubles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def run_check(options: CheckOptions) -> int:
    """Do what ``trainlint check`` was asked; the exit status.

    Raises:
        Failure: nothing could be judged at all: contradicting options, a report that has no place to go.
    """
    _require_sense(options)
    output.check_format(options.format)
    output.check_writable(options.output_file, "--output-file")
    output.check_writable(options.save_recording, "--save-recording")
    table = _table(options.target)
    judging = _judging(options, table)
    _try_selection(judging)
    evidence = _evidence(options, table)
    report = _judged(evidence, judging, table, options.deep_note)
    output.write_report(report, options.format, options.output_file, verbose=options.verbose)
    return report.exit_code


# ------------------------------------------------------------------------------------------------ before anything runs


def _require_sense(options: CheckOptions) -> None:
    target = options.target
    given = [name for name, on in (("--static", options.static), ("--recording", options.recording)) if on]
    if len(given) > 1:
        raise Failure("--static and --recording exclude each other.", "--recording starts nothing either.")
    for name in given:
        for other, on in (
            ("--save-recording", options.save_recording),
            ("--entry", options.entry),
            ("--deep", options.experiments),
            ("a command behind `--`", target.command if name == "--recording" else None),
        ):
            if on:
                raise Failure(f"{name} starts no program, so {other} means nothing.", "Leave one of them out.")
    if options.entry and target.command:
        raise Failure("--entry and a command behind `--` both say what to run.", "Leave one of them out.")
    if target.config is None and target.command is None and not options.recording and target.overrides:
        raise Failure("There are settings but no config to apply them to.", "trainlint check CONFIG KEY=VALUE …")
    if options.verbose and options.quiet:
        raise Failure("--verbose and --quiet exclude each other.")


def _table(target: Target) -> ToolTable:
    """Settings of the project: from the current folder up, else from the config's folder up."""
    try:
        table = read_tool_table(Path.cwd())
        if table.file is None and target.config is not None:
            table = read_tool_table(target.config.absolute().parent)
    except LaunchError as error:
        raise Failure(error.message, error.hint) from None
    return table


def _judging(options: CheckOptions, table: ToolTable) -> JudgeOptions:
    fail_on = options.fail_on or table.fail_on or "error"
    if fail_on not in SEVERITIES:
        raise Failure(f"--fail-on {fail_on!r} is not a severity.", f"It takes one of: {', '.join(SEVERITIES)}.")
    return JudgeOptions(
        select=options.select if options.select is not None else (table.select or ()),
        extend_select=options.extend_select,
        ignore=(*table.ignore, *options.ignore),
        fail_on=fail_on,
        exit_zero=options.exit_zero,
        suppress=table.suppress,
        cwd=Path.cwd(),
    )


def _try_selection(judging: JudgeOptions) -> None:
    """A misspelled code must be told before the program is started, not minutes after."""
    try:
        judge(None, None, None, judging)
    except UsageError as error:
        raise Failure(error.message[:1].upper() + error.message[1:], error.hint) from None


# ------------------------------------------------------------------------------------------------ the evidence


def _evidence(options: CheckOptions, table: ToolTable) -> Evidence:
    if options.recording is not None:
        return _saved(options.recording, options.target)
    evidence = Evidence()
    config = options.target.config
    if config is not None and not config.is_dir():
        try:
            evidence.config = load_config(config, options.target.overrides)
        except ConfigError as error:
            evidence.troubles = (_joined(error.message, error.hint),)
            evidence.no_run = evidence.no_config = "the config could not be read"
            return evidence
    if options.static:
        evidence.no_run = "--static: the program was not started"
    else:
        from trainlint.cli.watching import watched

        evidence = watched(evidence, options, table)
    if evidence.recording is None or evidence.recording.source is None:
        # Nothing ran, or it never came to training: the program's own files are read as they lie there.
        from trainlint.cli.reading import read_program

        evidence.source, evidence.no_source = read_program(options, table)
    return evidence


def _saved(path: Path, target: Target) -> Evidence:
    """A recording from a file, and the config beside it when one is named too."""
    from trainlint.recording import codec

    try:
        recording = codec.load(path)
    except codec.RecordingError as error:
        raise Failure(f"{path}: {error}.", "Give a file that `trainlint check --save-recording` wrote.") from None
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from None
    evidence = Evidence(recording=recording, route=f"the recording {path}")
    if target.config is not None:
        try:
            evidence.config = load_config(target.config, target.overrides)
        except ConfigError as error:
            evidence.troubles = (_joined(error.message, error.hint),)
    return evidence


def _joined(message: str, hint: str) -> str:
    message = message if message.endswith((".", "!", "?", ":")) else f"{message}."
    return f"{message}\n{hint}" if hint else message


# ------------------------------------------------------------------------------------------------ judging


def _judged(evidence: Evidence, judging: JudgeOptions, table: ToolTable, note: str = "") -> Report:
    options = dataclasses.replace(
        judging,
        route=evidence.route,
        hint=evidence.hint,
        troubles=evidence.troubles,
        notes=(*table.warnings, *evidence.notes, *((note,) if note else ())),
    )
    if evidence.no_run:
        options = dataclasses.replace(options, no_run=evidence.no_run)
    if evidence.no_config:
        options = dataclasses.replace(options, no_config=evidence.no_config)
    if evidence.no_source:
        options = dataclasses.replace(options, no_source=evidence.no_source)
    recording = evidence.recording
    source = (recording.source if recording is not None else None) or evidence.source
    if recording is not None and recording.config is not None:
        # The file's keys, joined with what the run did with them.
        return judge(recording, recording.config, source, options)
    config = evidence.config.facts if evidence.config is not None else None
    return judge(recording, config, source, options)
