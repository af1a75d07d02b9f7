"""Gradient accumulation: which backwards of an interval are micro-batches, and what each added to the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainlint.recording.intervals import Interval, clears, new_data, same_line
from trainlint.recording.schema import Backward, BatchFetched, LossCall, Optimizer, OptimizerStep, Recording

__all__ = ["MicroBatches", "Shares", "Supervision", "micro_batches", "shares_of", "supervision"]


@dataclass(frozen=True)
class MicroBatches:
    """Several backwards of one interval, from one source line, each with a batch of its own."""

    backwards: tuple[Backward, ...]
    #: Each micro-batch was fetched from a loader (not only another input of the model).
    fetched: bool
    #: The micro-batches are known to differ.
    told: bool
    #: A later one reached parameters that no earlier one did: an expert's turn, or the loss of another task.
    reaches_more: bool = False


def micro_batches(run: Recording, interval: Interval, optimizer: Optimizer) -> MicroBatches | None:
    """The micro-batches that led to a step; ``None`` when its backwards are anything else, or there is only one."""
    backwards = interval.backwards()
    if len(backwards) < 2 or not same_line(backwards):
        return None
    held = {i for g in optimizer.groups for i in g.parameters}
    roots: set[int | None] = {p.root for p in run.parameters if p.id in held and p.root is not None}
    fetched = True
    told = False
    loaders: set[int] = set()
    for a, b in pairwise(backwards):
        between = interval.between(a.seq, b.seq)
        if any(isinstance(e, OptimizerStep) or clears(e, optimizer.id, roots) for e in between):
            return None
        own = [e for e in between if isinstance(e, BatchFetched)]
        if not own:
            fetched = False
            fresh = new_data(interval, a, b)
            if fresh is False:
                return None
            told = told or fresh is True
        loaders.update(e.loader for e in own)
        if len(own) == 1 and own[0].fingerprint is not None and own[0].fingerprint == _batch_before(interval, a):
            return None  # the same samples again: views or repeats of one batch
    if not fetched and _window_fetched_first(interval, backwards):
        fetched = told = True
    if len(loaders) > 1:
        return None  # one batch from each of several loaders: tasks or domains, whose losses are meant to add up
    more = any(b.new_gradients for b in backwards[1:])
    return MicroBatches(tuple(backwards), fetched, told or fetched, more)


def _window_fetched_first(interval: Interval, backwards: Sequence[Backward]) -> bool:
    """The whole window was drawn before its first backward, as transformers' Trainer does."""
    early = [e for e in interval.events if isinstance(e, BatchFetched) and e.seq < backwards[0].seq]
    distinct = {e.fingerprint for e in early if e.fingerprint is not None}
    return len({e.loader for e in early}) == 1 and len(distinct) >= len(backwards)


def _batch_before(interval: Interval, backward: Backward) -> str | None:
    own = [e.fingerprint for e in interval.events if isinstance(e, BatchFetched) and e.seq < backward.seq]
    return own[-1] if own else None


@dataclass(frozen=True)
class Shares:
    """What each of several backwards added to the gradients, known by its dot products with the others.

    Vectors are given by their coefficients in these shares: ``(1, 1, ..., 1)`` is the accumulated gradient.
    """

    products: tuple[tuple[float, ...], ...]

    def dot(self, a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * y * self.products[i][j] for i, x in enumerate(a) for j, y in enumerate(b))

    def norm(self, a: Sequence[float]) -> float:
        return math.sqrt(max(0.0, self.dot(a, a)))

    def error(self, a: Sequence[float], truth: Sequence[float]) -> float | None:
        """``|a - truth| / |truth|``; ``None`` when the truth is zero."""
        whole = self.norm(truth)
        return self.norm([x - y for x, y in zip(a, truth, strict=True)]) / whole if whole else None

    def cosine(self, a: Sequence[float], b: Sequence[float]) -> float | None:
        """Cosine of the angle between two vectors; ``None`` when one of them is zero."""
        norms = self.norm(a) * self.norm(b)
        return self.dot(a, b) / norms if norms else None


def shares_of(interval: Interval) -> Shares | None:
    """The shares of the interval's backwards, in their order; ``None`` when they were not measured."""
    m = interval.measurement
    if m is None or not m.share_products:
        return None
    if list(m.share_backwards) != [b.seq for b in interval.backwards()]:
        return None
    count = len(m.share_backwards)
    return Shares(tuple(row[:count] for row in m.share_products[:count]))


@dataclass(frozen=True)
class Supervision:
    """How many positions (tokens) a micro-batch is supervised at, and how much each weighs in its backward's tensor."""

    positions: int
    weight: float
    loss: LossCall


def supervision(interval: Interval, backwards: Sequence[Backward]) -> tuple[Supervision, ...] | None:
    """One for each backward; ``None`` unless each has a loss over class indices whose gradient was seen, and no other.

    What backward sent to the loss says what a position weighs, whatever the program did with the loss in between.
    """
    out = []
    low = interval.after
    for backward in backwards:
        calls = [e for e in interval.between(low, backward.seq) if isinstance(e, LossCall) and _optimized(e)]
        found = [_supervision(call) for call in calls]
        known = [s for s in found if s is not None]
        if not calls or len(known) < len(calls):
            return None
        weight = known[0].weight
        # A long sequence may be taken in chunks, all of one weight; different ones are different losses.
        if any(not math.isclose(s.weight, weight, rel_tol=0.01) for s in known):
            return None
        out.append(Supervision(sum(s.positions for s in known), weight, known[0].loss))
        low = backward.seq
    return tuple(out)


def _optimized(call: LossCall) -> bool:
    return call.gradient is not None and call.gradient.total != 0


def _supervision(call: LossCall) -> Supervision | None:
    target, gradient = call.target, call.gradient
    if target is None or gradient is None or target.ignored is None or target.sampled or "weight" in call.options:
        return None
    count = target.positions - target.ignored
    if call.reduction == "sum":
        weight = gradient.total
    elif call.reduction == "mean":
        weight = gradient.total / count if count else 0.0
    else:
        # Unreduced: what was multiplied by a mask gets no gradient; the rest must weigh the same.
        count = gradient.nonzero or 0
        even = gradient.smallest and gradient.largest and gradient.largest <= 1.01 * gradient.smallest
        weight = gradient.total / count if count and even else 0.0
    return Supervision(count, weight, call) if count and weight > 0 and math.isfinite(weight) else None
