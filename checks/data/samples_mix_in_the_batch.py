"""TL907: the output of one sample depends on another sample of its batch."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import percent, place
from trainlint.recording.schema import Mixing

#: Layers whose ``batch_first`` says where the samples are.
_SEQUENCE = ("MultiheadAttention", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer",
             "TransformerDecoderLayer", "Transformer", "LSTM", "GRU", "RNN")  # fmt: skip
#: Parts of class names, module paths and functions that mix on purpose: statistics of the batch, routing with a
#: capacity, one scale for a whole tensor.
_MEANT = ("norm", "whiten", "moe", "expert", "router", "gate", "switch", "quant", "8bit", "4bit", "fp8", "float8",
          "mixup", "cutmix", "contrast", "episode", "proto", "retriev", "intersample", "minibatch", "mbstd", "stddev",
          "cdist", "pdist")  # fmt: skip
#: Smaller influences than this share are arithmetic rather than a path from sample to sample.
_LEAST = 0.01


@check("TL907", Recording, severity="error", catalog="")
def samples_mix_in_the_batch(run: Recording) -> Iterator[Finding]:
    """One sample's output depends on another sample of the batch.

    ## What goes wrong
    `nn.MultiheadAttention`, `nn.TransformerEncoder` and the recurrent layers expect `(sequence, batch, feature)` unless
    `batch_first=True`. Fed with `(batch, sequence, feature)` they raise nothing: the first sample of the batch becomes
    the first token, and attention runs from sample to sample while the tokens of one sequence never see each other.
    The loss falls, since labels of the batch leak, and at inference with another batch the model is worth nothing. A
    softmax, mean or cumulative sum over dimension 0, or a `view` that should have been a `transpose`, does the same.

    ## How it is detected
    After the watched steps the last batch goes through the model again in eval, cut down to a few samples: as it is,
    once more to see that it repeats bit by bit, and with one sample replaced by another. When the output of a third
    sample changes, the outputs of all modules and functions are compared in order, and the first that mixes samples
    that were apart in what it was given is named. Everything is put back afterwards.

    It is an error where such a layer has `batch_first=False` and was given the batch in its first dimension, and no
    other layer of the kind runs along the sequence. Everything else that mixes is a warning.

    ## What to do
    Pass `batch_first=True`, or transpose to `(sequence, batch, feature)` before and back after. Give the dimension of
    softmax, mean and sums as counted from the end (`dim=-1`). Use `transpose` or `permute` where the order of
    dimensions changes, `reshape` only where it does not.

    ## When it may be wrong
    Batch norm is seen in eval and does not count; other norms, routing with a capacity, per-tensor quantisation and
    scores and distances of all samples against all, partners drawn at random (mixup) and a GAN's minibatch statistics
    are taken as meant, and so is what the loss does. A model that compares the samples of a batch on purpose gives a
    warning: ignore it there. Models that return only a loss, or whose batch is one graph or one set, cannot be judged.

    ## References
    torch.nn.MultiheadAttention and torch.nn.LSTM (`batch_first`); Karpathy 2019, "A Recipe for Training Neural
    Networks" ("use backprop to chart dependencies").
    """
    if run.replay is None or not run.replay.forwards:
        raise NotObserved("no training forward of a module was seen that could be repeated")
    looked = [m for m in run.replay.mixing if m.outcome != "left-out"]
    if not looked:
        reasons = [m.reason for m in run.replay.mixing] or [f.reason for f in run.replay.forwards]
        raise NotObserved(f"the forward was not repeated with a sample replaced: {reasons[0]}")
    for mixing in looked:
        if mixing.outcome != "mixed":
            continue
        if _meant(mixing):
            raise NotApplicable(f"{mixing.module} ({mixing.class_name}) mixes the samples of a batch on purpose")
        finding = _finding(mixing)
        if finding is not None:
            yield finding


def _meant(mixing: Mixing) -> bool:
    text = f"{mixing.class_name} {mixing.module} {mixing.function}".lower()
    return any(part in text for part in _MEANT)


def _finding(mixing: Mixing) -> Finding | None:
    shape = "(" + ", ".join(map(str, mixing.given)) + ")"
    changed = f"Replacing one of {mixing.samples} samples of the batch changes the output of {mixing.changed} others"
    if mixing.ratio is not None:
        changed += f" (by up to {percent(min(mixing.ratio, 1.0), 1.0)} of its own change)"
    evidence = {
        "samples": mixing.samples,
        "changed": mixing.changed,
        "ratio": mixing.ratio,
        "module": mixing.module,
        "class_name": mixing.class_name,
        "function": mixing.function,
        "given": list(mixing.given),
    }
    name = f"{mixing.module} ({mixing.class_name})" if mixing.module else f"the forward of {mixing.forward}"
    if mixing.class_name in _SEQUENCE and mixing.batch_first is False:
        proven = len(mixing.given) == 3 and mixing.given[0] == mixing.samples != mixing.given[1] > 1
        alternating = bool(mixing.apart)
        message = f"{changed}: {name} has batch_first=False and was given {shape}, the batch first"
        message += ", so it takes samples for positions."
        if proven and not alternating:
            message += f" The {mixing.given[1]} positions of one sample never see each other in it."
        elif alternating:
            message += f" {mixing.apart[0]} keeps them apart."
        return Finding(
            message,
            at=mixing.at,
            evidence=evidence,
            fix=f"{mixing.class_name}(..., batch_first=True), or transpose(0, 1) before and after it.",
            severity=None if proven and not alternating else Severity.WARNING,
            about=mixing.module or mixing.class_name,
        )
    if mixing.ratio is not None and mixing.ratio < _LEAST:
        return None
    what = f"{mixing.function} in {name}" if mixing.function else name
    line = f" ({place(mixing.at)})" if mixing.at is not None else ""
    return Finding(
        f"{changed}: {what}{line} is the first to mix them.",
        at=mixing.at,
        evidence=evidence,
        fix="Look at the dimension that it works over: softmax, mean, cumsum or normalize over dim=0, a reshape where "
        "the order of dimensions should change (transpose). Ignore this if samples are meant to be compared.",
        severity=Severity.WARNING,
        about=mixing.module or mixing.function or mixing.forward,
    )
