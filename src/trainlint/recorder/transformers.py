"""transformers ``Trainer`` (so TRL's trainers, axolotl, LLaMA-Factory) and PEFT models.

What the Trainer will do is read when its ``train_begin`` callbacks have run: ``TrainerState.max_steps``, the optimizer
and the scheduler exist then. Names of arguments change between versions; those that the installed version has are read.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import boundary
from .core import Recorder
from .patching import ImportHooks, around, wrap
from .values import attribute, class_name, integer, known, log_values, number, read, setting, version

#: Always written; any other argument is written when it differs from its default.
ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",  # a fraction given as warmup_steps in transformers 5
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "train_batch_size",
    "auto_find_batch_size",
    "max_steps",
    "num_train_epochs",
    "bf16",
    "fp16",
    "tf32",
    "optim",
    "optim_args",
    "seed",
    "data_seed",
    "full_determinism",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "save_strategy",
    "save_steps",
    "save_only_model",
    "save_total_limit",
    "load_best_model_at_end",
    "eval_strategy",
    "evaluation_strategy",  # before transformers 4.41
    "eval_steps",
    "label_smoothing_factor",
    "gradient_checkpointing",
    "torch_compile",
    "resume_from_checkpoint",
    "ignore_data_skip",
    "report_to",
    "remove_unused_columns",
    "average_tokens_across_devices",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "group_by_length",
    "train_sampling_strategy",
    "world_size",
    "parallel_mode",
)

#: Arguments that say where something lies or who may read it, not how the model is trained.
LEFT_OUT = frozenset(
    {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "hub_model_id", "project"}
)

PEFT_SETTINGS = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "rank_pattern",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "num_virtual_tokens",
    "inference_mode",
)


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    trainers = Trainers(recorder)
    hooks.on_import("transformers.trainer", trainers.on_trainer)
    hooks.on_import("transformers.trainer_callback", trainers.on_callbacks)
    adapters = Adapters(recorder)
    hooks.on_import("peft.peft_model", adapters.on_peft_model)
    hooks.on_import("peft.tuners.tuners_utils", adapters.on_tuners)


class Trainers:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._trainer: weakref.ref[Any] | None = None
        self._at: dict[str, Any] | None = None
        self._resume: Any = None
        self._shortened = False
        boundary.EPOCH_ENDS.append(self)

    def on_trainer(self, module: ModuleType) -> None:
        wrap(module.Trainer, "train", around(before=self.recorder.quiet(self.train_called)))
        wrap(module.Trainer, "log", around(before=self.recorder.quiet(self.logged)))

    def on_callbacks(self, module: ModuleType) -> None:
        wrap(module.CallbackHandler, "on_train_begin", around(after=self.recorder.quiet(self.train_begins)))
        wrap(module.CallbackHandler, "on_train_end", around(before=self.train_ends))

    # -- training

    def train_called(self, trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> None:
        """The user called ``train``: written at once, so that a program that dies in set-up has its trainer named."""
        self._trainer = weakref.ref(trainer)
        self._at = self.recorder.user_line()
        self._resume = resume_from_checkpoint
        self.describe(trainer, trainer.args, {})

    def train_begins(
        self, result: Any, token: Any, handler: Any, args: Any = None, state: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if attribute(trainer, "callback_handler") is not handler:
            # A subclass with a `train` of its own: its frame calls the handler.
            trainer = _caller_with_handler(handler)
            self._at, self._resume = self.recorder.user_line(), None
        more = {
            # Not 0 when a checkpoint was restored.
            "global_step": integer(attribute(state, "global_step")),
            "state_max_steps": integer(attribute(state, "max_steps")),
        }
        self.describe(trainer, args, more)
        self.plan(trainer, handler, args, state)
        self.scheduler(handler)

    def describe(self, trainer: Any, args: Any, more: dict[str, Any]) -> None:
        settings = {**changed_arguments(args), **read(args, ARGUMENTS), **more}
        if self._resume is not None:
            settings["resume_from_checkpoint"] = setting(self._resume)
        # With this the Trainer hands num_items_in_batch to the model and does not divide the loss by the accumulation.
        settings["model_accepts_loss_kwargs"] = setting(attribute(trainer, "model_accepts_loss_kwargs"))
        settings["compute_loss_func"] = attribute(trainer, "compute_loss_func") is not None
        settings["overridden"] = overridden(trainer)
        self.recorder.emit(
            "framework",
            {
                "name": "transformers",
                "version": version("transformers"),
                "class_name": class_name(trainer) if trainer is not None else "",
                "at": self._at,
                "settings": settings,
                "callbacks": [class_name(c) for c in attribute(trainer, "callback_handler", "callbacks") or ()],
                "loggers": [str(x) for x in _names(attribute(args, "report_to")) if x != "none"],
            },
        )

    def plan(self, trainer: Any, handler: Any, args: Any, state: Any) -> None:
        steps = integer(attribute(state, "max_steps"))
        accumulation = integer(attribute(args, "gradient_accumulation_steps"))
        batches = _length(attribute(handler, "train_dataloader"))
        epochs: float | None = None
        if steps and (integer(attribute(args, "max_steps")) or 0) > 0:
            if batches:
                epochs = steps / max(math.ceil(batches / (accumulation or 1)), 1)
        else:
            epochs = number(attribute(args, "num_train_epochs"))
        self.recorder.emit(
            "plan",
            known(
                {
                    "optimizer_steps": steps or None,
                    "epochs": epochs,
                    "batches_per_epoch": batches,
                    "accumulation": accumulation,
                    "source": "transformers TrainerState.max_steps",
                }
            ),
        )

    def scheduler(self, handler: Any) -> None:
        """The Trainer steps its scheduler once per optimizer step; ReduceLROnPlateau after evaluations."""
        scheduler = attribute(handler, "lr_scheduler")
        if class_name(scheduler) == "AcceleratedScheduler":
            scheduler = attribute(scheduler, "scheduler")
        if scheduler is None or class_name(scheduler) == "ReduceLROnPlateau":
            return
        self.recorder.emit(
            "scheduler_config",
            {
                "scheduler": self.recorder.schedulers.of(scheduler),
                "interval": "step",
                "frequency": 1,
                "monitor": None,
                "wrapper": None,
            },
        )

    # -- the end of an epoch, brought on early (boundary.EpochEnd)

    def batches_left(self, loader: int) -> int | None:
        """One whole window of accumulation: the Trainer would leave the gradients of a part of one without a step."""
        trainer = self._trainer() if self._trainer is not None else None
        shard: Any = attribute(trainer, "callback_handler", "train_dataloader")
        inner = attribute(shard, "base_dataloader")
        if shard is None or loader not in [self.recorder.loaders.get(x) for x in (shard, inner) if x is not None]:
            return None
        self._shortened = True
        # accelerate's loaders are one batch ahead.
        ahead = 1 if class_name(shard).startswith("DataLoader") and class_name(shard) != "DataLoader" else 0
        window = integer(attribute(trainer, "args", "gradient_accumulation_steps")) or 1
        return window - 1 if ahead else 0

    def refusal(self, loader: int) -> str:
        return ""

    def stepped(self) -> None:
        """The Trainer counts updates, and would go on through the rest of them without data."""
        trainer = self._trainer() if self._trainer is not None else None
        control = attribute(trainer, "control")
        if self._shortened and control is not None:
            self._shortened = False
            control.should_epoch_stop = True

    def train_ends(self, *args: Any, **kwargs: Any) -> None:
        """Training is over: what comes after it (saving, uploading) is not watched."""
        if boundary.current is not None:
            boundary.current.training_over()

    # -- logging

    def logged(self, trainer: Any, logs: Any = None, *args: Any, **kwargs: Any) -> None:
        log_values(self.recorder, logs, "transformers.log", attribute(trainer, "state", "global_step"))


class Adapters:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_peft_model(self, module: ModuleType) -> None:
        wrap(module.PeftModel, "__init__", around(after=self.recorder.quiet(self.model_made)))

    def on_tuners(self, module: ModuleType) -> None:
        # Adapters injected without a PeftModel (`model.add_adapter`); PeftModel's own line comes later and wins.
        wrap(module.BaseTuner, "__init__", around(after=self.recorder.quiet(self.model_made)))

    def model_made(self, result: Any, token: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        configs = attribute(model, "peft_config")
        if not isinstance(configs, Mapping) or not configs:
            return
        active = attribute(model, "active_adapter")
        active = active[0] if isinstance(active, (list, tuple)) and active else active
        config = configs.get(active) if isinstance(active, str) else None
        settings = read(config if config is not None else next(iter(configs.values())), PEFT_SETTINGS)
        settings["adapters"] = [str(name) for name in configs]
        targeted = attribute(model, "base_model", "targeted_module_names") or attribute(model, "targeted_module_names")
        settings["targeted_modules"] = len(targeted) if isinstance(targeted, list) else None
        self.recorder.emit(
            "framework",
            {
                "name": "peft",
                "version": version("peft"),
                "class_name": class_name(model),
                "at": self.recorder.user_line(),
                "settings": settings,
            },
        )


PLAIN = (bool, int, float, str, list, tuple, dict, enum.Enum)


def overridden(trainer: Any) -> list[str]:
    """Those of the Trainer's methods around the loss that a subclass replaces (one that calls ``super`` adds to it)."""
    own = attribute(sys.modules.get("transformers.trainer"), "Trainer")
    found = []
    for name in ("compute_loss", "training_step"):
        method = attribute(type(trainer), name)
        if method is not attribute(own, name) and "super" not in (attribute(method, "__code__", "co_names") or ()):
            found.append(name)
    return found if trainer is not None else []


def changed_arguments(args: Any) -> dict[str, Any]:
    """Arguments that differ from their defaults, whatever subclass ``args`` is of (``SFTConfig`` ...)."""
    if not dataclasses.is_dataclass(args):
        return {}
    changed = []
    for field in dataclasses.fields(args):
        if field.name in LEFT_OUT or field.name.startswith("_"):
            continue
        default: Any = field.default
        factory: Any = field.default_factory
        if default is dataclasses.MISSING and factory is not dataclasses.MISSING:
            default = factory()
        try:
            value = getattr(args, field.name, default)
            if isinstance(value, PLAIN) and bool(value != default) and (value or default):
                changed.append(field.name)
        except Exception:
            continue
    return read(args, changed)


def _caller_with_handler(handler: Any) -> Any:
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if owner is not None and owner is not handler and attribute(owner, "callback_handler") is handler:
            return owner
    return None


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except Exception:
        return None  # no loader, or an iterable dataset without length


def _names(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
