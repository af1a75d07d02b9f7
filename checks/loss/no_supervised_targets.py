"""TL509: batches and samples without any target that counts, and end tokens that never do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import percent, plural, uses
from trainlint.recording.label_batches import label_lines
from trainlint.recording.loss_calls import LossLine, lines_of, none_called
from trainlint.recording.schema import Backward, LossCall, TargetRows

#: Losses that leave out an ignore_index.
_LOSSES = ("cross_entropy", "nll_loss")
#: Share of samples without a target from which on it is a warning.
_MANY = 0.1
#: Share of targets that must be the next token of the input for a run to train a language model.
_NEXT = 0.9


@check("TL509", Recording, severity="error", catalog="")
def no_supervised_targets(run: Recording) -> Iterator[Finding]:
    """Nothing in a batch or sample is a target.

    ## What goes wrong
    Targets that equal the `ignore_index` do not count. When that is every target of a batch, the mean is 0 divided by
    0: the loss is NaN, its gradient is NaN, and one step with it destroys the weights. It happens when prompts are
    masked and the text is cut off before the answer begins, when a template's answer marker is not found, or when
    labels and `ignore_index` use the same number. When it is every target of some samples, these cost as much as the
    others and teach nothing. And when one token both ends and pads sequences (`tokenizer.pad_token =
    tokenizer.eos_token`), a collator that ignores all padding ignores the end as well: the model never learns to stop.

    ## How it is detected
    At every loss the targets are counted that are not the `ignore_index` in effect. A batch without any is an error
    when its loss or what backward received is NaN. Samples are rows of positions; one without any target is reported
    where the targets are the next tokens of the input and the input fills the row without padding, so that the answer
    was cut off. For end tokens the ids are laid beside the mask of the batch: rows whose last token that counts is the
    very token that stands in all masked places, while the position that should predict it is ignored and the token is
    a target nowhere in the watched batches.

    ## What to do
    Truncate the prompt rather than the answer, raise the maximal length, or drop such samples; check the marker that
    the masking looks for (TRL: the response template as token ids, `assistant_only_loss` with a template that marks
    the answers). Skip a batch without targets before its backward. For the end token use a padding token of its own
    (`tokenizer.add_special_tokens({"pad_token": "<pad>"})`, or an unused token), or mask labels by the attention mask
    instead of by the token.

    ## When it may be wrong
    Rows without targets are right where labels are rare on purpose (masked language models, unlabelled samples, a
    head for some tasks only): only next-token targets of full rows are reported. A program that throws batches with a
    NaN loss away is not reported, and neither are samples of flattened targets whose rows could not be found again. A
    model that only scores texts need not learn where they end.

    ## References
    torch.nn.CrossEntropyLoss (`ignore_index`); transformers, DataCollatorForLanguageModeling (labels at padding).
    """
    lines = lines_of(run, _LOSSES) or label_lines(run)
    if not lines:
        missing = none_called(run)
        if missing:
            raise NotObserved(missing)
        raise NotApplicable("no loss of the run leaves out an ignore_index")
    counted = [c for line in lines for c in line.calls if c.target is not None and c.target.ignored is not None]
    if not counted:
        raise NotApplicable("the targets are probabilities: none can be ignored")
    for line in lines:
        empty = [c for c in line.calls if _is_empty(c)]
        if empty:
            yield from _batches(run, line, empty)
        else:
            yield from _samples(run, line)
        yield from _ends(run, line)


def _is_empty(call: LossCall) -> bool:
    target = call.target
    return target is not None and not target.sampled and 0 < target.positions == target.ignored


def _batches(run: Recording, line: LossLine, empty: Sequence[LossCall]) -> Iterator[Finding]:
    broken = [c for c in empty if _breaks(run, c)]
    first = (broken or empty)[0]
    if not broken and all(c.gradient is None for c in empty):
        return  # thrown away, or only looked at
    ignore = first.options.get("ignore_index", -100)
    positions = first.target.positions if first.target is not None else 0
    message = (
        f"{plural(len(empty), 'batch')} of {len(line.calls)} had no target at all: each of the {positions:,} targets "
        f"that {line.name} got is {ignore}, which it ignores"
    )
    message += (
        ", so the loss is 0/0 = NaN and so is every gradient." if broken else "; the step learns nothing from it."
    )
    yield Finding(
        message,
        at=line.at,
        evidence={"function": line.function, "batches": len(empty), "of": len(line.calls), "positions": positions},
        fix="Find out what ignores the targets (prompt masking, truncation before the answer, an ignore_index that is "
        "a real class), and skip batches without targets before their backward.",
        severity=None if broken else Severity.WARNING,
        about=f"{line.function} batch",
    )


def _breaks(run: Recording, call: LossCall) -> bool:
    """The loss is NaN and went into a backward, or the backward's tensor is."""
    if call.gradient is None:
        return False
    if call.reduction == "mean" and call.value is not None and math.isnan(call.value):
        return True
    after = next((e for e in run.events if isinstance(e, Backward) and e.seq > call.seq), None)
    return after is not None and after.value is not None and math.isnan(after.value)


def _next_token(rows: TargetRows) -> bool:
    return rows.compared >= 4 and len(rows.same) == 3 and rows.same[1] >= _NEXT


def _samples(run: Recording, line: LossLine) -> Iterator[Finding]:
    rows = [c.rows for c in line.calls if c.rows is not None]
    if not any(_next_token(r) for r in rows):
        return
    samples = sum(r.rows for r in rows)
    empty = sum(r.empty_full or 0 for r in rows)
    if not empty:
        return
    positions = sum(r.rows * r.length for r in rows)
    kept = positions - sum(r.ignored for r in rows)
    length = max(r.length for r in rows)
    yield Finding(
        f"{empty} of {plural(samples, 'sample')} carry no target: {line.name} ignores every position of rows that the "
        f"input fills to the end (up to {length:,} positions), so what was to be learned is cut off. "
        f"{percent(kept, positions)} of all positions are supervised.",
        at=line.at,
        evidence={"function": line.function, "samples": samples, "empty": empty, "supervised": kept,
                  "positions": positions},
        fix="Truncate the prompt instead of the answer, raise the maximal length"
        + (" (max_length)" if uses(run, "transformers") else "")
        + ", or leave such samples out.",
        severity=Severity.WARNING if empty >= _MANY * samples else Severity.INFO,
        about=f"{line.function} samples",
    )  # fmt: skip


def _ends(run: Recording, line: LossLine) -> Iterator[Finding]:
    rows = [c.rows for c in line.calls if c.rows is not None]
    seen = [r for r in rows if r.ends]
    ends = sum(r.ends for r in seen)
    tokens = {r.end_token for r in seen}
    if ends < 2 or len(tokens) != 1 or not all(_next_token(r) and r.ends_ignored == r.ends for r in seen):
        return
    token = tokens.pop()
    samples = sum(r.rows for r in rows)
    yield Finding(
        f"Token {token} ends {ends} of {plural(samples, 'sample')} and is the padding as well; {line.name} ignores it "
        "at all of these ends, and it is a target nowhere else: the model is never taught to stop.",
        at=line.at,
        evidence={"function": line.function, "token": token, "ends": ends, "samples": samples},
        fix="Give padding a token of its own, or mask the labels where attention_mask is 0, not where the token "
        "stands, as in labels = input_ids.masked_fill(attention_mask == 0, -100).",
        severity=Severity.WARNING,
        about=f"{line.function} end",
    )
