"""What an experiment holds still: dropout, and the schedule."""

from __future__ import annotations

import inspect
from typing import Any

from .core import Recorder
from .patching import wrap

#: Dropouts of torch.nn.functional (the modules call these).
DROPOUTS = "dropout alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout".split()


def install(recorder: Recorder, *, everything: bool) -> list[str]:
    """Hold the schedule still, and with ``everything`` also dropout; what was done, in words."""
    held = []
    for name, make in (("learning-rate schedule", _schedulers), *((("dropout", _dropout),) if everything else ())):
        try:
            make()
            held.append(name)
        except Exception as error:
            recorder.problem(f"holding still: {name}", error)
    return [*held, *(("weight decay", "the batch and its augmentation", "random numbers") if everything else ())]


def _schedulers() -> None:
    """Schedulers go on being called and change nothing: many refuse more steps than they were built for."""
    import torch

    module = torch.optim.lr_scheduler

    def make(original: Any) -> Any:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            # The constructor's own call sets the scheduler up.
            if getattr(self, "_step_count", None) == 0:
                return original(self, *args, **kwargs)
            return None

        return step

    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__ and "step" in value.__dict__:
            wrap(value, "step", make)


def _dropout() -> None:
    """No dropout, in whatever mode: by the functions, so that no module's mode is touched."""
    import torch

    functional: Any = torch.nn.functional

    def make_off(original: Any) -> Any:
        names = tuple(inspect.signature(original).parameters)
        position = names.index("training")

        def dropout(*args: Any, **kwargs: Any) -> Any:
            if len(args) > position:
                args = (*args[:position], False, *args[position + 1 :])
            else:
                kwargs["training"] = False
            return original(*args, **kwargs)

        return dropout

    for name in DROPOUTS:
        if hasattr(functional, name):
            wrap(functional, name, make_off)

    def make_attention(original: Any) -> Any:
        def attention(
            query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *a: Any, **k: Any
        ) -> Any:
            return original(query, key, value, attn_mask, 0.0, *a, **k)

        return attention

    wrap(functional, "scaled_dot_product_attention", make_attention)

    def make_recurrent(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "dropout", 0):
                self.dropout = 0.0
            return original(self, *args, **kwargs)

        return forward

    for kind in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU):
        wrap(kind, "forward", make_recurrent)
