"""TL510: the target of a position is the token after the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import percent, plural, uses
from trainlint.recording.loss_calls import LossLine, alone, lines_of, none_called
from trainlint.recording.schema import TargetRows

_LOSSES = ("cross_entropy", "nll_loss")
#: Share of compared positions that makes a rule, and the share that other shifts may have by chance.
_ALL, _CHANCE = 0.95, 0.5
#: Positions that must have been compared.
_ENOUGH = 16


@check("TL510", Recording, severity="error", catalog="")
def labels_shifted_twice(run: Recording) -> Iterator[Finding]:
    """Next-token labels are shifted by the data and again by the model.

    ## What goes wrong
    A language model predicts at each position the token that follows. Either the data makes the shift (`x = ids[:-1],
    y = ids[1:]`) or the model does (transformers' `...ForCausalLM` shifts the labels that it is given). When both do,
    every position is trained to predict the token after the next. The loss falls, more slowly and to a higher floor,
    and what the model generates skips every other token.

    ## How it is detected
    At the loss, the targets are laid beside the ids that the model was given: those that an embedding looked up, or
    those of the batch. Padding and ignored positions are left out. The targets of a right program equal the input one
    position later (or at the same position, for tagging and masked models). Here they equal the input two positions
    later, at nearly all positions, and not one later.

    It is an error when an embedding looked those ids up and this loss alone went into a backward; a warning when other
    losses were added to it, or when only a tensor of the batch has those ids.

    ## What to do
    Shift once. With a transformers model pass `labels=input_ids` unshifted (padding and prompts as -100) and let the
    model do it; with labels that are shifted already, do not pass `labels`, and compute the loss from the logits.

    ## When it may be wrong
    Heads that predict several tokens ahead train on this shift on purpose: nothing is reported while another loss of
    the run has the next token as its target. Losses inside torch.compile are not seen.

    ## References
    transformers, causal language modeling ("the labels are shifted inside the model").
    """
    lines = lines_of(run, _LOSSES)
    if not lines:
        missing = none_called(run)
        if missing:
            raise NotObserved(missing)
        raise NotApplicable("no loss of the run has a class as its target")
    compared = [r for line in lines for r in _compared(line)]
    if not compared:
        if not any(c.rows is not None and c.rows.length > 2 for line in lines for c in line.calls):
            raise NotApplicable("no target of the run is a row of tokens")
        raise NotObserved(
            "the ids that the model was given were not seen beside the targets (no embedding outside torch.compile, no "
            "batch of a DataLoader with rows of the same length)"
        )
    if any(_share(r, 1) >= _ALL for r in compared):
        return  # the next token is predicted: what predicts more is an extra head
    for line in lines:
        rows = _compared(line)
        positions = sum(r.compared for r in rows)
        if positions < _ENOUGH or not all(_is_second_next(r) for r in rows):
            continue
        yield _finding(run, line, rows, positions)


def _compared(line: LossLine) -> list[TargetRows]:
    return [c.rows for c in line.calls if c.rows is not None and c.rows.compared and len(c.rows.same) == 3]


def _share(rows: TargetRows, later: int) -> float:
    return rows.same[later]


def _is_second_next(rows: TargetRows) -> bool:
    return _share(rows, 2) >= _ALL and max(_share(rows, 0), _share(rows, 1)) <= _CHANCE


def _finding(run: Recording, line: LossLine, rows: Sequence[TargetRows], positions: int) -> Finding:
    second = sum(_share(r, 2) * r.compared for r in rows)
    after = sum(_share(r, 1) * r.compared for r in rows)
    embedded = all(r.embedded for r in rows)
    proven = embedded and alone(run, line)
    ids = "the ids that the model's embedding looked up" if embedded else "the ids of the batch"
    return Finding(
        f"{line.name} is given the token after the next: {percent(second, positions)} of {positions:,} targets equal "
        f"{ids} two positions later, {percent(after, positions)} the next one "
        f"({plural(len(rows), 'call')}). The labels are shifted by the data and again by the model.",
        at=line.at,
        evidence={
            "function": line.function,
            "positions": positions,
            "two_later": round(second / positions, 4),
            "next": round(after / positions, 4),
            "calls": len(rows),
        },
        fix="Pass labels=input_ids unshifted (padding as -100): the model shifts them itself."
        if uses(run, "transformers")
        else "Shift once: either x = ids[:, :-1], y = ids[:, 1:] in the data, or the shift inside the model (as "
        "transformers' causal models do when they get labels), not both.",
        severity=None if proven else Severity.WARNING,
        about=line.function,
    )
