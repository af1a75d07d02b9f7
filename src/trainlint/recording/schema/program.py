"""The program that was watched, its configuration, and what its source says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainlint.recording.schema.basics import Scalar, SourceLine, Value


@dataclass(frozen=True)
class Ending:
    """How the watched program ended.

    ``how`` is one of ``steps`` (the wanted number of optimizer steps was seen and the program was parked and ended),
    ``exit`` (it ended by itself), ``timeout``, ``backward-cap`` (many backwards and never an optimizer step),
    ``killed`` (by a signal from outside, e.g. out of memory), ``interrupted`` (Ctrl-C), ``not-started``.
    """

    how: str
    exit_code: int | None = None
    signal: str | None = None
    #: Exception type and text when the program died of one.
    error: str | None = None
    traceback: tuple[str, ...] = ()
    #: Where the program was when it was ended before it had made its steps.
    where: SourceLine | None = None
    last_output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """The program that was watched."""

    command: tuple[str, ...] = ()
    cwd: str = ""
    interpreter: str = ""
    python: str = ""
    torch: str | None = None
    #: Versions of training frameworks that the program imported (``lightning``, ``transformers``, ...).
    packages: Mapping[str, str] = field(default_factory=dict)
    platform: str = ""
    #: Device that holds the trained parameters (``cpu``, ``cuda:0``).
    device: str | None = None
    device_name: str | None = None
    device_memory_bytes: int | None = None
    world_size: int = 1
    rank: int = 0
    ranks_seen: int = 1
    #: Seconds from the start of the child to its first optimizer step.
    time_to_first_step_s: float | None = None
    #: ``default_dtype``, ``float32_matmul_precision``, ``deterministic`` ...
    flags: Mapping[str, Scalar] = field(default_factory=dict)
    #: Source files of the modules that the program had loaded (without the standard library).
    sources: tuple[str, ...] = ()
    steps_wanted: int = 3


# --------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class ConfigRead:
    """One place that read a key.

    ``how``: ``item`` (``cfg["lr"]``), ``attribute`` (``cfg.lr``), ``get``, ``contains``, or ``bulk``: the whole section
    was read at once (``**cfg``, ``items()``, ``asdict``, ``save_hyperparameters``, a YAML dump), which proves no use.
    """

    how: str
    at: SourceLine | None = None
    #: For a bulk read, what took the section (``**kwargs``, ``items``, ``to_container``, ``save_hyperparameters`` ...).
    by: str = ""
    #: For ``**``: it went into the program's own function, which hands it to no library.
    kept: bool = False


@dataclass(frozen=True)
class ConfigKey:
    """One leaf of the configuration.

    ``origin``: ``file``, ``override`` (given to trainlint or on the program's command line),
    ``default`` (the program's).
    ``reads`` is ``None`` when the object that holds the key was never seen in the watched process.
    """

    path: str
    value: Value
    type: str
    at: SourceLine | None = None
    origin: str = "file"
    reads: tuple[ConfigRead, ...] | None = None
    secret: bool = False
    #: The training setting that the key names, by its name and section (``learning_rate``, ``weight_decay``,
    #: ``warmup_ratio`` ...: see ``trainlint.config.meanings``); empty when it names none for certain.
    meaning: str = ""


@dataclass(frozen=True)
class MissingKey:
    """A key that the program looked for and did not find, and the default it used instead."""

    path: str
    default: Value = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class NameRead:
    """A source line of the program that could read a key of this name, whether it was run or not."""

    at: SourceLine
    #: The section that the expression names: ``training`` of ``cfg["training"]["lr"]``; empty when it names none.
    section: str = ""
    #: Lines of the conditions in its function that it stands under.
    conditions: tuple[int, ...] = ()


@dataclass(frozen=True)
class NameMention:
    """A place in the program's source (not the config) where a key's last name stands as a word."""

    name: str
    files: tuple[str, ...] = ()
    #: At least one of the places could read the key: the name in quotes, after a dot, or put together from pieces.
    access: bool = True
    #: At least one of the files is the program's own, not a library's.
    own: bool = True
    #: Where the program's own files could read a key of this name, by the syntax tree; ``None``: not looked up.
    reads: tuple[NameRead, ...] | None = None


@dataclass(frozen=True)
class ConfigFacts:
    """The configuration: every leaf key, where it stands, and, after a run, who read it."""

    #: Files (or ``command line``) that the keys come from, in the order they apply.
    files: tuple[str, ...] = ()
    #: ``yaml``, ``json``, ``toml``, ``hydra``, ``argparse``, ``dataclass``, ...
    kind: str = ""
    keys: tuple[ConfigKey, ...] = ()
    missing: tuple[MissingKey, ...] = ()
    #: How the live config object was recognised in the program; empty when it was not.
    tracked_by: str = ""
    #: Where the names of keys are mentioned in the loaded source; ``None`` when it was not looked up.
    mentions: tuple[NameMention, ...] | None = None


@dataclass(frozen=True)
class RateAssignment:
    """A source line that assigns a param group's ``lr`` by hand (``group["lr"] = ...``)."""

    at: SourceLine


@dataclass(frozen=True)
class SourceBlock:
    """A loop or a condition that calls stand under.

    ``kind``: ``for``, ``while``, ``if``, ``else``, ``unless`` (what follows a conditional ``continue``, ``break`` or
    ``return``), ``except``, ``accumulate`` (accelerate's context), ``step`` (one call of a hook by a trainer).
    """

    kind: str
    line: int
    #: The condition, or what a loop runs over, as it is written.
    text: str = ""
    #: The condition counts (``(i + 1) % n == 0``).
    counts: bool = False


@dataclass(frozen=True)
class SourceObject:
    """An object that the code makes or is given: an optimizer, a scheduler, a model, a part of one.

    ``kind``: ``optimizer``, ``scheduler``, ``module``, ``scaler``. Numbers are unique in one trace.
    """

    number: int
    kind: str
    class_name: str = ""
    #: As the code calls it (``self.optimizer``), for a part its name in the module that holds it.
    name: str = ""
    at: SourceLine | None = None
    #: An optimizer: modules whose parameters it was given; a scheduler: its optimizer; a part: the module it is in.
    of: tuple[int, ...] = ()
    #: It was seen being made; otherwise it is one by its name only.
    known: bool = True
    details: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceCall:
    """A call that matters to training.

    ``what``: ``built``, ``forward``, ``loss``, ``backward``, ``step``, ``zero_grad``, ``scheduler_step``, ``clip``,
    ``unscale``, ``scaler_step``, ``eval``, ``train``, ``replaced`` (a part of a module), ``grads`` (gradients read
    or written by hand), ``opaque`` (something that cannot be read got hold of the objects ``on``).
    """

    what: str
    at: SourceLine
    #: Objects that it is made on.
    on: tuple[int, ...] = ()
    #: Indices of the blocks that it stands under, outermost first. Of two calls, the one whose path begins the other's
    #: is always made when the other one is.
    path: tuple[int, ...] = ()
    details: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceTrace:
    """What a script, or a function that none of the read code calls, does in the order in which it does it.

    Calls of the project's own functions are followed into them.
    """

    entry: SourceLine
    blocks: tuple[SourceBlock, ...] = ()
    objects: tuple[SourceObject, ...] = ()
    calls: tuple[SourceCall, ...] = ()


@dataclass(frozen=True)
class SourceFacts:
    """What the program's own source says, read with the syntax tree and without importing it."""

    files: tuple[str, ...] = ()
    rate_assignments: tuple[RateAssignment, ...] = ()
    #: Lines that read a rate (``get_last_lr()``, ``group["lr"]`` on the right-hand side), which is how one is logged
    #: by hand; ``None`` when it was not looked up.
    rate_reads: tuple[SourceLine, ...] | None = None
    #: Lines that call a method or function named ``step``; ``None`` when it was not looked up.
    step_calls: tuple[SourceLine, ...] | None = None
    #: What the code does to models, optimizers and losses; ``None`` when it was not looked up.
    traces: tuple[SourceTrace, ...] | None = None
