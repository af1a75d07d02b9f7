"""Says how the program ended, and what its user can do about it."""

from __future__ import annotations

import json
import os
import re
import signal as signals
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainlint.launch.marks import Failure, Marks, Worker
from trainlint.launch.memory import MemoryWatch
from trainlint.recording.schema import Ending, SourceLine

#: Exit status of ``run_entry.py`` when the entry could not be called; beside it the reason in ``entry-error.json``.
ENTRY_ERROR = "entry-error.json"
OUTPUT_LINES = 40
#: What a shell or launcher makes of a child that a signal ended.
_SHELL_SIGNALS = frozenset(128 + n for n in (4, 6, 7, 8, 9, 11, 15))
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration)?)(?::\s*(.*))?$")
_USAGE = re.compile(r"^usage: |error: (?:unrecognized|the following) arguments|Error: No such option", re.MULTILINE)
_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_LIBRARY = re.compile(r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib(?:64)?[/\\]python3\.\d+[/\\]|^<")
_RECORDER = str(Path(__file__).resolve().parent.parent / "recorder") + os.sep


@dataclass(frozen=True)
class Outcome:
    """How the watch ended: ``steps``, ``backward-cap``, ``timeout``, ``interrupted``, or ``exited`` by itself."""

    how: str
    returncode: int | None = None
    #: The signal that interrupted trainlint.
    interrupted_by: str = ""
    where: SourceLine | None = None
    timeout_s: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What is known of the program when it is over."""

    run_dir: Path
    marks: Marks
    output: tuple[str, ...]
    memory: MemoryWatch
    interpreter: str | None
    redact: Callable[[str], str]


def describe(outcome: Outcome, seen: Evidence) -> tuple[Ending, str]:
    """The ending, and a hint for its user (empty when all went well)."""
    last = tuple(seen.output[-OUTPUT_LINES:])
    if outcome.how == "steps":
        # What became of the program at the end of its epoch says nothing about its steps: see Boundary.
        crossing = any(worker.boundary_at is not None for worker in seen.marks.workers.values())
        return Ending(how="steps", exit_code=None if crossing else outcome.returncode), ""
    if outcome.how == "interrupted":
        return Ending(
            how="interrupted", signal=outcome.interrupted_by or None, where=outcome.where, last_output=last
        ), ""
    if outcome.how == "backward-cap":
        return Ending(how="backward-cap", where=outcome.where, last_output=last), (
            "Gradients were computed again and again and no torch.optim optimizer stepped. Updates made by hand, by "
            "torch.func or by an optimizer that is no torch.optim.Optimizer are not seen; if the program accumulates "
            "more batches than that, raise the cap."
        )
    if outcome.how == "timeout":
        return Ending(how="timeout", where=outcome.where, last_output=last), _timeout_hint(outcome, seen.marks)
    return _exited(outcome, seen, last)


def _exited(outcome: Outcome, seen: Evidence, last: tuple[str, ...]) -> tuple[Ending, str]:
    entry = _entry_error(seen.run_dir)
    if entry is not None:
        text, lines = entry
        ending = Ending(
            how="not-started", exit_code=outcome.returncode, error=seen.redact(text),
            traceback=tuple(seen.redact(line) for line in lines), last_output=last,
        )  # fmt: skip
        return ending, _import_hint(text, seen.interpreter)
    code = outcome.returncode if outcome.returncode is not None else 0
    number = -code if code < 0 else code - 128 if code in _SHELL_SIGNALS else 0
    failure = _first_failure(seen.marks, code) or (from_output(seen.output) if code and not number else None)
    error = seen.redact(f"{failure.type}: {failure.text}".removesuffix(": ")) if failure is not None else None
    lines = tuple(seen.redact(line) for line in failure.traceback) if failure is not None else ()
    if number:
        name = _signal_name(number)
        ending = Ending(how="killed", exit_code=code, signal=name, error=error, traceback=lines, last_output=last)
        return ending, _signal_hint(number, name, seen)
    ending = Ending(how="exit", exit_code=code, error=error, traceback=lines, last_output=last)
    return ending, _exit_hint(code, failure, seen)


def _entry_error(run_dir: Path) -> tuple[str, tuple[str, ...]] | None:
    try:
        data = json.loads((run_dir / "scratch" / ENTRY_ERROR).read_text(encoding="utf-8"))
        return str(data["text"]), tuple(str(line) for line in data.get("traceback", ()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_failure(marks: Marks, code: int) -> Failure | None:
    """The exception that came first: what other ranks and launchers raise afterwards only follows from it."""
    failures = sorted(marks.failures, key=lambda f: f.time)
    if code == 0:  # a helper process may fail without harm; the one that trains may not
        failures = [f for f in failures if (w := marks.workers.get(f.pid)) is not None and w.torch]
    return failures[0] if failures else None


def from_output(lines: Sequence[str]) -> Failure | None:
    """The last traceback that stands in the program's output."""
    starts = [i for i, line in enumerate(lines) if line.strip().startswith("Traceback (most recent call last)")]
    if not starts:
        return None
    # "During handling ..." and "The above exception ..." chain several: the last is what ended the program.
    start = starts[-1]
    for end in range(start + 1, len(lines)):
        line = lines[end].strip()
        match = _EXCEPTION.match(line)
        if match and not lines[end].startswith((" ", "\t")):
            return Failure(0, 0.0, line.partition(":")[0], (match[2] or "").strip(), tuple(lines[start : end + 1]))
    return None


# ------------------------------------------------------------------------------------------------ hints


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _signal_hint(number: int, name: str, seen: Evidence) -> str:
    held = seen.memory.held()
    if number == signals.SIGKILL:
        if seen.memory.oom_killed():
            return (
                f"The kernel killed it for lack of memory{f' ({held})' if held else ''}. Make batch or model smaller."
            )
        return (
            f"SIGKILL comes from outside, mostly from the kernel or the job scheduler for lack of memory"
            f"{f' ({held})' if held else ''}."
        )
    if number in (signals.SIGSEGV, signals.SIGBUS, signals.SIGILL, signals.SIGFPE, signals.SIGABRT):
        return (
            f"It crashed in native code ({name}). Run it without trainlint, with PYTHONFAULTHANDLER=1: if it crashes "
            "there too, that shows the line; if it does not, please report it."
        )
    return ""


def _exit_hint(code: int, failure: Failure | None, seen: Evidence) -> str:
    marks = seen.marks
    if failure is not None:
        hint = _import_hint(f"{failure.type}: {failure.text}", seen.interpreter)
        if hint:
            return hint
        kind = failure.type.rpartition(".")[2]
        if kind in ("MemoryError", "OutOfMemoryError") or "out of memory" in failure.text.lower():
            return "It ran out of memory before the watch was complete. Make the batch or the model smaller."
        return ""
    if marks.most_steps:
        return ""
    if not any(worker.armed for worker in marks.workers.values()):
        return (
            "No Python process of the program loaded trainlint's recorder. It cannot enter python -I, -E or -S, a "
            "command that replaces PYTHONPATH (extend it: PYTHONPATH=src:$PYTHONPATH), containers and remote machines: "
            "run trainlint inside them, or give the Python command itself behind --."
        )
    last_words = "\n".join(seen.output[-10:])
    if code == 2 and _USAGE.search(last_words):
        return "It did not accept its arguments; correct the command behind --."
    trained = any(worker.torch for worker in marks.workers.values())
    if _left_abruptly(marks.workers.values()):
        return f"It left by os._exit({code}) or was ended by another process, before any optimizer step."
    if code == 0:
        if not trained:
            return "It ended before it imported torch. Is this the command that trains?"
        return "It ended by itself before any optimizer step. Does this command train, and is there data to train on?"
    return ""


def _left_abruptly(workers: Iterable[Worker]) -> bool:
    """Whether the processes that used torch all ended without Python's own exit."""
    main = [worker for worker in workers if worker.armed and worker.torch]
    return bool(main) and all(not worker.finished for worker in main)


def _import_hint(text: str, interpreter: str | None) -> str:
    match = re.search(r"No module named '?([\w.]+)'?", text)
    if match is None:
        return ""
    who = interpreter or "The program's Python"
    return (
        f"{who} has no module {match[1]}. Is it the right environment? `--python /path/to/venv/bin/python` chooses one."
    )


def _timeout_hint(outcome: Outcome, marks: Marks) -> str:
    waited = f"{outcome.timeout_s:g} s"
    more = f"If it needs longer, raise --timeout (now {outcome.timeout_s:g} seconds)."
    if marks.most_steps:
        return f"It made {marks.most_steps} optimizer steps and no further one within {waited}. {more}"
    if marks.seen_backward:
        return (
            f"Gradients were computed, and no torch.optim optimizer stepped within {waited}. Updates made by hand are "
            f"not seen. {more}"
        )
    if marks.seen_torch:
        return f"torch was imported, and no backward came within {waited}. {more}"
    if any(worker.armed for worker in marks.workers.values()):
        return f"The program did not import torch within {waited}. Is this the command that trains? {more}"
    return (
        f"No Python process of the program loaded trainlint's recorder within {waited}. It cannot enter python -I, -E "
        "or -S, a command that replaces PYTHONPATH (extend it: PYTHONPATH=src:$PYTHONPATH), containers and remote "
        "machines: run trainlint inside them."
    )


# ------------------------------------------------------------------------------------------------ where it was


def where_from_dump(text: str) -> SourceLine | None:
    """The user's innermost line in a dump of all threads by faulthandler; the innermost of any when there is none."""
    blocks: list[list[SourceLine]] = []
    current = 0
    for line in text.splitlines():
        if line.startswith(("Current thread", "Thread ", "Stack (most recent call first)")):
            if line.startswith("Current thread"):
                current = len(blocks)
            blocks.append([])
        elif blocks and (match := _FRAME.match(line)):
            if not match["file"].startswith(_RECORDER):
                blocks[-1].append(SourceLine(match["file"], int(match["line"]), match["function"]))
    if not blocks:
        return None
    # The thread that took the signal is nearly always the main one, which faulthandler lists last otherwise.
    ordered = [blocks[current], *reversed(blocks)]
    for frames in ordered:
        for frame in frames:
            if not _LIBRARY.search(frame.file):
                return frame
    return next((frames[0] for frames in ordered if frames), None)
