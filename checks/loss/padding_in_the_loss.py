"""TL504: the mean over a batch of sequences counts the positions that only fill rows up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import number, percent, plural, uses
from trainlint.recording.label_batches import OWN_LOSS, label_lines
from trainlint.recording.loss_calls import LossLine, lines_of, none_called
from trainlint.recording.schema import Backward, LossCall, LossGradient, TargetRows

#: Losses with a target for each position.
_LOSSES = (
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits multilabel_soft_margin_loss mse_loss "
    "l1_loss smooth_l1_loss huber_loss gaussian_nll_loss poisson_nll_loss"
).split()
#: How far two divisors may be apart and still be called equal.
_CLOSE = 1e-3
#: Repetitions of one value at the ends of rows, which occurs hardly ever inside them, that no chance explains.
_REPEATS = 8


@check("TL504", Recording, severity="error", catalog="O15")
def padding_in_the_loss(run: Recording) -> Iterator[Finding]:
    """Padding counts in the loss.

    ## What goes wrong
    Sequences of different length are filled up to one length with a padding value. When the loss does not leave those
    positions out, the model is trained to predict padding after padding, which it learns at once: the loss looks
    good, and its mean is taken over a number that depends on how long the longest sequence of the batch happens to
    be. Gradients of the real positions shrink by the share of padding, and short sequences count less. Where only the
    numerator is masked (`(loss * mask).mean()`), the padding still stands in the denominator.

    ## How it is detected
    In the first calls of every loss the target is laid beside what the model was given at the same positions: the ids
    that an embedding looked up and the tensors of the batch. Padding is a run of one and the same value that fills
    rows up at their end or beginning, with a length that differs from row to row, and that does not occur inside
    them; or what an attention mask or a tensor of lengths in the batch says. Flattened, shifted and time-major
    targets are laid out in rows again. Then the positions are counted at which the target is not the `ignore_index`
    in effect (-100 unless the program passes another) nor a class of weight 0. For a loss with `reduction="none"` the
    gradient that comes back to each element shows what the program masked and what it divided by.

    It is an error when ids, a mask or lengths show the padding; a warning when only features of the input show it
    (steps that are all one value), when the target repeats the input position by position (an autoencoder may have to
    learn its padding), and when padding is in the denominator alone.

    ## What to do
    Give the padded positions a target that the loss ignores: `labels = input_ids.masked_fill(attention_mask == 0,
    -100)`, `pad_sequence(targets, padding_value=-100)`, or `ignore_index=pad_id` where that id is nothing else. In
    transformers, `DataCollatorForSeq2Seq` and `DataCollatorForTokenClassification` pad labels with -100. For
    regressions: `(loss * mask).sum() / mask.sum()` with `reduction="none"`.

    ## When it may be wrong
    Models that shall learn to produce padding (one shot generators of fixed length, whose end is the first padding
    token) want it in the loss; ignore this check there. A fixed normaliser in the place of the number of valid
    positions (Dr. GRPO) looks like padding in the denominator. Trailing zeros that belong to the data (images, counts,
    silence), a single end token that is also the padding token, packed sequences and rows of equal length are not
    padding. Losses written by hand and models compiled together with their loss are not seen; without a DataLoader
    and without an embedding there is nothing to lay beside the target.

    ## References
    torch.nn.CrossEntropyLoss (`ignore_index`, and the denominator of its mean); transformers, "Data collators".
    """
    lines = lines_of(run, _LOSSES) or label_lines(run)
    if not lines:
        missing = none_called(run)
        if missing:
            raise NotObserved(missing)
        raise NotApplicable("no loss of the run has a target for each position")
    rows = [c.rows for line in lines for c in line.calls if c.rows is not None and c.rows.length > 1]
    if not rows:
        raise NotApplicable("no target of the run is a row of positions")
    if not any(r.beside for r in rows):
        if not any(r.classes for r in rows):
            raise NotApplicable("no target of the run is a row of positions that the input has too")
        raise NotObserved(
            "what the model was given at the positions of the targets was not seen (no batch of a DataLoader, no "
            "embedding outside torch.compile): run it without torch.compile once"
        )
    backwards = [e for e in run.events if isinstance(e, Backward)]
    for line in lines:
        # A loss that no backward came back to is only looked at.
        calls = [c for c in line.calls if c.rows is not None and (c.gradient is not None or not backwards)]
        if not calls or not _is_padding(calls):
            continue
        counted = [c for c in calls if _counts(c)]
        if counted and _is_counted(counted):
            yield _counted_finding(run, line, calls, counted)
        elif all(c.reduction == "none" for c in calls):
            divided = _divided_by_all(calls)
            if divided is not None:
                yield _divided_finding(line, calls, *divided)


def _rows(call: LossCall) -> TargetRows:
    return call.rows or TargetRows()


def _gradient(call: LossCall) -> LossGradient:
    return call.gradient or LossGradient()


def _is_padding(calls: Sequence[LossCall]) -> bool:
    """The runs differ in length, all are of one value on one side, and are too many to be chance."""
    rows = [_rows(c) for c in calls if _rows(c).padding]
    values = {r.padding_value for r in rows if r.padding_kind in ("ids", "values")}
    if not rows or len(values) > 1 or len({r.left for r in rows}) > 1:
        return False
    if any(r.padding_kind in ("mask", "lengths") or r.confirmed_by for r in rows):
        return True
    differ = max(r.padding_max for r in map(_rows, calls)) > min(r.padding_min for r in map(_rows, calls))
    return differ and sum(r.padded_rows for r in rows) >= 2 and sum(r.padding_repeats for r in rows) >= _REPEATS


def _counts(call: LossCall) -> bool:
    """Padding is supervised, weighs something, and its gradient is not taken out afterwards."""
    rows = _rows(call)
    if not rows.padding_supervised or rows.padding_weightless:
        return False
    return call.reduction != "none" or bool(_gradient(call).padding_nonzero)


def _is_counted(counted: Sequence[LossCall]) -> bool:
    """Most of the padding is supervised. One position a row may be the end, whose id may be the one that pads."""
    rows = [_rows(c) for c in counted]
    ends = sum(0 if r.left else r.padded_rows for r in rows)
    beyond = sum(r.padding - r.padded_rows for r in rows)
    return 2 * (sum(r.padding_supervised for r in rows) - ends) >= beyond


def _copies(calls: Sequence[LossCall]) -> bool:
    compared = [r for r in map(_rows, calls) if r.compared and r.same]
    return bool(compared) and all(r.same[0] >= 0.95 for r in compared)


def _counted_finding(run: Recording, line: LossLine, calls: Sequence[LossCall], counted: Sequence[LossCall]) -> Finding:
    rows = [_rows(c) for c in calls]
    first = _rows(counted[0])
    padding = sum(r.padding_supervised for r in map(_rows, counted))
    positions = sum(r.rows * r.length - r.ignored for r in rows)
    shortest, longest = min(r.padding_min for r in rows), max(r.padding_max for r in rows)
    ignore = counted[0].options.get("ignore_index", -100)
    target = "" if first.padding_target is None else f", with the target {first.padding_target:g}"
    proven = (first.padding_kind != "values" or bool(first.confirmed_by)) and not _copies(calls)
    proven = proven and line.function != OWN_LOSS
    message = (
        f"{percent(padding, positions)} of the targets that {line.name} counts are padding: {padding:,} of "
        f"{positions:,} in {plural(len(calls), 'call')} lie where {_shown_by(first)}{target}. Rows end in {shortest} "
        f"to {longest} such positions."
    )
    if first.left:
        message = message.replace("Rows end in", "Rows begin with")
    if first.classes:
        message += f" The ignore_index in effect is {ignore}."
    return Finding(
        message,
        at=line.at,
        evidence={
            "function": line.function,
            "padding": padding,
            "positions": positions,
            "share": round(padding / positions, 4),
            "shown_by": first.shown_by,
            "kind": first.padding_kind,
            "confirmed_by": first.confirmed_by,
            "target": first.padding_target,
            "calls": len(calls),
        },
        fix=_fix(run, first),
        severity=None if proven else Severity.WARNING,
        about=line.function,
    )


def _shown_by(rows: TargetRows) -> str:
    what = {
        "ids": f"the {rows.shown_by} are padding" if rows.shown_by == "input ids" else f"{rows.shown_by} is padding",
        "mask": f"{rows.shown_by} of the batch masks the row",
        "lengths": f"{rows.shown_by} of the batch says that the row is over",
        "values": f"{rows.shown_by} has nothing but one value",
    }.get(rows.padding_kind, "the rows are filled up")
    return f"{what} (so says {rows.confirmed_by} too)" if rows.confirmed_by else what


def _fix(run: Recording, rows: TargetRows) -> str:
    if not rows.classes:
        return (
            "Compute the loss with reduction='none', multiply by a mask of the real positions, and divide the sum by "
            "mask.sum()."
        )
    if uses(run, "transformers"):
        return (
            "Give padding the label -100 in the collator: labels = input_ids.masked_fill(attention_mask == 0, -100); "
            "DataCollatorForSeq2Seq and DataCollatorForTokenClassification pad labels so."
        )
    value = "" if rows.padding_target is None else f" instead of {rows.padding_target:g}"
    return (
        f"Pad the targets with -100{value} (the default ignore_index), e.g. pad_sequence(..., padding_value=-100); or "
        "pass ignore_index=<pad id> where that id is no real target."
    )


# ------------------------------------------------------------------------------------------------- denominator


def _divided_by_all(calls: Sequence[LossCall]) -> tuple[int, int] | None:
    """(valid elements, all elements) over the calls, when the sum of the valid ones is divided by all of them.

    Every valid element then has the same gradient g. Its product with the number by which the program divides is the
    same in all calls, whatever the loss is multiplied with later.
    """
    found: list[tuple[float, int, int]] = []
    for call in calls:
        gradient, rows = _gradient(call), _rows(call)
        low, high = gradient.smallest, gradient.largest
        if low is None or high is None or not low or high > low * (1 + _CLOSE) or not gradient.nonzero:
            return None
        if gradient.elements != rows.rows * rows.length:
            return None
        # Masked by multiplication: what still has a gradient. Masked by ignore_index: what is not ignored.
        valid = gradient.nonzero if gradient.nonzero < gradient.elements else gradient.elements - rows.ignored
        found.append((low, valid, gradient.elements))
    by_valid = [g * valid for g, valid, _ in found]
    by_all = [g * elements for g, _, elements in found]
    if all(valid == elements for _, valid, elements in found) or not _constant(by_all):
        return None
    # Where the share of padding never changes, only a divisor that is exactly one of the two tells them apart.
    if _constant(by_valid) and not math.isclose(by_all[0], 1.0, rel_tol=_CLOSE):
        return None
    return sum(v for _, v, _ in found), sum(n for _, _, n in found)


def _constant(values: Sequence[float]) -> bool:
    return max(values) <= min(values) * (1 + _CLOSE)


def _divided_finding(line: LossLine, calls: Sequence[LossCall], valid: int, elements: int) -> Finding:
    return Finding(
        f"{line.name} is masked, but its sum is divided by all {elements:,} positions of {plural(len(calls), 'call')}, "
        f"of which {valid:,} count: with {percent(elements - valid, elements)} padding the loss and its gradient are "
        f"{number(valid / elements)} times what they would be, by another factor in every batch.",
        at=line.at,
        evidence={"function": line.function, "valid": valid, "positions": elements, "calls": len(calls)},
        fix="Divide by the number of valid positions: (loss * mask).sum() / mask.sum(), not .mean() or numel().",
        severity=Severity.WARNING,
        about=f"{line.function} denominator",
    )
