"""Backward: what was differentiated, and how it relates to the loss that it came from."""

from __future__ import annotations

import threading
from typing import Any

from . import measure
from .core import Recorder
from .graph import Paths, changed
from .modules import dtype_name
from .patching import ImportHooks, wrap
from .watch import Session

#: Key under which a loss call leaves its event number in the metadata of its graph node.
TAG = "trainlint_loss"
#: Nodes looked at between backward's tensor and the loss it was made of.
WALK = 64

#: Nodes that hand a scalar on unchanged.
_THROUGH = (
    "ToCopyBackward0",
    "AliasBackward0",
    "CloneBackward0",
    "ViewBackward0",
    "SqueezeBackward0",
    "UnsqueezeBackward0",
    "SelectBackward0",
    "CompiledFunctionBackward",
    "ReshapeAliasBackward0",
    "_unsafe_viewBackward0",
)
_MEANS = ("MeanBackward0", "MeanBackward1")
_SUMS = ("SumBackward0", "SumBackward1")


#: Number of the event, parameters without a gradient, gradients to compare.
Begun = tuple[int, list[Any], list[Any]]


class Ancestry:
    """What lies between the tensor given to backward and the loss."""

    def __init__(self) -> None:
        #: loss tensor = micro loss / divided_by
        self.divided_by: float | None = None
        self.reduction: str | None = None
        self.loss: int | None = None


def ancestry(tensor: Any) -> Ancestry:
    """Walk back from a scalar through divisions, products with constants and sums, to a tagged loss or a reduction.

    Of several summands the first that leads to a tagged loss counts; a constant factor is what its node saved.
    """
    out = Ancestry()
    node = tensor.grad_fn
    stack: list[tuple[Any, float]] = [(node, 1.0)]
    fallback: tuple[float, str] | None = None
    for _ in range(WALK):
        if not stack:
            break
        node, factor = stack.pop(0)
        if node is None:
            continue
        name = node.name()
        tag = node.metadata.get(TAG)
        if tag is not None:
            out.loss, out.reduction = tag
            out.divided_by = 1.0 / factor if factor else None
            return out
        if name in _MEANS or name in _SUMS:
            if fallback is None:
                fallback = (factor, "mean" if name in _MEANS else "sum")
            continue
        if hasattr(node, "_saved_reduction"):
            if fallback is None:
                fallback = (factor, {0: "none", 1: "mean", 2: "sum"}.get(int(node._saved_reduction), "other"))
            continue
        parents = [n for n, _ in node.next_functions if n is not None]
        if name == "DivBackward0":
            constant = _constant(node, "_saved_other")
            if constant:
                stack.append((node.next_functions[0][0], factor / constant))
        elif name == "MulBackward0":
            # Exactly one operand is part of the graph when the other is a constant.
            if len(parents) == 1:
                left_in_graph = node.next_functions[0][0] is not None
                constant = _constant(node, "_saved_other" if left_in_graph else "_saved_self")
                if constant is not None:
                    stack.append((parents[0], factor * constant))
        elif name == "NegBackward0":
            stack.append((parents[0], -factor))
        elif name in ("AddBackward0", "SubBackward0"):
            alpha = getattr(node, "_saved_alpha", 1)
            signs = (1.0, -1.0 if name == "SubBackward0" else 1.0)
            for (parent, _), sign in zip(node.next_functions, signs, strict=False):
                if parent is not None:
                    scale = alpha if sign != 1.0 or parent is node.next_functions[-1][0] else 1
                    stack.append((parent, factor * sign * float(scale)))
        elif name == "StackBackward0" or name == "CatBackward0":
            continue
        elif name in _THROUGH or len(parents) == 1:
            if name not in _THROUGH:
                continue  # an unknown function of the loss (log, exp ...): no factor can be read off it
            stack.append((parents[0], factor))
    if fallback is not None:
        factor, out.reduction = fallback
        out.divided_by = 1.0 / factor if factor else None
    return out


def _constant(node: Any, name: str) -> float | None:
    try:
        saved = getattr(node, name)
    except Exception:
        return None
    if saved is None:
        return None
    if isinstance(saved, (int, float)):
        return float(saved)
    if getattr(saved, "numel", lambda: 0)() != 1:
        return None
    from torch.utils._python_dispatch import _disable_current_modes

    # Under a mode (a counter of operations) a Python number that became a tensor cannot be read.
    with _disable_current_modes():
        return measure.scale.of(saved)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    paths = Paths(session)
    running = threading.local()

    @recorder.quiet
    def begins(tensors: Any, grad_tensors: Any, retain_graph: Any, create_graph: Any) -> Begun | None:
        if not session.backwards:
            session.training_thread = threading.get_ident()  # the thread that trains, which need not be the main one
        if threading.get_ident() != session.training_thread:
            return None
        session.backwards += 1
        if session.backwards == 1:
            session.modules.scan()
            recorder.mark("backward")
        session.modules.modes.look("backward")
        given = [tensors] if isinstance(tensors, torch.Tensor) else [t for t in tensors if isinstance(t, torch.Tensor)]
        if not given:
            return None
        loss = given[0]
        path, gradients = paths.look(given)
        fields: dict[str, Any] = {
            **path,
            "dtype": dtype_name(loss.dtype),
            "numel": loss.numel(),
            "requires_grad": all(t.requires_grad for t in given),
            "grad_enabled": torch.is_grad_enabled(),
            "inference": loss.is_inference(),
            "grad_fn": loss.grad_fn.name() if loss.grad_fn is not None else None,
            "retain_graph": bool(retain_graph or create_graph),
            "loss_scale": session.loss_scale,
        }
        gradient = grad_tensors if isinstance(grad_tensors, torch.Tensor) else None
        if gradient is None and isinstance(grad_tensors, (list, tuple)) and grad_tensors:
            gradient = grad_tensors[0]
        if isinstance(gradient, torch.Tensor) and gradient.numel() == 1 and gradient.device.type == "cpu":
            fields["gradient_argument"] = float(gradient)
        if loss.grad_fn is not None and loss.numel() == 1:
            found = ancestry(loss)
            scale = session.loss_scale or 1.0
            fields["micro_loss_reduction"] = found.reduction
            fields["loss_call"] = found.loss
            if found.divided_by is not None:
                fields["divided_by"] = found.divided_by * scale
        seq = recorder.event("backward", at=recorder.user_line(), **fields)
        if loss.numel() == 1:
            recorder.later(seq, "value", loss.detach())
        session.optimizers.backward_begins()
        return seq, bare(), gradients

    def bare() -> list[Any]:
        """Parameters of the known optimizers that have no gradient."""
        return [
            p
            for watched in session.optimizers.watched.values()
            for group in watched.optimizer.param_groups
            for p in group["params"]
            if p.grad is None
        ]

    @recorder.quiet
    def ended(seq: int, before: list[Any], gradients: list[Any]) -> None:
        if threading.get_ident() != session.training_thread:
            return
        reached = {id(p) for p in before if p.grad is not None}  # two optimizers may hold one parameter
        values: dict[str, Any] = {"new_gradients": len(reached)}
        if gradients:
            values["gradients_changed"] = changed(gradients)
        recorder.emit("event_value", {"seq": seq, **values})
        session.optimizers.backward_ended(seq)
        session.inputs.backward()
        if not session.steps and session.backwards >= recorder.settings.backward_cap:
            session.park("backward-cap")

    @recorder.quiet
    def raised(seq: int, error: BaseException) -> None:
        recorder.emit("event_value", {"seq": seq, "raised": f"{type(error).__name__}: {error}"[:500]})

    def make(original: Any) -> Any:
        def backward(
            tensors: Any,
            grad_tensors: Any = None,
            retain_graph: Any = None,
            create_graph: Any = False,
            *a: Any,
            **k: Any,
        ) -> Any:
            # Reentrant checkpointing calls backward inside backward: that is not another one of the program's.
            if torch.compiler.is_compiling() or getattr(running, "inside", False) or measure.capturing():
                return original(tensors, grad_tensors, retain_graph, create_graph, *a, **k)
            session.activity()
            costs = session.costs
            costs.backward_begins(tensors)
            begun = begins(tensors, grad_tensors, retain_graph, create_graph)
            costs.enter("backward")
            running.inside = True
            try:
                result = original(tensors, grad_tensors, retain_graph, create_graph, *a, **k)
            except Exception as error:
                costs.failed()
                if begun is not None:
                    raised(begun[0], error)
                raise
            finally:
                running.inside = False
            costs.backward_ended()
            if begun is not None:
                ended(*begun)
            costs.leave()
            return result

        return backward

    wrap(torch.autograd, "backward", make)
