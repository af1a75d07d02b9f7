"""Gradient clipping."""

from __future__ import annotations

from typing import Any

from .core import Recorder
from .patching import ImportHooks, wrap
from .watch import Session


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    import torch.nn.utils.clip_grad as module

    recorder: Recorder = session.recorder

    @recorder.quiet
    def clipped(method: str, parameters: list[Any], threshold: Any, result: Any) -> None:
        numbers = [n for n in (recorder.parameters.get(p) for p in parameters) if n is not None]
        scale = session.loss_scale
        seq = recorder.event(
            "clip",
            at=recorder.user_line(),
            method=method,
            threshold=float(threshold),
            parameters=numbers,
            n_tensors=len(parameters),
            scaled=bool(scale and scale != 1.0 and not session.unscaled),
        )
        if isinstance(result, torch.Tensor) and result.numel() == 1:
            full = getattr(result, "full_tensor", None)
            recorder.later(seq, "total_norm", (full() if full is not None else result).detach())

    def make_for(method: str) -> Any:
        def make(original: Any) -> Any:
            def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():
                    return original(parameters, *args, **kwargs)
                # A generator can be read once only: the list takes its place.
                tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
                result = original(tensors, *args, **kwargs)
                name = "max_norm" if method == "norm" else "clip_value"
                threshold = kwargs.get(name, args[0] if args else float("nan"))
                clipped(method, tensors, threshold, result)
                return result

            return clip

        return make

    for name, method in (("clip_grad_norm_", "norm"), ("clip_grad_value_", "value")):
        wrap(module, name, make_for(method))
        setattr(torch.nn.utils, name, getattr(module, name))
