"""accelerate: ``Accelerator``, its scheduler wrapper and its ``log``.

Backwards and steps are seen by the torch instruments: accelerate calls torch for them, and not at all in micro-batches
in which gradients are only accumulated.
"""

from __future__ import annotations

import enum
import inspect
import os
import sys
import weakref
from types import ModuleType
from typing import Any

from . import boundary
from .core import Recorder
from .patching import ImportHooks, around, wrap
from .values import attribute, class_name, integer, log_values, read, setting, version

SETTINGS = (
    "mixed_precision",
    "gradient_accumulation_steps",
    "num_processes",
    "process_index",
    "distributed_type",
    "device",
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "step_scheduler_with_optimizer",
)

ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    accelerators = Accelerators(recorder)
    hooks.on_import("accelerate.accelerator", accelerators.on_accelerator)
    hooks.on_import("accelerate.scheduler", accelerators.on_scheduler)


class Accelerators:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._inside: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self._accumulating: weakref.WeakSet[Any] = weakref.WeakSet()
        boundary.EPOCH_ENDS.append(self)

    def on_accelerator(self, module: ModuleType) -> None:
        quiet = self.recorder.quiet
        self._signature = inspect.signature(module.Accelerator.__init__)
        wrap(module.Accelerator, "__init__", around(after=quiet(self.made)))
        wrap(module.Accelerator, "accumulate", around(before=quiet(self.accumulate)))
        wrap(module.Accelerator, "log", around(before=quiet(self.logged)))

    def on_scheduler(self, module: ModuleType) -> None:
        wrap(module.AcceleratedScheduler, "__init__", around(after=self.recorder.quiet(self.scheduler_wrapped)))

    def made(self, result: Any, token: Any, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        inside = _trainer_on_the_stack()
        self._inside[accelerator] = inside
        settings = read(accelerator, SETTINGS)
        kept: Any = attribute(accelerator, "gradient_state", "plugin_kwargs") or {}
        for name in ("adjust_scheduler", "sync_with_dataloader", "sync_each_batch"):
            if name in kept:
                settings[name] = setting(kept[name])
        if inside:
            settings["inside"] = inside
        else:
            given = self._signature.bind(accelerator, *args, **kwargs).arguments.get("gradient_accumulation_steps")
            effective = settings.get("gradient_accumulation_steps")
            if given is not None and given != effective and os.environ.get(ACCUMULATION_VARIABLE):
                # The environment of `accelerate launch` wins over the script.
                settings["gradient_accumulation_steps_given"] = setting(given)
        self.recorder.emit(
            "framework",
            {
                "name": "accelerate",
                "version": version("accelerate"),
                "class_name": class_name(accelerator),
                "at": self.recorder.user_line(),
                "settings": settings,
                "loggers": [_tracker_name(x) for x in attribute(accelerator, "log_with") or ()],
            },
        )

    def accumulate(self, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        """``accelerator.accumulate`` is what puts gradient_accumulation_steps into effect."""
        if accelerator in self._accumulating or self._inside.get(accelerator):
            return
        self._accumulating.add(accelerator)
        self.recorder.emit("plan", {"accumulation": integer(attribute(accelerator, "gradient_accumulation_steps"))})

    def scheduler_wrapped(self, result: Any, token: Any, wrapper: Any, *args: Any, **kwargs: Any) -> None:
        """The wrapper calls the scheduler once per process and real optimizer step, unless batches are split."""
        scheduler = attribute(wrapper, "scheduler")
        if scheduler is None:
            return
        with_optimizer = bool(attribute(wrapper, "step_with_optimizer"))
        processes = 1
        state: Any = attribute(sys.modules.get("accelerate.state"), "AcceleratorState")
        # Constructing the state before an Accelerator did would set it up: look only when it is there.
        if with_optimizer and not attribute(wrapper, "split_batches") and attribute(state, "_shared_state"):
            processes = integer(attribute(state(), "num_processes")) or 1
        self.recorder.emit(
            "scheduler_config",
            {
                "scheduler": self.recorder.schedulers.of(scheduler),
                "interval": None,
                "frequency": None,
                "monitor": None,
                "wrapper": "accelerate",
                "steps_with_optimizer": with_optimizer,
                "steps_per_call": processes,
            },
        )

    # -- the end of an epoch, brought on early (boundary.EpochEnd)

    def _prepared(self, loader: int) -> tuple[Any, Any] | None:
        """The accelerator and its wrapper of a loader."""
        for accelerator in list(self._inside):
            for wrapper in attribute(accelerator, "_dataloaders") or ():
                for one in (wrapper, attribute(wrapper, "base_dataloader")):
                    if one is not None and self.recorder.loaders.get(one) == loader:
                        return accelerator, wrapper
        return None

    def batches_left(self, loader: int) -> int | None:
        """The loader is one batch ahead: as many more as make a whole window of accumulation with it."""
        found = self._prepared(loader)
        if found is None or boundary.current is None:
            return None
        window = integer(attribute(found[0], "gradient_accumulation_steps")) or 1
        return max(window, boundary.current.batches_per_step) - 1

    def refusal(self, loader: int) -> str:
        found = self._prepared(loader)
        if found is not None and class_name(found[1]) == "DataLoaderDispatcher":
            if (integer(attribute(found[0], "num_processes")) or 1) > 1:
                return "one process reads the data for all (dispatch_batches)"
        return ""

    def stepped(self) -> None:
        pass

    def logged(self, accelerator: Any, values: Any = None, step: Any = None, *args: Any, **kwargs: Any) -> None:
        if attribute(accelerator, "is_main_process") is not False:
            log_values(self.recorder, values, "accelerate.log", step)


def _tracker_name(tracker: Any) -> str:
    value = setting(tracker) if isinstance(tracker, (str, enum.Enum)) else None
    return str(value) if value is not None else class_name(tracker)


def _trainer_on_the_stack() -> str | None:
    """The framework whose trainer is creating the Accelerator, ``None`` when the user's code does."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
        if name == "transformers.trainer":
            return "transformers"
        if name.startswith(("lightning.", "pytorch_lightning.")):
            return "lightning"
    return None
