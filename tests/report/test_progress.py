"""The progress display: lines in a log, a display on a terminal that is gone at the end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from trainlint.report.progress import Progress


def drive(progress: Progress) -> None:
    with progress:
        progress.phase("starting")
        progress.phase("starting")
        progress.output("epoch 1 \x1b[31mred\x1b[0m [bold]\r\n")
        progress.step(0, 0, 3)
        progress.step(1, 0, 3)
        progress.step(0, 1, 3)
        progress.warn("careful: [bold]")


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    console = plain_console()
    drive(Progress(console))
    lines = [re.sub(r" \([\d.]+ s\)$", "", line) for line in text_of(console).splitlines()]
    assert lines == [
        "trainlint: starting",
        "trainlint: optimizer step 1 of 3",
        "trainlint: optimizer step 2 of 3",
        "trainlint: careful: [bold]",
    ]


def test_verbose_passes_the_output_on_without_escapes() -> None:
    console = plain_console()
    drive(Progress(console, verbose=True))
    assert "epoch 1 red [bold]\n" in text_of(console)


def test_quiet_leaves_warnings_only() -> None:
    console = plain_console()
    drive(Progress(console, quiet=True))
    assert text_of(console) == "trainlint: careful: [bold]\n"


def test_nothing_stays_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(console) as progress:
        progress.phase("starting")
        progress.output("x" * 500)
    text = text_of(console)
    assert "starting" in text
    # The last thing done is to erase the lines of the display and to show the cursor again.
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K") or text.rstrip().endswith("\x1b[2K")
    assert "\x1b[?25h" in text


def test_the_display_goes_when_the_watch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)

    def watch() -> None:
        with Progress(console) as progress:
            progress.phase("starting")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        watch()
    assert "\x1b[?25h" in text_of(console)
