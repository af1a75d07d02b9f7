"""Which experiments can be made on a watched run, at which rates, and what they will cost.

Pure functions over a :class:`~trainlint.recording.schema.Recording`; ``launch/experiments.py`` makes them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainlint.recording.describe import plural
from trainlint.recording.length import planned_length
from trainlint.recording.projection import projection
from trainlint.recording.schema import Backward, ExperimentCurve, Optimizer, OptimizerStep, Recording

__all__ = [
    "EXPERIMENTS",
    "LR_RANGE_STEPS",
    "NOT_TRAINED",
    "OVERFIT_STEPS",
    "Plan",
    "next_rate",
    "overfit_rate",
    "peak_rates",
    "plan",
    "seconds",
    "step_seconds",
]

EXPERIMENTS = ("overfit", "lr-range")
OVERFIT_STEPS = 300
LR_RANGE_STEPS = 100
#: The sweep, unless the configured rate lies near an end of it.
LOWEST, HIGHEST = 1e-7, 10.0
#: Starts of the overfit experiment at most, each at another rate.
MOST_STARTS = 3
#: A loss that went this share of the way to its floor is being learned, at whatever pace.
ENOUGH = 0.5

#: Rates at which an optimizer can be expected to fit a batch within some hundred steps: lowest, usual, highest.
_WORKABLE = {
    "sgd": (1e-3, 1e-2, 1.0),
    "lion": (1e-6, 1e-4, 1e-3),
    "muon": (1e-3, 2e-2, 1e-1),
    "adagrad": (1e-3, 1e-2, 1.0),
    "adadelta": (1e-2, 1.0, 10.0),
    "adafactor": (1e-5, 1e-3, 1e-1),
    "lars": (1e-2, 1e-1, 10.0),
    "asgd": (1e-3, 1e-2, 1.0),
}
_ADAM = (1e-5, 1e-3, 1e-2)
#: Of a model whose weights mostly came from a checkpoint.
_FINE_TUNING = 1e-4

#: The reason that says nothing about the program, only about this watch.
NOT_TRAINED = "the watched run did not come to its optimizer steps"
#: Optimizers whose steps are no steps at a rate: line searches, signs with sizes of their own, self-adapting methods.
_NO_RATE = ("lbfgs", "rprop", "schedulefree", "prodigy", "dadapt", "dowg", "dog", "ldog")


@dataclass(frozen=True)
class Plan:
    """One experiment on one run. ``reason`` is set, and nothing else, when it cannot be made."""

    name: str
    reason: str = ""
    steps: int = 0
    #: The optimizer whose rate is told, and the configured rates of all groups of all optimizers that step.
    optimizer: int | None = None
    configured_rate: float | None = None
    peaks: tuple[tuple[int, tuple[float, ...]], ...] = ()
    #: DataLoaders feed the training; without, batches are drawn by hand.
    loaders: bool = False
    #: The rate of a single curve, or the ends of a sweep.
    rate: float | None = None
    low: float | None = None
    high: float | None = None

    def at(self, rate: float) -> Plan:
        """The same at another rate."""
        return replace(self, rate=rate)


def plan(run: Recording, name: str) -> Plan:
    """How an experiment is to be made on this run."""
    why = _refusal(run)
    if why:
        return Plan(name, why)
    stepping = _stepping(run)
    peaks = tuple((o.id, peak_rates(run, o)) for o in stepping)
    first = max(stepping, key=lambda o: max(peak_rates(run, o), default=0.0))
    configured = max((r for _, rates in peaks for r in rates), default=0.0) or None
    known = all(_projected(run, o) for o in stepping)
    made = Plan(
        name,
        optimizer=first.id,
        configured_rate=configured if known else None,
        peaks=peaks,
        loaders=any(loader.training for loader in run.loaders),
    )
    if name == "overfit":
        return replace(made, steps=OVERFIT_STEPS, rate=overfit_rate(run, first, configured if known else None))
    low, high = LOWEST, HIGHEST
    if configured:
        low, high = min(low, configured / 30), max(high, configured * 3)
    return replace(made, steps=_steps_of_sweep(run, first), low=low, high=high)


def _steps_of_sweep(run: Recording, optimizer: Optimizer) -> int:
    """As many as the program will make, where that is known and no loader or trainer can be told to go on."""
    length = planned_length(run, optimizer.id)
    if length is None or any(loader.training for loader in run.loaders) or run.frameworks:
        return LR_RANGE_STEPS
    return max(LR_RANGE_STEPS // 2, min(LR_RANGE_STEPS, length[0] - 1))


def _refusal(run: Recording) -> str:
    """Why no experiment can be made on this run."""
    stepping = _stepping(run)
    if run.ending.how not in ("steps", "exit") or not stepping:
        return NOT_TRAINED
    for optimizer in stepping:
        name = optimizer.class_name.lower().replace("_", "")
        if name.startswith(_NO_RATE) or (name.endswith("schedulefree")):
            return f"{optimizer.class_name} finds its own step sizes"
        if any(g.hyperparameters.get("relative_step") for g in optimizer.groups):
            return f"{optimizer.class_name} finds its own step sizes (relative_step)"
        if not any("lr" in g.hyperparameters for g in optimizer.groups):
            return f"{optimizer.class_name} has no learning rate in its groups"
    if len(stepping) > 1 and not _together(run, {o.id for o in stepping}):
        return (
            f"{plural(len(stepping), 'optimizer')} take turns (as in a GAN or with a critic), each on a loss of its own"
        )
    return ""


def _stepping(run: Recording) -> list[Optimizer]:
    return [o for o in run.optimizers if o.steps]


def _together(run: Recording, numbers: set[int]) -> bool:
    """Whether all optimizers step after the same backwards."""
    windows: list[set[int]] = [set()]
    for event in run.events:
        if isinstance(event, Backward) and windows[-1]:
            windows.append(set())
        elif isinstance(event, OptimizerStep):
            windows[-1].add(event.optimizer)
    whole = [w for w in windows if w]
    return bool(whole) and all(w == numbers for w in whole[: max(1, len(whole) - 1)])


def _projected(run: Recording, optimizer: Optimizer) -> bool:
    """Whether the rates of all groups are known over the whole run."""
    length = planned_length(run, optimizer.id)
    return all(projection(run, optimizer.id, g.index, planned=length).points for g in optimizer.groups)


def peak_rates(run: Recording, optimizer: Optimizer) -> tuple[float, ...]:
    """The highest rate that each group is known to get: watched, as configured, or at the peak of its schedule."""
    out = []
    length = planned_length(run, optimizer.id)
    for group in optimizer.groups:
        seen = projection(run, optimizer.id, group.index, planned=length)
        rates = [rate for _, rate in seen.observed]
        rates += [seen.peak_rate] if seen.peak_rate is not None else []
        rates += [v for n in ("lr", "initial_lr") if isinstance(v := group.hyperparameters.get(n), (int, float))]
        out.append(max((float(r) for r in rates if r == r and r != float("inf")), default=0.0))
    return tuple(out)


# ------------------------------------------------------------------------------------------- the rate to overfit at


def overfit_rate(run: Recording, optimizer: Optimizer, configured: float | None) -> float:
    """The configured rate, when a batch can be fitted with it; else one that is usual for the optimizer."""
    low, usual, high = _kind(optimizer)
    if configured is not None and low <= configured <= high:
        return configured
    weights = sum(p.numel for p in run.parameters if p.requires_grad)
    loaded = sum(p.numel for p in run.parameters if p.requires_grad and p.origin != "fresh")
    return min(usual, _FINE_TUNING) if 2 * loaded > weights and usual < 1e-2 else usual


def _kind(optimizer: Optimizer) -> tuple[float, float, float]:
    name = optimizer.class_name.lower()
    return next((rates for kind, rates in _WORKABLE.items() if kind in name and "adam" not in name), _ADAM)


def next_rate(curves: Sequence[ExperimentCurve], floor: float | None = None) -> float | None:
    """Where to look next after these curves; ``None``: enough was tried, or the last fell far enough to be believed.

    A loss that blew up or swung about is given a tenth of the rate, one that only crept ten times as much.
    """
    tried = [c.rate for c in curves if c.rate is not None]
    last = curves[-1]
    if last.ended not in ("diverged", "plateau", "steps") or len(tried) >= MOST_STARTS or last.rate is None:
        return None
    losses = [p.loss for p in last.points if p.loss is not None]
    finite = [x for x in losses if math.isfinite(x)]
    if last.ended != "diverged" and finite and finite[0] - min(finite) > ENOUGH * (finite[0] - (floor or 0.0)) > 0:
        return None
    rough = last.ended == "diverged" or (len(losses) > 20 and _swings(losses))
    rate = last.rate / 10 if rough else last.rate * 10
    return None if any(0.5 < rate / other < 2 for other in tried) else rate


def _swings(losses: Sequence[float]) -> bool:
    """Whether the later part of a curve goes up and down by more than it falls."""
    later = losses[len(losses) // 2 :]
    ups = sum(max(0.0, b - a) for a, b in itertools.pairwise(later))
    return max(losses) > 1.5 * abs(losses[0]) or ups > abs(losses[0] - min(losses))


# ------------------------------------------------------------------------------------------------ what it will cost


def step_seconds(run: Recording) -> float | None:
    """Median time from one watched optimizer step to the next."""
    times: dict[int, list[float]] = {}
    for event in run.events:
        if isinstance(event, OptimizerStep):
            times.setdefault(event.optimizer, []).append(event.time_s)
    longest = max(times.values(), key=len, default=[])
    gaps = [b - a for a, b in itertools.pairwise(longest)]
    return statistics.median(gaps) if gaps else None


def seconds(run: Recording, steps: int) -> float | None:
    """About how long a start of the program with so many steps will take."""
    each = step_seconds(run)
    if each is None:
        return None
    return (run.program.time_to_first_step_s or 0.0) + steps * each
