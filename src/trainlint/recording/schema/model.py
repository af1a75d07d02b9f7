"""The live objects: modules and parameters, optimizers, schedulers, loaders, trainers, and the planned length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainlint.recording.schema.basics import SourceLine, Value


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
