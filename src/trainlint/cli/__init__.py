"""The command line: thin commands over the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main() -> None:
    """Entry point of ``trainlint`` and ``python -m trainlint``: exits with 0, 1 or 2."""
    sys.exit(execute(sys.argv[1:]))


def execute(argv: Sequence[str]) -> int:
    """Run a command line and return its exit status: 0 nothing found, 1 findings, 2 the job could not be done."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character must not end the report.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    from trainlint.cli.failure import Failure

    try:
        from trainlint.cli.app import dispatch

        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except Failure as failure:
        say(failure.message, failure.hint)
    except KeyboardInterrupt:
        say("interrupted.")
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; the interpreter must not complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("TRAINLINT_DEBUG"):
            raise
        say(
            f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}",
            "This is a fault of trainlint, not of your program. Run again with TRAINLINT_DEBUG=1 for the traceback and "
            "report it with that.",
        )
    return 2


def say(message: str, hint: str = "") -> None:
    """One line on stderr, and one below it that says what to do."""
    from trainlint.report.terminal import strip_escapes

    for text in (f"trainlint: {message}", f"  {hint}" if hint else ""):
        if text:
            print(strip_escapes(text), file=sys.stderr)
