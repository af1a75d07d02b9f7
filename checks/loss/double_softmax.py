"""TL501: cross-entropy over values that are probabilities already."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import number, percent, place, uses
from trainlint.recording.loss_calls import LossLine, lines_of, maker, none_called
from trainlint.recording.source_models import loss_uses
from trainlint.recording.source_order import NOT_RUN, traces_of

#: Operations whose outputs are no probabilities over the classes, whatever their values.
_OTHERS = frozenset({"linear", "log_softmax", "sigmoid"})


@check("TL501", Recording, severity="error", catalog="O12")
def double_softmax(run: Recording) -> Iterator[Finding]:
    """Cross-entropy over values that are probabilities already.

    ## What goes wrong
    `cross_entropy` (and `nn.CrossEntropyLoss`) applies log_softmax to what it gets. Given probabilities, the second
    softmax sees numbers between 0 and 1 only: its output can never be far from uniform. Over C classes the loss
    cannot fall below ln(e + C - 1) - 1 (1.46 for ten), and the slope of the first softmax shrinks the gradient, to
    about a tenth at first and to nearly nothing where the model is sure. The run learns slowly, stops early, and
    looks like a model that is too small.

    ## How it is detected
    From what reached the loss in the watched steps: the operation that made it, read from the autograd graph through
    views, casts and copies (a module, a function, a helper, or exp divided by its sum: all the same), and its values
    (each row between 0 and 1, with sum 1). The share of the gradient that is left is computed from the measured
    probabilities and targets: J (softmax(p) - t) beside p - t, where J is the slope of the first softmax.

    Without a run, from the source: every way through the model (or the function) that makes the input ends in a
    softmax, and the loss reaches a backward.

    ## What to do
    Give the loss the raw scores: remove the softmax from the end of the model, and apply it only where probabilities
    are shown or stored. Where the model must return probabilities, `nll_loss(torch.log(p), target)` is the right loss.

    ## When it may be wrong
    Where the graph cannot be read (a compiled model), rows that sum to 1 are the evidence; a handful of rows, rows
    that are one-hot and rows that are all alike do not count. Soft *targets* may be probabilities. Log-probabilities
    are harmless: log_softmax of them is the identity, so they give an info only. Logits that merely lie between 0
    and 1, cosine similarities, and a loss that no backward comes back to are not reported. Outputs of a sigmoid meet
    the same bound, but may be meant as scores: a warning.

    ## References
    torch documentation, `torch.nn.CrossEntropyLoss`: "The input is expected to contain the unnormalized logits".
    """
    lines = lines_of(run, ["cross_entropy"], by_maker=True)
    if not lines:
        why = none_called(run)
        if why:
            raise NotObserved(why)
        raise NotApplicable("no cross-entropy is trained on")
    measured = False
    for line in lines:
        measured = measured or bool(line.inputs)
        if any((i.classes or 0) < 2 for i in line.inputs):
            continue
        if line.made_by == "softmax" or (line.made_by not in _OTHERS and line.probabilities()):
            yield _probabilities(run, line)
        elif line.made_by == "sigmoid":
            yield _sigmoid(run, line)
        elif line.made_by == "log_softmax":
            yield _log_softmax(run, line)
    if not measured:
        raise NotObserved("the inputs of cross_entropy could not be measured (sharded, traced or without values)")


def _floor(classes: int) -> float:
    """What cross-entropy cannot fall below on values between 0 and 1."""
    return math.log(math.e + classes - 1) - 1


def _probabilities(run: Recording, line: LossLine) -> Finding:
    classes = line.inputs[0].classes or 0
    kept = [i.gradient_kept for i in line.inputs if i.gradient_kept is not None]
    module = maker(run, "Softmax", "Softmax2d", "Softmin")
    low, high = line.low(lambda i: i.row_sum_min), line.high(lambda i: i.row_sum_max)
    sums = "rows sum to 1" if line.probabilities() else f"row sums {number(low)} to {number(high)}"
    if line.made_by == "softmax":
        over = line.other_dimension()
        source = f"softmax{f' (module {module})' if module else ''} made them"
        source += f", over dimension {over} and not over the classes" if over is not None else ""
    else:
        source = "by their values"
    message = (
        f"{line.name} gets probabilities ({source}: {line.values()} over {classes:,} classes, {sums}) and applies "
        "softmax again."
    )
    if kept:
        message += f" Of the gradient, {percent(sum(kept) / len(kept), 1)} reaches the logits."
    message += f" The loss of a sample cannot fall below {number(_floor(classes))}."
    return Finding(
        message,
        at=line.at,
        evidence={
            "made_by": line.made_by or None,
            "module": module or None,
            "classes": classes,
            "minimum": line.low(lambda i: i.minimum),
            "maximum": line.high(lambda i: i.maximum),
            "row_sum_min": low,
            "row_sum_max": high,
            "rows": line.rows,
            "gradient_kept": sum(kept) / len(kept) if kept else None,
            "loss_floor": _floor(classes),
        },
        fix=_fix(run, f"Remove the softmax{f' ({module})' if module and line.made_by else ''}"),
        about="softmax",
    )


def _sigmoid(run: Recording, line: LossLine) -> Finding:
    classes = line.inputs[0].classes or 0
    return Finding(
        f"{line.name} gets outputs of a sigmoid ({line.values()} over {classes:,} classes) as scores and applies "
        f"softmax to them: between 0 and 1 they cannot be far apart, so the loss cannot fall below "
        f"{number(_floor(classes))}.",
        at=line.at,
        evidence={"made_by": "sigmoid", "classes": classes, "rows": line.rows, "loss_floor": _floor(classes)},
        fix=_fix(run, "Remove the sigmoid")
        + " For classes that do not exclude each other use binary_cross_entropy_with_logits.",
        severity=Severity.WARNING,
        about="sigmoid",
    )


def _log_softmax(run: Recording, line: LossLine) -> Finding:
    over = line.other_dimension()
    if over is not None:
        return Finding(
            f"{line.name} gets the output of log_softmax over dimension {over} of {line.calls[0].input_shape}, which "
            "is not the classes': each score depends on the other samples of the batch.",
            at=line.at,
            evidence={"made_by": "log_softmax", "dimension": over, "shape": list(line.calls[0].input_shape)},
            fix="Remove the log_softmax: cross_entropy applies its own, over the classes (dimension 1).",
            severity=Severity.WARNING,
            about="dimension",
        )
    return Finding(
        f"{line.name} gets log-probabilities (log_softmax made them) and applies log_softmax again. Harmless: the "
        "second changes nothing, it only costs time and memory.",
        at=line.at,
        evidence={"made_by": "log_softmax", "rows": line.rows},
        fix="Use nll_loss on the log-probabilities, or cross_entropy on the raw scores.",
        severity=Severity.INFO,
        about="log_softmax",
    )


def _fix(run: Recording, remove: str) -> str:
    where = "before the loss"
    if uses(run, "lightning"):
        where = "from forward or training_step and apply it in predict_step"
    elif uses(run, "transformers"):
        where = "from the model's logits"
    return f"{remove} {where}: cross_entropy wants raw scores."


# ---------------------------------------------------------------------------------------------- without a run


@check("TL501", SourceFacts, severity="error", catalog="O12")
def double_softmax_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from the operation that makes the input of the loss."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for use in loss_uses(trace):
            if use.function == "cross_entropy" and use.made_by in ("softmax", "sigmoid"):
                what = "probabilities" if use.made_by == "softmax" else "values between 0 and 1"
                yield Finding(
                    f"cross_entropy ({place(use.call.at)}) is given {what}: its input comes from {use.made_by} "
                    f"({place(use.made_at)}), and cross_entropy applies log_softmax itself. {NOT_RUN}",
                    at=use.call.at,
                    evidence={"function": use.function, "made_by": use.made_by, "made_at": place(use.made_at)},
                    fix=f"Give cross_entropy the raw scores: leave the {use.made_by} out of the model.",
                    severity=None if use.made_by == "softmax" and use.trained else Severity.WARNING,
                    about=place(use.call.at).partition(":")[0],
                )
