"""Experiments that were made beside the watched run (``--deep``), each in a child of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExperimentPoint:
    """One optimizer step of an experiment."""

    #: 0-based number of the optimizer step.
    step: int
    #: What the backwards of this step were given, added up (loss scale taken off): the loss before this step's update.
    #: ``None``: no backward of a single number was seen.
    loss: float | None = None
    #: Rate of the group with the highest rate; the others keep their ratio to it.
    rate: float | None = None
    #: Norm of the gradients that the step used.
    gradient_norm: float | None = None


@dataclass(frozen=True)
class ExperimentCurve:
    """One start of the program within an experiment: the loss of each step, and how it ended.

    ``ended``: ``reached`` (near its floor), ``constant`` (no bit of the loss changed), ``plateau``, ``diverged``,
    ``swept`` (all rates were tried), ``steps`` (as many as wanted), ``program-ended`` (the program came to its own
    end), ``died``, ``timeout``, ``interrupted``, ``not-started``.
    """

    ended: str
    #: The rate of a curve at one rate.
    rate: float | None = None
    points: tuple[ExperimentPoint, ...] = ()
    #: Why it ended where the word alone does not say it.
    reason: str = ""
    duration_s: float | None = None


@dataclass(frozen=True)
class ExperimentLoss:
    """The loss function of the experiment's first step, and how low it can get on that batch."""

    #: Name in torch.nn.functional; empty when none was called with gradients.
    function: str = ""
    value: float | None = None
    #: Its value is what backward was given: nothing else is added to it.
    alone: bool = False
    #: Calls with gradients before the first step.
    calls: int = 0
    #: The lowest value it can have on these targets, where its arguments tell (0 for class indices, the entropy of soft
    #: targets or label smoothing); ``None``: not known, or without a bound.
    floor: float | None = None
    #: Positions of the target that count.
    positions: int | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """One experiment: the user's own program again, with some things held still or changed."""

    #: ``overfit`` or ``lr-range``.
    name: str
    #: ``done``, ``failed`` or ``left-out``.
    outcome: str = "left-out"
    #: Why it failed or was left out.
    reason: str = ""
    duration_s: float | None = None
    #: Optimizer steps that it would have made at most.
    steps_wanted: int | None = None
    #: The curves, in the order in which they were made.
    curves: tuple[ExperimentCurve, ...] = ()
    #: What was held still, in words (``dropout``, ``weight decay`` ...).
    held_still: tuple[str, ...] = ()
    #: How the same batch came again: ``loader`` (given out again), ``random`` (the random state was put back before
    #: each draw); empty when it was not to be the same.
    repeated_by: str = ""
    #: Different inputs or targets that were seen at the steps from the third on; 1: the same batch at nearly all.
    different_batches: int | None = None
    loss: ExperimentLoss | None = None
    #: ``Optimizer.id`` of the optimizer whose steps are counted, and its highest rate over the whole run; ``None``: not
    #: known (set by hand, so that the watched steps may be a warm-up).
    optimizer: int | None = None
    configured_rate: float | None = None
    #: The highest rate that the program itself gave its optimizer or set by hand in the experiment, before it was
    #: replaced.
    program_rate: float | None = None

    @property
    def peak_rate(self) -> float | None:
        """The highest rate of the whole run, as far as it is known."""
        return self.configured_rate or self.program_rate
