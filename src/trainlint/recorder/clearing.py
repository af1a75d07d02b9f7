"""Calls of ``zero_grad`` on optimizers and modules, with what there was to clear."""

from __future__ import annotations

from typing import Any

from .patching import ImportHooks, around, wrap
from .watch import Session


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder = session.recorder

    @recorder.quiet
    def zero_before(self: Any, set_to_none: bool = True) -> Any:
        had = sum(1 for g in self.param_groups for p in g["params"] if p.grad is not None)
        recorder.event(
            "zero_grad",
            at=recorder.user_line(),
            optimizer=session.optimizers.number_of(self),
            set_to_none=bool(set_to_none),
            had_gradients=had,
        )

    def quiet_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if torch.compiler.is_compiling() else zero_before(self, *args, **kwargs)

    wrap(torch.optim.Optimizer, "zero_grad", around(before=quiet_zero))

    @recorder.quiet
    def module_zero_before(self: Any, set_to_none: bool = True) -> Any:
        had = sum(1 for p in self.parameters() if p.grad is not None)
        recorder.event(
            "zero_grad",
            at=recorder.user_line(),
            root=recorder.roots.get(self),
            set_to_none=bool(set_to_none),
            had_gradients=had,
        )

    def quiet_module_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if torch.compiler.is_compiling() else module_zero_before(self, *args, **kwargs)

    wrap(torch.nn.Module, "zero_grad", around(before=quiet_module_zero))
