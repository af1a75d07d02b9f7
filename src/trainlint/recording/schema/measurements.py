"""What was measured of parameters, steps and optimizer state, and what was kept from doing harm."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


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
    optimizer steps (torch counts them, whatever was written). It counts as idle when no sampled element changed (in
    half precision: at most 1%), though the trained module differed by so much that any average over fewer than a
    million steps had to show in some (in half precision: differed in most).
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
