"""Finds the program and watches it, for ``trainlint check``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainlint.cli import output
from trainlint.cli.failure import Failure
from trainlint.launch.journal import RestoreResult, RunFolder, recover_abandoned
from trainlint.launch.model import Launch, LaunchError, NoLaunch, Watched, WatchOptions
from trainlint.launch.pyproject import ToolTable
from trainlint.launch.routes import find_launch
from trainlint.launch.secrets import masked_arguments, secret_values
from trainlint.recording.describe import place
from trainlint.recording.schema import Boundary, Recording
from trainlint.report.progress import Progress

if TYPE_CHECKING:
    from trainlint.cli.run import CheckOptions, Evidence


def watched(evidence: Evidence, options: CheckOptions, table: ToolTable) -> Evidence:
    """``evidence`` with the recording of a watched run, or with the reason why there is none."""
    progress = Progress(output.stderr(), verbose=options.verbose, quiet=options.quiet)
    for result in recover_abandoned():
        _tell_recovered(result, progress)
    try:
        found = find_launch(
            options.target.config,
            options.target.overrides,
            options.target.command or (),
            entry=options.entry,
            table=table,
            python=options.python,
        )
    except LaunchError as error:
        evidence.troubles = (*evidence.troubles, str(error))
        evidence.no_run = "the program could not be started"
        return evidence
    if isinstance(found, NoLaunch):
        if options.target.config is None:
            raise Failure(
                "There is nothing to check: neither a config nor a command was given.",
                "trainlint check CONFIG, or trainlint check -- python train.py …",
            )
        evidence.no_run = f"the program was not started: {found.reason}"
        evidence.notes = (f"To watch the run as well, add to this command: {found.add}",)
        return evidence
    if found.needs_confirmation and not options.yes and not _agreed(found, progress):
        evidence.no_run = f"the program was not started: `{found.shown}` was found, and nobody said that it may run"
        evidence.notes = (f"--yes runs it without asking: {found.shown} (found because: {found.why})",)
        return evidence
    return _watch(evidence, found, options, table, progress)


def _agreed(launch: Launch, progress: Progress) -> bool:
    """Show the command that was found and ask; without a terminal, or without an answer, it is a no."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    progress.warn(f"this command seems to train with that config ({launch.why}):\n  {launch.shown}\n  in {launch.cwd}")
    print("Run it and watch its first steps? [Y/n] ", end="", file=sys.stderr, flush=True)
    try:
        answer = input().strip().lower()
    except EOFError:
        return False
    return answer in ("", "y", "yes")


def _tell_recovered(result: RestoreResult, progress: Progress) -> None:
    """An earlier run's supervisor died; what that run did to files was undone just now."""
    if result.restored or result.removed_files:
        progress.warn(
            f"an earlier check ({result.run_id}) did not end properly; put back {result.restored} and removed "
            f"{result.removed_files} files of it."
        )
    for problem in result.problems:
        progress.warn(problem)


# ------------------------------------------------------------------------------------------------ the watch


def _watch(evidence: Evidence, launch: Launch, options: CheckOptions, table: ToolTable, progress: Progress) -> Evidence:
    from trainlint.launch.supervisor import watch
    from trainlint.recording.assemble import assemble

    wanted = _watch_options(evidence, options, table)
    try:
        folder = RunFolder()
    except OSError as error:
        raise Failure(
            f"trainlint has no place for its own files: {error}.", "Name one with the variable TRAINLINT_STATE_DIR."
        ) from None
    evidence.route = launch.why
    try:
        with progress:
            seen = watch(launch, wanted, folder, progress)
            progress.phase("reading what was recorded")
            recording = _completed(assemble(folder.path), seen, launch, evidence, wanted)
    except LaunchError as error:
        evidence.troubles = (*evidence.troubles, str(error))
        evidence.no_run = "the program could not be started"
        return evidence
    finally:
        # Whatever happened: what the program did to files is undone, and nothing of the run stays.
        restored = folder.close()
        for problem in restored.problems:
            progress.warn(problem)
    evidence.recording = dataclasses.replace(recording, created_files=restored.removed_files)
    evidence.hint = seen.hint
    evidence.notes = (*evidence.notes, *seen.notes)
    evidence.troubles = (*evidence.troubles, *restored.problems)
    if options.experiments:
        _experiment(evidence, launch, options, wanted, progress)
    if options.save_recording is not None:
        _save(evidence.recording, options.save_recording)
    return evidence


def _experiment(
    evidence: Evidence, launch: Launch, options: CheckOptions, wanted: WatchOptions, progress: Progress
) -> None:
    """Make the experiments of ``--deep`` and add them to the recording, which stays as it is otherwise."""
    from trainlint.launch.experiments import make_experiments

    assert evidence.recording is not None
    with progress:
        made = make_experiments(evidence.recording, options.experiments, launch, wanted, progress)
    evidence.recording = dataclasses.replace(evidence.recording, experiments=made.experiments)
    evidence.troubles = (*evidence.troubles, *made.problems)


def _completed(
    recording: Recording, seen: Watched, launch: Launch, evidence: Evidence, wanted: WatchOptions
) -> Recording:
    """What only the caller knows, added: the ending, the command, the config's own file, what the source says."""
    from trainlint.config.combine import combine
    from trainlint.source.facts import read_source
    from trainlint.source.reach import scripts_of

    program = recording.program
    program = dataclasses.replace(
        program,
        command=masked_arguments(launch.command),
        cwd=str(launch.cwd),
        interpreter=program.interpreter or seen.interpreter or "",
        time_to_first_step_s=seen.first_step_s,
        steps_wanted=wanted.steps,
    )
    config = combine(
        evidence.config.facts if evidence.config is not None else None,
        recording.config,
        command=launch.command,
        sources=program.sources,
    )
    source = recording.source
    if program.sources:
        source = read_source(program.sources, recording, scripts_of(launch.command, launch.cwd))
    boundary = _boundary(recording.boundary, seen)
    return dataclasses.replace(
        recording, program=program, ending=seen.ending, config=config, source=source, boundary=boundary
    )


def _boundary(boundary: Boundary | None, seen: Watched) -> Boundary | None:
    """What only the supervisor knows of a boundary that has no end of its own: it was too long, or the process died."""
    if boundary is None or boundary.outcome != "timeout":
        # What the program raised may quote anything.
        return boundary and dataclasses.replace(boundary, reason=seen.redact(boundary.reason))
    if seen.returncode is None:
        at = f"; the program was at {place(seen.stopped_at)}" if seen.stopped_at is not None else ""
        return dataclasses.replace(boundary, reason=f"{boundary.reason}{at}")
    if seen.returncode == 0:
        return dataclasses.replace(boundary, outcome="ended", reason="the program came to its end with this epoch")
    return dataclasses.replace(boundary, outcome="failed", reason=f"the program ended with exit code {seen.returncode}")


def _watch_options(evidence: Evidence, options: CheckOptions, table: ToolTable) -> WatchOptions:
    secrets = secret_values(evidence.config.data) if evidence.config is not None else set()
    wanted = WatchOptions(
        steps=options.steps or table.steps or WatchOptions.steps,
        device=options.device,
        python=options.python,
        secrets=tuple(sorted(secrets)),
        boundary=next((b for b in (options.boundary, table.boundary) if b is not None), WatchOptions.boundary),
    )
    timeout = options.timeout_s or table.timeout
    return dataclasses.replace(wanted, timeout_s=timeout) if timeout else wanted


def _save(recording: Recording, path: Path) -> None:
    from trainlint.recording import codec

    try:
        codec.save(recording, path)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from None
