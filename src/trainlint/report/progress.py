"""What stands on the screen while the program starts and makes its first steps. Gone when it has."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trainlint.report.terminal import Pen, strip_escapes

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_SPINNER_ASCII = "|/-\\"
#: Cells of the bar of an experiment; where lines are printed one by one, every how many steps there is one.
_BAR = 20
_TENTHS = 10


class Progress:
    """Shows phase, elapsed time, steps made, and the program's last line of output, on stderr.

    On a terminal one display is redrawn in place and removed at the end. Elsewhere (a CI log) each phase and each step
    is one line. With ``verbose`` the program's output is passed on as it is; with ``quiet`` nothing but warnings shows.

    Use as a context manager. The methods may be called from several threads.
    """

    def __init__(self, console: Console, *, verbose: bool = False, quiet: bool = False) -> None:
        self.console = console
        self.verbose = verbose
        self.quiet = quiet
        self.started = time.monotonic()
        self._pen = Pen(console)
        self._phase = ""
        self._made = 0
        self._wanted = 0
        self._last_line = ""
        #: The experiment that is being made; empty while the program is watched.
        self._title = ""
        self._live: _Live | None = None

    # ------------------------------------------------------------------------------------ what the supervisor calls

    def phase(self, text: str) -> None:
        """The program has come to another part: ``starting``, ``importing torch``, ``first backward`` ..."""
        changed, self._phase = text != self._phase, text
        if changed:
            self._tell(text)

    def step(self, optimizer: int, index: int, wanted: int) -> None:
        """Optimizer step ``index`` (0-based) of ``wanted`` was made; several optimizers count by the furthest."""
        made, self._wanted = max(self._made, index + 1), wanted
        changed, self._made = made != self._made, made
        few = not self._title or made % max(1, wanted // _TENTHS) == 0
        if changed and few:
            self._tell(f"optimizer step {made} of {wanted}")

    def experiment(self, title: str) -> None:
        """An experiment begins: the program is started once more, and its steps are counted anew."""
        self._title, self._phase, self._made, self._wanted, self._last_line = title, "", 0, 0, ""
        self._tell(f"experiment {title}")

    def note(self, text: str) -> None:
        """Something to know before it takes its time; stays on the screen."""
        if not self.quiet:
            self.console.print(Text("trainlint: ", style="dim") + Text(self._pen.block(text)), soft_wrap=True)

    def output(self, line: str) -> None:
        """A line of the program's own output."""
        line = line.rstrip("\r\n")
        if self.verbose:
            self.console.print(Text(self._pen.block(line)), soft_wrap=True)
        elif line.strip():
            self._last_line = line

    def warn(self, text: str) -> None:
        """Something the person must know now; stays on the screen."""
        self.console.print(Text("trainlint: ", style="bold yellow") + Text(self._pen.block(text)), soft_wrap=True)

    # ------------------------------------------------------------------------------------ display

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            self._live = _Live(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the display."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _tell(self, text: str) -> None:
        if self.quiet or self._live is not None:
            return
        line = Text(f"trainlint: {self._pen.line(text)} ({_elapsed(time.monotonic() - self.started)})", style="dim")
        self.console.print(line, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        elapsed = time.monotonic() - self.started
        signs = _SPINNER if self._pen.unicode else _SPINNER_ASCII
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(signs[int(elapsed * 10) % len(signs)] + " ", style="cyan")
        if self._title:
            head.append(self._pen.line(self._title) + "  ", style="bold")
        head.append(self._pen.line(self._phase) or "starting")
        if self._title and self._wanted:
            full = min(_BAR, self._made * _BAR // self._wanted)
            done, left = ("━", "─") if self._pen.unicode else ("#", "-")
            head.append(f"  {done * full}{left * (_BAR - full)}", style="cyan")
        if self._wanted and self._made:
            head.append(f"  optimizer step {self._made} of {self._wanted}", style="bold")
        head.append(f"  {_elapsed(elapsed)}", style="dim")
        head.truncate(width, overflow="ellipsis" if self._pen.unicode else "crop")
        yield head
        if self._last_line:
            last = Text("  " + self._pen.line(strip_escapes(self._last_line)), style="dim")
            last.truncate(width, overflow="ellipsis" if self._pen.unicode else "crop")
            yield last


class _Live:
    """rich's Live, imported when a display is really needed."""

    def __init__(self, progress: Progress) -> None:
        from rich.live import Live

        self.live = Live(
            get_renderable=lambda: progress,
            console=progress.console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start(refresh=True)

    def stop(self) -> None:
        self.live.stop()


def _elapsed(seconds: float) -> str:
    """``4.2 s``, ``1 min 05 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s"
