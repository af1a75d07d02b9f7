"""Where things go: the report to stdout or a file, everything else to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console

from trainlint.cli.failure import Failure
from trainlint.report.model import Report

FORMATS = ("text", "json")
LATER_FORMATS = ("sarif", "junit", "github", "html")
#: Width of a text report in a file, where nobody's terminal decides.
FILE_WIDTH = 100


def console_for(stream: TextIO) -> Console:
    """A console that decides by itself about colour (terminal, NO_COLOR, FORCE_COLOR, TERM) and width."""
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)


def stdout() -> Console:
    return console_for(sys.stdout)


def stderr() -> Console:
    return console_for(sys.stderr)


def check_format(name: str) -> str:
    """``name``, when this version writes it.

    Raises:
        Failure: it does not.
    """
    if name in FORMATS:
        return name
    if name in LATER_FORMATS:
        raise Failure(f"--format {name} is not available in this version.", f"It has: {', '.join(FORMATS)}.")
    raise Failure(f"There is no format {name!r}.", f"--format takes one of: {', '.join(FORMATS)}.")


def check_writable(path: Path | None, option: str) -> None:
    """Find out before the program is started that its report will have no place.

    Raises:
        Failure: the file cannot be written.
    """
    if path is None:
        return
    folder = path.parent if str(path.parent) else Path()
    if path.is_dir():
        raise Failure(f"{option} {path} is a directory.", "Name a file in it.")
    if not folder.is_dir():
        raise Failure(f"{option}: there is no directory {folder}.", "Make it first, or name another file.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise Failure(f"{option} {path} cannot be written: permission denied.", "Name another file.")


def write_report(report: Report, name: str, path: Path | None, *, verbose: bool) -> None:
    """Write the report in the format ``name`` to ``path``, or to stdout.

    Raises:
        Failure: the file cannot be written.
    """
    if path is None:
        _write(report, name, sys.stdout, verbose=verbose, to_file=False)
        return
    try:
        with path.open("w", encoding="utf-8") as stream:
            _write(report, name, stream, verbose=verbose, to_file=True)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from None


def _write(report: Report, name: str, stream: TextIO, *, verbose: bool, to_file: bool) -> None:
    if name == "json":
        from trainlint.report.json import render_json

        stream.write(render_json(report))
        stream.flush()
        return
    from trainlint.report.text import render_text

    if to_file:
        console = Console(file=stream, width=FILE_WIDTH, color_system=None, force_terminal=False, highlight=False)
    else:
        console = console_for(stream)
    render_text(report, console, verbose=verbose)
