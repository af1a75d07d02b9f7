"""The end of an epoch in Lightning, brought on early.

Lightning decides by counting which batch is its last: an iterator that simply runs dry would skip the validation and
the per-epoch schedulers of that epoch. Its data fetcher is told instead that the batches to come are the last.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import boundary
from .core import Recorder
from .patching import around, wrap
from .values import attribute, integer


class LightningEpoch:
    """One of the two packages (``lightning``, ``pytorch_lightning``)."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._trainer: weakref.ref[Any] | None = None
        #: The epoch that was shortened.
        self._epoch: int | None = None
        boundary.EPOCH_ENDS.append(self)

    # -- installing

    def on_fit_loop(self, loop: Any) -> None:
        wrap(loop, "on_run_end", around(before=self.run_ends))

    def on_epoch_loop(self, module: ModuleType) -> None:
        loop = getattr(module, "_TrainingEpochLoop", None) or module.TrainingEpochLoop
        wrap(loop, "_should_check_val_fx", self.make_should_validate)

    def fit_started(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    # -- boundary.EpochEnd

    def batches_left(self, loader: int) -> int | None:
        """One whole window of accumulation, after which the fetcher says that it is done."""
        trainer = self._trainer() if self._trainer is not None else None
        fetcher: Any = attribute(trainer, "fit_loop", "_data_fetcher")
        if fetcher is None or attribute(trainer, "training") is not True:
            return None
        loaders = attribute(fetcher, "combined_loader", "flattened")
        if not isinstance(loaders, list) or loader not in [self.recorder.loaders.get(x) for x in loaders]:
            return None
        length = getattr(fetcher, "length", None)
        if length is None:
            return 0  # of unknown length: Lightning fetches ahead and sees the end come
        assert trainer is not None
        automatic = bool(attribute(trainer, "lightning_module", "automatic_optimization"))
        window = integer(attribute(trainer, "accumulate_grad_batches")) or 1
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            fetcher.length = min(length, fetcher.fetched + (window if automatic else 1))
        return max(1, int(fetcher.length - fetcher.fetched))

    def refusal(self, loader: int) -> str:
        return ""

    def stepped(self) -> None:
        pass

    # -- what Lightning does at the end

    def make_should_validate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def should_check_val_fx(loop: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(loop, *args, **kwargs)
            return result or (self._epoch is not None and bool(self.due(loop)))

        return should_check_val_fx

    def due(self, loop: Any) -> bool:
        """Whether the last batch of a shortened epoch is followed by a validation as that of a whole one would be."""
        try:
            trainer = loop.trainer
            if trainer.current_epoch != self._epoch or not loop.batch_progress.is_last_batch:
                return False
            every, batches = trainer.val_check_batch, trainer.num_training_batches
            if trainer.check_val_every_n_epoch is None or not every or math.isinf(every) or math.isinf(batches):
                return False
            return bool(loop._should_check_val_epoch()) and batches % every == 0
        except Exception as error:
            self.recorder.problem("validation at the epoch boundary", error)
            return False

    def run_ends(self, *args: Any, **kwargs: Any) -> None:
        """Training is over: the end of it (final checkpoints, tests, exports) is not watched."""
        if boundary.current is not None:
            boundary.current.training_over()
