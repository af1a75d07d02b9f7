"""Calls of the losses in torch.nn.functional; the modules in torch.nn call these."""

from __future__ import annotations

from typing import Any

from .autograd import TAG
from .core import Recorder
from .modules import dtype_name
from .patching import ImportHooks, wrap
from .watch import Session

#: Losses, and the reduction that holds when none is passed.
LOSSES = (
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss "
    "huber_loss kl_div ctc_loss gaussian_nll_loss poisson_nll_loss cosine_embedding_loss margin_ranking_loss "
    "triplet_margin_loss hinge_embedding_loss soft_margin_loss multilabel_soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss"
).split()


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    functional = torch.nn.functional

    def make_for(name: str) -> Any:
        @recorder.quiet
        def called(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [a for a in (*args[:3], *kwargs.values()) if isinstance(a, torch.Tensor)]
            given = kwargs.get("input", args[0] if args else tensors[0])
            target = kwargs.get("target", args[1] if len(args) > 1 else None)
            reduction = kwargs.get("reduction", "mean")
            fields: dict[str, Any] = {
                "function": name,
                "reduction": reduction,
                "grad_enabled": torch.is_grad_enabled(),
                "autocast": autocast_dtype(given),
            }
            if isinstance(given, torch.Tensor):
                fields["input_shape"] = list(given.shape)
                fields["input_dtype"] = dtype_name(given.dtype)
                fields["input_requires_grad"] = given.requires_grad
            if isinstance(target, torch.Tensor):
                fields["target_shape"] = list(target.shape)
                fields["target_dtype"] = dtype_name(target.dtype)
            seq = recorder.event("loss", at=recorder.user_line(), **fields)
            if isinstance(result, torch.Tensor):
                if result.grad_fn is not None:
                    metadata: Any = result.grad_fn.metadata
                    metadata[TAG] = (seq, reduction)
                if result.numel() == 1:
                    recorder.later(seq, "value", result.detach())

        def make(original: Any) -> Any:
            def loss(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if not torch.compiler.is_compiling():
                    called(result, args, kwargs)
                return result

            return loss

        return make

    for name in LOSSES:
        wrap(functional, name, make_for(name))


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
