"""Trainers that count steps and epochs by themselves: told, in an experiment, that there is no end.

What the program configured has been used by then to build its schedule; evaluations and checkpoints are left out.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from .core import Recorder
from .patching import ImportHooks, around, wrap
from .values import attribute

#: More optimizer steps than any experiment makes.
FAR = 1_000_000


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    endless = Endless(recorder)
    for pytorch in ("lightning.pytorch", "pytorch_lightning"):
        hooks.on_import(f"{pytorch}.trainer.trainer", endless.on_lightning)
        hooks.on_import(f"{pytorch}.loops.fit_loop", endless.on_fit_loop)
    hooks.on_import("transformers.trainer", endless.on_transformers)
    hooks.on_import("transformers.trainer_callback", endless.on_callbacks)


class Endless:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    # -- Lightning

    def on_lightning(self, module: ModuleType) -> None:
        wrap(module.Trainer, "_fit_impl", around(before=self.recorder.quiet(self.fit_called)))

    def on_fit_loop(self, module: ModuleType) -> None:
        loop = getattr(module, "_FitLoop", None) or module.FitLoop
        wrap(loop, "on_run_start", around(after=self.recorder.quiet(self.fit_started)))

    def fit_called(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.num_sanity_val_steps = 0
        trainer.limit_val_batches = 0

    def fit_started(self, result: Any, token: Any, loop: Any, *args: Any, **kwargs: Any) -> None:
        """The optimizers and the schedule exist; no batch was drawn."""
        loop.max_epochs = -1
        loop.epoch_loop.max_steps = -1
        loop.max_batches = math.inf
        fetcher = attribute(loop, "_data_fetcher")
        if fetcher is not None:
            fetcher.length = None  # it counts, and says that it is done, only where a length is known

    # -- transformers

    def on_transformers(self, module: ModuleType) -> None:
        wrap(module.Trainer, "train", around(before=self.recorder.quiet(self.train_called)))

    def on_callbacks(self, module: ModuleType) -> None:
        wrap(module.CallbackHandler, "on_train_begin", around(after=self.recorder.quiet(self.train_begins)))

    def train_called(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.args.max_steps = FAR

    def train_begins(
        self, result: Any, token: Any, handler: Any, args: Any = None, state: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        for name in ("eval_strategy", "evaluation_strategy", "save_strategy"):
            now = attribute(args, name)
            if now is not None:
                setattr(args, name, type(now)("no"))
        args.eval_on_start = False
        if state is not None:
            state.max_steps = state.eval_steps = state.save_steps = FAR
