"""Findings as a person reads them: worst first, one screen each at most, repeats gathered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainlint.report.model import Location, ReportFinding
from trainlint.report.terminal import SEVERITY_STYLE, Pen, hanging, packed, short_number, shorten_path, wrap

#: From this many findings of one check on, each is told in its message only and the fix is given once.
GATHER_FROM = 4
MAX_MESSAGE_LINES = 14
MAX_EVIDENCE_LINES = 4
MAX_GATHERED = 12
MAX_PLACE_LINES = 12
#: Longer lines are hard to read, however wide the terminal.
MAX_TEXT_WIDTH = 110
INDENT = 2
LABEL = 10


class FindingsView:
    """All findings that are not suppressed, in the report's order."""

    def __init__(self, findings: Sequence[ReportFinding], pen: Pen, *, verbose: bool = False) -> None:
        self.findings = findings
        self.pen = pen
        self.verbose = verbose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, ((_, _), group) in enumerate(groupby(self.findings, key=lambda f: (f.severity, f.code))):
            members = list(group)
            if number:
                yield Text()
            if len(members) < GATHER_FROM or self.verbose:
                for i, finding in enumerate(members):
                    if i:
                        yield Text()
                    yield FindingView(finding, self.pen, verbose=self.verbose)
            else:
                yield GatheredView(members, self.pen)


class FindingView:
    """One finding: what is wrong, where, how it is known, what to change."""

    def __init__(self, finding: ReportFinding, pen: Pen, *, verbose: bool = False) -> None:
        self.finding = finding
        self.pen = pen
        self.verbose = verbose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finding, pen = self.finding, self.pen
        width = min(options.max_width, MAX_TEXT_WIDTH)
        yield from header(finding, pen, options.max_width)
        dots = pen.glyphs.ellipsis
        limit = None if self.verbose else MAX_MESSAGE_LINES
        message = [row for p in pen.paragraphs(finding.message) for row in wrap(Text(p), console, width - INDENT)]
        yield from hanging(
            Text(),
            message,
            indent=INDENT,
            label_width=0,
            limit=limit,
            more=f"{dots} (all of it: --verbose)",
        )
        facts = evidence_words(finding.evidence)
        if facts:
            room = width - INDENT - LABEL
            phrases = packed([pen.line(fact) for fact in facts], f" {pen.glyphs.dot} ", room)
            rows = [row for phrase in phrases for row in wrap(phrase, console, room)]
            limit = None if self.verbose else MAX_EVIDENCE_LINES
            yield from _labelled("evidence", rows, pen, limit)
        if finding.fix:
            rows = [r for p in pen.paragraphs(finding.fix) for r in wrap(Text(p), console, width - INDENT - LABEL)]
            yield from _labelled("fix", rows, pen, None if self.verbose else MAX_MESSAGE_LINES, "bold green")


class GatheredView:
    """Many findings of one check: the head once, a line or two for each, the fix once where it is the same."""

    def __init__(self, findings: Sequence[ReportFinding], pen: Pen) -> None:
        self.findings = findings
        self.pen = pen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pen = self.pen
        width = min(options.max_width, MAX_TEXT_WIDTH)
        first = self.findings[0]
        yield from header(first, pen, options.max_width, count=len(self.findings))
        if len({_template(f.message) for f in self.findings}) == 1 and all(_subject(f) for f in self.findings):
            yield from self._alike(console, width)
        else:
            yield from self._each(console, width)
        if first.fix and self._one_fix():
            rows = [r for p in pen.paragraphs(first.fix) for r in wrap(Text(p), console, width - INDENT - LABEL)]
            yield from _labelled("fix", rows, pen, MAX_MESSAGE_LINES, "bold green")

    def _one_fix(self) -> bool:
        return len({_template(f.fix) for f in self.findings}) == 1

    def _alike(self, console: Console, width: int) -> Iterator[Text]:
        """The messages differ only in names and numbers: the first one, then the places of all."""
        pen = self.pen
        first = self.findings[0]
        message = [row for p in pen.paragraphs(first.message) for row in wrap(Text(p), console, width - INDENT)]
        more = f"{pen.glyphs.ellipsis} (all of it: --verbose)"
        yield from hanging(Text(), message, indent=INDENT, label_width=0, limit=MAX_MESSAGE_LINES, more=more)
        yield Text(" " * INDENT + f"The same holds for each of these {len(self.findings)}:", style="dim")
        by_file: dict[str, list[str]] = {}
        for finding in self.findings:
            place = finding.location
            by_file.setdefault(place.file or "" if place else "", []).append(pen.line(_subject(finding)))
        more = f"{pen.glyphs.ellipsis} (all of them: --verbose)"
        for file, subjects in by_file.items():
            if file:
                path = shorten_path(pen.line(file), width - INDENT, pen.glyphs.ellipsis)
                yield Text(" " * INDENT) + Text(path, style="underline")
            rows = packed(subjects, f" {pen.glyphs.dot} ", width - INDENT - 2)
            yield from hanging(Text(), rows, indent=INDENT + 2, label_width=0, limit=MAX_PLACE_LINES, more=more)

    def _each(self, console: Console, width: int) -> Iterator[Text]:
        """A place and a few lines of message for each."""
        pen = self.pen
        told: dict[str, str] = {}
        for finding in self.findings[:MAX_GATHERED]:
            place = place_text(finding.location, pen, width - INDENT - 2)
            bullet = Text(f"{pen.glyphs.dot} ", style="dim")
            if place.plain:
                yield from hanging(bullet, wrap(place, console, width - INDENT - 2), indent=INDENT, label_width=2)
                bullet = Text()
            body = " ".join(p for p in pen.paragraphs(finding.message) if p)
            rows = wrap(Text(body), console, width - INDENT - 2)
            yield from hanging(bullet, rows, indent=INDENT, label_width=2, limit=5, more=pen.glyphs.ellipsis)
            if finding.fix and not self._one_fix():
                # The same cure for several of them is told once.
                earlier = told.setdefault(finding.fix, pen.line(_subject(finding)))
                fix = finding.fix if earlier == pen.line(_subject(finding)) else f"as for {earlier}"
                rows = wrap(pen.text("fix: " + fix, "green"), console, width - INDENT - 2)
                yield from hanging(Text(), rows, indent=INDENT, label_width=2, limit=4, more=pen.glyphs.ellipsis)
        hidden = self.findings[MAX_GATHERED:]
        if hidden:
            names = ", ".join(pen.line(s) for s in map(_subject, hidden) if s)
            text = f"{pen.glyphs.dot} and {len(hidden)} more" + (f": {names}" if names else "")
            rows = wrap(Text(text, style="dim"), console, width - INDENT)
            more = f"{pen.glyphs.ellipsis} (all of them: --verbose)"
            yield from hanging(Text(), rows, indent=INDENT, label_width=0, limit=4, more=more)


def _template(message: str) -> str:
    """A message without the names and numbers in it: equal for findings that say the same of different subjects."""
    return re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|\d[\w.,+%-]*", "#", message)


def _subject(finding: ReportFinding) -> str:
    """``training.lr:14``: what a gathered finding is about, within its file."""
    place = finding.location
    if place is None:
        return ""
    line = f":{place.line}" if place.line else ""
    return f"{place.key}{line}" if place.key else line.replace(":", "line ")


def header(finding: ReportFinding, pen: Pen, width: int, count: int = 1) -> Iterator[Text]:
    """``✗ error TL104 setting-not-in-effect    conf/config.yaml:14 training.weight_decay``."""
    style = SEVERITY_STYLE.get(finding.severity, "bold")
    head = Text()
    head.append(f"{pen.glyphs.of(finding.severity)} {finding.severity} ", style=style)
    head.append(f"{pen.line(finding.code)} {pen.line(finding.name)}", style="bold")
    if count > 1:
        head.append(f"  {count} findings", style="bold")
        yield head
        return
    width = min(width, MAX_TEXT_WIDTH)
    place = place_text(finding.location, pen, width - INDENT)
    if not place.plain:
        yield head
    elif head.cell_len + 3 + place.cell_len <= width:
        yield head + Text("   ") + place
    else:
        yield head
        yield Text(" " * INDENT) + place


def place_text(location: Location | None, pen: Pen, width: int) -> Text:
    """``conf/config.yaml:14  training.weight_decay``; the front of a path too long for ``width`` is left out."""
    if location is None:
        return Text()
    out = Text(overflow="fold")
    if location.file:
        line = f":{location.line}" if location.line else ""
        path = shorten_path(pen.line(location.file), width - len(line), pen.glyphs.ellipsis)
        out.append(path + line, style="underline")
    if location.key:
        if out.plain:
            out.append("  ")
        out.append(pen.line(location.key), style="cyan")
    return out


def _labelled(label: str, rows: list[Text], pen: Pen, limit: int | None, style: str = "dim") -> list[Text]:
    more = f"{pen.glyphs.ellipsis} (all of it: --verbose, --format json)"
    return hanging(Text(label, style=style), rows, indent=INDENT, label_width=LABEL, limit=limit, more=more)


# ------------------------------------------------------------------------------------------------ evidence in few words


def evidence_words(evidence: Mapping[str, Any]) -> list[str]:
    """``configured 0.0005``, ``names a, b, c … (14)``: one short phrase per entry."""
    return [f"{_key(key)} {_value(value)}" for key, value in evidence.items() if value is not None]


def _key(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: Any, depth: int = 0) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short_number(value, 4)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping) and depth and "key" in value:
        return str(value["key"])  # one of a list of keys: the rest of it is in the JSON report
    if isinstance(value, Mapping):
        items = [f"{k}: {_value(v, depth + 1)}" for k, v in value.items()]
        return _few(items, 4 if depth == 0 else 2)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _few([_value(v, depth + 1) for v in value], 4 if depth == 0 else 3)
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _few(items: list[str], most: int) -> str:
    if not items:
        return "(none)"
    if len(items) <= most:
        return ", ".join(items)
    return ", ".join(items[: most - 1]) + f", … ({len(items)})"
