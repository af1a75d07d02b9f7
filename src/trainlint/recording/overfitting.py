"""What came of overfitting one batch, and what else in the recording explains that it failed.

Pure functions over a :class:`~trainlint.recording.schema.Recording`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainlint.recording.describe import percent, plural, trainable_weights
from trainlint.recording.loss_calls import alone, lines_of
from trainlint.recording.membership import held_by, stale_optimizers, unheld_parameters
from trainlint.recording.schema import Backward, Experiment, ExperimentCurve, Recording
from trainlint.recording.timeline import of_kind

__all__ = ["Cause", "Fit", "best_curve", "causes", "fit", "losses_of", "room_to_fit"]

#: Weights per position of the target from which a model can be expected to tell the positions of one batch apart.
_WEIGHTS_PER_POSITION = 10
#: Steps that a curve must have to say anything.
LEAST_STEPS = 20
#: The first steps may have had other random numbers (noise, masks) than all later ones.
_SETTLING = 2
#: A loss is still falling when its last fifth fell by at least this share of the whole fall.
_STILL = 0.05


@dataclass(frozen=True)
class Fit:
    """The best of the curves: how far the loss of the repeated batch fell."""

    curve: ExperimentCurve
    first: float
    lowest: float
    last: float
    #: The floor, where it is known.
    floor: float | None
    steps: int
    #: Share of the way from the first loss to its floor (0 where the floor is not known) that the lowest loss has gone.
    fallen: float
    #: No bit of the loss changed from the third step to the last.
    constant: bool
    #: It fell to the last.
    still_falling: bool
    diverged: bool


@dataclass(frozen=True)
class Cause:
    """A fault that another check shows on the same run, and that explains a loss which does not fall."""

    code: str
    text: str


def losses_of(curve: ExperimentCurve) -> list[float]:
    return [p.loss for p in curve.points if p.loss is not None]


def best_curve(experiment: Experiment) -> ExperimentCurve | None:
    """The curve that fell furthest, of those that are long enough to be judged."""
    known = [c for c in experiment.curves if len(losses_of(c)) >= LEAST_STEPS or c.ended in ("reached", "diverged")]
    known = [c for c in known if losses_of(c)]
    return min(known, key=lambda c: (c.ended != "reached", _lowest(c)), default=None)


def _lowest(curve: ExperimentCurve) -> float:
    return min((x for x in losses_of(curve) if math.isfinite(x)), default=math.inf)


def fit(experiment: Experiment) -> Fit | None:
    """How far the loss fell; ``None`` when no curve is long enough."""
    curve = best_curve(experiment)
    if curve is None:
        return None
    losses = losses_of(curve)
    first, lowest = losses[0], _lowest(curve)
    floor = experiment.loss.floor if experiment.loss is not None and experiment.loss.alone else None
    height = first - (floor or 0.0)
    fallen = (first - lowest) / height if height > 0 else 0.0
    recent = losses[-max(5, len(losses) // 5) :]
    falls = sum(recent[: len(recent) // 2]) / (len(recent) // 2) - sum(recent[-(len(recent) // 2) :]) / (
        len(recent) // 2
    )
    return Fit(
        curve,
        first,
        lowest,
        losses[-1],
        floor,
        len(losses),
        fallen,
        constant=len(losses) >= LEAST_STEPS and len(set(losses[_SETTLING:])) == 1,
        still_falling=first > lowest and falls > _STILL * (first - lowest) / 2,
        diverged=all(c.ended == "diverged" for c in experiment.curves),
    )


def room_to_fit(run: Recording, experiment: Experiment) -> bool:
    """Whether one batch is something that this model could learn by heart and whose loss has a known lowest value.

    The predictions come straight out of a layer (no temperature, margin or bound stands between), the loss is one
    function whose floor is known, there are several times more weights than targets, and most of the model is trained:
    adapters and heads on frozen weights can only do what these allow.
    """
    loss = experiment.loss
    if loss is None or not loss.alone or loss.floor is None or not loss.positions or loss.calls != 1:
        return False
    held = held_by(run)
    trained = [p for p in run.parameters if p.id in held and p.requires_grad]
    weights, roots = sum(p.numel for p in trained), {p.root for p in trained}
    if weights < _WEIGHTS_PER_POSITION * loss.positions:
        return False
    if 2 * weights < sum(p.numel for p in run.parameters if p.root in roots):
        return False
    lines = [line for line in lines_of(run, (loss.function,)) if alone(run, line)]
    return bool(lines) and all(i.made_by == "linear" for line in lines for i in line.inputs)


def causes(run: Recording) -> list[Cause]:
    """Faults in the watched steps that keep a batch from being learned, the plainest first."""
    out: list[Cause] = []
    backwards = of_kind(run, Backward)
    if backwards and all(b.reaches_parameters is False and not b.gradients_changed for b in backwards):
        out.append(Cause("TL302", "backward's graph leads to no trainable parameter"))
    parameters = {p.id: p for p in run.parameters}
    held = [parameters[i] for i in held_by(run) if i in parameters]
    if held and not any(p.requires_grad or p.requires_grad_later for p in held):
        out.append(Cause("TL202", "all that the optimizer holds is frozen"))
    stale = stale_optimizers(run)
    if stale:
        n = sum(len(s.held) for s in stale)
        out.append(Cause("TL203", f"an optimizer holds {plural(n, 'tensor')} that the model no longer uses"))
    else:
        trained = {p.root for p in held}
        unheld = [p for p in unheld_parameters(run) if p.root in trained]
        # Whole loaded parts that were left out may be meant to stay as they are.
        if any(p.origin == "fresh" for p in unheld):
            total = trainable_weights(run, {p.root for p in unheld})
            share = percent(sum(p.numel for p in unheld), total)
            out.append(Cause("TL201", f"{share} of the trainable weights are in no optimizer"))
    measured = [m for m in run.steps if any(p.requires_grad for p in held)]
    if not out and measured and all(not m.gradient_norm_total for m in measured):
        found_before = any(m.gradient_norm_after_backward for m in measured)
        code = "TL303" if found_before else "TL204"
        out.append(Cause(code, "the optimizer's steps found no gradient"))
    softened = [
        line
        for line in lines_of(run, ("cross_entropy",))
        if line.inputs and all(i.made_by in ("softmax", "log_softmax") for i in line.inputs)
    ]
    if any(i.made_by == "softmax" for line in softened for i in line.inputs):
        out.append(Cause("TL501", "cross_entropy is given probabilities"))
    return out
