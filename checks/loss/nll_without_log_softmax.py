"""TL505: nll_loss or kl_div over values that are no log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import number, percent, place, uses
from trainlint.recording.loss_calls import LossLine, alone, lines_of, maker, none_called
from trainlint.recording.source_models import LossUse, loss_uses
from trainlint.recording.source_order import NOT_RUN, traces_of

#: How far the log-sum-exp of a row of log-probabilities may be from 0, by rounding and by an epsilon in the logarithm.
_CLOSE = 0.02
_CLOSE_IN_HALF = 0.1


@check("TL505", Recording, severity="error", catalog="O16")
def nll_without_log_softmax(run: Recording) -> Iterator[Finding]:
    """nll_loss or kl_div over values that are no log-probabilities.

    ## What goes wrong
    `nll_loss` only picks the value of the target class and turns its sign: on raw scores that is a number without
    bound, so the optimizer makes the scores larger for ever, of all classes alike, and the loss goes to minus
    infinity while nothing is learned. On probabilities (softmax without the logarithm) the loss lies between -1 and
    0, and the gradient all but vanishes for just those samples that the model gets wrong. `kl_div` likewise wants
    logarithms as its input.

    ## How it is detected
    From what reached the loss in the watched steps: log-probabilities have a log-sum-exp of 0 over the classes. Where
    it is not 0, the values and the operation that made them (from the autograd graph) say what they are instead:
    probabilities, the output of a layer, or a log_softmax over another dimension than the classes. For `nll_loss` on
    raw scores, the value that backward got shows whether it is the whole objective.

    Without a run, from the source: every way through the model that makes the input ends in a softmax (an error), or
    in a layer or another activation (a warning), and the loss reaches a backward.

    ## What to do
    `cross_entropy(scores, target)`, which is log_softmax and nll_loss in one; or `log_softmax(scores, dim=1)` before
    `nll_loss` and `kl_div`.

    ## When it may be wrong
    Values of 0 or below that do not sum to 1 (log-probabilities with classes masked out, joint probabilities) are
    bounded, and not reported. `reduction="none"` may just pick values (`-nll_loss(p, y, reduction="none")`): not
    reported. Raw scores beside a normaliser of its own (`logsumexp(scores) + nll_loss(scores)`) are right, so raw
    scores are a warning where the loss is not all that backward got, or where it is not known what made them
    (log-densities may be above 0). For `kl_div` only probabilities by a softmax and outputs straight from a layer are
    reported.

    ## References
    torch documentation, `torch.nn.NLLLoss`: "The input given through a forward call is expected to contain
    log-probabilities of each class"; `torch.nn.KLDivLoss`.
    """
    lines = lines_of(run, ["nll_loss", "kl_div"], by_maker=True)
    if not lines:
        why = none_called(run)
        if why:
            raise NotObserved(why)
        raise NotApplicable("neither nll_loss nor kl_div is trained on")
    measured = False
    for line in lines:
        if not line.inputs or any((i.classes or 0) < 2 for i in line.inputs):
            continue
        measured = True
        if all(c.reduction == "none" for c in line.calls) and line.function == "nll_loss":
            continue
        yield from _judge(run, line)
    if not measured:
        raise NotObserved("the inputs of the loss could not be measured (one class, sharded or without values)")


def _judge(run: Recording, line: LossLine) -> Iterator[Finding]:
    half = any(not c.input_dtype.endswith(("float32", "float64")) for c in line.calls)
    close = _CLOSE_IN_HALF if half else _CLOSE
    if line.within(-close, close, lambda i: (i.row_logsumexp_min, i.row_logsumexp_max)):
        return
    low, high = line.low(lambda i: i.minimum), line.high(lambda i: i.maximum)
    top = line.high(lambda i: i.row_logsumexp_max)
    if low is None or high is None or top is None:
        return
    over = line.other_dimension()
    if line.made_by == "softmax" or (line.function == "nll_loss" and not line.made_by and line.probabilities()):
        yield _probabilities(run, line)
    elif line.made_by == "log_softmax" and over is not None and line.function == "nll_loss":
        yield _dimension_finding(line, over)
    elif line.function == "kl_div":
        if line.made_by == "linear" and high > 0:
            yield _scores(run, line, None)
    elif line.made_by == "sigmoid":
        yield _probabilities(run, line)
    elif high > close or (top > close and line.made_by in ("linear", "logsigmoid", "")):
        sure = line.made_by in ("linear", "relu", "tanh") and alone(run, line)
        yield _scores(run, line, None if sure else Severity.WARNING)


def _probabilities(run: Recording, line: LossLine) -> Finding:
    kept = [i.gradient_kept for i in line.inputs if i.gradient_kept is not None]
    made = f"{line.made_by} made them" if line.made_by else "rows sum to 1"
    module = maker(run, "Softmax" if line.made_by != "sigmoid" else "Sigmoid")
    where = f" (module {module})" if module and line.made_by else ""
    message = f"{line.name} gets probabilities ({made}{where}: {line.values()}) where it wants their logarithms."
    if line.function == "nll_loss":
        message += f" The loss is minus a probability, so it lies between -1 and 0 ({_loss_values(line)})."
    if kept:
        message += f" Of the gradient of cross-entropy, {percent(sum(kept) / len(kept), 1)} is left."
    return Finding(
        message,
        at=line.at,
        evidence={**_evidence(line), "gradient_kept": sum(kept) / len(kept) if kept else None},
        fix=_fix(run, line, "softmax" if line.made_by != "sigmoid" else "sigmoid"),
        about="probabilities",
    )


def _scores(run: Recording, line: LossLine, severity: Severity | None) -> Finding:
    low, high = line.low(lambda i: i.row_logsumexp_min), line.high(lambda i: i.row_logsumexp_max)
    source = "straight from a layer" if line.made_by == "linear" else f"by {line.made_by}" if line.made_by else ""
    message = (
        f"{line.name} gets values that are no log-probabilities ({source + ': ' if source else ''}{line.values()}; "
        f"log-sum-exp {number(low)} to {number(high)} where log-probabilities have 0). "
    )
    if line.function == "nll_loss":
        message += f"The loss ({_loss_values(line)}) has no lower bound: it falls as the scores grow."
    else:
        message += "The divergence has no lower bound: it falls as the scores grow."
    return Finding(
        message,
        at=line.at,
        evidence=_evidence(line),
        fix=_fix(run, line, ""),
        severity=severity,
        about="scores",
    )


def _dimension_finding(line: LossLine, over: int) -> Finding:
    shape = line.calls[0].input_shape
    low, high = line.low(lambda i: i.row_logsumexp_min), line.high(lambda i: i.row_logsumexp_max)
    return Finding(
        f"{line.name} gets a log_softmax over dimension {over} of {shape}; the classes are dimension "
        f"{1 if len(shape) > 1 else 0}. Over the classes the log-sum-exp is {number(low)} to {number(high)}, not 0: "
        "the samples of the batch share one distribution, and the classes of a sample do not compete.",
        at=line.at,
        evidence={**_evidence(line), "dimension": over},
        fix="log_softmax(scores, dim=1), or cross_entropy on the scores.",
        about="dimension",
    )


def _loss_values(line: LossLine) -> str:
    values = [c.value for c in line.calls if c.value is not None]
    return ", ".join(number(v) for v in values[:3]) if values else "not measured"


def _evidence(line: LossLine) -> dict[str, object]:
    return {
        "made_by": line.made_by or None,
        "minimum": line.low(lambda i: i.minimum),
        "maximum": line.high(lambda i: i.maximum),
        "row_logsumexp_min": line.low(lambda i: i.row_logsumexp_min),
        "row_logsumexp_max": line.high(lambda i: i.row_logsumexp_max),
        "rows": line.rows,
        "losses": [c.value for c in line.calls[:16]],
    }


def _fix(run: Recording, line: LossLine, instead_of: str) -> str:
    if line.function == "kl_div":
        made = f" instead of {instead_of}" if instead_of else ""
        return f"kl_div(log_softmax(scores, dim=-1){made}, target, reduction='batchmean')."
    if uses(run, "transformers"):
        return "cross_entropy(logits.view(-1, C), labels.view(-1)), or let the model compute its loss from labels."
    if instead_of:
        return f"log_softmax instead of {instead_of}, or cross_entropy on the raw scores."
    return "cross_entropy on the raw scores, or log_softmax(scores, dim=1) before nll_loss."


# ---------------------------------------------------------------------------------------------- without a run


#: What makes values that are no log-probabilities.
_NO_LOGARITHMS = frozenset(
    ("softmax", "sigmoid", "softmin", "relu", "tanh", "gelu", "Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d")
)


@check("TL505", SourceFacts, severity="error", catalog="O16")
def nll_without_log_softmax_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from the operation that makes the input of the loss."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for use in loss_uses(trace):
            if _no_logarithms(use):
                yield Finding(
                    f"{use.function} ({place(use.call.at)}) wants log-probabilities, and its input comes straight from "
                    f"{use.made_by} ({place(use.made_at)}). {NOT_RUN}",
                    at=use.call.at,
                    evidence={"function": use.function, "made_by": use.made_by, "made_at": place(use.made_at)},
                    fix="Use cross_entropy on the raw scores, or log_softmax before the loss.",
                    severity=None if use.trained and use.made_by == "softmax" else Severity.WARNING,
                    about=place(use.call.at).partition(":")[0],
                )


def _no_logarithms(use: LossUse) -> bool:
    if use.function == "kl_div":
        return use.made_by == "softmax"
    # Without a reduction it may only pick values.
    return use.function == "nll_loss" and use.made_by in _NO_LOGARITHMS and use.call.details.get("reduction") != "none"
