"""The curves of experiments, drawn as the learning-rate curve is."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from trainlint.report.curve import CurvePlot
from trainlint.report.model import Plot
from trainlint.report.terminal import Pen, hanging, wrap


class ExperimentPlot(CurvePlot):
    """Lines with axis labels of their own, marked points, and notes in place of a legend of rates."""

    def __init__(self, plot: Plot, pen: Pen) -> None:
        super().__init__(plot.curves, pen)
        self.plot = plot

    def _x_axis(self, margin: int, columns: int, last: int) -> Text:
        rule, corner = ("─", "└") if self.pen.unicode else ("-", "+")
        axis = list(rule * columns)
        for place, text in self.plot.ticks:
            label = f" {self.pen.line(text)} "
            at = round(place / max(1, last) * (columns - 1))
            start = min(max(0, at - len(label) // 2), columns - len(label))
            if start >= 0 and all(sign == rule for sign in axis[start : start + len(label)]):
                axis[start : start + len(label)] = label
        return Text(" " * (margin - 1) + corner + "".join(axis), style="dim")

    def _legend(self, width: int, console: Console) -> Iterator[Text]:
        several = len(self.labels) > 1
        for label in self.labels:
            marked = all(c.kind == "observed" for c, _ in self.curves if c.label == label)
            sign = ("●" if self.pen.unicode else "o") if marked else ("─" if self.pen.unicode else "*")
            curve = next(c for c, _ in self.curves if c.label == label)
            head = Text("   ")
            head.append(
                f"{self._letter(curve) + ' ' if several and not marked else ''}{sign} ", style=self._style(curve)
            )
            note = f": {curve.note}" if curve.note else ""
            body = self.pen.text(f"{label}{note}", "dim")
            yield from hanging(head, wrap(body, console, width - 8), indent=0, label_width=8)
        for note in self.plot.notes:
            yield from hanging(Text(), wrap(self.pen.text(note, "dim"), console, width - 3), indent=3, label_width=0)
