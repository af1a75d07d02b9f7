"""Calls of losses: both sides of each, and what they send back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from trainlint.recording.schema.basics import SourceLine, Value


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
