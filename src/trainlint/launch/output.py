"""What the program prints: kept in a file of bounded size, its last lines in memory, and passed on line by line."""

from __future__ import annotations

import codecs
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

#: The beginning that is kept in ``output.log``; after it only the tail is.
HEAD_BYTES = 4_000_000
TAIL_LINES = 400
#: Longer lines are cut in what is shown.
LINE_CHARACTERS = 2000

_ESCAPE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # operating system command: window title, links
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # device control and other strings
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BREAK = re.compile(r"\r\n|\n|\r")


def plain(text: str) -> str:
    """One line without terminal escapes and control characters, tabs as blanks, cut when it is very long."""
    if "\x1b" in text or "\x9b" in text:
        text = _ESCAPE.sub("", text)
    if "\b" in text:  # a progress bar of backspaces
        kept: list[str] = []
        for character in text:
            if character != "\b":
                kept.append(character)
            elif kept:
                kept.pop()
        text = "".join(kept)
    text = _CONTROL.sub("", text.expandtabs(4)).rstrip()
    return text if len(text) <= LINE_CHARACTERS else text[: LINE_CHARACTERS - 1] + "…"


class Output:
    """Reads a pipe in a thread until it is closed.

    Args:
        fd: read end of the pipe; closed by this object.
        path: ``output.log``.
        show: called with each finished line (plain text); its exceptions are dropped.
        redact: takes secrets out of a line.
    """

    def __init__(self, fd: int, path: Path, show: Callable[[str], None], redact: Callable[[str], str]) -> None:
        self._fd = fd
        self._path = path
        self._show = show
        self._redact = redact
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = ""
        self._lock = threading.Lock()
        self.bytes_read = 0
        self._thread = threading.Thread(target=self._read, name="trainlint-output", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_s: float = 2.0) -> None:
        """Wait for the end of the output. A process that outlived the run may hold the pipe open: not for long."""
        self._thread.join(timeout_s)

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines printed, oldest first, without empty lines at the ends."""
        with self._lock:
            lines = list(self._tail)
            if self._partial.strip():
                lines.append(self._redact(plain(self._partial)))
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return tuple(lines)

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            with open(self._path, "w", encoding="utf-8", errors="replace") as log:
                while True:
                    try:
                        data = os.read(self._fd, 1 << 16)
                    except OSError:
                        break
                    if not data:
                        break
                    self.bytes_read += len(data)
                    self._take(decoder.decode(data), log.write)
                    log.flush()
                rest = decoder.decode(b"", True)
                if rest or self._partial:
                    self._take(rest + "\n", log.write)
                if self.bytes_read > HEAD_BYTES:
                    log.write("\n".join(("[...]", *self.last_lines)) + "\n")
        except OSError:
            # No space for the log: the program must not block on a full pipe because of it.
            while True:
                try:
                    if not os.read(self._fd, 1 << 16):
                        break
                except OSError:
                    break
        finally:
            os.close(self._fd)

    def _take(self, text: str, write: Callable[[str], object]) -> None:
        *lines, rest = _BREAK.split(self._partial + text)
        if len(rest) > 1 << 20:  # megabytes without a line break
            lines.append(rest)
            rest = ""
        shown: list[str] = []
        for line in lines:
            cleaned = self._redact(plain(line))
            shown.append(cleaned)
            if self.bytes_read <= HEAD_BYTES:
                write(cleaned + "\n")
        with self._lock:
            self._partial = rest
            self._tail.extend(shown)
        # Nobody reads ten thousand lines a second; the tail is kept anyway.
        for line in shown[-50:]:
            try:
                self._show(line)
            except Exception:
                pass
