"""TL403: the configured rate is far from where the loss responds."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, SourceLine, check
from trainlint.recording.describe import number
from trainlint.recording.experiment_plan import LR_RANGE_STEPS, seconds
from trainlint.recording.length import planned_length
from trainlint.recording.lr_band import Band, NoBand, band
from trainlint.recording.schema import Experiment, Optimizer

#: The configured rate must lie this far below the beginning of the band ...
BELOW = 100.0
#: ... or this far, when nobody says how long the run is ...
BELOW_UNKNOWN = 500.0
#: ... and the run must spend this share of its steps before its loss begins to fall.
WASTED = 0.1
#: How far above the rate at which the sweep blew up.
ABOVE = 1.5


@check("TL403", Recording, severity="warning", catalog="O7")
def lr_outside_productive_band(run: Recording) -> Iterator[Finding]:
    """The configured learning rate is far from where the loss responds.

    ## What goes wrong
    A rate a thousand times too low (a slipped exponent, a factor applied twice, one for another optimizer) trains: the
    loss wobbles, nothing crashes, and the run ends about where it began. A rate above the point where the loss blows up
    ends in noise.

    ## How it is detected
    Only with `--deep`: the program is started once more, and over 100 optimizer steps on its own data the rate grows
    geometrically from 1e-7 to 10; several param groups keep their ratios. Where the loss begins to fall, falls
    fastest and is lowest gives the band. One step per rate shows less than a run, so what is compared is distance: the
    sum of all rates up to where the loss began to fall, against the configured peak rate times the steps of the run.

    A warning: the configured rate is 100 times below the beginning of the band and a tenth of the planned steps would
    pass before the loss begins to fall (500 times below where the length is not known); or it is above the rate from
    which on the loss was more than twice what it was at first.

    ## What to do
    Take about a tenth of the steepest point: the test goes one step per rate, a run goes many. Look for what made the
    rate: a config value in the wrong unit, a scaling by batch size or accumulation that was applied twice.

    ## When it may be wrong
    Bands are wide and the test is short. Where the loss did not respond to any rate beyond its own noise, nothing is
    said. A long warm-up, or a model that needs many steps before its loss moves at all, shows a band that lies too
    high. Of a rate that is set by hand only what the optimizer was built with is known; it is not judged as too high.

    ## References
    Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3.3.
    """
    made = next((e for e in run.experiments if e.name == "lr-range"), None)
    if made is None:
        raise NotObserved(f"not made; --deep sweeps the rate ({LR_RANGE_STEPS} optimizer steps{_cost(run)})")
    if made.outcome == "left-out":
        if made.reason == "interrupted":
            raise NotObserved("the experiment was interrupted before it began")
        raise NotApplicable(made.reason)
    if made.outcome != "done":
        raise NotObserved(f"the experiment made no step: {made.reason}")
    optimizer = next((o for o in run.optimizers if o.id == made.optimizer), None)
    peak = made.peak_rate
    if optimizer is None or not peak:
        raise NotObserved("the configured learning rate is not known")
    try:
        seen = band(made)
    except NoBand as reason:
        raise NotObserved(str(reason)) from None
    # Of rates that are set by hand only the one that the optimizer was built with is known, which nothing may use.
    if seen.diverges is not None and made.configured_rate and made.configured_rate > ABOVE * seen.diverges:
        yield _above(run, made, optimizer, seen, made.configured_rate)
        return
    low = _below(run, made, optimizer, seen, peak)
    if low is not None:
        yield low


def _cost(run: Recording) -> str:
    whole = seconds(run, LR_RANGE_STEPS)
    return f", about {whole:.0f} s here" if whole is not None else ""


def _below(run: Recording, made: Experiment, optimizer: Optimizer, seen: Band, configured: float) -> Finding | None:
    length = planned_length(run, optimizer.id)
    steps = length[0] if length is not None else None
    needed = seen.travelled / configured
    if seen.begins / configured < (BELOW if steps else BELOW_UNKNOWN):
        return None
    if steps and needed < WASTED * steps:
        return None
    of = f" of the planned {steps:,}" if steps else ""
    return Finding(
        f"The peak learning rate {number(configured)} is {_about(seen.begins / configured)} times below where the loss "
        f"begins to respond: in the range test it began to fall at {number(seen.begins)}, fell fastest at "
        f"{number(seen.steepest)} and was lowest at {number(seen.ends)} ({number(seen.loss_before)} to "
        f"{number(seen.loss_lowest)}). At the configured rate the way to there takes about "
        f"{_about(needed)} steps{of}.",
        at=_place(optimizer),
        evidence=_evidence(made, seen, configured, steps),
        fix=f"Try about {number(seen.steepest / 10)}, a tenth of the steepest point; look for what made the rate so "
        "small.",
        about="below",
    )


def _above(run: Recording, made: Experiment, optimizer: Optimizer, seen: Band, configured: float) -> Finding:
    return Finding(
        f"The peak learning rate {number(configured)} is above {number(seen.diverges)}, from where on the loss blew up "
        f"in the range test; it was lowest at {number(seen.ends)} ({number(seen.loss_before)} to "
        f"{number(seen.loss_lowest)}).",
        at=_place(optimizer),
        evidence=_evidence(made, seen, configured, None),
        fix=f"Try about {number(seen.steepest / 10)}, a tenth of the steepest point.",
        about="above",
    )


def _evidence(made: Experiment, seen: Band, configured: float, steps: int | None) -> dict[str, float | int | None]:
    return {
        "configured_rate": configured,
        "begins": seen.begins,
        "steepest": seen.steepest,
        "ends": seen.ends,
        "diverges": seen.diverges,
        "loss_before": seen.loss_before,
        "loss_lowest": seen.loss_lowest,
        "planned_steps": steps,
        "steps_swept": len(made.curves[-1].points),
    }


def _about(value: float) -> str:
    """Two digits: more were not measured."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _place(optimizer: Optimizer) -> SourceLine | None:
    return optimizer.at
