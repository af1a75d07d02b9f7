"""Mixed precision: autocast and GradScaler."""

from __future__ import annotations

from typing import Any

from .core import Recorder
from .modules import dtype_name, inner_optimizer
from .patching import ImportHooks, around, wrap
from .watch import Session

#: autocast events kept per device and dtype: the first few tell everything.
AUTOCASTS = 40


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    seen: dict[tuple[str, str, bool], int] = {}

    @recorder.quiet
    def entered(result: Any, token: Any, self: Any, *args: Any) -> None:
        key = (str(self.device), dtype_name(self.fast_dtype), bool(self._enabled))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= AUTOCASTS:
            recorder.event("autocast", at=recorder.user_line(), device=key[0], dtype=key[1], enabled=key[2])

    wrap(torch.amp.autocast_mode.autocast, "__enter__", around(after=entered))

    def scale_of(scaler: Any) -> float | None:
        # get_scale() waits for the GPU; the growth tracker's tensor is read at the step, once.
        if not scaler.is_enabled():
            return None
        return float(scaler.get_scale())

    def event(call: str, scaler: Any, **fields: Any) -> None:
        recorder.event(
            "scaler",
            at=recorder.user_line(),
            call=call,
            scale=session.loss_scale,
            enabled=bool(scaler.is_enabled()),
            class_name=type(scaler).__name__,
            **fields,
        )

    @recorder.quiet
    def before_scale(self: Any, *args: Any, **kwargs: Any) -> None:
        session.loss_scale = scale_of(self)
        session.unscaled = False
        event("scale", self)

    @recorder.quiet
    def after_unscale(result: Any, token: Any, self: Any, optimizer: Any) -> None:
        session.unscaled = True
        watched = session.optimizers.of(inner_optimizer(optimizer))
        watched.unscaled = True
        event("unscale", self, optimizer=watched.number)

    @recorder.quiet
    def before_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        watched = session.optimizers.of(inner_optimizer(optimizer))
        return watched.number, watched.steps

    @recorder.quiet
    def after_step(result: Any, token: Any, self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if token is None:
            return
        number, before = token
        watched = session.optimizers.watched[number]
        skipped = watched.steps == before
        if skipped:
            watched.skipped += 1
        event("step", self, optimizer=number, skipped=skipped)

    @recorder.quiet
    def after_update(result: Any, token: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        session.loss_scale = None
        session.unscaled = False
        for watched in session.optimizers.watched.values():
            watched.unscaled = False
        event("update", self)

    scaler = torch.amp.GradScaler
    wrap(scaler, "scale", around(before=before_scale))
    wrap(scaler, "unscale_", around(after=after_unscale))
    wrap(scaler, "step", around(before_step, after_step))
    wrap(scaler, "update", around(after=after_update))

    def on_sharded(module: Any) -> None:
        # It replaces all but step with methods of its own.
        sharded = module.ShardedGradScaler
        wrap(sharded, "scale", around(before=before_scale))
        wrap(sharded, "unscale_", around(after=after_unscale))
        wrap(sharded, "update", around(after=after_update))

    hooks.on_import("torch.distributed.fsdp.sharded_grad_scaler", on_sharded)
