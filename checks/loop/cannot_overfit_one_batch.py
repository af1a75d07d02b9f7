"""TL301: one batch, given again and again, is not learned."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceLine, check
from trainlint.recording.describe import number, plural
from trainlint.recording.experiment_plan import ENOUGH, OVERFIT_STEPS, seconds
from trainlint.recording.loss_calls import lines_of
from trainlint.recording.overfitting import LEAST_STEPS, Cause, Fit, causes, fit, room_to_fit
from trainlint.recording.schema import Backward, Experiment
from trainlint.recording.timeline import of_kind

#: Where the watched steps show a fault that explains it, a loss that has not come near its floor is one not learned.
NEAR = 0.95
#: A loss at the start this many times that of guessing, and that much above it, is no bad luck of the weights.
FAR_ABOVE = 3.0
ABOVE = 2.0


@check("TL301", Recording, severity="error", catalog="O1")
def cannot_overfit_one_batch(run: Recording) -> Iterator[Finding]:
    """One batch, given again and again, is not learned.

    ## What goes wrong
    A model with room enough learns a single batch by heart within some hundred steps, whatever the data. When it does
    not, something between the loss and the weights is broken: the loss hangs from no weight, weights are in no
    optimizer, gradients are cleared before the step, the loss is computed from the wrong tensor. On the whole data
    such a run looks like a hard task.

    ## How it is detected
    Only with `--deep`: the program is started once more in a child of its own, for up to 300 optimizer steps. The
    first training batch is given out again and again (where batches are drawn by hand, the random state is put back
    before each draw, and it is verified that the same batch came), so augmentation and shuffling stand still; dropout
    and weight decay are off, the schedule is replaced by one rate that suits the optimizer. The loss must come near its
    floor: 0, or what label smoothing and soft targets leave. When it does not, another rate is tried, up to three.

    An error: the loss did not change at all, or it did not come near its floor and the watched steps show why (no other
    rate is tried then). A warning: it fell by less than half at every rate and stopped falling, with no known cause,
    while the model has ten times more weights than the batch has targets, trains most of them, and predicts straight
    from a layer. Also a warning: the loss starts far above that of guessing (ln C for C classes) in a model whose
    weights are all fresh (with tied weights, information).

    ## What to do
    Repair the cause that the finding names; its own finding has the details. With none named, look at the batch: do the
    targets belong to the inputs, are all inputs alike, is the loss on the right tensor.

    ## When it may be wrong
    Losses without a known floor (contrastive, adversarial, likelihoods of densities, sums of several terms) are judged
    only when the loss does not move at all. A batch with contradicting targets, or whose inputs the model cannot tell
    apart, has a floor of its own: without a known cause nothing is an error. Optimizers that take turns on losses of
    their own (GANs) and those that find their own step sizes are left out.

    ## References
    Karpathy, "A Recipe for Training Neural Networks" (2019), "overfit one batch", "verify loss @ init".
    """
    made = next((e for e in run.experiments if e.name == "overfit"), None)
    if made is None:
        raise NotObserved(f"not made; --deep overfits one batch (up to {OVERFIT_STEPS} optimizer steps{_cost(run)})")
    _require_judgeable(made)
    yield from _start(run)
    found = fit(made)
    if found is None:
        last = made.curves[-1]
        raise NotObserved(
            f"only {plural(len(last.points), 'optimizer step')} could be made: {last.reason or last.ended}; "
            f"{LEAST_STEPS} are needed"
        )
    known = causes(run)
    enough = NEAR if known and found.floor is not None else ENOUGH
    if found.curve.ended == "reached" or (found.fallen >= enough and not found.constant):
        return
    if found.floor is not None and found.first - found.floor <= 0.02:
        return  # nothing to learn: it begins where it should end
    if found.constant:
        strong = bool(known) or (made.loss is not None and made.loss.alone)
        yield _finding(run, made, found, known, Severity.ERROR if strong else Severity.WARNING)
        return
    if found.floor is None:
        raise NotObserved(
            f"the loss fell from {number(found.first)} to {number(found.lowest)} in {found.steps} steps; how low it "
            "can get is not known, so that nothing can be said"
        )
    if known:
        yield _finding(run, made, found, known, Severity.ERROR)
        return
    if found.still_falling:
        raise NotObserved(
            f"the loss of the repeated batch was still falling after {found.steps} steps ({number(found.first)} to "
            f"{number(found.last)}); more steps would tell"
        )
    if room_to_fit(run, made):
        yield _finding(run, made, found, known, Severity.WARNING)
        return
    raise NotObserved(
        f"the loss of the repeated batch fell from {number(found.first)} to {number(found.lowest)}; whether this model "
        "could go lower on this batch cannot be told"
    )


def _cost(run: Recording) -> str:
    whole = seconds(run, OVERFIT_STEPS)
    return f", about {whole:.0f} s here" if whole is not None else ""


def _require_judgeable(made: Experiment) -> None:
    if made.outcome == "left-out":
        if made.reason == "interrupted":
            raise NotObserved("the experiment was interrupted before it began")
        raise NotApplicable(made.reason)
    if made.outcome != "done":
        raise NotObserved(f"the experiment made no step: {made.reason}")
    if made.different_batches is not None and made.different_batches > 1:
        raise NotObserved(
            "the program draws its batches by hand and the same one could not be made to come again "
            f"({made.different_batches} different ones came)"
        )
    if made.repeated_by == "random" and made.different_batches is None:
        raise NotObserved("the program draws its batches by hand, and whether the same one came again was not seen")


def _finding(run: Recording, made: Experiment, found: Fit, known: list[Cause], severity: Severity) -> Finding:
    rates = [c.rate for c in made.curves if c.rate is not None]
    at = ", ".join(number(r) for r in rates)
    tried = f"rate {at}" if len(rates) == 1 else f"rates {at}"
    if found.constant:
        what = (
            f"One batch given {found.steps} times is not learned: the loss stays at {number(found.last)} to the last "
            f"bit ({tried})."
        )
    elif found.diverged and not math.isfinite(found.last):
        what = f"One batch given again and again is not learned: the loss becomes {found.last} ({tried})."
    else:
        what = (
            f"One batch given {found.steps} times is not learned: the loss went from {number(found.first)} to "
            f"{number(found.lowest)} at best ({tried}); it can get to {number(found.floor)}."
        )
    why = "; ".join(f"{cause.text} ({cause.code})" for cause in known[:3])
    text = f"{what} Likely because {why}." if why else f"{what} Nothing else in the watched steps explains it."
    loss = made.loss
    return Finding(
        text,
        at=_place(run),
        evidence={
            "loss_first": found.first,
            "loss_lowest": found.lowest,
            "loss_last": found.last,
            "floor": found.floor,
            "steps": found.steps,
            "rates": rates,
            "loss_function": loss.function if loss is not None else "",
            "held_still": list(made.held_still),
            "causes": [cause.code for cause in known],
        },
        fix=f"See {known[0].code}: {known[0].text}."
        if known
        else "Look at this one batch: do its targets belong to its inputs, can the inputs be told apart, does the loss "
        "get the model's output and the right targets.",
        severity=severity,
        about="one-batch",
    )


def _place(run: Recording) -> SourceLine | None:
    return next((b.at for b in of_kind(run, Backward) if b.at is not None), None)


def _start(run: Recording) -> Iterator[Finding]:
    """The first loss of a classifier with fresh weights, against that of guessing."""
    weights = [p for p in run.parameters if p.requires_grad]
    if not weights or any(p.origin != "fresh" for p in weights):
        return
    for line in lines_of(run, ("cross_entropy",)):
        call = line.calls[0]
        seen, target = call.input, call.target
        if (
            seen is None
            or target is None
            or call.value is None
            or call.reduction != "mean"
            or call.options.get("weight")
        ):
            continue
        # Straight out of a layer: scaled similarities (ArcFace, CLIP) may rightly begin high.
        if seen.made_by != "linear" or not seen.classes or seen.classes < 2 or not math.isfinite(call.value):
            continue
        guessing = math.log(seen.classes)
        if call.value < FAR_ABOVE * guessing + ABOVE:
            continue
        yield Finding(
            f"The loss starts at {number(call.value)}; guessing among {seen.classes} classes costs ln {seen.classes} = "
            f"{number(guessing)}. Fresh weights make confident predictions (outputs from {number(seen.minimum)} to "
            f"{number(seen.maximum)}), so the first steps only undo them.",
            at=line.at,
            evidence={"loss_first": call.value, "classes": seen.classes, "ln_classes": guessing},
            fix="Initialise the last layer smaller, and bring its inputs to unit size (a norm before it).",
            # An output layer that is also the embedding is drawn as wide as an embedding by many who know it.
            severity=Severity.INFO if any(p.tied for p in weights) else Severity.WARNING,
            about="first-loss",
        )
        return
