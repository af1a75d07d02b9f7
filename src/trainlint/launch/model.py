"""What the parts of launching pass to each other: the program to start, how to watch it, what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Union

from trainlint.launch.secrets import masked_command
from trainlint.recording.schema import Ending, SourceLine

#: Stands for the path of the config in a command.
CONFIG = "{config}"

#: ``DEFAULT_TIMEOUT_S`` until the first optimizer step and as long again from there to the last: long enough for a
#: large model to load and a dataset to be tokenised, short enough for a CI job to end by itself.
DEFAULT_TIMEOUT_S = 600.0


class LaunchError(Exception):
    """The program cannot be started as asked: exit status 2.

    ``message`` says what is wrong, ``hint`` what to do about it; both are sentences for a person, without secrets.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class AmbiguousLaunch(LaunchError):
    """Several programs could read this config; ``candidates`` are the commands, ready to be pasted behind ``--``."""

    def __init__(self, message: str, candidates: tuple[str, ...], hint: str) -> None:
        super().__init__(message, hint)
        self.candidates = candidates


@dataclass(frozen=True)
class GeneratedFile:
    """A file that must be written before the program starts; ``placeholder`` in the command becomes its path."""

    placeholder: str
    name: str
    text: str = field(repr=False)
    #: Preferred folder (so that relative includes of a config still work); the run folder when it cannot be written.
    beside: Path | None = None


@dataclass(frozen=True)
class Launch:
    """A program to start.

    ``template`` may hold placeholders (``{config}``) for files that are written just before the start;
    ``command`` is the same with the paths as the user knows them, for people to read.
    """

    #: 1 command line, 2 entry function, 3 command in pyproject.toml, 4 Hydra run folder, 5 found in the repository.
    route: int
    #: One sentence: which route, and why it was taken.
    why: str
    command: tuple[str, ...]
    cwd: Path
    #: Environment variables to add; names that end in ``PATH`` are put before what is there already.
    env: Mapping[str, str] = field(default_factory=dict)
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    #: How the overrides reach the program: ``copy`` of the config, ``arguments``, or empty.
    overrides_by: str = ""
    #: The command was guessed: show it and ask, or take it with ``--yes``.
    needs_confirmation: bool = False
    #: The Python that will probably run the program; ``None`` when the command does not say.
    interpreter: str | None = None
    template: tuple[str, ...] = ()
    files: tuple[GeneratedFile, ...] = ()
    notes: tuple[str, ...] = ()
    #: What to call it where the command says nothing to people (an entry function).
    title: str = ""

    @property
    def shown(self) -> str:
        """For people: the title, or the command as one line of shell, secrets masked."""
        return self.title or masked_command(self.command)


@dataclass(frozen=True)
class NoLaunch:
    """Route 6: nothing says which program reads this config. ``add`` is the line to add or the command to type."""

    reason: str
    add: str


Found = Union[Launch, NoLaunch]


@dataclass(frozen=True)
class WatchOptions:
    """How to watch.

    ``timeout_s``: seconds until the first optimizer step, and again from there to the last wanted one.
    ``device``: ``auto``, or ``cpu`` to hide all GPUs from the program.
    ``backward_cap``: backwards without any optimizer step after which the program is stopped.
    """

    steps: int = 3
    timeout_s: float = DEFAULT_TIMEOUT_S
    device: str = "auto"
    python: str | None = None
    backward_cap: int = 200
    #: After the steps, have the training data run dry and watch the end of the epoch and the first steps of the next.
    boundary: bool = True
    #: Not an ordinary watch: an experiment, as JSON for the recorder.
    experiment: str = field(default="", repr=False)
    #: Further config files whose reading is tracked.
    configs: tuple[Path, ...] = ()
    #: Values that must not appear in what is kept of the program's output.
    secrets: tuple[str, ...] = field(default=(), repr=False)


class Progress(Protocol):
    """What the supervisor tells while it works; ``output`` is called from a reader thread."""

    def phase(self, text: str) -> None:
        """A new stage: ``starting``, ``torch is imported``, ``first backward``, ``stopping the program``."""

    def output(self, line: str) -> None:
        """One line of the program's output, without terminal escapes and with secrets masked."""

    def step(self, optimizer: int, index: int, wanted: int) -> None:
        """An optimizer made its ``index``-th step (0-based)."""

    def warn(self, text: str) -> None:
        """Something the user should know now."""


@dataclass(frozen=True)
class Watched:
    """What came of a watch; the observations themselves are in ``run_dir/stream``."""

    ending: Ending
    run_dir: Path
    #: The command as it was started, generated files included.
    command: tuple[str, ...]
    cwd: Path
    interpreter: str | None
    #: Unix time of the start, and how long the program ran.
    started: float
    duration_s: float
    #: Seconds to the first optimizer step, ``None`` when there was none.
    first_step_s: float | None = None
    #: Most steps that one optimizer of one process made.
    steps: int = 0
    #: Processes that made backwards or steps.
    ranks: int = 0
    #: What to do about an ending that is not ``steps``; empty when there is nothing to say.
    hint: str = ""
    notes: tuple[str, ...] = ()
    #: Config files whose reading was tracked (the resolved copy first, when overrides made one).
    configs: tuple[Path, ...] = ()
    #: Exit status of a program that ended by itself, whatever it had been watched for.
    returncode: int | None = None
    #: Where a program was that had to be ended before it parked.
    stopped_at: SourceLine | None = None
    #: Takes secrets out of a text that the program wrote.
    redact: Callable[[str], str] = field(default=str, repr=False)
