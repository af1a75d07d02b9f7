"""What the autograd graph says of a loss: which operation made its input, and differences of vectors that broadcast.

Only names, shapes and edges are read; of saved tensors only what :func:`outer_difference` needs to prove its finding.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

#: Nodes looked at between a tensor and the operation that made it.
WALK = 48

#: Operations that hand their values on: views, copies, casts, picks.
_THROUGH = frozenset(
    """view unsafeview reshape reshapealias viewas squeeze unsqueeze permute transpose t select slice index indexselect
    split splitwithsizes unbind chunk expand repeat clone tocopy alias asstrided contiguous maskedselect narrow roll
    flip movedim unfold detach clamp clampmin clampmax""".split()
)
#: Those of them that keep the number and the order of the dimensions.
_SAME_DIMENSIONS = frozenset("clone tocopy alias contiguous clamp clampmin clampmax".split())
_CLAMPS = frozenset("clamp clampmin clampmax".split())
#: What :attr:`Origin.made_by` calls an operation.
_KINDS = {
    "softmax": "softmax",
    "safesoftmax": "softmax",
    "logsoftmax": "log_softmax",
    "sigmoid": "sigmoid",
    "hardsigmoid": "sigmoid",
    "logsigmoid": "logsigmoid",
    "relu": "relu",
    "tanh": "tanh",
    **dict.fromkeys("addmm mm bmm baddbmm addbmm mv addmv linear convolution".split(), "linear"),
}
_LOG_OF = {"softmax": "log_softmax", "sigmoid": "logsigmoid"}
_EXP_OF = {"log_softmax": "softmax", "logsigmoid": "sigmoid"}


@dataclass(frozen=True)
class Origin:
    """The operation that made a tensor, looking through views and casts."""

    #: ``softmax``, ``log_softmax``, ``sigmoid``, ``logsigmoid``, ``log`` or ``exp`` of something else, ``linear``
    #: (straight out of a layer), ``relu``, ``tanh``; empty when it was none of these.
    made_by: str = ""
    #: Name of the node that was not looked through; empty when the tensor hangs from no graph.
    node: str = ""
    #: The dimension a softmax went over, as a dimension of the tensor; ``None`` when that cannot be said.
    over: int | None = None


def origin(tensor: Any) -> Origin:
    """Which operation made ``tensor``."""
    made_by, node, over = _made_by(tensor.grad_fn, WALK)
    if over is not None and over >= 1 << 63:
        over -= 1 << 64  # saved as unsigned
    if over is not None and over < 0:
        over += tensor.ndim
    return Origin(made_by, node, over if over is not None and 0 <= over < tensor.ndim else None)


def _made_by(node: Any, budget: int) -> tuple[str, str, int | None]:
    """``(made_by, node, dimension)`` of what ``node`` made; the dimension is ``None`` once the shape was changed."""
    same_dimensions, altered = True, False
    outer = ""
    found = ""
    while node is not None and budget > 0:
        budget -= 1
        found = node.name()
        kind = _kind(found)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if kind in _THROUGH and parents:
            same_dimensions = same_dimensions and kind in _SAME_DIMENSIONS
            altered = altered or kind in _CLAMPS
            node = node.next_functions[0][0]
        elif kind in ("cat", "stack") and parents:
            inner = [_made_by(parent, budget // len(parents)) for parent in parents[:8]]
            if len({made_by for made_by, _, _ in inner}) > 1:
                return "", found, None
            made_by, found, _ = inner[0]
            return _combined(outer, made_by, altered), found, None
        elif kind in ("log", "exp") and not outer and parents:
            outer = kind
            node = parents[0]
        elif kind == "add" and len(parents) == 1 and outer == "log":
            node = parents[0]  # log(p + eps)
        elif kind == "add" and len(parents) == 2 and not outer and _is_leaf(parents[1]):
            node = parents[0]  # x @ W + b; of other things the sum says nothing
            if _kind(_behind_views(node).name()) not in ("mm", "bmm"):
                return "", found, None
        else:
            made_by = _KINDS.get(kind) or _by_hand(kind, node, parents)
            over = getattr(node, "_saved_dim", None) if made_by in ("softmax", "log_softmax") else None
            known = isinstance(over, int) and same_dimensions
            return _combined(outer, made_by, altered), found, over if known else None
    return outer, found, None


def _combined(outer: str, made_by: str, altered: bool) -> str:
    """``made_by`` under a logarithm or an exponential."""
    if outer == "log":
        return _LOG_OF.get(made_by, "log")
    if outer == "exp":
        return _EXP_OF.get(made_by, "exp")
    return "" if altered and made_by == "linear" else made_by


def _by_hand(kind: str, node: Any, parents: list[Any]) -> str:
    """Softmax and sigmoid as people write them out."""
    if kind == "div" and len(parents) == 2:
        # exp(z) / exp(z).sum(): the same exponential above and below.
        below = _behind_views(parents[1])
        if _named(parents[0], "exp") and _named(below, "sum") and below.next_functions[0][0] is parents[0]:
            return "softmax"
    elif kind == "mul" and len(parents) == 1 and _named(parents[0], "reciprocal"):
        return _by_hand("reciprocal", parents[0], [p for p, _ in parents[0].next_functions if p is not None])
    elif kind == "reciprocal" and len(parents) == 1 and _named(parents[0], "add"):
        # 1 / (1 + exp(-z))
        terms = [p for p, _ in parents[0].next_functions if p is not None]
        return "sigmoid" if len(terms) == 1 and _named(terms[0], "exp") else ""
    elif kind == "sub" and len(parents) == 2:
        # z - logsumexp(z)
        return "log_softmax" if _named(_behind_views(parents[1]), "logsumexp") else ""
    return ""


def _behind_views(node: Any) -> Any:
    for _ in range(4):
        if node is None or _kind(node.name()) not in _THROUGH:
            break
        node = node.next_functions[0][0]
    return node


def _named(node: Any, kind: str) -> bool:
    return node is not None and _kind(node.name()) == kind


def _is_leaf(node: Any) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))


@functools.lru_cache(maxsize=512)
def _kind(name: str) -> str:
    """``LogSoftmaxBackward0`` -> ``logsoftmax``."""
    return re.sub(r"backward\d*$", "", name.lower()).replace("_", "")


# ---------------------------------------------------------------------------------------- differences that broadcast


@dataclass(frozen=True)
class OuterDifference:
    """A loss written by hand is the mean or sum of powers of *all* differences of two vectors."""

    #: Shape of the prediction (the operand in the graph) and of the difference.
    operand_shape: tuple[int, ...]
    shape: tuple[int, ...]
    #: ``square`` or ``absolute``.
    power: str
    #: ``mean`` or ``sum``.
    reduction: str
    #: Nothing is added to it on the way to the loss.
    alone: bool = True


#: Rows and columns of the difference that are read to prove it.
_CORNER = 64


def outer_difference(loss: Any) -> OuterDifference | None:
    """The difference in ``loss`` (a scalar given to backward) that broadcast a vector against another.

    Found when the whole loss, apart from terms that are added to it, is a mean or a sum of squared or absolute
    differences, one operand is in the graph with shape (N, 1) or (N,), and the difference has shape (N, N). That the
    other operand is a vector too is then read from the values: ``d[i, j] = a[i] - b[j]`` for a corner of them.
    """
    stack = [loss.grad_fn]
    alone = True
    for _ in range(WALK):
        if not stack:
            break
        node = stack.pop(0)
        if node is None:
            continue
        kind = _kind(node.name())
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if kind in ("mean", "sum"):
            found = _of_reduced(node, parents[0], kind) if parents else None
            if found is not None:
                return replace(found, alone=alone)
        elif kind in ("add", "sub", "neg", "mul", "div", "sqrt", "pow"):
            alone = alone and len(parents) < 2
            stack += parents
        elif kind in _THROUGH and parents:
            stack.append(parents[0])
    return None


def _of_reduced(reduction: Any, node: Any, how: str) -> OuterDifference | None:
    for _ in range(4):
        kind = _kind(node.name())
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if kind == "pow" or (kind == "mul" and len(parents) == 2 and parents[0] is parents[1]):
            power = "square"
        elif kind == "abs":
            power = "absolute"
        elif kind in ("mul", "div") and len(parents) == 1:
            node = parents[0]  # weights
            continue
        else:
            return None
        difference = parents[0]
        if kind == "pow" and getattr(node, "_saved_exponent", 2) not in (2, 2.0):
            return None
        return _broadcast(difference, node, power, how) if _named(difference, "sub") else None
    return None


def _broadcast(difference: Any, power_node: Any, power: str, how: str) -> OuterDifference | None:
    edges = [(parent, index) for parent, index in difference.next_functions if parent is not None]
    if len(edges) != 1:
        return None  # both sides are predictions: pairs are meant
    shape = _shape(difference, 0)
    operand = _shape(*edges[0])
    if shape is None or operand is None or len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        return None
    n = shape[0]
    if operand not in ((n, 1), (n,)):
        return None
    values = getattr(power_node, "_saved_self", None)
    if values is None or tuple(values.shape) != shape or not _is_outer(values):
        return None
    return OuterDifference(operand, shape, power, how)


def _shape(node: Any, index: int) -> tuple[int, ...] | None:
    metadata = getattr(node, "_input_metadata", None)
    if _is_leaf(node):
        variable = getattr(node, "variable", None)
        return tuple(variable.shape) if variable is not None else None
    try:
        return tuple(int(size) for size in metadata[index].shape) if metadata is not None else None
    except (IndexError, TypeError):
        return None


def _is_outer(values: Any) -> bool:
    """Whether ``values[i, j]`` is ``a[i] - b[j]``, and neither ``a`` nor ``b`` is constant."""
    corner = values.detach()[:_CORNER, :_CORNER].double()
    rows, columns = corner[:, :1], corner[:1, :]
    size = float(corner.abs().amax())
    rest = float((corner - rows - columns + corner[:1, :1]).abs().amax())
    # A rounding of each difference to its own dtype is what may be left.
    return size > 0 and rest <= 8 * _epsilon(values.dtype) * size and float((columns - columns[:, :1]).abs().amax()) > 0


def _epsilon(dtype: Any) -> float:
    import torch

    return float(torch.finfo(dtype).eps)
