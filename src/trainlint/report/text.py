"""The text report: what a person reads before launching, or at two in the morning after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from trainlint.report.card import CardView
from trainlint.report.findings import FindingsView
from trainlint.report.model import PreventedAct, Report, Verdict
from trainlint.report.terminal import SEVERITY_STYLE, Pen, hanging, wrap

MAX_PREVENTED = 6
MAX_OUTPUT_LINES = 40
#: In the order of the coverage line. The words of the JSON report, and how a sentence says them.
VERDICTS = {
    "passed": "passed",
    "failed": "failed",
    "not-applicable": "not applicable",
    "not-observed": "not observed",
    "crashed": "crashed",
}
_ACTS = {
    "delete": "deleting",
    "overwrite": "overwriting",
    "append": "appending to",
    "truncate": "truncating",
    "move": "moving",
    "upload": "uploading",
    "tracker": "tracking with",
}


def render_text(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print the report.

    Args:
        report: everything computed; nothing is found out here.
        console: where to; its width, colour and encoding are respected.
        verbose: all evidence, every finding in full, suppressed findings, all reasons.
    """
    pen = Pen(console)
    for renderable in sections(report, pen, verbose=verbose):
        console.print(renderable, soft_wrap=False, highlight=False, markup=False)


def sections(report: Report, pen: Pen, *, verbose: bool = False) -> Iterator[RenderableType]:
    """The parts of the report from top to bottom."""
    open_findings = [f for f in report.findings if f.suppressed is None]
    if report.troubles:
        yield TroubleView(report, pen)
        yield Text()
    if report.card.sections or report.card.curves:
        yield Heading("this run", pen)
        yield CardView(report.card, pen, verbose=verbose)
        yield Text()
    if open_findings:
        yield Heading(_counted(report), pen)
        yield FindingsView(open_findings, pen, verbose=verbose)
        yield Text()
    if report.prevented or report.created_files:
        yield PreventedView(report, pen, verbose=verbose)
        yield Text()
    yield CoverageView(report, pen, verbose=verbose)


class Heading:
    """A title on a rule."""

    def __init__(self, title: str, pen: Pen) -> None:
        self.title = title
        self.pen = pen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rule = self.pen.glyphs.rule
        line = Text(f"{rule}{rule} ", style="dim")
        line.append(self.title, style="bold not dim")
        line.append(" " + rule * max(2, min(options.max_width, 110) - line.cell_len - 1))
        yield line


class TroubleView:
    """Why the job could not be done, with the program's own last words."""

    def __init__(self, report: Report, pen: Pen) -> None:
        self.report = report
        self.pen = pen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pen = self.pen
        width = min(options.max_width, 110)
        for trouble in self.report.troubles:
            first, *rest = pen.block(trouble).strip().split("\n")
            rows = wrap(Text(first, style="bold red"), console, width - 2)
            rows += [row for p in rest for row in wrap(Text(p), console, width - 2)]
            yield from hanging(Text(pen.glyphs.error, style="bold red"), rows, indent=0, label_width=2)
        output = [pen.block(line).rstrip() for line in self.report.program_output]
        output = [part for line in output for part in line.split("\n")]
        while output and not output[-1]:
            output.pop()
        if output:
            yield Text("  the program's last lines:", style="dim")
            for line in output[-MAX_OUTPUT_LINES:]:
                for row in Text(line).wrap(console, max(8, options.max_width - 4)) or [Text()]:
                    yield Text.assemble(("  " + pen.glyphs.gutter + " ", "red"), row)


class PreventedView:
    """What the program did to files and trackers while it was watched, and that none of it remains."""

    def __init__(self, report: Report, pen: Pen, *, verbose: bool) -> None:
        self.report = report
        self.pen = pen
        self.verbose = verbose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pen = self.pen
        created = self.report.created_files
        if not self.report.prevented:
            text = f"{_files(created)} that the program created while it was watched {_was(created)} removed again."
            yield Text(text, style="dim")
            return
        yield Text("What the program did while it was watched, prevented or undone:", style="bold")
        by_action: dict[str, list[PreventedAct]] = {}
        for act in self.report.prevented:
            by_action.setdefault(act.action, []).append(act)
        for action, acts in by_action.items():
            shown = acts if self.verbose else acts[:MAX_PREVENTED]
            for act in shown:
                row = Text(pen.line(act.target), overflow="fold")
                if act.detail:
                    row.append(f"  {pen.line(act.detail)}", style="dim")
                label = Text(_ACTS.get(action, pen.line(action)), style="yellow")
                yield from hanging(
                    label, wrap(row, console, options.max_width - 2 - 15), indent=2, label_width=max(15, len(label) + 1)
                )
            if len(acts) > len(shown):
                yield Text(f"  {'':<15}and {len(acts) - len(shown)} more (--verbose)", style="dim")
        if created:
            yield Text(f"  {_files(created)} that it created {_was(created)} removed again.", style="dim")


class CoverageView:
    """How much was looked at: one line of verdicts, then the reasons of what was not seen."""

    def __init__(self, report: Report, pen: Pen, *, verbose: bool) -> None:
        self.report = report
        self.pen = pen
        self.verbose = verbose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pen, report = self.pen, self.report
        width = min(options.max_width, 110)
        dot = f" {pen.glyphs.dot} "
        counts = Counter(v.verdict for v in report.verdicts)
        parts = [f"{counts[name]} {words}" for name, words in VERDICTS.items() if counts[name]]
        total = len(report.verdicts)
        line = Text(f"{total} check{'' if total == 1 else 's'}: ", style="bold")
        line.append(dot.join(parts) if parts else "none ran")
        yield from wrap(line, console, width)

        told = ["crashed", "not-observed"] + (["not-applicable"] if self.verbose else [])
        for verdict in told:
            for reason, codes in self._reasons(verdict):
                style = "bold red" if verdict == "crashed" else "dim"
                row = Text(" ".join(codes), style="" if verdict == "crashed" else "dim")
                row.append(f": {pen.line(reason)}" if reason else "", style=style if verdict == "crashed" else "dim")
                yield from hanging(
                    Text(VERDICTS[verdict], style=style),
                    wrap(row, console, width - 18),
                    indent=2,
                    label_width=16,
                    limit=None if self.verbose else 5,
                    more=pen.glyphs.ellipsis,
                )
        suppressed = [f for f in report.findings if f.suppressed is not None]
        if suppressed and self.verbose:
            for finding in suppressed:
                place = f" {finding.location.key}" if finding.location and finding.location.key else ""
                row = Text(f"{pen.line(finding.code)}{pen.line(place) and ' ' + pen.line(place)}: ", style="dim")
                row.append(pen.line(finding.suppressed or "no reason given"), style="dim")
                yield from hanging(
                    Text("suppressed", style="dim"), wrap(row, console, width - 18), indent=2, label_width=16
                )
        elif suppressed:
            tally = Counter(f.code for f in suppressed)
            names = ", ".join(code if n == 1 else f"{code} ×{n}" for code, n in sorted(tally.items()))
            yield Text(f"  {len(suppressed)} suppressed ({pen.line(names)}); --verbose tells why", style="dim")
        for note in report.notes:
            yield from wrap(pen.text(note, "dim"), console, width)
        if not any(f.suppressed is None for f in report.findings) and not report.troubles and counts["passed"]:
            yield Text("No findings.", style="bold green")

    def _reasons(self, verdict: str) -> list[tuple[str, list[str]]]:
        """Codes by reason, in the order of the verdicts."""
        by_reason: dict[str, list[str]] = {}
        for v in self.report.verdicts:
            if v.verdict == verdict:
                by_reason.setdefault(v.reason, []).append(_code(v, self.pen))
        return list(by_reason.items())


def _code(verdict: Verdict, pen: Pen) -> str:
    return pen.line(verdict.code)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _counted(report: Report) -> str:
    """``2 errors, 1 warning``."""
    counts = Counter(f.severity for f in report.findings if f.suppressed is None)
    words = [
        f"{n} {name if name == 'info' or n == 1 else name + 's'}"
        for name in SEVERITY_STYLE
        if (n := counts.pop(name, 0))
    ]
    words += [f"{n} {name}" for name, n in counts.items()]
    return ", ".join(words)
