"""Gradient clipping."""

from __future__ import annotations

import inspect
from typing import Any

from .core import Recorder
from .patching import ImportHooks, wrap
from .watch import Session

#: Functions of ``torch.nn.utils``, what they clip by, and the name of their threshold.
FUNCTIONS = (
    ("clip_grad_norm_", "norm", "max_norm"),
    ("clip_grad_value_", "value", "clip_value"),
    # Clips by a norm that was computed before (over several meshes, or over several calls).
    ("clip_grads_with_norm_", "norm", "max_norm"),
)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    import torch.nn.utils.clip_grad as module

    recorder: Recorder = session.recorder

    @recorder.quiet
    def clipped(method: str, tensors: list[Any], threshold: Any, had: int, norm: Any) -> None:
        numbers = [n for n in (recorder.parameters.get(p) for p in tensors) if n is not None]
        seq = recorder.event(
            "clip",
            at=recorder.user_line(),
            method=method,
            threshold=float(threshold),
            parameters=numbers,
            n_tensors=len(tensors),
            with_gradient=had,
            scaled=session.optimizers.scaled(numbers),
        )
        if isinstance(norm, torch.Tensor) and norm.numel() == 1:
            full = getattr(norm, "full_tensor", None)
            recorder.later(seq, "total_norm", (full() if full is not None else norm).detach())

    def make_for(method: str, name: str) -> Any:
        def make(original: Any) -> Any:
            names = tuple(inspect.signature(original).parameters)

            def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling() or recorder.busy:
                    return original(parameters, *args, **kwargs)
                # A generator can be read once only: the list takes its place.
                tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
                had = sum(1 for p in tensors if getattr(p, "grad", None) is not None)
                result = original(tensors, *args, **kwargs)
                given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
                norm = given.get("total_norm") if result is None else result
                clipped(method, tensors, given.get(name, float("nan")), had, norm)
                return result

            return clip

        return make

    for function, method, name in FUNCTIONS:
        if wrap(torch.nn.utils, function, make_for(method, name)) and hasattr(module, function):
            setattr(module, function, getattr(torch.nn.utils, function))
