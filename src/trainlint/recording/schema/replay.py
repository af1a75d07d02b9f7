"""One extra eager forward over the last watched batch, with RNG, buffers and modes put back afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


@dataclass(frozen=True)
class ReplayedForward:
    """A module that the program called to train, called once more with what it was given the last time."""

    #: Class of the module, or its path in a module that is never called itself (``LitModel.net``).
    name: str
    class_name: str
    #: ``replayed`` or ``left-out``; then why.
    outcome: str
    reason: str = ""
    duration_s: float | None = None
    training: bool = True
    #: Samples in the batch: the leading size that the loader's tensors and the inputs share; ``None``: not known.
    samples: int | None = None
    #: Some floating output was not finite.
    finite: bool = True


@dataclass(frozen=True)
class UnitUse:
    """What one call of an activation function made of the units of the layer right before it, over the whole batch.

    ``function``: ``relu``, ``tanh``, ``sigmoid``. A unit is a channel of a convolution or a feature of a linear layer.
    """

    function: str
    #: Path of the innermost module that called it, and of the layer before it with its class.
    module: str = ""
    layer: str = ""
    layer_class: str = ""
    units: int = 0
    #: Inputs of the layer (its ``in_features`` or channels).
    fan_in: int = 0
    #: relu: units whose output is 0 everywhere; tanh and sigmoid: whose output is at one end, within float32's
    #: rounding, everywhere.
    dead: int = 0
    #: Of a relu's dead units those whose input is exactly 0 everywhere: nothing reaches them.
    silent: int = 0
    samples: int = 0
    #: Values per unit (samples times positions).
    values: int = 0
    #: Parameter id of the layer's weight.
    weight: int | None = None
    at: SourceLine | None = None


@dataclass(frozen=True)
class Distribution:
    """Values of one tensor: exact extremes and share of zeros, and a histogram of a sample of its elements.

    ``what``: ``weight`` (after the last watched step), ``gradient`` (as that step used it), ``activation`` (in the
    replay).
    """

    what: str
    name: str
    class_name: str = ""
    shape: tuple[int, ...] = ()
    elements: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    std: float | None = None
    zeros: int = 0
    #: Equal bins from ``minimum`` to ``maximum``; empty when a value is not finite.
    counts: tuple[int, ...] = ()
    #: Weights and gradients of four rows of four elements or more: whether all rows (output units) are the same bits.
    identical_rows: bool | None = None
    #: Activations with one row per sample: the largest difference between two samples over the largest value.
    spread: float | None = None


@dataclass(frozen=True)
class Producer:
    """An operation that made values that are not finite."""

    #: As torch calls it (``softmax``, ``log``, ``div``).
    function: str
    #: ``nan`` or ``inf``.
    kind: str
    module: str = ""
    class_name: str = ""
    #: Elements that were so, of how many.
    count: int = 0
    elements: int = 0
    #: It was given infinite values (none of them NaN).
    from_infinite: bool = False
    #: Rows of a softmax of which every value was -inf.
    masked_rows: int = 0
    #: dtype of the output.
    dtype: str = ""
    at: SourceLine | None = None


@dataclass(frozen=True)
class NonFinite:
    """Values that are not finite, at one moment, and the operation of the forward that made the first of them.

    ``when``: ``before-step`` (the loss of an optimizer step that was about to happen was not finite) or ``replay``.
    """

    when: str
    forward: str = ""
    #: Optimizer steps made before.
    steps: int = 0
    loss: float | None = None
    #: Inputs of the module that hold NaN, as paths; parameters and buffers that hold NaN or infinities, by name.
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    #: Of how many parameters.
    tensors: int = 0
    #: The module's outputs were finite when the forward was repeated.
    outputs_finite: bool = True
    #: Why the forward was not repeated.
    left_out: str = ""
    producer: Producer | None = None
    #: The first operation that made an infinity, where ``producer`` made a NaN of one.
    source: Producer | None = None


@dataclass(frozen=True)
class Mixing:
    """Whether a change of one sample of the batch changes the outputs of others, with the model in eval.

    ``outcome``: ``apart``, ``mixed``, or ``left-out`` (then ``reason``).
    """

    forward: str
    outcome: str
    reason: str = ""
    #: Samples that the forward was repeated with, and how many of the others changed.
    samples: int = 0
    changed: int = 0
    #: Largest change of another sample's output over the change of the replaced sample's own.
    ratio: float | None = None
    #: Shape of the output that changed.
    output: tuple[int, ...] = ()
    #: The first module whose output mixes samples that were apart in what it was given.
    module: str = ""
    class_name: str = ""
    #: The first function of torch that does, as torch calls it, and its line; empty inside a library's kernel.
    function: str = ""
    #: ``batch_first`` of an attention, transformer or recurrent layer.
    batch_first: bool | None = None
    #: Shape of that module's first input.
    given: tuple[int, ...] = ()
    #: Other layers of these kinds, that kept the samples apart, as ``path (Class)``.
    apart: tuple[str, ...] = ()
    at: SourceLine | None = None


@dataclass(frozen=True)
class Replay:
    """One extra eager forward over the last watched batch, with RNG, buffers and modes put back afterwards."""

    forwards: tuple[ReplayedForward, ...] = ()
    units: tuple[UnitUse, ...] = ()
    distributions: tuple[Distribution, ...] = ()
    non_finite: tuple[NonFinite, ...] = ()
    mixing: tuple[Mixing, ...] = ()
