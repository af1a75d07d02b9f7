"""The target side of a loss call: ranges, ignored positions, samples without any target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .loss_inputs import Figures

#: Elements of a target that are looked at; of larger ones the first samples.
LIMIT = 1 << 22
#: Losses whose integer target names a class, and the index that they leave out unless told otherwise.
INDEXED = {"cross_entropy": -100, "nll_loss": -100, "multi_margin_loss": None}
#: Losses on probabilities: each element of the target is one.
BINARY = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"})
#: Losses whose target is a distribution over the classes when it has the shape of the input.
DISTRIBUTIONS = frozenset({"cross_entropy", "kl_div"})


def look(function: str, given: Any, target: Any, options: Mapping[str, Any]) -> Figures | None:
    """Measure the target of a loss; ``None`` when there is nothing to measure."""
    import torch

    if not isinstance(target, torch.Tensor) or target.layout != torch.strided or target.is_complex():
        return None
    if target.device.type == "meta" or target.is_quantized or not target.numel():
        return None
    whole, target = target, within_limit(target.detach())
    whole_numbers = not target.is_floating_point()
    if function in INDEXED and whole_numbers and target.dtype is not torch.bool:
        out = _of_indices(target, _classes(given), ignore_index(function, options))
    elif function in DISTRIBUTIONS and _same_shape(given, whole):
        out = _of_distributions(function, target, options)
    else:
        out = _of_values(target, function in BINARY)
    figures, build = out
    if target.numel() == whole.numel():
        return figures, build
    return figures, lambda values: {**build(values), "sampled": True}


def ignore_index(function: str, options: Mapping[str, Any]) -> int | None:
    """The index that this call leaves out; ``None`` when the loss knows none."""
    index = options.get("ignore_index", INDEXED.get(function))
    return index if isinstance(index, int) else None


def within_limit(target: Any) -> Any:
    """The target, or its first samples when it is very large (at least one; an even sample of a 1-d target)."""
    if target.numel() <= LIMIT:
        return target
    if target.ndim == 1:
        return target[:: -(-target.numel() // LIMIT)]
    return target[: max(1, LIMIT // max(1, target[0].numel()))]


def together(numbers: list[Any]) -> Any:
    """0-d tensors of any kind as one 1-d tensor of floats on their device."""
    import torch

    # MPS knows no float64, which holds every count and every class exactly.
    kind = torch.float32 if numbers[0].device.type == "mps" else torch.float64
    return torch.stack([n.to(kind) for n in numbers])


def _classes(given: Any) -> int | None:
    """Size of the class dimension: the second, or the only one of an unbatched input."""
    shape = tuple(getattr(given, "shape", ()))
    if not shape:
        return None
    return int(shape[1] if len(shape) > 1 else shape[0])


def _same_shape(given: Any, target: Any) -> bool:
    return target.is_floating_point() and tuple(getattr(given, "shape", ())) == tuple(target.shape) and target.ndim > 0


def _of_indices(target: Any, classes: int | None, ignored: int | None) -> Figures:
    """``target``: classes of any shape."""
    import torch

    kept = target != ignored if ignored is not None else torch.ones_like(target, dtype=torch.bool)
    wide = target.long()
    limits = torch.iinfo(torch.int64)
    outside = (wide < 0) | (wide >= classes) if classes is not None else torch.zeros_like(kept)
    numbers = [
        kept.sum(),
        torch.where(kept, wide, limits.max).amin(),
        torch.where(kept, wide, limits.min).amax(),
        (outside & kept).sum(),
    ]
    samples = int(target.shape[0]) if target.ndim > 1 else None
    if samples is not None:
        numbers.append((~kept.reshape(samples, -1).any(dim=1)).sum())
    positions = target.numel()

    def build(values: list[float]) -> dict[str, Any]:
        supervised = int(values[0])
        return {
            "positions": positions,
            "ignored": positions - supervised,
            "minimum": values[1] if supervised else None,
            "maximum": values[2] if supervised else None,
            "integral": True,
            "out_of_range": int(values[3]) if classes is not None else None,
            "samples": samples,
            "empty_samples": int(values[4]) if samples is not None else None,
        }

    return together(numbers), build


def _of_distributions(function: str, target: Any, options: Mapping[str, Any]) -> Figures:
    """``target``: probabilities (or, for kl_div with ``log_target``, their logarithms) over a class dimension."""
    axis = (1 if target.ndim > 1 else 0) if function == "cross_entropy" else target.ndim - 1
    wide = target.float()
    sums = (wide.exp() if options.get("log_target") else wide).sum(dim=axis)
    numbers = [wide.amin(), wide.amax(), (wide == wide.round()).all(), sums.amin(), sums.amax()]
    positions = sums.numel()
    samples = int(target.shape[0]) if target.ndim > 1 else None

    def build(values: list[float]) -> dict[str, Any]:
        return {
            "positions": positions,
            "minimum": values[0],
            "maximum": values[1],
            "integral": bool(values[2]),
            "row_sum_min": values[3],
            "row_sum_max": values[4],
            "samples": samples,
        }

    return together(numbers), build


def _of_values(target: Any, binary: bool) -> Figures:
    """``target``: a number per element, for losses on probabilities (``binary``) and regressions."""
    import torch

    if target.dtype is torch.bool:
        target = target.to(torch.uint8)
    numbers = [target.amin(), target.amax()]
    whole_numbers = not target.is_floating_point()
    if not whole_numbers:
        numbers.append((target == target.round()).all())
    if binary:
        numbers.append((target > 0.5).sum())
    positions = target.numel()
    samples = int(target.shape[0]) if target.ndim else None

    def build(values: list[float]) -> dict[str, Any]:
        return {
            "positions": positions,
            "minimum": values[0],
            "maximum": values[1],
            "integral": whole_numbers or bool(values[2]),
            "positives": int(values[-1]) if binary else None,
            "samples": samples,
        }

    return together(numbers), build
