"""The prediction side of a loss call: what its values look like, and which operation made them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .loss_graph import origin

#: A 1-d tensor of figures still on its device, and what makes the payload of a ``LossInput`` of their list.
Figures = tuple[Any, Callable[[list[float]], dict[str, Any]]]

#: Losses whose input has a class dimension: the second, or the only one of an unbatched input.
CLASSES = frozenset({"cross_entropy", "nll_loss"})
#: Losses on one probability, or its logit, per element.
ELEMENTS = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"})
#: Losses that apply a sigmoid to their input themselves.
_ON_LOGITS = ELEMENTS - {"binary_cross_entropy"}

#: What is looked at of one call.
MOST_ROWS = 4096
MOST_ELEMENTS = 1 << 19
MOST_SINGLE_ELEMENTS = 1 << 16
#: Values this close to 0 or 1 count as saturated.
_SATURATED = 1e-6
#: Below this product p (1 - p), ``binary_cross_entropy`` no longer undoes the slope of the sigmoid
#: (ATen's binary_cross_entropy_backward divides by it or by this).
_CLAMP = 1e-12


def look(function: str, given: Any, target: Any, options: Mapping[str, Any]) -> Figures | None:
    """Measure the input of a loss; ``None`` when there is nothing to measure."""
    if not readable(given) or not given.is_floating_point() or not given.numel() or not given.ndim:
        return None
    if not readable(target) or target.device != given.device:
        target = None
    if function in CLASSES or function == "kl_div":
        return _look_at_classes(function, given, target, options)
    if function in ELEMENTS:
        return _look_at_elements(function, given, target)
    return None


def readable(tensor: Any) -> bool:
    """A plain tensor with values that this process can read by itself, outside any function transform."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    if tensor.device.type == "meta" or tensor.is_quantized or tensor.is_complex():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._C._get_tracing_state():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _look_at_classes(function: str, given: Any, target: Any, options: Mapping[str, Any]) -> Figures:
    import torch

    source = origin(given)
    axis = 1 if given.ndim > 1 else 0
    if function == "kl_div":
        axis = source.over if source.over is not None else given.ndim - 1
    classes = int(given.shape[axis])
    rows = given.detach().movedim(axis, -1)
    picked = _every(rows.shape[:-1], min(MOST_ROWS, max(1, MOST_ELEMENTS // classes)))
    rows = rows[picked].reshape(-1, classes).float()
    sums, normalisers = rows.sum(dim=1), rows.logsumexp(dim=1)
    numbers = [*_of_all(rows), sums.amin(), sums.amax(), normalisers.amin(), normalisers.amax()]
    wanted = None
    if function in CLASSES and source.made_by == "softmax" and classes > 1 and target is not None:
        wanted = _distributions(target.detach(), tuple(given.shape), picked, options, classes)
    if wanted is not None:
        numbers.append(_kept_by_softmax(rows, wanted, function))
    n = int(rows.shape[0])

    def build(values: list[float]) -> dict[str, Any]:
        return {
            "rows": n,
            "classes": classes,
            **_first(values),
            "row_sum_min": values[5],
            "row_sum_max": values[6],
            "row_logsumexp_min": values[7],
            "row_logsumexp_max": values[8],
            "made_by": source.made_by,
            "made_over": source.over,
            "node": source.node,
            "gradient_kept": _number(values[9]) if wanted is not None else None,
        }

    return torch.stack(numbers), build


def _look_at_elements(function: str, given: Any, target: Any) -> Figures:
    import torch

    source = origin(given)
    picked = _every(given.shape, MOST_SINGLE_ELEMENTS)
    values = given.detach()[picked].reshape(-1).float()
    numbers = _of_all(values)
    wanted = None
    if source.made_by == "sigmoid" and target is not None and target.shape == given.shape:
        wanted = target.detach()[picked].reshape(-1).float()
        wrong = (values - wanted).abs() > 0.5
        numbers.append((wrong & (values * (1 - values) < _CLAMP)).sum().float())
        numbers.append(_kept_by_sigmoid(values, wanted))
    known = wanted is not None and not source.node.lower().startswith("hardsigmoid")  # another slope
    n = int(values.numel())

    def build(figures: list[float]) -> dict[str, Any]:
        return {
            "rows": n,
            **_first(figures),
            "made_by": source.made_by,
            "made_over": source.over,
            "node": source.node,
            "vanished": int(figures[5]) if wanted is not None and function not in _ON_LOGITS else None,
            "gradient_kept": _number(figures[6]) if known and function in _ON_LOGITS else None,
        }

    return torch.stack(numbers), build


def _every(shape: Any, most: int) -> tuple[slice, ...]:
    """Slices that thin a shape out to at most about ``most`` entries, the last dimensions first."""
    sizes = [int(size) for size in shape]
    entries = math.prod(sizes)
    out = [slice(None)] * len(sizes)
    for axis in reversed(range(len(sizes))):
        if entries <= most:
            break
        step = min(sizes[axis], -(-entries // most))
        out[axis] = slice(None, None, step)
        entries = entries // sizes[axis] * -(-sizes[axis] // step)
    return tuple(out)


def _of_all(values: Any) -> list[Any]:
    """Smallest, largest, mean, saturated share, finite: as 0-d tensors."""
    saturated = (values.abs() <= _SATURATED) | ((values - 1).abs() <= _SATURATED)
    return [values.amin(), values.amax(), values.mean(), saturated.float().mean(), values.isfinite().all().float()]


def _first(values: list[float]) -> dict[str, Any]:
    return {
        "minimum": values[0],
        "maximum": values[1],
        "mean": values[2],
        "saturated": values[3],
        "finite": bool(values[4]),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _distributions(
    target: Any, shape: tuple[int, ...], picked: tuple[slice, ...], options: Mapping[str, Any], classes: int
) -> Any:
    """The picked targets as rows over the classes, zero where they are ignored; ``None`` for shapes that do not fit."""
    import torch

    lead = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if target.is_floating_point():
        if tuple(target.shape) != shape:
            return None
        wanted = target.movedim(1 if len(shape) > 1 else 0, -1)[picked].reshape(-1, classes).float()
        kept = None
    else:
        if tuple(target.shape) != lead or target.dtype is torch.bool:
            return None
        indices = target[picked].reshape(-1, 1).long()
        wanted = (indices == torch.arange(classes, device=indices.device)).float()
        kept = indices != int(options.get("ignore_index", -100))
    smoothing = float(options.get("label_smoothing", 0.0))
    if smoothing:
        wanted = wanted * (1 - smoothing) + smoothing / classes
    return wanted if kept is None else wanted * kept


def _kept_by_softmax(probabilities: Any, wanted: Any, function: str) -> Any:
    """Norm of the gradient at what the first softmax was given, over the norm it has without the fault.

    Without: p - t. With: J (q - t) for a second softmax q of p, or J (-t) for a missing logarithm, where
    J = diag(p) - p p^T is the slope of the first.
    """
    weight = wanted.sum(dim=1, keepdim=True)
    outer = probabilities.softmax(dim=1) * weight - wanted if function == "cross_entropy" else -wanted
    inner = probabilities * (outer - (probabilities * outer).sum(dim=1, keepdim=True))
    return inner.norm() / (probabilities * weight - wanted).norm()


def _kept_by_sigmoid(probabilities: Any, wanted: Any) -> Any:
    """The same for a second sigmoid: p (1 - p) (sigmoid(p) - t) over p - t."""
    inner = (probabilities.sigmoid() - wanted) * probabilities * (1 - probabilities)
    return inner.norm() / (probabilities - wanted).norm()
