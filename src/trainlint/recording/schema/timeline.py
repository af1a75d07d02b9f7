"""The events of the timeline, in the order of ``seq``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Union, get_args

from trainlint.recording.schema.basics import SourceLine
from trainlint.recording.schema.losses import LossCall, OuterDifference, TargetRows


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

EVENT_TYPES: Mapping[str, type] = {cls.kind: cls for cls in get_args(Event)}
