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
from dataclasses import dataclass
from typing import Any

from .batches import Given, Inputs
from .loss_inputs import readable
from .loss_targets import BINARY, INDEXED, ignore_index

#: Elements of a target that are looked at; of larger ones the first rows.
LIMIT = 1 << 20
#: Nodes looked at behind the predictions for their shape before they were flattened.
WALK = 8
#: How many positions longer than the target the input may be (both sides of a shift cut one off).
LONGER = 2
#: A token that pads may occur inside a row as well (the end of a turn, where one token ends and pads): this often.
INSIDE = 0.05
#: Losses whose target is a number or a vector per position.
REGRESSIONS = frozenset("mse_loss l1_loss smooth_l1_loss huber_loss gaussian_nll_loss poisson_nll_loss".split())
#: Nodes that leave rows and positions where they are.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@dataclass(frozen=True)
class Rows:
    """A target with its rows: ``values`` (rows, length) or (rows, length, features), ``kept`` (rows, length)."""

    values: Any
    kept: Any
    #: The input's position that target position 0 belongs to.
    start: int
    #: Rows are the second dimension of the target as it came.
    turned: bool
    classes: bool
    #: The whole target, unless it was cut down to its first rows.
    complete: bool


@dataclass(frozen=True)
class Padding:
    """Positions (rows, length) that fill rows up."""

    at: Any
    lengths: Any
    name: str
    kind: str
    left: bool
    #: Ids and features, which the model sees; masks and lengths only tell.
    content: bool
    padding_idx: bool = False


def look(
    function: str, given: Any, target: Any, options: Mapping[str, Any], weight: Any, inputs: Inputs
) -> tuple[dict[str, Any], Any] | None:
    """Figures of a ``TargetRows`` and the mask of the padding in the target's own shape (or ``None``).

    ``None`` when the target is no rows of positions.
    """
    if not _readable(target) or not (function in INDEXED or function in BINARY or function in REGRESSIONS):
        return None
    beside = [*inputs.lookups(), *inputs.of_batches()]
    best: tuple[dict[str, Any], Any] | None = None
    ignored = ignore_index(function, options)
    indexed = function in INDEXED and not target.is_floating_point()
    if function in INDEXED and not indexed:
        return None
    for rows in _arrangements(given, target, indexed, ignored, beside):
        figures, padding = _measure(rows, beside, weight)
        if best is None or _merit(figures) > _merit(best[0]):
            mask = None
            if padding is not None and rows.complete:
                mask = padding.at.T if rows.turned else padding.at
                mask = mask.contiguous()
                if mask.numel() == target.numel():
                    mask = mask.reshape(target.shape)
                elif target.ndim == 3:
                    mask = mask.unsqueeze(-1).expand(target.shape) if target.shape[:2] == mask.shape else None
                else:
                    mask = None
            best = figures, mask
    return best


def _merit(figures: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which of two readings of a target is the better founded."""
    same = figures.get("same") or [0.0]
    return (
        figures.get("padding_supervised", 0),
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


def _measure(rows: Rows, beside: list[Given], weight: Any) -> tuple[dict[str, Any], Padding | None]:
    height, length = rows.kept.shape
    empty = ~rows.kept.any(dim=1)
    figures: dict[str, Any] = {
        "rows": height,
        "length": length,
        "ignored": int((~rows.kept).sum()),
        "empty": int(empty.sum()),
        "classes": rows.classes,
    }
    candidates = _candidates(rows, beside)
    figures["beside"] = bool(candidates)
    ids = [(known, x) for known, x in candidates if _are_ids(x)]
    padding, confirmed = _padding(rows, candidates)
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
        shown_by=padding.name,
        confirmed_by=confirmed,
        left=padding.left,
        padding_min=int(padding.lengths.min()),
        padding_max=int(padding.lengths.max()),
        padded_rows=int((padding.lengths >= 2).sum()),
        empty_full=int((empty & (padding.lengths == 0)).sum()),
    )
    counted = _counted(rows, padding)
    supervised = int(counted.sum())
    figures["padding_supervised"] = supervised
    if supervised and rows.values.ndim == 2:
        value = float(rows.values[counted][0])
        figures["padding_target"] = value
        if rows.classes and getattr(weight, "ndim", 0) == 1 and 0 <= value < weight.numel():
            figures["padding_weightless"] = float(weight[int(value)]) == 0.0
    return figures, padding


def _counted(rows: Rows, padding: Padding) -> Any:
    """Padding that the loss does not ignore. The last position before content on the right predicts that content."""
    at = padding.at
    if padding.left:
        at = at.clone()
        at[:, :-1] &= at[:, 1:].clone()
    return rows.kept & at


def _candidates(rows: Rows, beside: list[Given]) -> list[tuple[Given, Any]]:
    """Tensors with the same rows, cut to the target's positions; lengths (one number per row) as they are.

    A tensor of the batch that is the target itself says nothing about padding: left out. So is one that is the target
    one position on, unless another such tensor (the input beside the labels) came with it.
    """
    height, length = rows.kept.shape
    out: list[tuple[Given, Any]] = []
    shifted = 0
    for known in beside:
        x = known.tensor
        if rows.turned and x.ndim >= 2:
            x = x.transpose(0, 1)
        if x.ndim == 1:
            if not known.tensor.is_floating_point() and x.shape[0] >= height and not known.embedded:
                out.append((known, x[:height].cpu()))
            continue
        longer = x.shape[1] - length
        if not (x.shape[0] == height or not rows.complete and x.shape[0] > height) or not 0 <= longer <= LONGER:
            continue
        x = x[:height, min(rows.start, longer) :].cpu()
        if not known.embedded:
            if _equal(rows, x, 0):
                shifted += 1
                continue
            if _are_ids(x) and _equal(rows, x, 1):
                shifted += 1
        out.append((known, x))
    embedded = any(known.embedded for known, _ in out)
    return [
        (known, x)
        for known, x in out
        if known.embedded or x.ndim == 1 or not (_are_ids(x) and _equal(rows, x, 1)) or not embedded and shifted > 1
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


def _are_ids(x: Any) -> bool:
    """Whole numbers that are neither a mask nor one per row."""
    return x.ndim == 2 and not x.is_floating_point() and str(x.dtype) != "torch.bool" and int(x.max()) > 1


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
    masks = [x for known, x in candidates if x.ndim == 2 and not known.embedded and _is_mask(x)]
    best: dict[str, Any] = {}
    for x in (x for _, x in candidates if _are_ids(x)):
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


def _is_mask(x: Any) -> bool:
    """0 and 1 (or false and true) only, both."""
    return bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()) and bool((x == 1).any())


# ------------------------------------------------------------------------------------------------------- padding


def _padding(rows: Rows, candidates: list[tuple[Given, Any]]) -> tuple[Padding | None, str]:
    """The padding that the tensors beside the target show, and the name of a second one that confirms it.

    Only padding at which the target is one and the same is padding of the target as well.
    """
    found = [padding for known, x in candidates for padding in _runs(rows, known, x)]
    contents = [p for p in found if p.content]
    seen = any(x.ndim == 3 or _are_ids(x) or x.is_floating_point() for _, x in candidates if x.ndim > 1)
    best: Padding | None = None
    for padding in found:
        if not padding.content and seen and not any(_agrees(padding, c) for c in contents):
            continue  # what the model was given does not stand still there
        if padding.kind == "lengths" and not _ends_at(rows, padding):
            continue
        if not _constant(rows, padding):
            continue
        if best is None or _rank(rows, padding) > _rank(rows, best):
            best = padding
    if best is None:
        return None, ""
    if best.padding_idx:
        return best, "padding_idx of the embedding"
    for padding in found:
        if padding is not best and padding.content != best.content and _agrees(padding, best):
            other = padding if best.content else best
            return best, f"{other.name} ({other.kind})"
    return best, ""


def _rank(rows: Rows, padding: Padding) -> tuple[int, int, bool, bool]:
    return int(_counted(rows, padding).sum()), int(padding.at.sum()), padding.padding_idx, padding.content


def _agrees(a: Padding, b: Padding) -> bool:
    """Both see padding on the same side, with runs that differ by one position at most."""
    return a.left == b.left and int((a.lengths - b.lengths).abs().max()) <= 1


def _constant(rows: Rows, padding: Padding) -> bool:
    """The target is one and the same at all padding that counts."""
    values = rows.values[_counted(rows, padding)]
    return len(values) == 0 or bool((values == values[0]).all())


def _ends_at(rows: Rows, padding: Padding) -> bool:
    """The target's own runs of the padding's value end where the lengths say, give or take one position."""
    counted = _counted(rows, padding)
    if not bool(counted.any()):
        return True
    own = _tail((rows.values == rows.values[counted][0]), rows.values.ndim)
    return int((own.sum(dim=1) - padding.lengths).abs().max()) <= 1


def _runs(rows: Rows, known: Given, x: Any) -> list[Padding]:
    """The padding that one tensor shows: at most one on each side."""
    length = rows.kept.shape[1]
    if x.ndim == 1:
        return _of_lengths(rows, known, x)
    out = []
    mask = x.ndim == 2 and not known.embedded and _is_mask(x)
    declared = known.embedded and known.padding is not None
    kind = "mask" if mask else "ids" if _are_ids(x) else "values"
    for left in (False, True):
        side = x.flip(1) if left else x
        for value in (0, 1) if mask else (known.padding,) if declared else (None,):
            filled = _filled(side, value)
            if filled is None:
                continue
            at = _tail(filled, 2)
            if _is_padding(filled, at, declared, mask):
                at = (at.flip(1) if left else at)[:, :length]
                out.append(Padding(at, at.sum(dim=1), known.name, kind, left, not mask, declared))
    return out


def _of_lengths(rows: Rows, known: Given, x: Any) -> list[Padding]:
    import torch

    length = rows.kept.shape[1]
    if x.dtype == torch.bool or x.shape[0] != rows.kept.shape[0]:
        return []
    low, high = int(x.min()), int(x.max())
    if low < 1 or high > length + LONGER or high < length or low == high:
        return []  # the longest row sets the length that all are padded to
    at = torch.arange(length)[None, :] >= x[:, None]
    return [Padding(at, at.sum(dim=1), known.name, "lengths", False, False)]


def _filled(x: Any, value: int | None) -> Any:
    """Where ``x`` has the value that its rows end in: ``value``, or the one of the row with the longest run."""
    if value is not None:
        filled = x == value
        return filled if bool(filled[:, -1].any()) else None
    last = x[:, -1:]
    same = x == last
    runs = _tail(same, x.ndim).sum(dim=1)
    runs = runs * (runs < x.shape[1])
    row = int(runs.argmax())
    if int(runs[row]) < 2:
        return None
    filled = x == x[row, -1]
    return filled.all(dim=-1) if x.ndim == 3 else filled


def _tail(same: Any, ndim: int) -> Any:
    """From (rows, length[, features]) of booleans: the positions of the unbroken run at each row's end."""
    if ndim == 3:
        same = same.all(dim=-1)
    return same.int().flip(1).cumprod(dim=1).flip(1).bool()


def _is_padding(filled: Any, at: Any, declared: bool, mask: bool) -> bool:
    """Whether runs at the ends of rows are padding, and not what the rows contain.

    ``declared``: the value is an embedding's padding_idx. A first position may have it as well (T5 starts with it).
    """
    lengths = at.sum(dim=1)
    whole = lengths == filled.shape[1]
    if not bool((~whole & (lengths >= 2)).any()):
        return False
    inside = (filled & ~at)[~whole]
    if mask:
        return not bool(inside.any())
    if bool((inside[:, 0] & inside[:, 1]).any()):
        return False  # at both ends: a border
    inside = inside[:, 1:]
    pairs = bool((inside[:, :-1] & inside[:, 1:]).any())
    rest = int((~at[~whole][:, 1:]).sum())
    if declared:
        return int(inside.sum()) <= INSIDE * max(1, rest)
    return not pairs and int(inside.sum()) <= INSIDE * max(1, rest)
