"""The learning-rate curve, drawn with characters over the whole planned run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainlint.report.model import Curve
from trainlint.report.terminal import Pen, hanging, short_number, wrap

ROWS = 7
MAX_COLUMNS = 110
#: Letters that name the curves where colour does not; and their colours where it does.
LETTERS = "ABCDEFGHJK"
COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
#: More curves than this are not drawn: nobody can tell them apart.
MAX_CURVES = 6

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def rate_text(rate: float) -> str:
    """A learning rate as people write it: ``3e-5``, ``0.001``, ``0``."""
    return short_number(rate, 3)


class CurvePlot:
    """Curves of one run: projected and configured as lines, observed as points.

    Drawn in braille where the terminal has it, else in plain characters. Curves that share a label belong together and
    share letter and colour; a letter at the right edge names each line, so that no colour is needed.
    """

    def __init__(self, curves: Sequence[Curve], pen: Pen) -> None:
        self.pen = pen
        self.hidden = 0
        labels: list[str] = []
        for curve in curves:
            if curve.label not in labels:
                labels.append(curve.label)
        self.hidden = max(0, len(labels) - MAX_CURVES)
        self.labels = labels[:MAX_CURVES]
        self.curves = [
            (curve, [(s, r) for s, r in curve.points if math.isfinite(r)])
            for curve in curves
            if curve.label in self.labels
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(min(options.max_width, MAX_COLUMNS), console)

    def lines(self, width: int, console: Console) -> Iterator[Text]:
        points = [p for _, ps in self.curves for p in ps]
        if not points:
            return
        low = min(0.0, min(r for _, r in points))
        high = max(r for _, r in points)
        last = max(1, max(s for s, _ in points))
        ticks = {0: high, ROWS // 2: (high + low) / 2, ROWS - 1: low}
        if high <= low:  # all rates are 0, or the same negative number: one level, at the bottom
            ticks = {ROWS - 1: low}
            high = low + 1.0
        margin = max(len(rate_text(v)) for v in ticks.values()) + 3
        several = len(self.labels) > 1
        columns = max(16, width - margin - (len(self.labels) if several else 0))
        scale = _Scale(columns, ROWS, last, low, high)

        glyphs, styles = self._canvas(scale)
        ends = self._ends(scale) if several else {}
        for row in range(ROWS):
            line = Text(" ")
            line.append(rate_text(ticks[row]).rjust(margin - 3) if row in ticks else " " * (margin - 3), style="dim")
            edge = ("┤" if row in ticks else "│") if self.pen.unicode else "|"
            line.append(f" {edge}", style="dim")
            for glyph, style in zip(glyphs[row], styles[row]):
                line.append(glyph, style=style)
            for letter, style in ends.get(row, ()):
                line.append(letter, style=style)
            line.rstrip()
            yield line
        yield self._x_axis(margin, columns, last)
        yield from self._legend(width, console)

    def _style(self, curve: Curve) -> str:
        return COLOURS[self.labels.index(curve.label) % len(COLOURS)]

    def _letter(self, curve: Curve) -> str:
        return LETTERS[self.labels.index(curve.label)]

    def _canvas(self, scale: _Scale) -> tuple[list[list[str]], list[list[str]]]:
        cells = [[" "] * scale.columns for _ in range(scale.rows)]
        styles = [[""] * scale.columns for _ in range(scale.rows)]
        bits = [[0] * scale.columns for _ in range(scale.rows)]
        several = len(self.labels) > 1
        order = {"configured": 0, "projected": 1}
        for curve, points in sorted(self.curves, key=lambda c: order.get(c[0].kind, 2)):
            if curve.kind == "observed" or not points:
                continue
            dotted = curve.kind == "configured"
            for x, y in scale.path(points, braille=self.pen.unicode):
                if self.pen.unicode:
                    if dotted and (x // 2) % 2:
                        continue
                    row, column = y // 4, x // 2
                    bits[row][column] |= _DOTS[y % 4][x % 2]
                    cells[row][column] = chr(0x2800 + bits[row][column])
                else:
                    if dotted and x % 2:
                        continue
                    row, column = y, x
                    cells[row][column] = "." if dotted else (self._letter(curve).lower() if several else "*")
                styles[row][column] = ("dim " if dotted else "") + self._style(curve)
        mark = "●" if self.pen.unicode else "o"
        for curve, points in self.curves:
            if curve.kind == "observed":
                for step, rate in points:
                    column, row = scale.cell(step, rate)
                    cells[row][column] = mark
                    styles[row][column] = "bold " + self._style(curve)
        return cells, styles

    def _ends(self, scale: _Scale) -> dict[int, list[tuple[str, str]]]:
        """Letters at the right edge, on the row where each curve ends."""
        ends: dict[int, list[tuple[str, str]]] = {}
        seen: set[str] = set()
        for curve, points in self.curves:
            if curve.kind == "projected" and points and curve.label not in seen:
                seen.add(curve.label)
                ends.setdefault(scale.cell(*points[-1])[1], []).append((self._letter(curve), self._style(curve)))
        return ends

    def _x_axis(self, margin: int, columns: int, last: int) -> Text:
        """The axis with the first, middle and last optimizer step written at their places."""
        rule, corner = ("─", "└") if self.pen.unicode else ("-", "+")
        axis = list(rule * columns)
        labels = [(0, "0 "), (columns, f" {last:,}")]
        middle = f" {last // 2:,} "
        if last % 2 == 0 or last > 200:
            labels.append(((columns + len(middle)) // 2, middle))
        for end, label in labels:
            start = max(0, end - len(label))
            if all(sign == rule for sign in axis[start : start + len(label)]):
                axis[start : start + len(label)] = label
        return Text(" " * (margin - 1) + corner + "".join(axis), style="dim")

    def _legend(self, width: int, console: Console) -> Iterator[Text]:
        """A row for each label and kind of line; observed points have one only where nothing else tells their rate."""
        several = len(self.labels) > 1
        signs = {"observed": "●", "configured": "┄"} if self.pen.unicode else {"observed": "o", "configured": "."}
        line_sign = "─" if self.pen.unicode else "*"
        notes = {c.note for c, _ in self.curves if c.kind == "projected"}
        #: Said once when it holds for every curve.
        common = notes.pop() if several and len(notes) == 1 else ""
        for label in self.labels:
            mine = [(c, p) for c, p in self.curves if c.label == label]
            kinds = {c.kind for c, _ in mine}
            for curve, points in mine:
                if "projected" in kinds and curve.kind == "observed":
                    continue
                head = Text("   ")
                if several:
                    head.append(self._letter(curve) + " ", style="bold " + self._style(curve))
                sign = signs.get(curve.kind, line_sign)
                if curve.kind == "projected" and "observed" in kinds:
                    sign = signs["observed"] + sign
                head.append(f"{sign:<2}", style=self._style(curve))
                indent = head.cell_len + 1
                body = Text(f"{self.pen.line(label)}, {self.pen.line(curve.kind)}: ", style="dim")
                body.append(self.pen.line(_summary(points)), style="not dim")
                if curve.note and not (common and curve.note == common):
                    body.append(f" ({self.pen.line(curve.note)})", style="not dim")
                yield from hanging(head, wrap(body, console, width - indent), indent=0, label_width=indent)
        if self.hidden:
            yield Text(f"   and {self.hidden} more, not drawn", style="dim")
        if common:
            yield from hanging(Text(), wrap(self.pen.text(common, "dim"), console, width - 3), indent=3, label_width=0)


def _summary(points: Sequence[tuple[int, float]]) -> str:
    """``0 → 3e-05 at step 500 → 3e-06``: start, highest, end; a constant says so."""
    if not points:
        return "nothing finite"
    rates = [r for _, r in points]
    first, last = rates[0], rates[-1]
    peak_step, peak = max(points, key=lambda p: p[1])
    if math.isclose(min(rates), max(rates), rel_tol=1e-9, abs_tol=0.0):
        return f"constant at {rate_text(first)}" if len(points) > 1 else rate_text(first)
    parts = [rate_text(first)]
    if peak > max(first, last) * (1 + 1e-6):
        parts.append(f"{rate_text(peak)} at step {peak_step:,}")
    parts.append(rate_text(last))
    return " → ".join(parts)


class _Scale:
    """From (step, rate) to cells, or to braille dots (2 × 4 of them in a cell)."""

    def __init__(self, columns: int, rows: int, last: int, low: float, high: float) -> None:
        self.columns, self.rows, self.last, self.low, self.high = columns, rows, last, low, high

    def cell(self, step: int, rate: float) -> tuple[int, int]:
        return self._x(step, self.columns), self._y(rate, self.rows)

    def _x(self, step: float, size: int) -> int:
        return min(size - 1, max(0, round(step / self.last * (size - 1))))

    def _y(self, rate: float, size: int) -> int:
        share = (rate - self.low) / (self.high - self.low)
        return min(size - 1, max(0, round((1 - share) * (size - 1))))

    def path(self, points: Sequence[tuple[int, float]], *, braille: bool) -> Iterator[tuple[int, int]]:
        """Dots of the line through the points, segment by segment, so that a jump or a fast swing is not lost."""
        wide, high = (self.columns * 2, self.rows * 4) if braille else (self.columns, self.rows)
        at = [(self._x(step, wide), self._y(rate, high)) for step, rate in points]
        yield at[0]
        for (x0, y0), (x1, y1) in pairwise(at):
            length = max(abs(x1 - x0), abs(y1 - y0))
            for i in range(1, length + 1):
                yield x0 + round((x1 - x0) * i / length), y0 + round((y1 - y0) * i / length)
