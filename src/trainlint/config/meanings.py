"""Which training setting a config key names, across the words that ecosystems use for it.

A key has a meaning only when its name says so *and* every section above it is one that speaks of training in
general: ``training.optimizer.lr`` is the learning rate, ``discriminator.lr`` is one of several,
``model.layer_norm.eps`` is none. A key that is not recognised is never compared with anything: a missed comparison
costs less than a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trainlint.recorder.config_paths import split, words

#: Sections that speak of training as a whole. Endings such as ``_config`` and ``_args`` are cut first.
_TRAINING = words(
    """training train trainer hparams hyperparameters hyper hyperparams hyper_parameters params parameters args
    kwargs init_args dict_kwargs solver learning config cfg experiment settings run fit engine learner common
    general base main default defaults algorithm algo task lightning lightning_module pl_module module system
    litmodel lit_module strategy training_arguments trainer_kwargs finetune finetuning fine_tuning finetuner sft
    pretrain pretraining"""
)
_OPTIMIZER = words(
    """optim optims optimizer optimizers optimiser optimization optimisation opt adam adamw sgd optimizer_settings
    configure_optimizers"""
)
_SCHEDULE = words("scheduler lr_scheduler lr_schedule schedule sched lr_sched schedulers lr_schedulers")
_DATA = words(
    """data dataset datamodule data_module dataloader dataloaders loader train_dataloader train_loader train_data
    data_loader train_dataset data_loading"""
)
_MODEL = frozenset(("model",))
_ENDINGS = re.compile(r"_(?:config|cfg|conf|args|kwargs|params|parameters|settings|options|opts|hparams|arguments)$")


@dataclass(frozen=True)
class Setting:
    """How one setting is written.

    ``names`` count in the sections ``sections`` (and at the top). ``narrow`` names are too general for that: they count
    only directly inside a section of ``owners``.
    """

    names: frozenset[str]
    sections: frozenset[str] = _TRAINING | _OPTIMIZER
    narrow: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    #: ``number``, ``integer``, ``name``, ``pair``, ``flag``, ``precision``.
    value: str = "number"
    low: float = float("-inf")
    high: float = float("inf")


SETTINGS: dict[str, Setting] = {
    "learning_rate": Setting(
        words(
            "lr learning_rate base_lr max_lr peak_lr init_lr initial_lr learningrate base_learning_rate "
            "peak_learning_rate max_learning_rate initial_learning_rate"
        ),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0.0,
        high=1e3,
    ),
    "weight_decay": Setting(
        words("weight_decay wd weightdecay adam_weight_decay"), _TRAINING | _OPTIMIZER | _MODEL, low=0.0, high=10.0
    ),
    "betas": Setting(words("betas adam_betas optim_betas optimizer_betas"), value="pair", low=0.0, high=1.0),
    "beta1": Setting(words("beta1 beta_1 adam_beta1 adam_beta_1 optim_beta1"), low=0.0, high=1.0),
    "beta2": Setting(words("beta2 beta_2 adam_beta2 adam_beta_2 optim_beta2"), low=0.0, high=1.0),
    "eps": Setting(
        words("adam_epsilon adam_eps optim_eps optimizer_eps opt_eps"),
        narrow=words("eps epsilon"),
        owners=_OPTIMIZER,
        low=0.0,
        high=1.0,
    ),
    "momentum": Setting(
        words("sgd_momentum optim_momentum"),
        narrow=words("momentum"),
        owners=_OPTIMIZER | _TRAINING,
        low=0.0,
        high=1.0,
    ),
    "optimizer": Setting(
        words("optimizer optim optimizer_name optimizer_type optim_name opt optimizer_class optimiser"),
        _TRAINING | _OPTIMIZER | _MODEL,
        narrow=words("name type _target_ class_path kind opt"),
        owners=_OPTIMIZER,
        value="name",
    ),
    "schedule": Setting(
        words(
            "lr_scheduler lr_scheduler_type lr_schedule lr_schedule_type sched scheduler scheduler_type scheduler_name "
            "lr_policy lr_decay_style lr_scheduler_name learning_rate_schedule learning_rate_scheduler schedule_type"
        ),
        _TRAINING | _OPTIMIZER | _MODEL | _SCHEDULE,
        narrow=words("name type _target_ class_path kind sched"),
        owners=_SCHEDULE,
        value="name",
    ),
    "warmup_steps": Setting(
        words(
            "warmup_steps num_warmup_steps warmup_iters lr_warmup_steps n_warmup_steps warmup_updates lr_warmup_iters "
            "warmup_iterations warm_up_steps number_warmup_steps"
        ),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0,
    ),
    "warmup_epochs": Setting(
        words("warmup_epochs num_warmup_epochs lr_warmup_epochs warm_up_epochs"),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0,
    ),
    "warmup_ratio": Setting(
        words(
            "warmup_ratio warmup_fraction warmup_proportion warmup_frac lr_warmup_ratio lr_warmup_fraction "
            "warm_up_ratio"
        ),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0.0,
        high=1.0,
    ),
    "min_lr": Setting(
        words("min_lr minimum_lr lr_min min_learning_rate eta_min lr_end minimum_learning_rate"),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0.0,
    ),
    "min_lr_ratio": Setting(
        words("min_lr_ratio min_lr_rate lr_min_ratio min_lr_fraction min_learning_rate_ratio min_lr_frac"),
        _TRAINING | _OPTIMIZER | _SCHEDULE | _MODEL,
        low=0.0,
        high=1.0,
    ),
    "precision": Setting(
        words("precision mixed_precision trainer_precision amp_precision"),
        _TRAINING | words("accelerator accelerate fabric"),
        value="precision",
    ),
    "bf16": Setting(words("bf16"), _TRAINING, value="flag"),
    "fp16": Setting(words("fp16"), _TRAINING, value="flag"),
    "accumulation": Setting(
        words(
            "accumulate_grad_batches gradient_accumulation_steps grad_accumulation_steps grad_accum_steps "
            "accumulation_steps grad_accum accumulate_steps accum_iter accum_steps gradient_accumulation accum_freq "
            "accumulate_gradients grad_accumulation num_accumulation_steps gradient_accumulate_every"
        ),
        _TRAINING | _OPTIMIZER | _DATA | words("accelerator accelerate fabric"),
        value="integer",
        low=1,
        high=1e5,
    ),
    "clip_norm": Setting(
        words(
            "gradient_clip_val max_grad_norm grad_clip clip_grad_norm grad_clip_norm gradient_clip_norm clip_grad "
            "gradient_clipping grad_norm_clip grad_clip_val gradient_clip clip_grad_max_norm clip_gradient"
        ),
        _TRAINING | _OPTIMIZER | _MODEL,
        narrow=words("max_norm clip_norm"),
        owners=_OPTIMIZER | words("grad_clip gradient_clipping clip"),
    ),
    "clip_value": Setting(words("clip_grad_value grad_clip_value gradient_clip_value"), _TRAINING | _OPTIMIZER),
    "batch_size": Setting(
        words(
            "batch_size train_batch_size per_device_train_batch_size micro_batch_size batchsize device_batch_size "
            "per_gpu_train_batch_size train_micro_batch_size_per_gpu per_device_batch_size"
        ),
        _TRAINING | _DATA,
        value="integer",
        low=1,
        high=1e8,
    ),
    "max_steps": Setting(
        words(
            "max_steps max_train_steps train_steps training_steps num_train_steps max_training_steps max_iters "
            "max_iterations num_training_steps total_steps total_train_steps max_updates train_iters"
        ),
        _TRAINING,
        value="integer",
        low=1,
    ),
    "epochs": Setting(
        words("epochs num_epochs max_epochs n_epochs num_train_epochs total_epochs train_epochs max_epoch"),
        _TRAINING,
        low=0,
    ),
    "seed": Setting(
        words("seed random_seed train_seed seed_everything manual_seed global_seed rng_seed training_seed"),
        _TRAINING,
        value="integer",
        low=0,
    ),
    "log_lr": Setting(
        words("log_lr log_learning_rate log_lrs"), _TRAINING | _OPTIMIZER | words("logging logger log"), value="flag"
    ),
}

_BY_NAME: dict[str, list[str]] = {}
for _meaning, _setting in SETTINGS.items():
    for _name in _setting.names | _setting.narrow:
        _BY_NAME.setdefault(_name, []).append(_meaning)

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _normal(name: str) -> str:
    return _CAMEL.sub("_", name.strip()).replace("-", "_").lower()


def _section(name: str) -> str:
    normal = _normal(name)
    if normal in _TRAINING:
        return normal
    cut = _ENDINGS.sub("", normal)
    return cut or normal


def meaning_of(path: str, value: Any) -> str:
    """The setting that a key names, or an empty string.

    Args:
        path: the key's path as in :mod:`trainlint.recorder.config_paths`.
        value: its raw value: a learning rate that is a text or a table has no meaning here.
    """
    parts = [p for p in split(path) if isinstance(p, str)]
    if not parts:
        return ""
    name = _normal(parts[-1])
    candidates = _BY_NAME.get(name)
    if not candidates:
        return ""
    sections = [_section(p) for p in parts[:-1]]
    for meaning in candidates:
        setting = SETTINGS[meaning]
        if not fits(meaning, value):
            continue
        if name in setting.names and all(_allowed(s, setting.sections) for s in sections):
            return meaning
        if name in setting.narrow and _narrow(sections, setting):
            return meaning
    return ""


def _allowed(section: str, among: frozenset[str]) -> bool:
    return section in among or section in _TRAINING


def _narrow(sections: list[str], setting: Setting) -> bool:
    """A general name: the nearest section that is not mere wrapping (``init_args``, ``params``) must be an owner."""
    wrapping = ("init_args", "kwargs", "params", "args", "dict_kwargs")
    real = [s for s in sections if s not in wrapping]
    if not real or real[-1] not in setting.owners:
        return False
    return all(_allowed(s, setting.sections | setting.owners | _MODEL) for s in real[:-1])


def number(value: Any) -> float | None:
    """A number, also one that YAML 1.1 read as text (``1e-4``); ``None`` for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", value):
        return float(value)
    return None


#: Spellings of precision, to what autocast or the weights must then be: (dtype, mixed).
PRECISIONS: dict[str, tuple[str, bool]] = {
    "bf16-mixed": ("bfloat16", True),
    "bf16": ("bfloat16", True),
    "bfloat16": ("bfloat16", True),
    "16-mixed": ("float16", True),
    "fp16": ("float16", True),
    "16": ("float16", True),
    "float16": ("float16", True),
    "bf16-true": ("bfloat16", False),
    "16-true": ("float16", False),
    "32": ("float32", False),
    "32-true": ("float32", False),
    "fp32": ("float32", False),
    "float32": ("float32", False),
    "no": ("float32", False),
    "64": ("float64", False),
    "64-true": ("float64", False),
}


def fits(meaning: str, value: Any) -> bool:
    """Whether a value is of the kind that the setting takes."""
    setting = SETTINGS[meaning]
    if setting.value == "flag":
        return isinstance(value, bool)
    if setting.value == "name":
        return isinstance(value, str) and bool(value.strip()) and "${" not in value
    if setting.value == "precision":
        return str(value).strip().lower() in PRECISIONS and not isinstance(value, bool)
    if setting.value == "pair":
        items = value if isinstance(value, (list, tuple)) else ()
        numbers = [number(v) for v in items]
        return len(numbers) == 2 and all(n is not None and setting.low <= n <= setting.high for n in numbers)
    found = number(value)
    if found is None or not setting.low <= found <= setting.high:
        return False
    return setting.value != "integer" or found == int(found)
