"""What the numbers of the run did: rounding, loss scale, values that are not finite, memory never written."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


@dataclass(frozen=True)
class RoundedUpdates:
    """What became of the updates of half-precision weights at one optimizer step, on a sample of one group.

    The *spacing* of an element is the distance to its neighbouring number in the dtype. An update smaller than half of
    it rounds away. ``ratio`` below is the size of the meant update over that half.
    """

    optimizer: int
    group: int
    #: OptimizerStep.index.
    index: int
    dtype: str
    rate: float | None = None
    #: The update is known from the optimizer's state: ``adam``, ``sgd``, ``lion``, ``rmsprop``, ``adagrad``; empty: it
    #: is not, and ``elements`` counts those with a gradient.
    formula: str = ""
    #: Sampled elements whose update (or gradient) is not zero, and those of them with the same bits after the step.
    elements: int = 0
    unchanged: int = 0
    #: Share of the squared updates that was meant for the unchanged elements.
    unchanged_power: float | None = None
    median_ratio: float | None = None
    #: Elements by ratio: entry k counts 2**(k - 24) <= ratio < 2**(k - 23), the ends take what is beyond; and their
    #: share of the squared updates.
    bins: tuple[int, ...] = ()
    power: tuple[float, ...] = ()
    #: Elements with a ratio below 0.9, those of them that changed, and how many would under stochastic rounding.
    small: int = 0
    small_changed: int = 0
    small_expected: float = 0.0
    #: Elements with a ratio of 2 and more, which change under any rounding, and those of them that changed.
    large: int = 0
    large_changed: int = 0
    #: Elements by the exponent of the weight (entry k: 2**(k - 24) <= |weight| < 2**(k - 23)), and those that changed.
    weights: tuple[int, ...] = ()
    weights_changed: tuple[int, ...] = ()
    #: Where the optimizer keeps what rounds away: the key of its state, or a word; empty: nowhere that was found.
    kept_in: str = ""


@dataclass(frozen=True)
class Scaler:
    """A GradScaler when it first scaled a loss."""

    class_name: str = "GradScaler"
    enabled: bool = True
    scale: float | None = None
    growth_factor: float | None = None
    backoff_factor: float | None = None
    growth_interval: int | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class ScalerState:
    """State that was loaded into a GradScaler."""

    scale: float | None = None
    growth_tracker: int | None = None
    path: str | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class HalfGradients:
    """Gradients that a backward computed in float16, on a sample of each tensor, right after it.

    Those of float32 parameters count when every sampled element is a float16 number (and enough are not zero): they
    were computed in float16 under autocast.
    """

    #: ``seq`` of the last event before.
    after: int
    #: Trainable tensors with a fresh gradient, and those of them whose gradient was computed in float16.
    tensors: int = 0
    half: int = 0
    #: Parameter ids of these, as far as they were looked at.
    parameters: tuple[int, ...] = ()
    #: Of the sampled elements of these: all, those that are 0, those that are subnormal in float16 (fewer than 11
    #: significant bits), infinite or NaN.
    elements: int = 0
    zero: int = 0
    subnormal: int = 0
    non_finite: int = 0
    #: float16 autocast was entered; parameters are float16.
    autocast: bool = False
    weights: bool = False


@dataclass(frozen=True)
class UnwrittenTensors:
    """Memory that was handed out uninitialised and that nothing wrote until the first backward was over.

    A tensor counts when torch counted no write to it and its sampled bits are those that the memory had, in a module
    of which some parameter got a gradient.
    """

    #: ``to_empty``, or ``torch.empty`` for parameters that were made so in the source.
    how: str
    #: Class of the module.
    module: str = ""
    at: SourceLine | None = None
    #: Tensors that were handed out so and are part of the model, and the names of those that count.
    tensors: int = 0
    unwritten: tuple[str, ...] = ()
    #: Of the unwritten ones those that hold anything but zeros, and those with values that are not finite.
    garbage: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    #: Tensors of two and more dimensions among ``tensors`` and among the unwritten ones.
    matrices: int = 0
    matrices_unwritten: int = 0
    #: The unwritten ones that are buffers.
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Numerics:
    """What the numbers of the run did: rounding, loss scale, values that are not finite, memory never written."""

    rounding: tuple[RoundedUpdates, ...] = ()
    scalers: tuple[Scaler, ...] = ()
    scaler_states: tuple[ScalerState, ...] = ()
    half_gradients: tuple[HalfGradients, ...] = ()
    unwritten: tuple[UnwrittenTensors, ...] = ()
