"""The page of a check, and the table of all checks."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainlint.report.model import CheckPage
from trainlint.report.terminal import SEVERITY_STYLE, Pen, wrap

MAX_WIDTH = 100


def render_page(page: CheckPage, console: Console) -> None:
    """Print a check's page: rendered on a terminal, as Markdown into a file or a pipe."""
    pen = Pen(console)
    if not console.is_terminal:
        console.print(Text(pen.block(markdown(page))), soft_wrap=True)
        return
    from rich.markdown import Markdown  # only here: it brings the Markdown parser and pygments

    console.print(Markdown(pen.block(markdown(page)), hyperlinks=True), width=min(console.width, MAX_WIDTH))


def markdown(page: CheckPage) -> str:
    """``# TL202 frozen-but-optimized``, a line of facts, the docstring."""
    facts = [f"severity up to **{page.severity}**", f"needs {' and '.join(page.needs)}"]
    if page.catalog:
        facts.append("also known as " + ", ".join(page.catalog))
    return f"# {page.code} {page.name}\n\n{' · '.join(facts)}\n\n{page.page.strip()}\n"


class RulesTable:
    """One line a check: code, name, severity, needs, title."""

    def __init__(self, pages: Sequence[CheckPage], pen: Pen) -> None:
        self.pages = pages
        self.pen = pen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pen = self.pen
        rows = [(p.code, p.name, p.severity, "+".join(p.needs)) for p in self.pages]
        widths = [max((len(row[i]) for row in rows), default=0) + 2 for i in range(4)]
        title_width = options.max_width - sum(widths)
        for row, page in zip(rows, self.pages):
            line = Text(row[0].ljust(widths[0]), style="bold")
            line.append(row[1].ljust(widths[1]), style="not bold")
            line.append(row[2].ljust(widths[2]), style=SEVERITY_STYLE.get(page.severity, "") + " not bold")
            line.append(row[3].ljust(widths[3]), style="not bold dim")
            if title_width >= 40:
                titles = wrap(pen.text(page.title), console, title_width)
                yield line + (titles[0] if titles else Text())
                for more in titles[1:]:
                    yield Text(" " * sum(widths)) + more
            else:
                line.rstrip()
                yield line
                for more in wrap(pen.text(page.title, "dim"), console, options.max_width - widths[0]):
                    yield Text(" " * widths[0]) + more


def render_rules(pages: Sequence[CheckPage], console: Console) -> None:
    """Print the table of checks."""
    console.print(RulesTable(pages, Pen(console)))
    count = len(pages)
    console.print(
        Text(f"{count} check{'' if count == 1 else 's'}. `trainlint explain CODE` prints a check's page.", style="dim")
    )


def rules_json(pages: Sequence[CheckPage]) -> str:
    """The checks as a JSON array; the page is in ``page``."""
    rows = [
        {
            "code": p.code,
            "name": p.name,
            "title": p.title,
            "severity": p.severity,
            "family": p.family,
            "needs": list(p.needs),
            "catalog": list(p.catalog),
            "page": p.page,
        }
        for p in pages
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
