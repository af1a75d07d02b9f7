"""TL801: steps that are far too large or far too small for the weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, check
from trainlint.recording.describe import by_module, name_optimizer, number, plural
from trainlint.recording.intervals import Timeline
from trainlint.recording.projection import planned_steps
from trainlint.recording.rounding import settled
from trainlint.recording.schema import Optimizer, StateLoaded
from trainlint.recording.update_ratio import Movement, movements

#: A step of half the size of the weights; ordinary recipes at their first, largest steps measure 3e-4 to 0.1.
_HIGH = 0.5
_LOW = 1e-6
#: Change of the weights, had all steps of the plan the same direction, below which nothing is learned.
_NOTHING = 0.02
#: Times the median from which one layer stands out, and its ratio then.
_OUTLIER = 100.0
_OUTLIER_RATIO = 0.1
#: Matrices that begin smaller than this are meant to grow.
_SMALL_INIT = 2e-3
#: Matrices that must be seen.
_FEWEST = 2
_FEWEST_FOR_OUTLIERS = 4


@check("TL801", Recording, severity="warning", catalog="O22")
def update_ratio_out_of_band(run: Recording) -> Iterator[Finding]:
    """Steps that are far too large or far too small for the weights.

    ## What goes wrong
    A step that changes its weights by about a thousandth of their size trains; the rule is old and rough, and holds
    within two powers of ten. A rate in the wrong unit, a forgotten factor, a schedule that multiplies twice, a layer
    in the wrong group leave that band: at half of its size and more a matrix is overwritten with noise by every step,
    at a millionth a whole run changes nothing that could be seen.

    ## How it is detected
    For each weight matrix the norm of the change by a watched step over the norm of the matrix (of what it was at the
    first one, where it has grown since), the median of the steps. The update grows in proportion to the rate, so the
    ratio is scaled to the highest rate of the planned schedule: warm-up is not mistaken for a small rate. Judged is the
    median over the matrices of an optimizer: 0.5 and more; or below 1e-6, and too little to change the weights by 2% if
    all planned steps went the same way. A single matrix counts when its ratio is above 0.1 and 100 times the median.

    ## What to do
    Too large: divide the rate by ten until it is near 1e-3 to 1e-2, or give the layer named a rate of its own. Too
    small: look for the unit of the rate, the factor of the schedule, gradients that are divided twice or clipped while
    they are scaled. `--deep` runs a learning-rate range test.

    ## When it may be wrong
    The first steps of Adam are its largest: all elements move by the rate. The bounds leave room for that; measured
    on ordinary recipes were 3e-4 (AdamW below 1e-4) to 0.1. Vectors, embeddings, and matrices that began at zero
    or below 2e-3 are left out, as are tensors of no module (images, latent codes), optimizers whose step is not in
    proportion to their rate (L-BFGS, Rprop, Adadelta, rate-free methods), and half-precision weights of which only
    some move (TL805).

    ## References
    Karpathy, "A Recipe for Training Neural Networks" and CS231n (ratio of updates to weights); You et al. 2017, "Large
    Batch Training of Convolutional Networks".
    """
    timeline = Timeline(run)
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    rounded = settled(run)
    looked = unknown = False
    for optimizer in run.optimizers:
        moved = [m for m in movements(run, timeline, optimizer) if (optimizer.id, m.group) not in rounded]
        known = [m for m in moved if m.at_peak is not None and m.size >= _SMALL_INIT]
        unknown = unknown or len(known) < len(moved)
        if len(known) < _FEWEST:
            continue
        looked = True
        middle = statistics.median(m.at_peak for m in known if m.at_peak is not None)
        if middle >= _HIGH:
            yield _out_of_band(run, optimizer, known, middle, high=True)
        elif _too_low(run, optimizer, known, middle):
            yield _out_of_band(run, optimizer, known, middle, high=False)
        else:
            yield from _outliers(run, optimizer, known, middle)
    if not looked:
        if unknown:
            raise NotObserved("the peak of the learning rate is not known, or the weights began near zero")
        raise NotApplicable("no optimizer moves two weight matrices in proportion to its rate")


def _too_low(run: Recording, optimizer: Optimizer, known: Sequence[Movement], middle: float) -> bool:
    group = optimizer.groups[known[0].group].hyperparameters
    momentum = group.get("momentum")
    if isinstance(momentum, (int, float)) and 0 < momentum < 1:
        middle /= 1 - momentum
    # What is resumed may be in the tail of its schedule.
    resumed = any(
        isinstance(e, StateLoaded) and e.what in ("optimizer", "scheduler") and not e.empty for e in run.events
    )
    if middle >= _LOW or resumed or optimizer.state_loaded or optimizer.state_tensors_before:
        return False
    planned = planned_steps(run)
    # Gradients of a model that fits are small; Adam's steps are not.
    return middle * planned[0] < _NOTHING if planned is not None else "betas" in group or middle < _LOW / 10


def _outliers(run: Recording, optimizer: Optimizer, known: Sequence[Movement], middle: float) -> Iterator[Finding]:
    if len(known) < _FEWEST_FOR_OUTLIERS:
        return
    out = [m for m in known if m.at_peak is not None and m.at_peak >= max(_OUTLIER * middle, _OUTLIER_RATIO)]
    if not out or len(out) > len(known) / 4:
        return
    worst = max(out, key=lambda m: m.at_peak or 0.0)
    groups = by_module([m.parameter for m in out], [m.parameter for m in known])
    others = "" if len(out) == 1 else f" and {plural(len(out) - 1, 'other matrix').replace('matrixes', 'matrices')}"
    yield Finding(
        f"{worst.parameter.name}{others} in {name_optimizer(optimizer)} changes by {number(worst.at_peak)} of its size "
        f"in one step at the rate {number(worst.peak)}; the median of the {len(known)} matrices is {number(middle)}.",
        at=ParameterName(worst.parameter.name),
        evidence={
            "outliers": {m.parameter.name: m.at_peak for m in out[:20]},
            "median": middle,
            "matrices": len(known),
            "rate": worst.rate,
            "peak_rate": worst.peak,
        },
        fix="Give it a smaller rate in a param group of its own, or look for what makes its gradient so large.",
        about=groups[0].pattern,
    )


def _out_of_band(
    run: Recording, optimizer: Optimizer, known: Sequence[Movement], middle: float, *, high: bool
) -> Finding:
    typical = min(known, key=lambda m: abs((m.at_peak or 0.0) - middle))
    planned = planned_steps(run)
    peak = f" at the planned peak of {number(typical.peak)}" if (typical.peak or 0) > 1.01 * typical.rate else ""
    message = (
        f"One step of {name_optimizer(optimizer)} changes the weight matrices by {number(middle)} of their size{peak} "
        f"(median of {len(known)}; {typical.parameter.name}, weights of size {number(typical.size)}: "
        f"{number(typical.ratio)} at rate {number(typical.rate)})"
    )
    if high:
        message += ". Training takes about 0.001 to 0.01: each step overwrites what the weights held."
        fix = f"Lower the rate about {number(_round_factor(middle / 1e-2))}-fold, or look for its unit."
    else:
        message += ", where training takes about 0.001"
        if planned is not None:
            message += f": {planned[0]:,} steps change them by {number(100 * middle * planned[0])}% at most"
        message += "."
        fix = "Look for the unit of the rate, a factor of the schedule, gradients divided or clipped too much."
    return Finding(
        message,
        at=optimizer.at,
        evidence={
            "median_at_peak": middle,
            "matrices": len(known),
            "rate": typical.rate,
            "peak_rate": typical.peak,
            "by_matrix": {m.parameter.name: m.at_peak for m in known[:20]},
        },
        fix=fix,
        about="high" if high else "low",
    )


def _round_factor(value: float) -> float:
    """One significant digit."""
    return float(f"{value:.0e}")
