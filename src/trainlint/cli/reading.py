"""Reads the program that would be started, for ``trainlint check`` without a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainlint.launch.model import LaunchError, NoLaunch
from trainlint.launch.pyproject import ToolTable
from trainlint.recording.schema import SourceFacts
from trainlint.source.facts import read_source
from trainlint.source.project import Project, project_root
from trainlint.source.reach import imported_files, project_files, scripts_of

if TYPE_CHECKING:
    from trainlint.cli.run import CheckOptions


def read_program(options: CheckOptions, table: ToolTable) -> tuple[SourceFacts | None, str]:
    """Facts from the source of the program, or why there are none.

    The script that the command names and what it imports of its project are read; where no program is known, all
    Python files of the project that the config belongs to.
    """
    scripts = _scripts(options, table)
    if scripts:
        files = imported_files(scripts, Project())
        return read_source(files, scripts=scripts), ""
    config = options.target.config
    start = config.absolute() if config is not None else Path.cwd()
    folder = project_root(start if start.is_dir() else start.parent)
    files = project_files(folder)
    if not files:
        return None, f"no Python file of a program was found below {folder}"
    return read_source(files), ""


def _scripts(options: CheckOptions, table: ToolTable) -> tuple[str, ...]:
    target = options.target
    if target.command:
        return scripts_of(target.command, Path.cwd())
    if options.entry or table.entry:
        return scripts_of((options.entry or table.entry or "",), table.base if not options.entry else Path.cwd())
    from trainlint.launch.routes import find_launch

    try:
        found = find_launch(target.config, target.overrides, (), table=table, python=options.python)
    except LaunchError:
        return ()
    return () if isinstance(found, NoLaunch) else scripts_of(found.command, found.cwd)
