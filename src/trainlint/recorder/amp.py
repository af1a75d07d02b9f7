"""Mixed precision: autocast and GradScaler."""

from __future__ import annotations

from typing import Any

from . import measure
from .core import Recorder, scalar
from .half_gradients import HalfGradients
from .modules import dtype_name, inner_optimizer
from .patching import ImportHooks, around, wrap
from .watch import Session

#: autocast events kept per device and dtype: the first few tell everything.
AUTOCASTS = 40


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    seen: dict[tuple[str, str, bool], int] = {}
    gradients = HalfGradients(session)
    gradients.install()
    #: Scalers that have been described.
    known: set[int] = set()

    @recorder.quiet
    def entered(result: Any, token: Any, self: Any, *args: Any) -> None:
        key = (str(self.device), dtype_name(self.fast_dtype), bool(self._enabled))
        seen[key] = seen.get(key, 0) + 1
        if key[1:] == ("float16", True):
            gradients.autocast = True
        if seen[key] <= AUTOCASTS:
            recorder.event("autocast", at=recorder.user_line(), device=key[0], dtype=key[1], enabled=key[2])

    wrap(torch.amp.autocast_mode.autocast, "__enter__", around(after=entered))

    def scale_of(scaler: Any) -> float | None:
        # get_scale() waits for the GPU, which is done once after each update and not at every micro-batch.
        if not scaler.is_enabled():
            return None
        tensor = scaler._scale
        return float(scaler.get_scale()) if tensor is None else measure.scale.read(tensor)

    def event(call: str, scaler: Any, **fields: Any) -> int:
        return recorder.event(
            "scaler",
            at=recorder.user_line(),
            call=call,
            scale=session.loss_scale,
            enabled=bool(scaler.is_enabled()),
            class_name=type(scaler).__name__,
            **fields,
        )

    def describe(scaler: Any) -> dict[str, Any]:
        return {
            "class_name": type(scaler).__name__,
            "enabled": bool(scaler.is_enabled()),
            "scale": session.loss_scale,
            "growth_factor": scalar(getattr(scaler, "_growth_factor", None)),
            "backoff_factor": scalar(getattr(scaler, "_backoff_factor", None)),
            "growth_interval": scalar(getattr(scaler, "_growth_interval", None)),
            "at": recorder.user_line(),
        }

    @recorder.quiet
    def before_scale(self: Any, *args: Any, **kwargs: Any) -> None:
        session.loss_scale = scale_of(self)
        session.unscaled = False
        event("scale", self)
        if id(self) not in known:
            known.add(id(self))
            recorder.emit("numerics", {"scalers": [describe(self)]})

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
        seq = event("update", self)
        scale = getattr(self, "_scale", None)
        if isinstance(scale, torch.Tensor) and self.is_enabled():
            recorder.later(seq, "scale", scale.detach().clone())

    @recorder.quiet
    def after_load(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        if self.is_enabled() and state_dict:
            state = {
                "scale": scalar(state_dict.get("scale")),
                "growth_tracker": scalar(state_dict.get("_growth_tracker")),
                "path": session.last_loaded,
                "at": recorder.user_line(),
            }
            recorder.emit("numerics", {"scaler_states": [state]})

    scaler = torch.amp.GradScaler
    wrap(scaler, "scale", around(before=before_scale))
    wrap(scaler, "unscale_", around(after=after_unscale))
    wrap(scaler, "step", around(before_step, after_step))
    wrap(scaler, "update", around(after=after_update))
    wrap(scaler, "load_state_dict", around(after=after_load))

    def on_sharded(module: Any) -> None:
        # It replaces all but step with methods of its own.
        sharded = module.ShardedGradScaler
        wrap(sharded, "scale", around(before=before_scale))
        wrap(sharded, "unscale_", around(after=after_unscale))
        wrap(sharded, "update", around(after=after_update))

    hooks.on_import("torch.distributed.fsdp.sharded_grad_scaler", on_sharded)
