"""Where a backward leads: from the tensor it is called on to the parameters its gradients would go to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .watch import Session

#: Nodes looked at in one graph, and in all graphs that led to no parameter: such a walk cannot stop early.
NODES = 200_000
ALL_NODES = 1_000_000


class Reach:
    """What a walk over a graph found."""

    def __init__(self) -> None:
        #: It leads to a trainable parameter; ``None``: not known.
        self.parameters: bool | None = False
        #: Tensors that it ends in, none of them a parameter.
        self.leaves = 0
        #: A custom autograd function on the way, whose backward may run a graph of its own (reentrant checkpointing).
        self.hidden = ""
        self.nodes = 0


def reach(tensors: Iterable[Any], is_parameter: Callable[[Any], bool], most: int = NODES) -> Reach:
    """Walk the graph of ``tensors`` until a parameter is found, which takes a handful of nodes when nothing is wrong.

    Args:
        tensors: what backward is called on.
        is_parameter: whether a leaf tensor is a trainable parameter.
        most: nodes to look at before giving up.
    """
    import torch

    custom = getattr(torch.autograd.function, "BackwardCFunction", ())
    out = Reach()
    stack: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            if is_parameter(tensor):
                out.parameters = True
                return out
            out.leaves += 1
    # Nodes are kept, not their ids: the Python object of a node that nobody holds is made anew at each look.
    seen: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        out.nodes += 1
        if out.nodes > most:
            out.parameters = None
            return out
        if isinstance(node, custom):
            out.hidden = out.hidden or node.name()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            if is_parameter(leaf):
                out.parameters = True
                return out
            out.leaves += 1
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    if out.hidden:
        out.parameters = None
    return out


class Paths:
    """Asks of every backward whether it leads to a parameter."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._left = ALL_NODES

    def look(self, tensors: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """Fields of the ``backward`` event, and the gradients to compare afterwards where the graph led nowhere."""
        if not tensors or not all(t.requires_grad for t in tensors):
            return {"reaches_parameters": False, "leaves": 0}, []
        if self._left <= 0:
            return {}, []
        found = reach(tensors, self._is_parameter(), min(NODES, self._left))
        if found.parameters:
            return {"reaches_parameters": True}, []
        self._left -= found.nodes
        fields = {"reaches_parameters": found.parameters, "leaves": found.leaves, "hidden": found.hidden}
        return fields, [(p, p.grad, version(p.grad)) for p in self._parameters()]

    def _parameters(self) -> list[Any]:
        known = {id(p): p for p in self.session.modules.parameters.values()}
        for watched in self.session.optimizers.watched.values():
            for group in watched.optimizer.param_groups:
                known.update((id(p), p) for p in group["params"])
        return [p for p in known.values() if p.requires_grad]

    def _is_parameter(self) -> Callable[[Any], bool]:
        import torch

        known: set[int] = set()

        def is_parameter(leaf: Any) -> bool:
            # Also one of no module that was found: a model built since the last scan, the flat parameter of FSDP.
            if isinstance(leaf, torch.nn.Parameter):
                return True
            if not known:
                known.update(id(p) for p in self._parameters())
            return id(leaf) in known

        return is_parameter


def changed(before: list[Any]) -> int:
    """Of the parameters looked at before a backward, those whose gradient is new or was added to."""
    return sum(1 for p, grad, count in before if p.grad is not grad or version(p.grad) != count)


def version(gradient: Any) -> int:
    """The count that every change in place raises; it costs no look at the values."""
    return int(gradient._version) if gradient is not None else -1
