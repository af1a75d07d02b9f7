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

from trainlint.recording.schema.adapters import (
    AdaptedModel,
    Adapters,
    AdapterSite,
    AdapterTarget,
    GradientCut,
    Save,
)
from trainlint.recording.schema.basics import (
    Scalar,
    SourceLine,
    Value,
)
from trainlint.recording.schema.costs import Costs, PhaseMemory, StepCost
from trainlint.recording.schema.experiments import Experiment, ExperimentCurve, ExperimentLoss, ExperimentPoint
from trainlint.recording.schema.losses import (
    LossCall,
    LossGradient,
    LossInput,
    LossTarget,
    OuterDifference,
    TargetRows,
)
from trainlint.recording.schema.measurements import (
    CarriedGradients,
    Outsiders,
    Prevented,
    Problem,
    SecondMoment,
    Shadow,
    StepMeasurement,
)
from trainlint.recording.schema.model import (
    CurvePoint,
    Framework,
    Loader,
    Loop,
    ModeSensitive,
    Optimizer,
    Parameter,
    ParamGroup,
    Plan,
    RootModule,
    Scheduler,
    Submodule,
    TrainingLoops,
)
from trainlint.recording.schema.numerics import (
    HalfGradients,
    Numerics,
    RoundedUpdates,
    Scaler,
    ScalerState,
    UnwrittenTensors,
)
from trainlint.recording.schema.program import (
    ConfigFacts,
    ConfigKey,
    ConfigRead,
    Ending,
    MissingKey,
    NameMention,
    NameRead,
    Program,
    RateAssignment,
    SourceBlock,
    SourceCall,
    SourceFacts,
    SourceObject,
    SourceTrace,
)
from trainlint.recording.schema.provenance import NamedShape, NormDrift, Provenance, ShapeMismatch, WeightLoad
from trainlint.recording.schema.replay import (
    Distribution,
    Mixing,
    NonFinite,
    Producer,
    Replay,
    ReplayedForward,
    UnitUse,
)
from trainlint.recording.schema.samples import Samples
from trainlint.recording.schema.timeline import (
    EVENT_TYPES,
    AutocastEntered,
    Backward,
    BatchFetched,
    Clip,
    DropoutCall,
    Event,
    FileEvent,
    Forward,
    Logged,
    ModeCall,
    ModeChanged,
    ModeState,
    OptimizerStep,
    ScalerEvent,
    SchedulerStep,
    SeedSet,
    StateLoaded,
    ZeroGrad,
)

__all__ = [
    "EVENT_TYPES",
    "SCHEMA",
    "AdaptedModel",
    "AdapterSite",
    "AdapterTarget",
    "Adapters",
    "AutocastEntered",
    "Backward",
    "BatchFetched",
    "Boundary",
    "CarriedGradients",
    "Clip",
    "ConfigFacts",
    "ConfigKey",
    "ConfigRead",
    "Costs",
    "CurvePoint",
    "Distribution",
    "DropoutCall",
    "Ending",
    "Event",
    "Experiment",
    "ExperimentCurve",
    "ExperimentLoss",
    "ExperimentPoint",
    "FileEvent",
    "Forward",
    "Framework",
    "GradientCut",
    "HalfGradients",
    "Loader",
    "Logged",
    "Loop",
    "LossCall",
    "LossGradient",
    "LossInput",
    "LossTarget",
    "MissingKey",
    "Mixing",
    "ModeCall",
    "ModeChanged",
    "ModeSensitive",
    "ModeState",
    "NameMention",
    "NameRead",
    "NamedShape",
    "NonFinite",
    "NormDrift",
    "Numerics",
    "Optimizer",
    "OptimizerStep",
    "OuterDifference",
    "Outsiders",
    "ParamGroup",
    "Parameter",
    "PhaseMemory",
    "Plan",
    "Prevented",
    "Problem",
    "Producer",
    "Program",
    "Provenance",
    "RateAssignment",
    "Recording",
    "Replay",
    "ReplayedForward",
    "RootModule",
    "RoundedUpdates",
    "Samples",
    "Save",
    "Scalar",
    "Scaler",
    "ScalerEvent",
    "ScalerState",
    "Scheduler",
    "SchedulerStep",
    "SecondMoment",
    "SeedSet",
    "Shadow",
    "ShapeMismatch",
    "SourceBlock",
    "SourceCall",
    "SourceFacts",
    "SourceLine",
    "SourceObject",
    "SourceTrace",
    "StateLoaded",
    "StepCost",
    "StepMeasurement",
    "Submodule",
    "TargetRows",
    "TrainingLoops",
    "UnitUse",
    "UnwrittenTensors",
    "Value",
    "WeightLoad",
    "ZeroGrad",
]

SCHEMA = "trainlint.recording/1"


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
    provenance: Provenance | None = None
    adapters: Adapters | None = None
    replay: Replay | None = None
    numerics: Numerics | None = None
    samples: Samples | None = None
    costs: Costs | None = None
    boundary: Boundary | None = None
    #: Made on request, after this recording; each in a child of its own.
    experiments: tuple[Experiment, ...] = ()
    prevented: tuple[Prevented, ...] = ()
    created_files: int = 0
    problems: tuple[Problem, ...] = ()
