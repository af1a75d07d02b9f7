"""Lightning: ``Trainer.fit`` and Fabric, for both packages (``lightning``, ``pytorch_lightning``).

What Lightning will do is read from the Trainer when its fit loop starts, after the data loaders and optimizers exist.
Backwards, steps and schedulers are seen by the torch instruments: Lightning calls torch for all of them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from .core import Recorder
from .lightning_epoch import LightningEpoch
from .patching import ImportHooks, around, wrap
from .values import attribute, class_name, compiling, integer, known, log_value, log_values, read, setting, version

#: (package of ``Trainer``, package of ``Fabric``)
PACKAGES = (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric"))

TRAINER_SETTINGS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "max_steps",
    "min_steps",
    "max_epochs",
    "min_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "fast_dev_run",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "reload_dataloaders_every_n_epochs",
    "num_nodes",
    "world_size",
    "ckpt_path",
    "barebones",
)


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    for pytorch, fabric in PACKAGES:
        package = pytorch.partition(".")[0]
        lightning = Lightning(recorder, package)
        hooks.on_import(f"{pytorch}.trainer.trainer", lightning.on_trainer)
        hooks.on_import(f"{pytorch}.loops.fit_loop", lightning.on_fit_loop)
        hooks.on_import(f"{pytorch}.loops.training_epoch_loop", lightning.epoch.on_epoch_loop)
        hooks.on_import(f"{pytorch}.core.module", lightning.on_module)
        hooks.on_import(f"{fabric}.fabric", lightning.on_fabric)


class Lightning:
    """The instruments of one of the two packages."""

    def __init__(self, recorder: Recorder, package: str) -> None:
        self.recorder = recorder
        self.package = package
        self.epoch = LightningEpoch(recorder)
        self._at: dict[str, Any] | None = None

    # -- installing

    def on_trainer(self, module: ModuleType) -> None:
        # Not `fit`: LightningCLI and jsonargparse read its signature and source.
        wrap(module.Trainer, "_fit_impl", around(before=self.recorder.quiet(self.fit_called)))

    def on_fit_loop(self, module: ModuleType) -> None:
        loop = getattr(module, "_FitLoop", None) or module.FitLoop
        wrap(loop, "on_run_start", around(after=self.recorder.quiet(self.fit_started)))
        self.epoch.on_fit_loop(loop)

    def on_module(self, module: ModuleType) -> None:
        wrap(module.LightningModule, "log", around(after=self.recorder.quiet(self.module_log)))

    def on_fabric(self, module: ModuleType) -> None:
        wrap(module.Fabric, "__init__", around(after=self.recorder.quiet(self.fabric_made)))
        wrap(module.Fabric, "log_dict", around(before=self.recorder.quiet(self.fabric_log)))

    # -- Trainer

    def fit_called(self, trainer: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """The user called ``fit``: written at once, so that a program that dies in set-up has its trainer named."""
        self._at = self.recorder.user_line()
        self.describe(trainer, model, started=False)

    def fit_started(self, result: Any, token: Any, loop: Any, *args: Any, **kwargs: Any) -> None:
        """The fit loop begins: loaders, optimizers and a checkpoint's state are in place, no batch was drawn."""
        trainer = loop.trainer
        self.epoch.fit_started(trainer)
        self.describe(trainer, trainer.lightning_module, started=True)
        self.plan(trainer)
        self.schedulers(trainer)
        for logger in getattr(trainer, "loggers", ()):
            self.watch_logger(type(logger))

    def describe(self, trainer: Any, model: Any, started: bool) -> None:
        settings = read(trainer, TRAINER_SETTINGS)
        settings["devices"] = setting(attribute(trainer, "num_devices"))
        settings["strategy"] = class_name(attribute(trainer, "strategy"))
        settings["accelerator"] = class_name(attribute(trainer, "accelerator"))
        settings["automatic_optimization"] = setting(attribute(model, "automatic_optimization"))
        settings["max_time_s"] = self.max_time_s(trainer)
        settings["enable_checkpointing"] = bool(attribute(trainer, "checkpoint_callbacks"))
        if started:
            settings["num_training_batches"] = integer(attribute(trainer, "num_training_batches"))
            settings["estimated_stepping_batches"] = estimated_steps(trainer)
            # Not 0 when a checkpoint was restored.
            settings["global_step"] = integer(attribute(trainer, "global_step"))
            settings["current_epoch"] = integer(attribute(trainer, "current_epoch"))
        self.recorder.emit(
            "framework",
            {
                "name": "lightning",
                "version": version(self.package),
                "class_name": class_name(model) if model is not None else "",
                "at": self._at,
                "settings": settings,
                "callbacks": [class_name(c) for c in attribute(trainer, "callbacks") or ()],
                "loggers": [class_name(x) for x in attribute(trainer, "loggers") or ()],
            },
        )

    @staticmethod
    def max_time_s(trainer: Any) -> float | None:
        for callback in attribute(trainer, "callbacks") or ():
            if class_name(callback) == "Timer":
                duration = getattr(callback, "_duration", None)
                return float(duration) if isinstance(duration, (int, float)) else None
        return None

    def plan(self, trainer: Any) -> None:
        automatic = bool(attribute(trainer, "lightning_module", "automatic_optimization"))
        batches = integer(attribute(trainer, "num_training_batches"))
        max_epochs = integer(attribute(trainer, "max_epochs"))
        max_steps = integer(attribute(trainer, "max_steps"))
        plan: dict[str, Any] = {"batches_per_epoch": batches}
        if not automatic:
            # The program decides how often it steps; max_steps counts the steps of all optimizers together.
            if max_steps is not None and max_steps >= 0 and len(attribute(trainer, "optimizers") or ()) == 1:
                plan.update(optimizer_steps=max_steps, source="lightning Trainer.max_steps")
            elif max_epochs is not None and max_epochs >= 0:
                plan["source"] = "lightning Trainer.max_epochs"
            plan["epochs"] = max_epochs if max_epochs is not None and max_epochs >= 0 else None
            self.recorder.emit("plan", known(plan))
            return
        by_epoch = accumulation_by_epoch(trainer)
        if by_epoch is not None:
            plan["accumulation"] = by_epoch(integer(attribute(trainer, "current_epoch")) or 0)
            plan["epochs"] = max_epochs if max_epochs is not None and max_epochs >= 0 else None
            if batches and max_epochs is not None and 0 <= max_epochs <= 100_000:
                steps = sum(math.ceil(batches / by_epoch(epoch)) for epoch in range(max_epochs))
                plan["optimizer_steps"] = min(steps, max_steps) if max_steps is not None and max_steps >= 0 else steps
                plan["source"] = "lightning GradientAccumulationScheduler"
            self.recorder.emit("plan", known(plan))
            return
        accumulation = integer(attribute(trainer, "accumulate_grad_batches")) or 1
        steps_planned = estimated_steps(trainer)
        plan["accumulation"] = accumulation
        if steps_planned is not None:
            plan.update(optimizer_steps=steps_planned, source="lightning Trainer.estimated_stepping_batches")
        if batches and steps_planned is not None:
            plan["epochs"] = steps_planned / math.ceil(batches / accumulation)
        elif max_epochs is not None and max_epochs >= 0:
            plan["epochs"] = max_epochs
        self.recorder.emit("plan", known(plan))

    def schedulers(self, trainer: Any) -> None:
        """Who steps each scheduler and how often: with manual optimization the program, whatever was configured."""
        automatic = bool(attribute(trainer, "lightning_module", "automatic_optimization"))
        for config in attribute(trainer, "lr_scheduler_configs") or ():
            scheduler = attribute(config, "scheduler")
            if scheduler is None:
                continue
            self.recorder.emit(
                "scheduler_config",
                {
                    "scheduler": self.recorder.schedulers.of(scheduler),
                    "interval": setting(attribute(config, "interval")) if automatic else None,
                    "frequency": integer(attribute(config, "frequency")) if automatic else None,
                    "monitor": setting(attribute(config, "monitor")),
                    "name": setting(attribute(config, "name")),
                    "wrapper": None,
                },
            )

    # -- logging

    def module_log(
        self, result: Any, token: Any, module: Any, name: Any = None, value: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if compiling() or attribute(module, "_fabric") is not None:
            return
        trainer = attribute(module, "_trainer")
        step = attribute(trainer, "fit_loop", "epoch_loop", "_batches_that_stepped")
        log_value(self.recorder, name, value, "lightning.log", step, self.recorder.user_line())

    def watch_logger(self, logger: type) -> None:
        """``log_metrics`` of an attached logger: what the connector, LearningRateMonitor and user code hand to it."""
        by = f"lightning.{logger.__name__}"
        owner = next((c for c in logger.__mro__ if "log_metrics" in c.__dict__), None)
        if owner is None or getattr(owner.__dict__["log_metrics"], "__isabstractmethod__", False):
            return

        def logged(logger: Any, metrics: Any = None, step: Any = None, **kwargs: Any) -> None:
            log_values(self.recorder, metrics, by, step)

        wrap(owner, "log_metrics", around(before=self.recorder.quiet(logged)))

    # -- Fabric

    def fabric_made(self, result: Any, token: Any, fabric: Any, *args: Any, **kwargs: Any) -> None:
        parallel = attribute(fabric, "_connector", "_parallel_devices")
        self.recorder.emit(
            "framework",
            {
                "name": "fabric",
                "version": version(self.package),
                "class_name": class_name(fabric),
                "at": self.recorder.user_line(),
                "settings": {
                    "precision": setting(attribute(fabric, "_precision", "precision")),
                    "devices": [str(d) for d in parallel] if isinstance(parallel, (list, tuple)) else setting(parallel),
                    "num_nodes": setting(attribute(fabric, "_connector", "_num_nodes_flag")),
                    "strategy": class_name(attribute(fabric, "strategy")),
                    "accelerator": class_name(attribute(fabric, "accelerator")),
                },
                "callbacks": [class_name(c) for c in attribute(fabric, "_callbacks") or ()],
                "loggers": [class_name(x) for x in attribute(fabric, "loggers") or ()],
            },
        )

    def fabric_log(self, fabric: Any, metrics: Any = None, step: Any = None, **kwargs: Any) -> None:
        log_values(self.recorder, metrics, "fabric.log", step)


def estimated_steps(trainer: Any) -> int | None:
    """``Trainer.estimated_stepping_batches``; ``None`` when training has no end (``inf``, or -1 for endless data)."""
    steps = integer(attribute(trainer, "estimated_stepping_batches"))
    return steps if steps is not None and steps >= 0 else None


def accumulation_by_epoch(trainer: Any) -> Any:
    """The function epoch -> accumulation of an attached GradientAccumulationScheduler, or ``None``."""
    for callback in attribute(trainer, "callbacks") or ():
        if class_name(callback) == "GradientAccumulationScheduler":
            return getattr(callback, "get_accumulate_grad_batches", None)
    return None
