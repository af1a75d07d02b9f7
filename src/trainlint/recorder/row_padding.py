"""Padding: what fills rows up to one length.

A run of one and the same value at the end (or beginning) of rows, of different length from row to row, that occurs
nowhere else in them; or what a mask or lengths that came with the batch say. It is looked for in what the model was
given: the target alone cannot tell padding from a frequent class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .batches import Given

#: How many positions longer than the target the input may be (both sides of a shift cut one off).
LONGER = 2
#: A token that pads may occur inside a row as well (the end of a turn, where one token ends and pads): this often.
INSIDE = 0.05
#: Different values that an embedded tensor of segments or types has at most.
SEGMENTS = 3


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
    value: float | None = None


def are_ids(x: Any) -> bool:
    """Whole numbers that are neither a mask nor one per row."""
    return x.ndim == 2 and not x.is_floating_point() and str(x.dtype) != "torch.bool" and int(x.max()) > 1


def is_mask(x: Any) -> bool:
    """0 and 1 (or false and true) only, both."""
    return bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()) and bool((x == 1).any())


def counted(rows: Rows, padding: Padding) -> Any:
    """Padding that the loss does not ignore. The last position before content on the right predicts that content."""
    at = padding.at
    if padding.left:
        at = at.clone()
        at[:, :-1] &= at[:, 1:].clone()
    return rows.kept & at


def find(rows: Rows, candidates: list[tuple[Given, Any]]) -> tuple[Padding | None, str]:
    """The padding that the tensors beside the target show, and the name of a second one that confirms it.

    Only padding at which the target is one and the same is padding of the target as well.
    """
    found = [padding for known, x in _tokens_first(candidates) for padding in _runs(rows, known, x)]
    contents = [p for p in found if p.content]
    seen = any(x.ndim == 3 or are_ids(x) or x.is_floating_point() for _, x in candidates if x.ndim > 1)
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


def _tokens_first(candidates: list[tuple[Given, Any]]) -> list[tuple[Given, Any]]:
    """Without the segment numbers that were embedded beside tokens: a second segment is no padding."""
    kinds = [len(x.unique()) if known.embedded else 0 for known, x in candidates]
    return [pair for pair, n in zip(candidates, kinds, strict=True) if not 0 < n <= SEGMENTS or max(kinds) <= SEGMENTS]


def _rank(rows: Rows, padding: Padding) -> tuple[int, int, bool, bool]:
    # A token that happens to stand twice at an edge is less than the padding on the other side.
    return int(padding.at.sum()), int(counted(rows, padding).sum()), padding.padding_idx, padding.content


def _agrees(a: Padding, b: Padding) -> bool:
    """Both see padding on the same side, with runs that differ by one position at most."""
    return a.left == b.left and int((a.lengths - b.lengths).abs().max()) <= 1


def _constant(rows: Rows, padding: Padding) -> bool:
    """The target is one and the same at all padding that counts."""
    values = rows.values[counted(rows, padding)]
    return len(values) == 0 or bool((values == values[0]).all())


def _ends_at(rows: Rows, padding: Padding) -> bool:
    """The target's own runs of the padding's value end where the lengths say, give or take one position."""
    at = counted(rows, padding)
    if not bool(at.any()):
        return True
    own = _tail((rows.values == rows.values[at][0]), rows.values.ndim)
    return int((own.sum(dim=1) - padding.lengths).abs().max()) <= 1


def _runs(rows: Rows, known: Given, x: Any) -> list[Padding]:
    """The padding that one tensor shows: at most one on each side."""
    length = rows.kept.shape[1]
    if x.ndim == 1:
        return _of_lengths(rows, known, x)
    out = []
    mask = x.ndim == 2 and not known.embedded and is_mask(x)
    kind = "mask" if mask else "ids" if are_ids(x) else "values"
    declared = known.padding if known.embedded else None
    for left in (False, True):
        side = x.flip(1) if left else x
        # The padding_idx of an embedding need not be what pads here.
        for value in (0, 1) if mask else dict.fromkeys((declared, None)):
            filled = _filled(side, value)
            if filled is None:
                continue
            at = _tail(filled, 2)
            told = not mask and value is not None
            if not _is_padding(filled, at, told, mask):
                continue
            at = (at.flip(1) if left else at)[:, :length]
            found = x[:, :length][at]
            fill = float(found[0]) if x.ndim == 2 and len(found) else None
            out.append(Padding(at, at.sum(dim=1), known.name, kind, left, not mask, told, fill))
            if told:
                break
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
    runs = lengths[~whole]
    if int((runs >= 2).sum()) < 2 and int(runs.max()) < 4:
        return False  # one token twice at an edge
    return not pairs and int(inside.sum()) <= INSIDE * max(1, rest)
