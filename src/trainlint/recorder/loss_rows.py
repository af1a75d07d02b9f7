"""A target as rows of positions: which of them the input pads, and which token of the input they are.

Targets reach a loss flattened, shifted and cut. Their rows are found again in the shape that the predictions had before
they were flattened, or in the ids that the model was given. Padding is what fills rows up to one length: a run of one
and the same value at their end (or beginning) that occurs nowhere else, of different length from row to row, in the
*input*; the target alone cannot tell padding from a frequent class.

Runs on copies in the host's memory, for the first few calls of a line only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .batches import Given, Inputs
from .loss_inputs import readable
from .loss_targets import BINARY, INDEXED, ignore_index
from .row_padding import LONGER, Padding, Rows, are_ids, counted, find, is_mask

#: Elements of a target that are looked at; of larger ones the first rows.
LIMIT = 1 << 20
#: Calls of one source line (or batches of one loader) whose targets are laid beside the inputs.
ROWS_CALLS = 6
#: Nodes looked at behind the predictions for their shape before they were flattened.
WALK = 8
#: Losses whose target is a number or a vector per position.
REGRESSIONS = frozenset("mse_loss l1_loss smooth_l1_loss huber_loss gaussian_nll_loss poisson_nll_loss".split())
#: Nodes that leave rows and positions where they are.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def look(
    function: str, given: Any, target: Any, options: Mapping[str, Any], weight: Any, inputs: Inputs
) -> tuple[dict[str, Any], Any] | None:
    """Figures of a ``TargetRows`` and the mask of the padding in the target's own shape (or ``None``).

    ``None`` when the target is no rows of positions.
    """
    if not _readable(target) or not (function in INDEXED or function in BINARY or function in REGRESSIONS):
        return None
    lookups, batches = inputs.lookups(), inputs.batches()
    best: tuple[dict[str, Any], Any] | None = None
    ignored = ignore_index(function, options)
    indexed = function in INDEXED and not target.is_floating_point()
    if function in INDEXED and not indexed:
        return None
    beside = lookups + [known for batch in batches for known in batch]
    for rows in _arrangements(given, target, indexed, ignored, beside):
        figures, padding = _measure(rows, _candidates(rows, lookups, batches), weight)
        if best is None or _merit(figures) > _merit(best[0]):
            best = figures, _in_shape_of(target, rows, padding)
    return best


def of_labels(batch: Any) -> dict[str, Any] | None:
    """The ``labels`` of a batch beside its ``input_ids``, shifted as transformers' causal models shift them.

    For losses that no function of torch computes (fused kernels). ``None`` when the batch has no such pair on the host.
    """
    keys = getattr(batch, "keys", None)
    if keys is None or "labels" not in keys() or "input_ids" not in keys():
        return None
    labels, ids = batch["labels"], batch["input_ids"]
    for tensor in (labels, ids):
        if not readable(tensor) or tensor.ndim != 2 or tensor.is_floating_point() or tensor.device.type != "cpu":
            return None
    if labels.shape != ids.shape or labels.shape[1] < 2:
        return None
    inputs = Inputs()
    inputs.fetched(batch)
    inputs.embedded(ids, None)
    found = look("cross_entropy", None, labels[:, 1:], {}, None, inputs)
    return found[0] if found is not None else None


def _in_shape_of(target: Any, rows: Rows, padding: Padding | None) -> Any:
    """Where the target as it came has padding; ``None`` when that is not known for all of it."""
    if padding is None or not rows.complete:
        return None
    at = padding.at.T if rows.turned else padding.at
    return at.unsqueeze(-1).expand(target.shape) if target.ndim == 3 else at.reshape(target.shape)


def _merit(figures: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which of two readings of a target is the better founded."""
    same = figures.get("same") or [0.0]
    return (
        max(same) >= 0.9 and figures.get("compared", 0) >= 4,
        figures.get("padding", 0),
        max(same),
        bool(figures.get("beside")),
    )


def _readable(target: Any) -> bool:
    return readable(target) and 1 <= target.ndim <= 3 and 1 < target.numel() <= LIMIT * 64


# ------------------------------------------------------------------------------------------------------- rows


def _arrangements(given: Any, target: Any, indexed: bool, ignored: int | None, beside: list[Given]) -> list[Rows]:
    """The ways to read a target as rows: by its own shape, the predictions' before flattening, or the ids'."""
    sizes: tuple[int, int] | None = None
    start = 0
    if target.ndim == 1:
        sizes, start = _before_flattening(given, target.numel())
        if sizes is None and indexed:
            sizes = _rows_of_ids(target.numel(), beside)
        if sizes is None:
            return []
    elif target.ndim == 3 and indexed:
        return []  # pixels, not a sequence
    else:
        # (samples, features) looks like (rows, positions): told apart by what stands beside it.
        sizes = int(target.shape[0]), int(target.shape[1])
    if min(sizes) < 1 or max(sizes) < 2:
        return []
    values = target.detach().reshape(*sizes, -1) if target.ndim == 3 else target.detach().reshape(sizes)
    out = []
    for turned in (False, True):
        shown = values.transpose(0, 1) if turned else values
        complete = True
        if shown.numel() > LIMIT:
            shown, complete = shown[: max(1, LIMIT // max(1, shown[0].numel()))], False
        shown = shown.cpu()
        kept = shown != ignored if indexed and ignored is not None else shown.new_ones(shown.shape[:2]).bool()
        out.append(Rows(shown, kept, 0 if turned else start, turned, indexed, complete))
    return out


def _before_flattening(given: Any, count: int) -> tuple[tuple[int, int] | None, int]:
    """(rows, positions) of predictions that were flattened to ``count`` rows of classes, and what was cut off before.

    The second figure is the input's position that the first prediction belongs to (``logits[:, 1:]``: 1).
    """
    node = getattr(given, "grad_fn", None)
    sizes: tuple[int, int] | None = None
    start = 0
    for _ in range(WALK):
        if node is None:
            break
        name = node.name()
        if sizes is None and name in _VIEWS:
            before = tuple(int(n) for n in getattr(node, "_saved_self_sym_sizes", ()))
            deep = 3 if given.ndim == 2 else 2
            if len(before) == deep and before[0] * before[1] == count and math.prod(before) == given.numel():
                sizes = before[0], before[1]
        elif sizes is not None and name == "SliceBackward0" and getattr(node, "_saved_dim", None) == 1:
            begin = int(getattr(node, "_saved_start", 0) or 0)
            start += begin if 0 < begin <= LONGER else 0
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1:
            break
        node = following[0]
    return sizes, start


def _rows_of_ids(count: int, beside: list[Given]) -> tuple[int, int] | None:
    for known in beside:
        if known.tensor.ndim != 2 or known.tensor.is_floating_point():
            continue
        rows, length = int(known.tensor.shape[0]), int(known.tensor.shape[1])
        for cut in range(LONGER + 1):
            if length - cut > 1 and rows * (length - cut) == count:
                return rows, length - cut
    return None


# ------------------------------------------------------------------------------------------------------- figures


def _measure(rows: Rows, candidates: list[tuple[Given, Any]], weight: Any) -> tuple[dict[str, Any], Padding | None]:
    height, length = rows.kept.shape
    empty = ~rows.kept.any(dim=1)
    figures: dict[str, Any] = {
        "rows": height,
        "length": length,
        "ignored": int((~rows.kept).sum()),
        "empty": int(empty.sum()),
        "classes": rows.classes,
    }
    figures["beside"] = bool(candidates)
    ids = [(known, x) for known, x in candidates if are_ids(x)]
    padding, confirmed = find(rows, candidates)
    outside = rows.kept if padding is None else rows.kept & ~padding.at
    if rows.classes:
        figures.update(_compare(rows, outside, ids))
        figures.update(_ends(rows, candidates))
    if padding is None:
        if candidates:
            figures["empty_full"] = figures["empty"]
        return figures, None
    figures.update(
        padding=int(padding.at.sum()),
        padding_kind=padding.kind,
        padding_value=padding.value,
        padding_repeats=int((padding.lengths - 1).clamp(min=0).sum()),
        shown_by=padding.name,
        confirmed_by=confirmed,
        left=padding.left,
        padding_min=int(padding.lengths.min()),
        padding_max=int(padding.lengths.max()),
        padded_rows=int((padding.lengths >= 2).sum()),
        empty_full=int((empty & (padding.lengths == 0)).sum()),
    )
    at = counted(rows, padding)
    supervised = int(at.sum())
    figures["padding_supervised"] = supervised
    if supervised and rows.values.ndim == 2:
        figures["padding_target"] = float(rows.values[at][0])
    if supervised and readable(weight):
        figures["padding_weightless"] = _weightless(rows, at, weight)
    return figures, padding


def _weightless(rows: Rows, at: Any, weight: Any) -> bool:
    """Whether the weights of the loss (one per class, or per element of the target) are 0 at these positions."""
    if rows.classes:
        value = int(rows.values[at][0])
        return weight.ndim == 1 and 0 <= value < weight.numel() and float(weight[value]) == 0.0
    if weight.ndim < 2:
        return False
    own = weight.detach().transpose(0, 1) if rows.turned else weight.detach()
    own = own[: at.shape[0]].cpu()
    return own.shape[:2] == at.shape and not bool(own[at].any())


def _candidates(rows: Rows, lookups: list[Given], batches: list[list[Given]]) -> list[tuple[Given, Any]]:
    """Tensors with the same rows, cut to the target's positions; lengths (one number per row) as they are.

    Of the batches, the one that the target belongs to: trainers fetch several ahead. It has the target in it, or the
    ids that an embedding looked up. Where no batch has, the last one is taken if no ids tell that it is another's.
    """
    seen = [(known, x) for known in lookups if (x := _cut(rows, known)) is not None]
    told: list[tuple[Given, Any]] = []
    for batch in batches:
        found = [(known, x) for known in batch if (x := _cut(rows, known)) is not None]
        own = any(_equal(rows, x, 0) or _equal(rows, x, 1) for _, x in found) or any(
            known.tensor.shape == ids.tensor.shape and bool((known.tensor.cpu() == ids.tensor.cpu()).all())
            for known in batch
            for ids, _ in seen
        )
        if own or not (told or seen):
            told = found
        if own:
            break
    return seen + _without_target(rows, told, bool(seen))


def _cut(rows: Rows, known: Given) -> Any:
    """A tensor at the target's positions, or ``None`` when it has other rows."""
    height, length = rows.kept.shape
    x = known.tensor
    if x.ndim == 1:
        whole_numbers = not x.is_floating_point() and not known.embedded
        return x[:height].cpu() if whole_numbers and x.shape[0] >= height else None
    if rows.turned:
        x = x.transpose(0, 1)
    longer = x.shape[1] - length
    if not (x.shape[0] == height or not rows.complete and x.shape[0] > height) or not 0 <= longer <= LONGER:
        return None
    return x[:height, min(rows.start, longer) :].cpu()


def _without_target(rows: Rows, told: list[tuple[Given, Any]], embedded: bool) -> list[tuple[Given, Any]]:
    """The tensors of a batch without those that are the target, which says nothing about padding.

    Ids with the target one position on may be labels as well: kept when nothing else shows what the model saw and two
    such tensors (the input beside the labels) came with the batch. No model is given ids below 0.
    """
    labels = [are_ids(x) and int(x.min()) < 0 for _, x in told]
    same = [x.ndim > 1 and _equal(rows, x, 0) for _, x in told]
    later = [are_ids(x) and _equal(rows, x, 1) for _, x in told]
    inputs = not embedded and sum(same) + sum(later) > 1
    return [
        pair
        for pair, label, s, n in zip(told, labels, same, later, strict=True)
        if not label and not s and (not n or inputs)
    ]


def _equal(rows: Rows, x: Any, later: int) -> bool:
    """Nearly every position that counts has the number that ``x`` has ``later`` positions further on."""
    if x.ndim != rows.values.ndim or x.shape[2:] != rows.values.shape[2:]:
        return False
    count = min(rows.kept.shape[1], x.shape[1] - later)
    kept = rows.kept[:, :count]
    if count < 1 or not bool(kept.any()):
        return False
    same = rows.values[:, :count] == x[:, later : later + count]
    same = same.all(dim=-1) if same.ndim == 3 else same
    return float(same[kept].float().mean()) >= 0.95


def _compare(rows: Rows, outside: Any, ids: list[tuple[Given, Any]]) -> dict[str, Any]:
    """How often a target is the id at the same position, one and two positions later; by the ids that fit best.

    Ids that an embedding looked up are what the model saw; those of a batch are taken when there are none.
    """
    seen = [pair for pair in ids if pair[0].embedded] or ids
    best: dict[str, Any] = {}
    for known, x in seen:
        shares, compared = [], 0
        for later in range(3):
            count = min(rows.kept.shape[1], x.shape[1] - later)
            kept = outside[:, :count]
            compared = int(kept.sum())
            if count < 1 or not compared:
                break
            same = (rows.values[:, :count] == x[:, later : later + count])[kept]
            shares.append(round(float(same.float().mean()), 4))
        if len(shares) == 3 and max(shares) > max(best.get("same", [-1.0])):
            best = {"compared": compared, "same": shares, "embedded": known.embedded}
    return best


def _ends(rows: Rows, candidates: list[tuple[Given, Any]]) -> dict[str, Any]:
    """Rows that end in the token that also pads (told apart by a mask): is that token ever a target?"""
    masks = [x for known, x in candidates if x.ndim == 2 and not known.embedded and is_mask(x)]
    best: dict[str, Any] = {}
    for x in (x for _, x in candidates if are_ids(x)):
        for mask in masks:
            width = min(x.shape[1], mask.shape[1])
            counts, tokens = mask[:, :width].bool(), x[:, :width]
            if bool(counts.all()):
                continue
            fill = tokens[~counts]
            token = int(fill[0])
            if not bool((fill == token).all()):
                continue
            last = width - 1 - counts.flip(1).int().argmax(dim=1)
            ending = counts.any(dim=1) & (tokens.gather(1, last[:, None])[:, 0] == token) & (last >= 1)
            ending &= last - 1 < rows.kept.shape[1]
            predicting = (last - 1).clamp(0, rows.kept.shape[1] - 1)
            ignored = ending & ~rows.kept.gather(1, predicting[:, None])[:, 0]
            ends = int(ending.sum())
            if ends > best.get("ends", 0):
                never = not bool((rows.kept & (rows.values == token)).any())
                best = {"ends": ends, "ends_ignored": int(ignored.sum()) if never else 0, "end_token": token}
    return best
