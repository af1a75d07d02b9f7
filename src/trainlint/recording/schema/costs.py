"""Memory and time of the watched steps, by phase.

Phases: ``data`` (waiting for a DataLoader), ``forward`` (up to the backward: the model, its loss, and what lies between
a batch's arrival and them), ``backward``, ``optimizer`` (the step itself, without a closure's forward and backward),
``other`` (everything else: clipping, schedulers, logging, evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepCost:
    """Time since the step before, up to the end of this one, without the recorder's own work."""

    optimizer: int
    #: OptimizerStep.index this belongs to.
    index: int
    #: Phase -> seconds.
    seconds: Mapping[str, float] = field(default_factory=dict)
    backwards: int = 0
    #: torch.compile built graphs meanwhile.
    compiled: bool = False
    #: ``False``: a phase was left by an exception, so the times are not those of a step.
    whole: bool = True


@dataclass(frozen=True)
class PhaseMemory:
    """What is known of the most memory held during one phase."""

    phase: str
    #: The most at the phase's edges, or inside it where that is known: a lower bound.
    at_least_bytes: int | None = None
    #: The last time that the highest value so far was passed in this phase: that value.
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Costs:
    """What a step costs.

    The counters of peaks are read, never reset, so that the program's own reading of them is undisturbed. A peak is
    therefore known for the phases in which the highest value so far was passed.
    """

    #: ``cpu``, ``cuda:0``: where the loss was.
    device: str = ""
    #: ``wall``, or ``device`` for times between events of the CUDA stream.
    clock: str = "wall"
    #: Why nothing is said of phases, where the device works on its own and has no clock that is read.
    no_phases: str = ""
    steps: tuple[StepCost, ...] = ()
    #: Seconds of the recorder's own work in the thread that trains, within these steps.
    own_s: float | None = None
    #: ``process`` (resident memory) or ``device`` (memory that torch's allocator has given out).
    memory_of: str = ""
    memory: tuple[PhaseMemory, ...] = ()
    #: Highest value, the phase in which it was passed (``before``: before the watched steps; ``trainlint``: while the
    #: recorder worked) and the number of that step, counted over all optimizers.
    peak_bytes: int | None = None
    peak_phase: str = ""
    peak_step: int | None = None
    #: Highest value before the first watched batch.
    before_bytes: int | None = None
    #: Most memory that the allocator took from the device.
    reserved_bytes: int | None = None
    #: Most memory that an optimizer step needed beyond what was held before and after it.
    step_temporary_bytes: int | None = None
