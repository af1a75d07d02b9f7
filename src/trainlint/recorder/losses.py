"""Calls of the losses in torch.nn.functional; the modules in torch.nn call these."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import loss_gradients, loss_inputs, loss_rows, loss_targets
from .autograd import TAG
from .core import Recorder
from .loss_graph import outer_difference
from .loss_rows import ROWS_CALLS
from .modules import dtype_name
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Losses, and the reduction that holds when none is passed.
LOSSES = (
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss "
    "huber_loss kl_div ctc_loss gaussian_nll_loss poisson_nll_loss cosine_embedding_loss margin_ranking_loss "
    "triplet_margin_loss hinge_embedding_loss soft_margin_loss multilabel_soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss"
).split()


#: Calls of one source line whose arguments are measured; later ones are only noted.
MEASURED_CALLS = 64
#: Backwards whose graph is searched for a difference that broadcast.
SEARCHED_BACKWARDS = 16


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    functional = torch.nn.functional
    measured: Counter[Any] = Counter()

    def make_for(name: str, names: tuple[str, ...]) -> Any:
        @recorder.quiet
        def begins(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, str, Any]:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            # Positions are kept for losses whose first arguments have other names (``anchor``, ``x1`` ...).
            given = arguments.get("input", args[0] if args else next(iter(arguments.values()), None))
            target = arguments.get("target", args[1] if len(args) > 1 else None)
            reduction = arguments.get("reduction", "mean")
            options = options_of(arguments)
            fields: dict[str, Any] = {
                "function": name,
                "reduction": reduction,
                "grad_enabled": torch.is_grad_enabled(),
                "autocast": autocast_dtype(given),
                "options": options,
            }
            if isinstance(given, torch.Tensor):
                fields["input_shape"] = list(given.shape)
                fields["input_dtype"] = dtype_name(given.dtype)
                fields["input_requires_grad"] = given.requires_grad
            if isinstance(target, torch.Tensor):
                fields["target_shape"] = list(target.shape)
                fields["target_dtype"] = dtype_name(target.dtype)
            at = recorder.user_line()
            seq = recorder.event("loss", at=at, **fields)
            padding = None
            place = (at or {}).get("file"), (at or {}).get("line"), torch.is_grad_enabled()
            measured[place] += 1
            if measured[place] <= MEASURED_CALLS:
                # A target inside a function transform, or spread over processes, has no values to be read.
                target = target if loss_inputs.readable(target) else None
                with torch.no_grad():
                    for field, side in (("input", loss_inputs), ("target", loss_targets)):
                        figures = side.look(name, given, target, options)
                        if figures is not None:
                            recorder.later_fields(seq, on_its_way(figures[0]), _under(field, figures[1]))
                    if measured[place] <= ROWS_CALLS:
                        padding = rows(seq, name, given, target, options, arguments.get("weight"))
            return seq, str(reduction), padding

        @recorder.quiet
        def ended(seq: int, reduction: str, padding: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                loss_gradients.watch(recorder, seq, result, padding)
                if result.grad_fn is not None:
                    metadata: Any = result.grad_fn.metadata
                    metadata[TAG] = (seq, reduction)
                if result.numel() == 1 and loss_inputs.readable(result):
                    recorder.later(seq, "value", result.detach().reshape(()))

        @recorder.quiet
        def raised(seq: int, error: BaseException) -> None:
            recorder.emit("event_value", {"seq": seq, "raised": f"{type(error).__name__}: {error}"[:500]})

        def make(original: Any) -> Any:
            def loss(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():
                    return original(*args, **kwargs)
                begun = begins(args, kwargs)
                try:
                    result = original(*args, **kwargs)
                except Exception as error:
                    if begun is not None:
                        raised(begun[0], error)
                    raise
                if begun is not None:
                    ended(*begun, result)
                return result

            return loss

        return make

    def rows(seq: int, name: str, given: Any, target: Any, options: Mapping[str, Any], weight: Any) -> Any:
        """Lay a target's rows beside the model's inputs; returns where the target has padding, when it is known."""
        try:
            found = loss_rows.look(name, given, target, options, weight, session.inputs)
        except Exception as error:
            recorder.problem("the rows of a target", error)
            return None
        if found is None:
            return None
        recorder.emit("event_value", {"seq": seq, "rows": found[0]})
        return found[1]

    for name in LOSSES:
        wrap(functional, name, make_for(name, argument_names(getattr(functional, name, None))))

    searched: Counter[str] = Counter()

    @recorder.quiet
    def before_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling() or searched["backwards"] >= SEARCHED_BACKWARDS:
            return
        searched["backwards"] += 1
        loss: Any = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
        if not loss_inputs.readable(loss) or loss.numel() != 1:
            return
        found = outer_difference(loss)
        if found is not None:
            recorder.event("outer_difference", at=recorder.user_line(), **asdict(found))

    wrap(torch.autograd, "backward", around(before=before_backward))


def argument_names(function: Any) -> tuple[str, ...]:
    """Names of a function's parameters in order."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that change what a loss computes; a tensor (``weight``) as its number of elements."""
    out: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in ("input", "target", "reduction", "size_average", "reduce") or value is None:
            continue
        if name in ("weight", "pos_weight") and hasattr(value, "numel"):
            out[name] = int(value.numel())
        elif isinstance(value, (bool, int, float, str)):
            out[name] = value
    return out


def on_its_way(figures: Any) -> Any:
    """Figures on a GPU as something that is copied to the host now, in turn, and read later.

    A target outside the classes ends in a device-side assert, after which nothing can be read from the device; what was
    copied before the loss ran is on the host by then.
    """
    import torch

    if not figures.is_cuda:
        return figures
    try:
        return _OnItsWay(figures, torch)
    except RuntimeError:
        return figures


class _OnItsWay:
    """Looks like a tensor on its device to ``Recorder.later_fields``."""

    is_cuda = True

    def __init__(self, figures: Any, torch: Any) -> None:
        self._host = torch.full(figures.shape, math.nan, dtype=figures.dtype, pin_memory=True)
        self._host.copy_(figures, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(figures.device))

    def tolist(self) -> list[float]:
        try:
            self._copied.synchronize()
        except RuntimeError:
            pass  # the device has failed since: the copy was made before
        values: list[float] = self._host.tolist()
        return values


def _under(field: str, build: Callable[[list[float]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    return lambda values: {field: build(values)}


def autocast_dtype(tensor: Any) -> str | None:
    """The autocast dtype in force for a tensor's device, ``None`` outside autocast."""
    import torch

    kind = tensor.device.type if isinstance(tensor, torch.Tensor) else "cpu"
    try:
        if torch.is_autocast_enabled(kind):
            return dtype_name(torch.get_autocast_dtype(kind))
    except Exception:
        return None
    return None
