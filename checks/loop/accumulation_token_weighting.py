"""TL307: micro-batches of one step count alike although they hold different numbers of supervised tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import framework_settings, name_optimizer, percent, place, plural, uses
from trainlint.recording.intervals import Interval, Timeline
from trainlint.recording.micro_batches import Supervision, micro_batches, shares_of, supervision
from trainlint.recording.schema import BatchFetched, Forward, Optimizer

#: Relative error of the accumulated gradient from which on it is worth a word.
_ERROR = 0.02
#: Most over fewest tokens of the micro-batches of a step, below which their weights hardly differ.
_SPREAD = 1.05


@check("TL307", Recording, severity="warning", catalog="O9")
def accumulation_token_weighting(run: Recording) -> Iterator[Finding]:
    """Micro-batches of one step count alike although they hold different numbers of supervised tokens.

    ## What goes wrong
    A loss averaged over the valid tokens of each micro-batch, divided by the number of micro-batches, is a mean of
    means. Where micro-batches differ in the number of supervised tokens (padding, masked prompts, `ignore_index`), a
    token in a short one weighs more than a token in a long one, and the accumulated gradient is not that of one large
    batch: changing the accumulation steps at the same effective batch size changes the training. With sequences of
    similar length the error is a percent; with chats or documents of very different lengths it can reach a third.

    ## How it is detected
    For every micro-batch the number of target positions that are not ignored is counted in the loss call, and the
    gradient that backward sent to that loss says what one position weighs, whatever the program divided by. A sample
    of what each micro-batch added to the gradients then gives the difference between the accumulated gradient and the
    one in which all tokens of the window weigh the same, as a share of the latter. Reported from 2% on (median over the
    watched steps).

    ## What to do
    Sum the loss over tokens (`reduction="sum"`) and divide by the number of supervised tokens of the whole window, or
    by a constant. The transformers `Trainer` hands that number to `compute_loss` (and to models that take it) as
    `num_items_in_batch`. On several processes the count must be summed over them too.

    ## When it may be wrong
    Weighing every sequence the same, whatever its length, may be meant; it is then better written so (a mean per
    sequence). Micro-batches that differ only in their number of samples (a last, shorter one) are not reported; nor
    are losses of several terms, class weights, losses outside `torch.nn.functional`, and runs on several processes,
    where a micro-batch's own gradient is not known.

    ## References
    transformers blog, "Fixing gradient accumulation" (October 2024); unsloth, "Bug fixes in LLM training: gradient
    accumulation".
    """
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    windows = counted = measured = 0
    for optimizer in run.optimizers:
        uneven = []
        for interval in timeline.intervals(optimizer.id):
            batches = micro_batches(run, interval, optimizer)
            if batches is None or batches.reaches_more or not batches.told:
                continue
            windows += 1
            parts = supervision(interval, batches.backwards)
            if parts is None:
                continue
            counted += 1
            window = _weigh(interval, parts)
            measured += window is not None
            if window is not None and window.spread >= _SPREAD and not _by_samples(run, parts):
                uneven.append(window)
        if uneven and statistics.median(w.error for w in uneven) >= _ERROR:
            yield _finding(run, optimizer, uneven)
    if not windows:
        raise NotApplicable("no step accumulates several micro-batches")
    if not counted:
        raise NotObserved(
            "the supervised positions of the micro-batches are not known: their loss is not one call of cross_entropy "
            "or nll_loss over class indices"
        )
    if not measured:
        raise NotObserved("the gradient of each micro-batch is not known (several processes?); watch one process")


@dataclass(frozen=True)
class _Window:
    """A step's micro-batches: their tokens, and the relative error of the gradient that they were added up to."""

    parts: Sequence[Supervision]
    error: float

    @property
    def tokens(self) -> list[int]:
        return [p.positions for p in self.parts]

    @property
    def spread(self) -> float:
        return max(self.tokens) / min(self.tokens)


def _weigh(interval: Interval, parts: Sequence[Supervision]) -> _Window | None:
    shares = shares_of(interval)
    if shares is None:
        return None
    # What backward added is (tokens x weight) times the mean gradient of these tokens. All weights together may be
    # off by one factor, which is another check's question: they are scaled to the sum that they should have.
    applied = [p.positions * p.weight for p in parts]
    whole, tokens = sum(applied), sum(p.positions for p in parts)
    meant = [p.positions / tokens * whole / a for p, a in zip(parts, applied, strict=True)]
    error = shares.error([1.0] * len(parts), meant)
    return _Window(parts, error) if error is not None else None


def _by_samples(run: Recording, parts: Sequence[Supervision]) -> bool:
    """Whether the micro-batches may differ in the number of their samples only, with equally many tokens each."""
    if any(p.loss.target is not None and p.loss.target.ignored for p in parts):
        return False
    sizes = {e.size for e in run.events if isinstance(e, BatchFetched) and e.size}
    sizes = sizes or {e.size for e in run.events if isinstance(e, Forward) and e.size}
    if not sizes:
        return True  # nobody knows
    most = max(p.positions for p in parts)
    return any(all((p.positions * size / most) in sizes for p in parts) for size in sizes)


def _finding(run: Recording, optimizer: Optimizer, windows: Sequence[_Window]) -> Finding:
    typical = max(windows, key=lambda w: w.error)
    error = statistics.median(w.error for w in windows)
    n = len(typical.parts)
    heavy = max(typical.parts, key=lambda p: p.weight)
    light = min(typical.parts, key=lambda p: p.weight)
    tokens = ", ".join(f"{t:,}" for t in typical.tokens[:8]) + (", ..." if n > 8 else "")
    at = typical.parts[0].loss.at
    message = (
        f"{plural(n, 'micro-batch')} per step of {name_optimizer(optimizer)} hold {tokens} supervised tokens and do "
        f"not count by them: each loss ({place(at) or 'unknown line'}) is a mean of its own, so a token among "
        f"{heavy.positions:,} weighs {heavy.weight / light.weight:.2g} times one among {light.positions:,}. The "
        f"accumulated gradient is {percent(error, 1)} off that of one batch of the same tokens (median of "
        f"{plural(len(windows), 'step')}, measured on a sample of the gradients)."
    )
    return Finding(
        message,
        at=at,
        evidence={
            "tokens": typical.tokens[:32],
            "share_of_tokens": [round(t / sum(typical.tokens), 4) for t in typical.tokens[:32]],
            "weight_of_a_token": [p.weight / light.weight for p in typical.parts[:32]],
            "relative_error": [w.error for w in windows][:16],
            "median_relative_error": error,
        },
        fix=_fix(run),
        about=optimizer.class_name,
    )


def _fix(run: Recording) -> str:
    if uses(run, "transformers"):
        return (
            "Let compute_loss sum over tokens and divide by num_items_in_batch, which the Trainer counts over the "
            "whole window (a model that takes it does so by itself)."
        )
    if uses(run, "lightning") and framework_settings(run, "lightning").get("automatic_optimization") is not False:
        return (
            "Return the loss summed over tokens, divided by a constant (the usual number of tokens of a micro-batch); "
            "or count the window's tokens in manual optimization."
        )
    return 'Use reduction="sum" and divide by the supervised tokens of the whole window, counted before its backwards.'
