"""Pages and the table of checks."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from trainlint.report.explain import render_page, render_rules, rules_json
from trainlint.report.model import CheckPage

PAGE = CheckPage(
    code="TL202",
    name="frozen-but-optimized",
    title="Frozen parameters that an optimizer still holds.",
    severity="error",
    family="optimizer",
    needs=("run",),
    catalog=("O17",),
    page="Frozen parameters that an optimizer still holds.\n\n## What goes wrong\n\nThey `move`.\n",
)


def test_a_pipe_gets_markdown() -> None:
    console = Console(file=io.StringIO(), width=40)
    render_page(PAGE, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.startswith("# TL202 frozen-but-optimized\n\nseverity up to **error** · needs run · also known as O17\n")
    assert "## What goes wrong\n\nThey `move`." in text


def test_a_terminal_gets_a_rendered_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    render_page(PAGE, console)
    assert isinstance(console.file, io.StringIO)
    assert "##" not in console.file.getvalue()
    assert "What goes wrong" in console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    render_rules([PAGE, PAGE], console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum("TL202" in line for line in lines) == 2


def test_the_table_as_json() -> None:
    rows = json.loads(rules_json([PAGE]))
    assert rows[0]["code"] == "TL202"
    assert rows[0]["catalog"] == ["O17"]
    assert rows[0]["needs"] == ["run"]
