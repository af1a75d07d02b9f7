"""A training run that is handed over instead of launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainingRun:
    """What an entry function returns when its code has no loop that can be launched.

    trainlint trains it with a plain loop: for each of ``batches`` ``loss(model, batch)``, divided by ``accumulation``,
    backward; every ``accumulation`` batches clip, optimizer steps, scheduler steps, ``zero_grad``.

    Any object with these attributes will do, so the user's environment needs no trainlint.
    """

    #: ``torch.nn.Module``.
    model: Any
    #: ``torch.optim.Optimizer``, one or several.
    optimizers: Any
    #: ``loss(model, batch)`` returns a scalar tensor, not yet divided by ``accumulation``.
    loss: Callable[[Any, Any], Any]
    #: A DataLoader or any iterable of batches, on the device that the model is on.
    batches: Iterable[Any]
    #: Stepped once after every optimizer step.
    schedulers: Sequence[Any] = ()
    #: Batches per optimizer step.
    accumulation: int = 1
    #: Largest gradient norm, ``None`` for no clipping.
    clip: float | None = None
