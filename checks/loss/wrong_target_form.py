"""TL503: targets in a form that the loss does not mean."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import number, percent, plural
from trainlint.recording.loss_calls import LossLine, lines_of, none_called
from trainlint.recording.schema import OptimizerStep
from trainlint.recording.timeline import of_kind

_INDEXED = ("cross_entropy", "nll_loss")
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
#: Losses whose targets are -1 and 1, and what they do with a target of 0.
_SIGNED = {
    "soft_margin_loss": "gives it a constant loss and no gradient",
    "cosine_embedding_loss": "leaves it out of the loss",
    "margin_ranking_loss": "gives it a constant loss and no gradient",
    "hinge_embedding_loss": "adds both the loss of a 1 and that of a -1 for it",
}
#: Values that mark a target as missing; whoever writes them masks the loss.
_SENTINELS = (-1.0, -100.0, 255.0)
#: How far the sum of a soft target may be from 1.
_CLOSE = 0.02
#: Targets that are needed to say of all of them that one class is never among them.
_ENOUGH = 32


@check("TL503", Recording, severity="error", catalog="O14")
def wrong_target_form(run: Recording) -> Iterator[Finding]:
    """Targets in a form that the loss does not mean.

    ## What goes wrong
    A class index outside [0, C) stops the program on the CPU, and on a GPU ends in a device-side assert that names
    neither the value nor the line. Other forms go through: a binary target outside [0, 1] leaves
    `binary_cross_entropy_with_logits` without a lower bound; a soft target below 0 does the same to `cross_entropy`; a
    vector of predictions and a vector of float labels make `cross_entropy` take the batch for the classes of one
    sample; -1 as the name of the negative class is skipped where it is also the `ignore_index`; 0 as the name of the
    negative class means nothing to losses on -1 and 1.

    ## How it is detected
    Every target of the watched calls is measured before the loss runs: range, whole numbers, the `ignore_index` in
    effect, values outside the classes, sums over the classes. What harms for sure is an error: indices outside the
    classes, binary targets outside [0, 1] in a loss that is not masked, negative soft targets. Soft targets whose rows
    do not sum to 1 are a warning. Where torch refuses the target, the finding says what it was and what it should be.

    ## What to do
    Classes are 0 to C - 1 (`labels - 1` for labels from 1), of dtype int64, in the input's shape without its class
    dimension; a class that is to be left out gets the `ignore_index`. Soft and one-hot targets are floats of the
    input's shape whose rows sum to 1. Binary targets are floats from 0 to 1 (`(labels + 1) / 2` for -1 and 1).

    ## When it may be wrong
    Float one-hot targets, mixup and label smoothing sum to 1; rows of zeros mask a position: silent. -1, -100 or 255
    for missing binary labels are right where the loss is masked (`weight=`, `reduction="none"`): silent. Targets
    weighted on purpose do not sum to 1 (a warning says so). Targets that are all of one class are no fault by
    themselves, and labels from 1 are not where the model has an output for class 0.

    ## References
    torch documentation, `torch.nn.CrossEntropyLoss` (target), `torch.nn.BCEWithLogitsLoss`, `torch.nn.SoftMarginLoss`.
    """
    lines = lines_of(run, [*_INDEXED, *_BINARY, *_SIGNED])
    if not lines:
        why = none_called(run)
        if why:
            raise NotObserved(why)
        raise NotApplicable("no loss on classes or labels is trained on")
    if not any(line.targets or any(c.raised for c in line.calls) for line in lines):
        raise NotObserved("the targets of the losses could not be measured (sharded, traced or without values)")
    for line in lines:
        if line.function in _SIGNED:
            yield from _signed(line)
        elif line.function in _BINARY:
            yield from _binary(line)
        else:
            yield from _classes(line, _survived(run, line))


# ------------------------------------------------------------------------------------------------------ classes


def _survived(run: Recording, line: LossLine) -> bool:
    """The loss refused its target, and the program caught that and stepped on."""
    refused = next((c.seq for c in line.calls if c.raised), None)
    return refused is not None and any(step.seq > refused for step in of_kind(run, OptimizerStep))


def _classes(line: LossLine, survived: bool) -> Iterator[Finding]:
    outside = [c for c in line.calls if c.target is not None and c.target.out_of_range]
    refused = next((c for c in line.calls if c.raised), None)
    soft = [c for c in line.calls if c.target is not None and c.target.row_sum_min is not None]
    if outside:
        yield _outside(line, survived)
    elif refused is not None:
        finding = _refused(line, survived)
        if finding is not None:
            yield finding
    elif soft:
        yield from _soft(line)
    else:
        yield from _negatives_ignored(line)


def _n_classes(line: LossLine) -> int:
    shape = line.calls[0].input_shape
    return shape[1] if len(shape) > 1 else shape[0] if shape else 0


def _ends(survived: bool) -> str:
    return "the program catches that and loses the batch" if survived else "the program stops there"


def _outside(line: LossLine, survived: bool) -> Finding:
    classes = _n_classes(line)
    targets = [t for t in line.targets if t.minimum is not None and t.maximum is not None]
    low = int(min(t.minimum for t in targets if t.minimum is not None))
    high = int(max(t.maximum for t in targets if t.maximum is not None))
    wrong, kept = sum(t.out_of_range or 0 for t in targets), sum(t.positions - (t.ignored or 0) for t in targets)
    ignore = line.calls[0].options.get("ignore_index", -100)
    died = any(c.raised for c in line.calls)
    message = (
        f"{line.name} gets class indices from {low} to {high} for {plural(classes, 'class')} (0 to {classes - 1}): "
        f"{wrong:,} of {kept:,} are outside"
        + (f"; {_ends(survived)}." if died else "; on a GPU this ends in a device-side assert.")
    )
    if low == 1 and high == classes:
        message += " They count from 1."
        fix = "Pass labels - 1."
    elif low == -1 and 0 <= high < classes:
        message += f" -1 is not the ignore_index here ({ignore})."
        fix = "If -1 marks what to leave out, pass ignore_index=-1; if it names a class, map the labels to 0, 1, ..."
    elif low < 0:
        message += f" The ignore_index is {ignore}."
        fix = f"Map the labels to 0 to {classes - 1}, and mark what is to be left out with ignore_index."
    elif high == 255 and classes < 255:
        message += f" 255 often marks unlabelled pixels; the ignore_index is {ignore}."
        fix = "Pass ignore_index=255 if that is what it means here."
    else:
        fix = f"Give the model {high + 1} outputs, or map the labels to 0 to {classes - 1}."
    return Finding(
        message,
        at=line.at,
        evidence={
            "classes": classes,
            "minimum": low,
            "maximum": high,
            "outside": wrong,
            "of": kept,
            "ignore_index": ignore,
            "raised": next((c.raised for c in line.calls if c.raised), None),
        },
        fix=fix,
        severity=Severity.WARNING if survived else None,
        about="outside",
    )


def _refused(line: LossLine, survived: bool) -> Finding | None:
    """What torch refused, where shape and dtype say why."""
    call = next(c for c in line.calls if c.raised)
    given, target, dtype = call.input_shape, call.target_shape, call.target_dtype.removeprefix("torch.")
    lead = given[:1] + given[2:] if len(given) > 1 else ()
    whole = "int" in dtype or dtype == "bool"
    if whole and target == given and len(given) > 1:
        what, fix = "one-hot rows of whole numbers", "target.float(), or the indices: target.argmax(dim=1)."
    elif whole and target == (*lead, 1):
        what, fix = "indices with a trailing dimension", "target.squeeze(-1)."
    elif not whole and dtype and target == lead:
        what, fix = "class indices as floats", "target.long()."
    elif whole and dtype not in ("int64", "uint8") and target == lead:
        what, fix = f"class indices as {dtype}", "target.long()."
    elif target and len(given) > 2 and target == (given[0], *given[1:-1]):
        what = f"indices of the shape {target}, with the classes last in the input"
        fix = "Move the classes to dimension 1: input.transpose(1, -1), or flatten both sides."
    else:
        return None
    return Finding(
        f"{line.name} refuses its target: {what} ({dtype} {target} for an input of {given}); {_ends(survived)}.",
        at=line.at,
        evidence={"input_shape": list(given), "target_shape": list(target), "dtype": dtype, "raised": call.raised},
        fix=fix,
        severity=Severity.WARNING if survived else None,
        about="refused",
    )


def _soft(line: LossLine) -> Iterator[Finding]:
    targets = [t for t in line.targets if t.row_sum_min is not None and t.row_sum_max is not None]
    low = min(t.minimum for t in targets if t.minimum is not None)
    sums = min(t.row_sum_min or 0.0 for t in targets), max(t.row_sum_max or 0.0 for t in targets)
    classes = _n_classes(line)
    evidence = {"minimum": low, "row_sum_min": sums[0], "row_sum_max": sums[1], "classes": classes}
    summed = f"{number(sums[0])} to {number(sums[1])}"
    flat = all(len(c.input_shape) == 1 for c in line.calls)
    if flat and classes > 1 and all(t.integral for t in targets) and not 1 - _CLOSE <= sums[0] <= sums[1] <= 1 + _CLOSE:
        yield Finding(
            f"{line.name} gets a vector of {classes} predictions and a vector of {classes} labels as floats, and so "
            f"takes the batch for the classes of one sample: its labels sum to {summed}, a distribution sums to 1.",
            at=line.at,
            evidence=evidence,
            fix="For two classes use binary_cross_entropy_with_logits; for more, keep the input at (batch, classes).",
            about="flat",
        )
    elif classes == 1 and any(t.maximum for t in targets):
        yield Finding(
            f"{line.name} has one class: softmax over it is 1 whatever the model says, so the loss is 0 and trains "
            "nothing.",
            at=line.at,
            evidence=evidence,
            fix="For one output use binary_cross_entropy_with_logits.",
            about="one class",
        )
    elif low < -1e-6:
        yield Finding(
            f"{line.name} gets soft targets down to {number(low)} (row sums {summed}): a target below 0 leaves the "
            "loss without a lower bound. Scores or log-probabilities are no targets.",
            at=line.at,
            evidence=evidence,
            fix="Pass probabilities: teacher_scores.softmax(dim=1).",
            about="negative",
        )
    elif sums[1] > 1 + _CLOSE:
        many = all(t.integral for t in targets) and all((t.maximum or 0) <= 1 for t in targets)
        kind = "several classes per sample" if many else "row sums are the weights of the samples"
        yield Finding(
            f"{line.name} gets soft targets whose rows sum to {summed} over {classes} classes, not to 1 ({kind}): the "
            "loss and its gradient are multiplied by that sum.",
            at=line.at,
            evidence=evidence,
            fix="For classes that do not exclude each other use binary_cross_entropy_with_logits; else divide each row "
            "by its sum."
            if many
            else "Divide each row by its sum: target / target.sum(dim=1, keepdim=True).",
            severity=Severity.WARNING,
            about="sum",
        )


def _negatives_ignored(line: LossLine) -> Iterator[Finding]:
    """Labels -1 and 1 under ignore_index=-1: only one class is left."""
    targets = [t for t in line.targets if t.ignored is not None]
    if _n_classes(line) != 2 or any(c.options.get("ignore_index") != -1 for c in line.calls):
        return
    positions, ignored = sum(t.positions for t in targets), sum(t.ignored or 0 for t in targets)
    kept = [t for t in targets if t.minimum is not None]
    if positions < _ENOUGH or not 0.2 <= ignored / positions <= 0.8 or not kept:
        return
    if any(t.minimum != 1 or t.maximum != 1 for t in kept):
        return
    yield Finding(
        f"{line.name} skips {ignored:,} of {positions:,} targets ({percent(ignored, positions)}): they are -1, the "
        "ignore_index, and all the others are class 1. Where -1 names the negative class, it is never trained.",
        at=line.at,
        evidence={"positions": positions, "ignored": ignored, "ignore_index": -1},
        fix="Map the labels to 0 and 1: (labels + 1) // 2.",
        severity=Severity.WARNING,
        about="ignored",
    )


# ------------------------------------------------------------------------------------------------- -1 and 1, 0 and 1


def _binary(line: LossLine) -> Iterator[Finding]:
    targets = [t for t in line.targets if t.minimum is not None and t.maximum is not None]
    if not targets:
        return
    low = min(t.minimum for t in targets if t.minimum is not None)
    high = max(t.maximum for t in targets if t.maximum is not None)
    if low >= -1e-6 and high <= 1 + 1e-6 or low != low or high != high:
        return
    masked = all(c.reduction == "none" or "weight" in c.options for c in line.calls)
    marks = (low >= -1e-6 or low in _SENTINELS) and (high <= 1 + 1e-6 or high in _SENTINELS)
    if masked and marks:
        return
    signed = (low, high) == (-1.0, 1.0) and all(t.integral for t in targets)
    message = f"{line.name} gets targets from {number(low)} to {number(high)}; it means probabilities from 0 to 1. "
    message += (
        "For a target of -1 the loss has no lower bound: the score falls for ever."
        if signed
        else "Outside that range the loss has no lower bound."
    )
    yield Finding(
        message,
        at=line.at,
        evidence={"minimum": low, "maximum": high, "targets": sum(t.positions for t in targets)},
        fix="(labels + 1) / 2, or soft_margin_loss for labels -1 and 1; mask what is missing with weight=."
        if low < 0
        else "Bring the targets to 0 to 1 (255 in an image is 1), or use cross_entropy for class indices.",
        severity=Severity.WARNING if masked else None,
        about="range",
    )


def _signed(line: LossLine) -> Iterator[Finding]:
    targets = [t for t in line.targets if t.minimum is not None]
    zeros = [t for t in targets if t.minimum == 0 and t.maximum in (0, 1) and t.integral]
    if not zeros or len(zeros) != len(targets) or not any(t.maximum == 1 for t in zeros):
        return
    yield Finding(
        f"{line.name} gets targets 0 and 1; it means -1 and 1. For a target of 0 it {_SIGNED[line.function]}.",
        at=line.at,
        evidence={"minimum": 0, "maximum": 1, "targets": sum(t.positions for t in targets)},
        fix="Pass 2 * labels - 1.",
        about="signs",
    )
