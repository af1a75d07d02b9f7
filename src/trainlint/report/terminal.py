"""What a terminal can show: glyphs it has, and text that cannot talk to it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

#: Terminal escape sequences: CSI (colour, cursor), OSC (title, hyperlinks), DCS/PM/APC/SOS strings, two-byte ones.
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
#: Control characters, and the marks that reorder or hide what is shown (bidi overrides, zero-width).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

_ASCII = str.maketrans(
    {
        "≠": "!=",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "×": "x",
        "→": "->",
        "·": "-",
        "•": "*",
        "…": "...",
        "–": "-",
        "—": "-",
        "−": "-",
        "√": "sqrt",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "│": "|",
        "─": "-",
        "\u00a0": " ",
    }
)


@dataclass(frozen=True)
class Glyphs:
    """The few signs a report draws with; each also reads without colour."""

    error: str = "✗"
    warning: str = "▲"
    info: str = "•"
    agrees: str = "="
    differs: str = "≠"
    dot: str = "·"
    ellipsis: str = "…"
    rule: str = "─"
    gutter: str = "│"
    arrow: str = "→"
    braille: bool = True

    def of(self, severity: str) -> str:
        return {"error": self.error, "warning": self.warning}.get(severity, self.info)


ASCII = Glyphs(
    error="x",
    warning="!",
    info="*",
    agrees="=",
    differs="!=",
    dot="-",
    ellipsis="...",
    rule="-",
    gutter="|",
    arrow="->",
    braille=False,
)

SEVERITY_STYLE = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}


def strip_escapes(text: str) -> str:
    """``text`` without escape sequences and control characters; newlines stay, tabs become blanks.

    A line that a progress bar redrew with carriage returns keeps only what was drawn last.
    """
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    if "\r" in text:
        text = "\n".join(_last_drawn(line) for line in text.split("\n"))
    return _CONTROLS.sub("", text.expandtabs(4))


def _last_drawn(line: str) -> str:
    drawn = [part for part in line.split("\r") if part.strip()]
    return drawn[-1] if drawn else ""


class Pen:
    """Turns strings of any origin into rich Text for one console.

    Text is never read as markup, carries no escape sequence of its own, and holds no character that the console's
    encoding lacks (a strict ASCII stream would raise in the middle of the report).
    """

    def __init__(self, console: Console) -> None:
        self.encoding = (console.encoding or "utf-8").lower()
        self.unicode = self.encoding.replace("-", "").startswith("utf")
        self.glyphs = Glyphs() if self.unicode else ASCII

    def block(self, text: object) -> str:
        """Cleaned text that may hold several lines."""
        clean = strip_escapes(str(text))
        if self.unicode:
            # Lone surrogates (undecodable bytes in a path) cannot be written either.
            return clean.encode("utf-8", "backslashreplace").decode("utf-8")
        return clean.translate(_ASCII).encode(self.encoding, "backslashreplace").decode(self.encoding, "replace")

    def line(self, text: object) -> str:
        """Cleaned text on one line."""
        return " ".join(self.block(text).split())

    def text(self, text: object, style: str = "") -> Text:
        return Text(self.line(text), style=style)

    def paragraphs(self, text: object) -> list[str]:
        """The lines of a message, unwrapped: newlines that only wrapped the source are joined, lists are kept."""
        out: list[str] = []
        for raw in self.block(text).split("\n"):
            bare = raw.strip()
            starts_item = bare.startswith(("- ", "* ", "> ", "1.", "2.", "3."))
            indented = raw.startswith("    ")
            if not bare:
                out.append("")
            elif out and out[-1] and not starts_item and not indented and not out[-1].startswith("    "):
                out[-1] += " " + bare
            else:
                out.append(raw.rstrip() if indented else bare)
        while out and not out[-1]:
            out.pop()
        return out


def short_number(value: float, digits: int) -> str:
    """``3e-5``, ``0.0981``, ``12000``: so many significant digits, no padding in the exponent."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    mantissa, mark, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa


def wrap(text: Text, console: Console, width: int) -> list[Text]:
    """Lines of at most ``width`` columns, broken at blanks only; a longer word (a path) is folded at the edge."""
    rows = list(text.wrap(console, max(8, width), tab_size=4))
    for row in rows:
        row.rstrip()
    return rows


def shorten_path(path: str, width: int, ellipsis: str) -> str:
    """The end of a path that is longer than ``width``, cut at a separator: ``…/models/transition.py``."""
    if len(path) <= width:
        return path
    parts = path.split("/")
    tail = parts[-1]
    for part in reversed(parts[:-1]):
        if len(ellipsis) + 1 + len(part) + 1 + len(tail) > width:
            break
        tail = f"{part}/{tail}"
    return f"{ellipsis}/{tail}"


def packed(words: Iterable[str], separator: str, width: int) -> list[Text]:
    """Phrases joined by ``separator``, with line breaks between phrases rather than inside them."""
    rows: list[str] = []
    for word in words:
        if rows and len(rows[-1]) + len(separator) + len(word) <= width:
            rows[-1] += separator + word
        else:
            rows.append(word)
    return [Text(row) for row in rows]


def hanging(
    label: Text, lines: Iterable[Text], *, indent: int, label_width: int, limit: int | None = None, more: str = ""
) -> list[Text]:
    """Lines under a label: the label stands before the first, the others are indented as far."""
    out: list[Text] = []
    all_lines = list(lines)
    if limit is not None and len(all_lines) > limit:
        all_lines = [*all_lines[:limit], Text(more, style="dim")]
    for number, line in enumerate(all_lines):
        row = Text(" " * indent)
        if number == 0:
            row.append_text(label)
            row.append(" " * max(1 if label.cell_len else 0, label_width - label.cell_len))
        else:
            row.append(" " * label_width)
        row.append_text(line)
        row.rstrip()
        out.append(row)
    return out
