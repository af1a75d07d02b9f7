"""TL502: a sigmoid before a loss that has its own, or before binary_cross_entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import number, percent, place
from trainlint.recording.loss_calls import LossLine, lines_of, maker, none_called
from trainlint.recording.source_models import loss_uses
from trainlint.recording.source_order import NOT_RUN, traces_of

#: Losses that apply a sigmoid to their input.
_ON_LOGITS = ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
#: Share of the probabilities of a call that may be stuck on the wrong side before it counts as harm.
_STUCK = 0.01
#: Probabilities that must lie between 0 and 1 before values stand in for a graph that cannot be read.
_MANY = 64


@check("TL502", Recording, severity="error", catalog="O13")
def sigmoid_before_bce(run: Recording) -> Iterator[Finding]:
    """A sigmoid before a loss that has its own, or before binary_cross_entropy.

    ## What goes wrong
    `binary_cross_entropy_with_logits` (`nn.BCEWithLogitsLoss`) applies the sigmoid itself. Given the output of one, it
    sees logits between 0 and 1: the model can then only say 0.5 to 0.73, the loss of a negative never falls below
    0.693 nor that of a positive below 0.313, and the gradient is a quarter or less of what it should be. Nothing fails.

    `binary_cross_entropy` (`nn.BCELoss`) does want probabilities, and a sigmoid before it trains well as long as it
    does not saturate: in float32 it rounds to exactly 1 from logits of about 17 (in bfloat16 from about 6), where the
    loss stands at its clamp of 100 and the gradient is exactly 0, so a confident mistake is never corrected.

    ## How it is detected
    From the operation that made what reached the loss in the watched steps (autograd graph, through views and casts)
    and its values. For `binary_cross_entropy`, the probabilities are counted that lie on the wrong side of their target
    and so close to 0 or 1 that the gradient is lost: an error from 1% of a batch on, a warning below. For the losses
    on logits it is an error, with the share of the gradient that is left.

    Without a run, from the source, for the losses on logits only: every way through the model that makes the input
    ends in a sigmoid, and the loss reaches a backward.

    ## What to do
    Give `binary_cross_entropy_with_logits` the raw scores, without any sigmoid in the model; apply the sigmoid where
    probabilities are shown or stored. It is exact for logits of any size, and works under autocast, where
    `binary_cross_entropy` does not.

    ## When it may be wrong
    Values that merely lie between 0 and 1 (small or clamped logits, a ReLU, probabilities that are inputs) are not
    taken for the output of a sigmoid; only for a compiled model, whose graph cannot be read, they count together with
    an `nn.Sigmoid` in the model, as a warning. For `binary_cross_entropy`
    that is no fault in two textbook programs: a discriminator with all-real and all-fake batches, and targets between
    0 and 1 (pixels of an autoencoder), whose best answer is not at the ends. Both are reported only once gradients are
    lost.

    ## References
    torch documentation, `torch.nn.BCEWithLogitsLoss`: "more numerically stable than using a plain Sigmoid followed by
    a BCELoss"; `torch.nn.BCELoss` on its clamp.
    """
    lines = lines_of(run, [*_ON_LOGITS, "binary_cross_entropy"], by_maker=True)
    if not lines:
        why = none_called(run)
        if why:
            raise NotObserved(why)
        raise NotApplicable("no binary cross-entropy is trained on")
    if not any(line.inputs for line in lines):
        raise NotObserved("the inputs of the loss could not be measured (sharded, traced or without values)")
    one_sided = _one_sided(lines)
    for line in lines:
        if line.function in _ON_LOGITS:
            if line.made_by in ("sigmoid", "softmax") or _by_values(run, line):
                yield _twice(run, line)
        elif line.made_by == "sigmoid":
            yield from _plain(run, line, one_sided)


def _by_values(run: Recording, line: LossLine) -> bool:
    """A compiled model with an nn.Sigmoid, and many values all well between 0 and 1."""
    return (
        bool(line.inputs)
        and all(i.node.startswith("CompiledFunction") for i in line.inputs)
        and line.rows >= _MANY
        and line.within(1e-6, 1 - 1e-6, lambda i: (i.minimum, i.maximum))
        and bool(maker(run, "Sigmoid"))
    )


def _twice(run: Recording, line: LossLine) -> Finding:
    kept = [i.gradient_kept for i in line.inputs if i.gradient_kept is not None]
    made_by = line.made_by or "sigmoid"
    module = maker(run, "Softmax" if made_by == "softmax" else "Sigmoid")
    source = f"{made_by} made them" if line.made_by else "by their values"
    named = f" (module {module})" if module else ""
    message = (
        f"{line.name} gets probabilities ({source}{named}: {line.values()}) and applies a sigmoid to them: its "
        "predictions can only lie between 0.5 and 0.731, and the loss of a negative never falls below 0.693."
    )
    if kept:
        message += f" Of the gradient, {percent(sum(kept) / len(kept), 1)} reaches the logits."
    return Finding(
        message,
        at=line.at,
        evidence={
            "made_by": line.made_by or None,
            "module": module or None,
            "minimum": line.low(lambda i: i.minimum),
            "maximum": line.high(lambda i: i.maximum),
            "elements": line.rows,
            "gradient_kept": sum(kept) / len(kept) if kept else None,
            "floor_positive": math.log1p(math.exp(-1)),
            "floor_negative": math.log(2),
        },
        fix=f"Remove the {made_by}{named} before {line.function}: it wants raw scores.",
        severity=None if line.made_by else Severity.WARNING,
        about=line.function,
    )


def _plain(run: Recording, line: LossLine, one_sided: bool) -> Iterator[Finding]:
    refused = next((c.raised for c in line.calls if c.raised and "autocast" in c.raised), None)
    worst = max(line.inputs, key=lambda i: (i.vanished or 0) / max(1, i.rows))
    stuck = worst.vanished or 0
    if (one_sided or any(t.integral is False for t in line.targets)) and not stuck and not refused:
        return
    low, high = line.low(lambda i: i.minimum), line.high(lambda i: i.maximum)
    module = maker(run, "Sigmoid")
    message = f"{line.name} gets the output of a sigmoid{f' (module {module})' if module else ''}"
    severity: Severity | None = Severity.WARNING
    if refused:
        message += ", and torch refuses this loss under autocast: the program cannot train so."
        severity = None
    elif stuck:
        share = stuck / worst.rows
        message += (
            f" that is saturated: {stuck:,} of {worst.rows:,} elements ({percent(stuck, worst.rows)}) are wrong and "
            "rounded so close to 0 or 1 that their gradient is lost; the loss stands at its clamp of 100 there."
        )
        severity = None if share >= _STUCK else Severity.WARNING
    else:
        message += (
            f" ({number(low)} to {number(high)}, none saturated on the wrong side yet). Once it rounds to 0 or 1, the "
            "gradient of a confident mistake is lost."
        )
    yield Finding(
        message,
        at=line.at,
        evidence={
            "made_by": "sigmoid",
            "minimum": low,
            "maximum": high,
            "elements": line.rows,
            "stuck": stuck,
            "stuck_of": worst.rows,
            "saturated": line.high(lambda i: i.saturated),
        },
        fix="Leave the sigmoid out and use binary_cross_entropy_with_logits (nn.BCEWithLogitsLoss).",
        severity=severity,
        about=line.function,
    )


def _one_sided(lines: list[LossLine]) -> bool:
    """Every call has one value as its target, and there are two of them: real and fake."""
    targets = [t for line in lines if line.function == "binary_cross_entropy" for t in line.targets]
    values = {(t.minimum, t.maximum) for t in targets}
    return len(values) > 1 and all(low is not None and low == high for low, high in values)


# ---------------------------------------------------------------------------------------------- without a run


@check("TL502", SourceFacts, severity="error", catalog="O13")
def sigmoid_before_bce_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from the operation that makes the input of the loss."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for use in loss_uses(trace):
            if use.function in _ON_LOGITS and use.made_by in ("sigmoid", "softmax"):
                yield Finding(
                    f"{use.function} ({place(use.call.at)}) applies a sigmoid itself, and its input comes from "
                    f"{use.made_by} ({place(use.made_at)}) already. {NOT_RUN}",
                    at=use.call.at,
                    evidence={"function": use.function, "made_by": use.made_by, "made_at": place(use.made_at)},
                    fix=f"Give it the raw scores: leave the {use.made_by} out of the model.",
                    severity=None if use.trained else Severity.WARNING,
                    about=place(use.call.at).partition(":")[0],
                )
