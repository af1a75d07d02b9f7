"""The run card: what this run will really do, observed beside configured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainlint.report.curve import CurvePlot
from trainlint.report.model import CardLine, RunCard
from trainlint.report.plot import ExperimentPlot
from trainlint.report.terminal import Pen, wrap

#: Order in which a person asks.
ORDER = (
    "launch",
    "device",
    "model",
    "weights",
    "optimizers",
    "schedule",
    "length",
    "batches",
    "accumulation",
    "clipping",
    "precision",
    "loss",
    "resume",
    "logging",
    "experiments",
)
LABEL_WIDTH = 22


class CardView:
    """The card as a table of three columns (setting, observed, configured) and the curve below it.

    Where observed and configured disagree, the line carries ``≠`` in the margin: the sign survives a log without
    colour. Settings that nothing configures use the whole width.
    """

    def __init__(self, card: RunCard, pen: Pen, *, verbose: bool = False) -> None:
        self.card = card
        self.pen = pen
        self.verbose = verbose
        #: Columns before the label, for the sign of disagreement.
        self.margin = len(pen.glyphs.differs) + 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [line for name in self._sections() for line in self.card.sections[name]]
        width = options.max_width
        label_width = min(LABEL_WIDTH, max((len(self.pen.line(li.label)) for li in lines), default=0)) + 2
        if any(line.configured for line in lines):
            yield from self._head(label_width, width)
        for line in lines:
            yield from self._line(console, line, label_width, width)
        if self.card.curves:
            yield Text()
            whole = any(curve.kind != "observed" for curve in self.card.curves)
            over = "" if whole else ", in the watched steps"
            yield Text(f" learning rate by optimizer step{over}", style="bold")
            yield CurvePlot(self.card.curves, self.pen)
        for plot in self.card.plots:
            yield Text()
            yield Text(f" {self.pen.line(plot.title)}", style="bold")
            yield ExperimentPlot(plot, self.pen)

    def _sections(self) -> list[str]:
        known = [name for name in ORDER if name in self.card.sections]
        return known + [name for name in self.card.sections if name not in ORDER]

    def _columns(self, label_width: int, width: int) -> tuple[int, int]:
        """Widths of observed and configured."""
        rest = width - label_width - self.margin - 3
        observed = max(16, min(rest * 11 // 20, 60))
        return observed, max(12, rest - observed)

    def _head(self, label_width: int, width: int) -> Iterator[Text]:
        observed, _ = self._columns(label_width, width)
        yield Text(" " * (self.margin + label_width) + "observed".ljust(observed + 3) + "configured", style="dim")

    def _line(self, console: Console, line: CardLine, label_width: int, width: int) -> Iterator[Text]:
        pen, glyphs = self.pen, self.pen.glyphs
        differs = line.agrees is False
        style = "bold red" if differs else ""
        sign = glyphs.differs if differs else ""
        left = Text(f" {sign}".ljust(self.margin), style="bold red")
        label = pen.line(line.label)
        left.append(label.ljust(label_width), style=style or "dim")
        blank = Text(" " * (self.margin + label_width))
        if len(label) > label_width - 1:
            yield left
            left = blank.copy()

        if not line.configured:
            for row in wrap(pen.text(line.observed, style), console, width - self.margin - label_width):
                yield left + row
                left = blank.copy()
        else:
            observed_width, configured_width = self._columns(label_width, width)
            observed = wrap(pen.text(line.observed, style), console, observed_width - 1)
            configured = wrap(pen.text(line.configured, style), console, configured_width)
            for i in range(max(len(observed), len(configured))):
                row = left.copy()
                cell = observed[i] if i < len(observed) else Text()
                row.append_text(cell)
                if i < len(configured):
                    row.append(" " * (observed_width - cell.cell_len))
                    between = {True: glyphs.agrees, False: glyphs.differs, None: ""}[line.agrees] if i == 0 else ""
                    row.append(f"{between:<2} ", style="bold red" if differs else "dim")
                    row.append_text(configured[i])
                row.rstrip()
                yield row
                left = blank.copy()
        if line.note and (differs or self.verbose or line.agrees is None):
            for row in wrap(pen.text(line.note, "dim"), console, width - self.margin - label_width):
                yield blank + row
