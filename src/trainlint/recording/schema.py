"""What was seen of one training run: plain, frozen data.

A :class:`Recording` is the only thing that passes from watching to judging. It is written as JSON
(:mod:`trainlint.recording.codec`), can be saved, diffed and attached to a bug report, and needs no torch to read.

Conventions that hold for every class here:

- identifiers (``Parameter.id``, ``Optimizer.id`` ...) are small integers given by the recorder, unique in one process;
- ``seq`` orders events of one process: a larger number happened later;
- ``None`` means *not measured*, never zero;
- numbers carry their unit in the name (``_s``, ``_bytes``), counts and ratios have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Union

SCHEMA = "trainlint.recording/1"

Scalar = Union[None, bool, int, float, str]
#: A hyperparameter or setting: a scalar or a flat list of scalars (``betas``).
Value = Union[None, bool, int, float, str, tuple[Scalar, ...]]


@dataclass(frozen=True)
class SourceLine:
    """A place in the user's source: absolute file, 1-based line, the function it is in."""

    file: str
    line: int
    function: str = ""


# --------------------------------------------------------------------------------------------- program


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


# --------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Submodule:
    name: str
    class_name: str
    training: bool


@dataclass(frozen=True)
class ModeSensitive:
    """A module that does something else in eval mode.

    ``effect``: ``dropout`` (it drops with probability ``p`` > 0), or ``norm`` (it keeps running statistics).
    """

    name: str
    class_name: str
    effect: str
    p: float | None = None


@dataclass(frozen=True)
class RootModule:
    """A module that no other module holds, as found at the first backward or optimizer step."""

    id: int
    class_name: str
    #: Defining module of the class (``torchvision.models.resnet``).
    defined_in: str = ""
    training: bool = True
    n_parameters: int = 0
    n_trainable: int = 0
    #: Wrappers from outside in: ``DistributedDataParallel``, ``OptimizedModule`` (torch.compile), ...
    wrappers: tuple[str, ...] = ()
    submodules: tuple[Submodule, ...] = ()
    #: Another root keeps this module in a plain list, tuple or dict, where it is not registered: where
    #: (``Net.layers[0]``). Empty when it does not.
    unregistered_in: str = ""
    #: What in it depends on train and eval mode, as far as it can be known: dropout of any kind, norms with running
    #: statistics. Functional dropout is not in here.
    mode_sensitive: tuple[ModeSensitive, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor. ``name`` is its first name in ``root``; further names are in ``tied``."""

    id: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    requires_grad: bool
    #: ``weight``, ``bias``, ``norm``, ``embedding``, or ``other``.
    kind: str = "other"
    #: Root module, or ``None`` for a tensor that an optimizer holds and no module does.
    root: int | None = None
    #: Class of the module that owns it (``Linear``).
    owner: str = ""
    tied: tuple[str, ...] = ()
    #: ``fresh`` or the file it was loaded from.
    origin: str = "fresh"
    #: requires_grad as it was at the end of the watch, when it changed.
    requires_grad_later: bool | None = None
    #: A gradient was in ``.grad`` after at least one watched backward (``None``: never looked).
    gradient_seen: bool | None = None

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


# --------------------------------------------------------------------------------------------- optimizer, schedule


@dataclass(frozen=True)
class ParamGroup:
    index: int
    parameters: tuple[int, ...]
    #: ``lr``, ``initial_lr``, ``weight_decay``, ``betas``, ``eps``, ``fused`` ... as they stood before the first step.
    hyperparameters: Mapping[str, Value] = field(default_factory=dict)
    #: The dtype that the update is computed in: that of the state and parameters (``bfloat16`` for pure bf16 training).
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Optimizer:
    id: int
    class_name: str
    defined_in: str = ""
    at: SourceLine | None = None
    groups: tuple[ParamGroup, ...] = ()
    #: Default of each hyperparameter in the constructor's signature: what holds when nobody passes a value.
    signature_defaults: Mapping[str, Value] = field(default_factory=dict)
    #: Non-empty state was loaded into it (and from which file, when known).
    state_loaded: bool = False
    state_loaded_from: str | None = None
    #: State held before its first watched step (0: cold).
    state_tensors_before: int = 0
    #: dtypes of floating point state after the first step, by key (``exp_avg_sq`` -> ``bfloat16``), group 0 first.
    state_dtypes: Mapping[str, str] = field(default_factory=dict)
    #: Steps seen in the watch, and steps that a GradScaler skipped.
    steps: int = 0
    skipped_steps: int = 0
    #: For an optimizer that made no step in the watch: whether any parameter it holds changed between the first and the
    #: last watched backward (something else updates them).
    moved_without_steps: bool | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Learning rate per group after ``calls`` further calls of ``scheduler.step()``, on a copy."""

    calls: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Scheduler:
    id: int
    class_name: str
    optimizer: int | None
    at: SourceLine | None = None
    #: Constructor settings that torch keeps (``T_max``, ``total_steps``, ``step_size``, ``eta_min``, ...).
    settings: Mapping[str, Value] = field(default_factory=dict)
    base_rates: tuple[float, ...] = ()
    #: Classes of the schedulers inside a SequentialLR/ChainedScheduler.
    children: tuple[str, ...] = ()
    #: Rates over calls of ``step()`` from the state at construction (call 0), made on a copy after the watch.
    curve: tuple[CurvePoint, ...] = ()
    #: Why there is no curve (``needs a metric``, ``could not be copied: ...``).
    curve_missing: str = ""
    #: Calls after which the schedule has run its course, when its settings say so (T_max, total_steps, ...).
    horizon_calls: int | None = None
    #: The framework steps it: ``step``, ``epoch`` or ``None`` when the program does.
    interval: str | None = None
    frequency: int | None = None
    #: Metric that a framework hands to it.
    monitor: str | None = None
    #: A wrapper steps it this many times per call (accelerate: once per process).
    steps_per_call: int | None = None
    #: Needs a metric (ReduceLROnPlateau).
    metric: bool = False
    calls: int = 0


@dataclass(frozen=True)
class Loader:
    """A DataLoader that was iterated."""

    id: int
    class_name: str = "DataLoader"
    at: SourceLine | None = None
    batch_size: int | None = None
    #: Batches per epoch, ``None`` when unknown (IterableDataset without length).
    batches: int | None = None
    samples: int | None = None
    workers: int = 0
    shuffle: bool | None = None
    drop_last: bool | None = None
    #: It fed at least one batch that a backward followed.
    training: bool = False


@dataclass(frozen=True)
class Framework:
    """A trainer that drives the loop, with its own settings by the names it gives them."""

    #: ``lightning``, ``transformers``, ``accelerate``.
    name: str
    version: str = ""
    class_name: str = ""
    at: SourceLine | None = None
    settings: Mapping[str, Value] = field(default_factory=dict)
    #: Names of callbacks and loggers attached.
    callbacks: tuple[str, ...] = ()
    loggers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loop:
    """A loop of the program around its optimizer's step."""

    at: SourceLine
    #: What it goes over, as the source says (``range(args.epochs)``); ``while`` for a while loop.
    over: str = ""
    #: How often it runs its body when it is not left early; ``None`` when not known.
    iterations: int | None = None
    #: It holds a ``break`` or ``return``.
    may_end_early: bool = False


@dataclass(frozen=True)
class TrainingLoops:
    """The loops around an optimizer's step, outermost first, within the life of the optimizer."""

    optimizer: int
    loops: tuple[Loop, ...] = ()
    #: The backward lies in the innermost of them, so that one that steps only now and then accumulates.
    holds_backward: bool = False


@dataclass(frozen=True)
class Plan:
    """How long the whole run is meant to be, in optimizer steps, and who says so."""

    optimizer_steps: int | None = None
    epochs: float | None = None
    batches_per_epoch: int | None = None
    #: Backwards per optimizer step that were seen, or what the framework says.
    accumulation: int | None = None
    #: ``lightning Trainer.estimated_stepping_batches``, ``transformers TrainerState.max_steps`` ...
    source: str = ""
    #: What the program's own loops say, where no trainer drives it.
    training_loops: tuple[TrainingLoops, ...] = ()


# --------------------------------------------------------------------------------------------- timeline


@dataclass(frozen=True)
class BatchFetched:
    kind: ClassVar[str] = "batch"
    seq: int
    time_s: float
    loader: int
    #: Leading size of the first tensor found in the batch.
    size: int | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    #: Hash of a sample of the values: equal batches have equal fingerprints.
    fingerprint: str | None = None
    #: ``labels`` beside ``input_ids``, as transformers' causal models will shift and read them, in the first batches of
    #: a loader; ``None`` when the batch has no such pair.
    labels: TargetRows | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class ModeChanged:
    kind: ClassVar[str] = "mode"
    seq: int
    time_s: float
    root: int | None
    training: bool
    class_name: str = ""
    at: SourceLine | None = None


@dataclass(frozen=True)
class ModeCall:
    """A call of ``train()`` or ``eval()`` that is why modules are in eval."""

    #: Class of the module it was called on.
    on: str
    #: ``program`` (its own code), ``library`` (``from_pretrained``), or ``override``: the ``train`` method of a class
    #: keeps the modules in eval, or somebody set their attribute after a ``train()``.
    how: str
    seq: int
    modules: tuple[str, ...] = ()
    at: SourceLine | None = None


@dataclass(frozen=True)
class ModeState:
    """Modes in one root, written when they differ from what was last written for the same moment.

    ``when``: ``backward`` (it is about to begin; the forward pass was made so), or ``batch`` (``loader`` is asked for
    another batch; what was done with the one before was done so).
    """

    kind: ClassVar[str] = "mode_state"
    seq: int
    time_s: float
    root: int
    when: str
    training: bool
    loader: int | None = None
    #: Mode-sensitive modules in eval (the first of them by name), and how many are in eval and in train.
    in_eval: tuple[str, ...] = ()
    n_eval: int = 0
    n_train: int = 0
    #: The last calls that set the modes of those in eval; modules that no call was made for are in none.
    calls: tuple[ModeCall, ...] = ()
    #: Batches that the running statistics took in, summed over the norms.
    batches_tracked: int | None = None


@dataclass(frozen=True)
class DropoutCall:
    """A call of dropout in torch.nn.functional (modules call it too), once per place while one loader is read."""

    kind: ClassVar[str] = "dropout"
    seq: int
    time_s: float
    p: float
    #: It dropped: ``training`` was true.
    active: bool
    #: The program's own call left ``training`` out, so that torch's default (true) held.
    by_default: bool = False
    grad_enabled: bool = True
    #: Root and name of the dropout module that called it; ``None`` and empty for others.
    root: int | None = None
    module: str = ""
    #: Class of the module whose method called it, and whether that is in train mode.
    class_name: str = ""
    owner_training: bool | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class Forward:
    """A call of a root module (from the moment that roots are known)."""

    kind: ClassVar[str] = "forward"
    seq: int
    time_s: float
    root: int
    training: bool
    grad_enabled: bool
    autocast: str | None = None
    #: Leading size of the first tensor argument.
    size: int | None = None
    fingerprint: str | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class AutocastEntered:
    kind: ClassVar[str] = "autocast"
    seq: int
    time_s: float
    device: str
    dtype: str
    enabled: bool
    at: SourceLine | None = None


@dataclass(frozen=True)
class LossInput:
    """The prediction side of a loss call, measured on a sample of its rows (a row: one position's classes).

    For losses without a class dimension a row is one element, and the figures over classes are ``None``.
    """

    #: Rows that were looked at.
    rows: int = 0
    #: Size of the class dimension.
    classes: int | None = None
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    #: Smallest and largest sum over the classes of a row (1 and 1: probabilities).
    row_sum_min: float | None = None
    row_sum_max: float | None = None
    #: Smallest and largest log-sum-exp over the classes of a row (0 and 0: log-probabilities).
    row_logsumexp_min: float | None = None
    row_logsumexp_max: float | None = None
    #: Share of the elements within 1e-6 of 0 or of 1.
    saturated: float | None = None
    finite: bool | None = None
    #: The operation that made it, from the autograd graph, looking through views and casts: ``softmax``,
    #: ``log_softmax``, ``sigmoid``, ``logsigmoid``, ``log`` or ``exp`` of something else, ``linear`` (straight out of
    #: a layer), ``relu``, ``tanh``; empty when it was none of the known ones.
    made_by: str = ""
    #: The dimension that a softmax or log_softmax went over, where the tensor has kept its dimensions since.
    made_over: int | None = None
    #: Name of the graph's node that made it (``CompiledFunctionBackward``); empty when it hangs from no graph.
    node: str = ""
    #: Where a softmax or sigmoid made it and the loss applies its own (or wants logarithms): norm of the gradient
    #: before that softmax or sigmoid, over the norm it would have without the fault.
    gradient_kept: float | None = None
    #: Of ``rows``, the probabilities on the wrong side of their target that a sigmoid rounded so close to 0 or 1 that
    #: the gradient is lost.
    vanished: int | None = None


@dataclass(frozen=True)
class LossTarget:
    """The target side of a loss call, over all of its positions unless ``sampled``."""

    #: Positions that have a target (elements of an index target; rows of a target with classes).
    positions: int = 0
    sampled: bool = False
    #: Positions whose target is the ignore_index in effect.
    ignored: int | None = None
    #: Of the positions that are not ignored.
    minimum: float | None = None
    maximum: float | None = None
    #: Every value is a whole number.
    integral: bool | None = None
    #: Index targets outside [0, classes) that are not ignored.
    out_of_range: int | None = None
    #: Soft targets: smallest and largest sum over the classes.
    row_sum_min: float | None = None
    row_sum_max: float | None = None
    #: Elements above one half, for losses on probabilities.
    positives: int | None = None
    #: Samples (rows of the first dimension; ``None`` for classes in one dimension, which may be flattened rows), and
    #: those of which every position is ignored.
    samples: int | None = None
    empty_samples: int | None = None


@dataclass(frozen=True)
class TargetRows:
    """The target of a loss as rows of positions (sequences), beside what the model was given at the same positions.

    Looked at in the first calls of a source line. A flattened target has its rows back; positions run along ``length``.
    """

    rows: int = 0
    length: int = 0
    #: Positions whose target is the ignore_index in effect; rows in which that is every position, and of these rows
    #: the ones that the input fills without padding.
    ignored: int = 0
    empty: int = 0
    empty_full: int | None = None
    #: The target has one number per position (a class); otherwise it is a vector or the loss a regression.
    classes: bool = True
    #: A tensor with these rows was found beside it, whose padding could be looked for.
    beside: bool = False
    #: Positions in the runs that fill rows up, as ``shown_by`` has them: ``input ids``, ``padding_idx``, or a tensor of
    #: the batch by its name, with what it is (``mask``, ``lengths``, ``values``).
    padding: int = 0
    padding_kind: str = ""
    #: The value of the input there (``None`` for vectors), and positions of the runs after the first of each.
    padding_value: float | None = None
    padding_repeats: int = 0
    shown_by: str = ""
    #: A second tensor that shows the same padding: a mask, lengths, the padding_idx of an embedding.
    confirmed_by: str = ""
    left: bool = False
    #: Shortest and longest run of a row, and rows with a run of two or more.
    padding_min: int = 0
    padding_max: int = 0
    padded_rows: int = 0
    #: Of the padding, positions that are not ignored and all have one and the same target, and that target (``None``
    #: for vectors).
    padding_supervised: int = 0
    padding_target: float | None = None
    #: The loss weighs that class with 0.
    padding_weightless: bool = False
    #: Positions compared with the ids that the model was given, and the share of them whose target is the id at the
    #: same position, one and two positions later.
    compared: int = 0
    same: tuple[float, ...] = ()
    #: The ids are those that an embedding looked up, not merely a tensor of the batch.
    embedded: bool = False
    #: Rows whose last token that counts (by a mask) is the very token that pads, and of these the rows in which the
    #: position that should predict it is ignored.
    ends: int = 0
    ends_ignored: int = 0
    end_token: int | None = None


@dataclass(frozen=True)
class LossGradient:
    """What backward sent to a loss: how much of it is in what was optimized, loss scale and divisions included."""

    #: Sum over the elements of the loss: for a reduced loss the factor it has in backward's tensor.
    total: float = 0.0
    #: For an unreduced loss: elements, those with a gradient that is not 0, the smallest and largest size of these.
    elements: int = 1
    nonzero: int | None = None
    smallest: float | None = None
    largest: float | None = None
    #: Elements at padding (see :class:`TargetRows`) whose gradient is not 0.
    padding_nonzero: int | None = None


@dataclass(frozen=True)
class LossCall:
    """A call of a loss in torch.nn.functional (modules call these too)."""

    kind: ClassVar[str] = "loss"
    seq: int
    time_s: float
    function: str
    reduction: str | None = None
    input_shape: tuple[int, ...] = ()
    input_dtype: str = ""
    target_shape: tuple[int, ...] = ()
    target_dtype: str = ""
    grad_enabled: bool = True
    input_requires_grad: bool = True
    autocast: str | None = None
    value: float | None = None
    #: Arguments that change what is computed: ``ignore_index``, ``label_smoothing``, ``weight`` and ``pos_weight``
    #: (their number of elements), ``log_target`` ...; only those that were in effect.
    options: Mapping[str, Value] = field(default_factory=dict)
    input: LossInput | None = None
    target: LossTarget | None = None
    rows: TargetRows | None = None
    #: ``None``: no backward came back to it.
    gradient: LossGradient | None = None
    #: Exception type and text when the loss refused its arguments.
    raised: str | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class OuterDifference:
    """The next backward's tensor is made of all differences of two vectors (``((pred - y) ** 2).mean()`` broadcast)."""

    kind: ClassVar[str] = "outer_difference"
    seq: int
    time_s: float
    #: Shape of the operand that is in the graph, and of the difference: ``d[i, j] = a[i] - b[j]``, proven by values.
    operand_shape: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    #: ``square`` or ``absolute``; then ``mean`` or ``sum``.
    power: str = "square"
    reduction: str = "mean"
    #: Nothing else is part of the tensor given to backward.
    alone: bool = True
    at: SourceLine | None = None


@dataclass(frozen=True)
class Backward:
    """One call of ``Tensor.backward`` / ``torch.autograd.backward``.

    ``value`` is the tensor's value as given to backward, so after any division or loss scaling by the program.
    ``micro_loss`` and ``divided_by``: the mean-reduced loss that this backward's graph hangs from and the factor that
    lies between the two, read from the graph (1.0: backward received the full mean).
    """

    kind: ClassVar[str] = "backward"
    seq: int
    time_s: float
    value: float | None = None
    dtype: str = ""
    numel: int = 1
    requires_grad: bool = True
    grad_fn: str | None = None
    #: An explicit ``gradient=`` was passed (its mean, when it is a scalar).
    gradient_argument: float | None = None
    loss_scale: float | None = None
    micro_loss: float | None = None
    divided_by: float | None = None
    micro_loss_reduction: str | None = None
    #: ``seq`` of the LossCall that ``divided_by`` and ``micro_loss_reduction`` speak of.
    loss_call: int | None = None
    #: Line of the user's code that computed the loss, when it differs from ``at``.
    at: SourceLine | None = None
    retain_graph: bool = False
    #: Parameters (of optimizers) that had no gradient before this backward and have one after it.
    new_gradients: int | None = None
    #: Norm of all gradients right after this backward (only when it is the last before a step: see GradientAtStep).
    gradient_norm: float | None = None
    #: Gradients were switched on where it was called; the tensor comes from ``inference_mode``.
    grad_enabled: bool = True
    inference: bool = False
    #: Its graph leads to a trainable parameter; ``None``: not known (the graph is too large, or runs through
    #: ``hidden``, a custom autograd function whose backward may run a graph of its own).
    reaches_parameters: bool | None = None
    hidden: str = ""
    #: Where no parameter was found: tensors that the graph ends in, and parameters whose gradient it changed all the
    #: same.
    leaves: int | None = None
    gradients_changed: int | None = None
    #: Exception type and text when it raised.
    raised: str | None = None


@dataclass(frozen=True)
class ZeroGrad:
    kind: ClassVar[str] = "zero_grad"
    seq: int
    time_s: float
    #: Optimizer whose gradients were cleared, or ``None`` when it was called on a module.
    optimizer: int | None = None
    root: int | None = None
    set_to_none: bool = True
    #: Parameters that had a gradient just before.
    had_gradients: int | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class Clip:
    kind: ClassVar[str] = "clip"
    seq: int
    time_s: float
    #: ``norm`` or ``value``.
    method: str
    threshold: float
    parameters: tuple[int, ...] = ()
    n_tensors: int = 0
    #: How many of them had a gradient.
    with_gradient: int | None = None
    total_norm: float | None = None
    #: Gradients were still multiplied by a loss scale other than 1.
    scaled: bool = False
    at: SourceLine | None = None


@dataclass(frozen=True)
class ScalerEvent:
    """``scale``, ``unscale_``, ``step``, ``update`` of a GradScaler."""

    kind: ClassVar[str] = "scaler"
    seq: int
    time_s: float
    call: str
    scale: float | None = None
    optimizer: int | None = None
    enabled: bool = True
    skipped: bool | None = None
    #: ``GradScaler``, ``ShardedGradScaler`` (FSDP) ...
    class_name: str = ""
    at: SourceLine | None = None


@dataclass(frozen=True)
class OptimizerStep:
    """One step that really happened (a step that a GradScaler skipped is a ScalerEvent)."""

    kind: ClassVar[str] = "step"
    seq: int
    time_s: float
    optimizer: int
    #: 0-based number of this optimizer's step in the watch.
    index: int
    #: Learning rate of each group as this step used it.
    rates: tuple[float, ...] = ()
    #: Rate of each group that the optimizer says it used, where it has a warm-up of its own and writes the outcome into
    #: the group (``scheduled_lr`` of the schedule-free methods). Empty when it says nothing.
    scheduled_rates: tuple[float, ...] = ()
    #: A closure was passed, and how often it was called; backwards then lie inside the step.
    closure: bool = False
    closure_calls: int = 0
    #: seq when the step was entered: events between ``began`` and ``seq`` happened inside it.
    began: int = 0
    duration_s: float | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class SchedulerStep:
    kind: ClassVar[str] = "scheduler_step"
    seq: int
    time_s: float
    scheduler: int
    rates_before: tuple[float, ...] = ()
    rates_after: tuple[float, ...] = ()
    #: This call was made by the scheduler's own constructor.
    initial: bool = False
    #: What the program passed as ``step(epoch)``: a place in the schedule, which then counts no calls. For one that
    #: follows a metric, nothing.
    epoch: float | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class StateLoaded:
    """``load_state_dict`` on a module, optimizer, scheduler or scaler."""

    kind: ClassVar[str] = "state_loaded"
    seq: int
    time_s: float
    #: ``module``, ``optimizer``, ``scheduler``, ``scaler``.
    what: str
    target: int | None = None
    class_name: str = ""
    empty: bool = False
    strict: bool | None = None
    tensors: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    #: Rates of the groups before and after, for an optimizer.
    rates_before: tuple[float, ...] = ()
    rates_after: tuple[float, ...] = ()
    path: str | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class FileEvent:
    """A checkpoint file read or written: ``torch.load``, ``torch.save``, safetensors."""

    kind: ClassVar[str] = "file"
    seq: int
    time_s: float
    #: ``load`` or ``save``.
    call: str
    path: str
    function: str = ""
    keys: tuple[str, ...] = ()
    at: SourceLine | None = None


@dataclass(frozen=True)
class Logged:
    """A value handed to a logger: Lightning ``log``, transformers ``log``, ``add_scalar``, ``wandb.log``, CSV."""

    kind: ClassVar[str] = "logged"
    seq: int
    time_s: float
    name: str
    value: float | None = None
    by: str = ""
    step: int | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class SeedSet:
    kind: ClassVar[str] = "seed"
    seq: int
    time_s: float
    function: str
    seed: int | None = None
    at: SourceLine | None = None


Event = Union[
    BatchFetched,
    ModeChanged,
    ModeState,
    DropoutCall,
    Forward,
    AutocastEntered,
    LossCall,
    OuterDifference,
    Backward,
    ZeroGrad,
    Clip,
    ScalerEvent,
    OptimizerStep,
    SchedulerStep,
    StateLoaded,
    FileEvent,
    Logged,
    SeedSet,
]

EVENT_TYPES: Mapping[str, type] = {
    cls.kind: cls
    for cls in (
        BatchFetched,
        ModeChanged,
        ModeState,
        DropoutCall,
        Forward,
        AutocastEntered,
        LossCall,
        OuterDifference,
        Backward,
        ZeroGrad,
        Clip,
        ScalerEvent,
        OptimizerStep,
        SchedulerStep,
        StateLoaded,
        FileEvent,
        Logged,
        SeedSet,
    )
}


# --------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class CarriedGradients:
    """Gradients that a step used and the next step used again: nothing cleared them, and backward added to them.

    Measured on a sample of the tensors concerned, in the units that backward left them in.
    """

    #: Of the sampled tensors those for which this is proven; empty: looked, and there was none.
    parameters: tuple[int, ...] = ()
    #: Tensors of the optimizer that were, at the first backward, just as the last step had left them.
    found: int = 0
    #: Norm of what the steps before had left, and of what the backwards since then have added.
    norm: float = 0.0
    own_norm: float = 0.0


@dataclass(frozen=True)
class StepMeasurement:
    """Parameters before and after one optimizer step, as columns of equal length.

    Norms are L2. ``update_norm`` and ``changed`` are estimated from a sample of each large tensor; ``unchanged_exact``
    lists the parameters for which *every* element is known to be bit-identical before and after the step.
    """

    optimizer: int
    #: OptimizerStep.index this belongs to.
    index: int
    parameters: tuple[int, ...] = ()
    #: Norm of ``.grad`` as the step used it; ``None``: no gradient.
    gradient_norm: tuple[float | None, ...] = ()
    weight_norm: tuple[float | None, ...] = ()
    update_norm: tuple[float | None, ...] = ()
    #: Share of sampled elements whose bits changed.
    changed: tuple[float | None, ...] = ()
    #: Elements sampled per parameter (equal to numel: exact).
    sampled: tuple[int, ...] = ()
    unchanged_exact: tuple[int, ...] = ()
    #: Parameters that had ``requires_grad=False`` when the step ran.
    frozen: tuple[int, ...] = ()
    #: Trainable parameters that this optimizer does not hold: id -> moved since the previous measurement.
    gradient_norm_total: float | None = None
    #: Norm of this optimizer's gradients right after the last backward before the step (before clip and rescaling).
    gradient_norm_after_backward: float | None = None
    #: Several backwards led to this step: their ``seq``, and the dot products of what each of them added to the
    #: gradients, on one sample of elements. The last row and column are those of the gradient that the step used.
    share_backwards: tuple[int, ...] = ()
    share_products: tuple[tuple[float, ...], ...] = ()
    #: ``None`` before the second step, or when it could not be told.
    carried: CarriedGradients | None = None
    duration_s: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Outsiders:
    """Trainable parameters of the root modules that no optimizer holds, looked at over the whole watch.

    Parallel columns: parameter id, whether a gradient arrived, whether its value changed, whether the forward used it.
    """

    parameters: tuple[int, ...] = ()
    gradient_norm: tuple[float | None, ...] = ()
    moved: tuple[bool | None, ...] = ()


@dataclass(frozen=True)
class Shadow:
    """A module with the same parameters as a trained one, none of which any optimizer holds: an average, a teacher, a
    target network, a reference. Followed over the watch and the epoch boundary.

    An *update* is a call of ``AveragedModel.update_parameters``, or in-place writes to its parameters between two
    optimizer steps (torch counts them, whatever was written). It counts as idle when no sampled element changed (in half
    precision: at most 1%), though the trained module differed by so much that any average over fewer than a million
    steps had to show in some (in half precision: differed in most).
    """

    id: int
    #: Where it is: ``AveragedModel.module``, ``Net.teacher``; and the trained module.
    name: str
    class_name: str
    of: str = ""
    tensors: int = 0
    weights: int = 0
    dtype: str = ""
    #: Calls of update_parameters; ``None``: it is no AveragedModel.
    calls: int | None = None
    effective_updates: int = 0
    #: Idle updates since the last effective one, and sampled elements that had to change in one of them.
    idle_updates: int = 0
    due: int = 0
    sampled: int = 0
    #: Norm of its difference from the trained module over the norm of that, on the sample, at the last look.
    distance: float | None = None
    #: Any sampled element changed since it was found.
    moved: bool = False
    #: Forward passes through it, and the first file that it was saved to.
    forwards: int = 0
    saved: str | None = None
    #: Line of the last call of update_parameters.
    at: SourceLine | None = None


@dataclass(frozen=True)
class SecondMoment:
    """Adam-family arithmetic of one group in the dtype it really computes in.

    Counts are over the elements of a sample of the group's state after the last watched step.
    """

    optimizer: int
    group: int
    dtype: str
    #: ``eps`` as configured and as it is after rounding to ``dtype``.
    eps: float | None = None
    eps_rounded: float | None = None
    beta2: float | None = None
    elements: int = 0
    #: Elements whose second moment is exactly zero while the gradient is not.
    zero: int = 0
    #: Elements for which ``v * beta2`` rounds back to ``v``.
    stuck: int = 0
    #: Elements whose denominator ``sqrt(v) + eps`` equals ``sqrt(v)`` although ``sqrt(v) <= 100 * eps``.
    unbounded: int = 0
    #: Median of (step taken / step in float32) over the sampled elements: by the optimizer's arithmetic from the same
    #: state and gradients, before the weights round it.
    step_ratio: float | None = None
    #: Elements whose step differs from that in float32 by more than 10% (``None``: formula not known), and the median
    #: ratio of these; ``None`` when that is infinite.
    affected: int | None = None
    affected_ratio: float | None = None
    #: ``fused``, ``foreach`` or ``for-loop``.
    implementation: str = ""


# --------------------------------------------------------------------------------------------- epoch boundary


@dataclass(frozen=True)
class Boundary:
    """What was seen after the first watched steps, when the training loader was made to run dry early.

    The program then passes the end of its epoch (schedulers, evaluation, callbacks) and begins the next one within
    seconds. Everything in here happened after everything in the recording it is part of; ``seq`` goes on counting.
    How *many* steps, batches or samples an epoch has in here is trainlint's doing and proves nothing.
    """

    #: ``crossed`` (training went on after it), ``ended`` (the program came to its end), ``failed`` (it raised),
    #: ``timeout`` (it took longer than it may), ``left-out`` (not tried).
    outcome: str = "left-out"
    #: Why it was left out, or how it ended.
    reason: str = ""
    #: The training loader that was ended early, the batches it had delivered in that epoch and its length.
    loader: int | None = None
    batches_delivered: int | None = None
    batches_meant: int | None = None
    duration_s: float | None = None
    #: ``seq`` of the first batch of the next epoch; ``None``: no pass over the data began after the one that was ended.
    next_epoch: int | None = None
    #: As in :class:`Recording`, from the beginning of the boundary on; objects stand here as they were at its end.
    roots: tuple[RootModule, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[Scheduler, ...] = ()
    loaders: tuple[Loader, ...] = ()
    events: tuple[Event, ...] = ()
    steps: tuple[StepMeasurement, ...] = ()
    outsiders: Outsiders | None = None


# --------------------------------------------------------------------------------------------- no harm


@dataclass(frozen=True)
class Prevented:
    """Something the program did to the world while watched, that was undone, redirected or refused.

    ``action``: ``delete``, ``overwrite``, ``append``, ``move``, ``create`` (only counted), ``upload``, ``tracker``.
    """

    action: str
    target: str
    detail: str = ""
    at: SourceLine | None = None


@dataclass(frozen=True)
class Problem:
    """Something that the recorder could not do; the program went on."""

    where: str
    error: str


# --------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Recording:
    schema: str = SCHEMA
    program: Program = field(default_factory=Program)
    ending: Ending = field(default_factory=lambda: Ending(how="not-started"))
    config: ConfigFacts | None = None
    source: SourceFacts | None = None
    roots: tuple[RootModule, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[Scheduler, ...] = ()
    loaders: tuple[Loader, ...] = ()
    frameworks: tuple[Framework, ...] = ()
    plan: Plan = field(default_factory=Plan)
    events: tuple[Event, ...] = ()
    #: Events that were left out because a kind had too many, by kind.
    events_dropped: Mapping[str, int] = field(default_factory=dict)
    steps: tuple[StepMeasurement, ...] = ()
    outsiders: Outsiders | None = None
    second_moments: tuple[SecondMoment, ...] = ()
    shadows: tuple[Shadow, ...] = ()
    boundary: Boundary | None = None
    prevented: tuple[Prevented, ...] = ()
    created_files: int = 0
    problems: tuple[Problem, ...] = ()
