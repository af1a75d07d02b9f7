"""What the keys of a config say about the framework that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainlint.launch.pyproject import load_toml

LIGHTNING_CLI = "Lightning CLI"
HYDRA = "Hydra"
TRANSFORMERS = "transformers"
TORCHTUNE = "torchtune"
AXOLOTL = "axolotl"
LLAMA_FACTORY = "LLaMA-Factory"
ACCELERATE = "accelerate"
DEEPSPEED = "DeepSpeed"

_TRAINING_ARGUMENTS = frozenset(
    [
        "output_dir",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "warmup_ratio",
        "warmup_steps",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "save_strategy",
        "eval_strategy",
        "evaluation_strategy",
        "gradient_checkpointing",
        "bf16",
        "fp16",
        "weight_decay",
        "max_grad_norm",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "optim",
        "adam_beta1",
        "adam_beta2",
        "save_total_limit",
        "dataloader_num_workers",
        "remove_unused_columns",
        "load_best_model_at_end",
        "overwrite_output_dir",
        "do_train",
        "do_eval",
    ]
)
_SCRIPT_ARGUMENTS = frozenset(
    [
        "model_name_or_path",
        "dataset_name",
        "tokenizer_name_or_path",
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "dataset_config",
        "torch_dtype",
        "dtype",
        "attn_implementation",
        "max_length",
        "max_seq_length",
        "packing",
    ]
)
_BIG = 2_000_000


class _Loader(yaml.SafeLoader):
    """Reads any tag as the plain value under it: only the shape matters here."""


def _any_tag(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None


_Loader.add_multi_constructor("", _any_tag)


@dataclass(frozen=True)
class Shape:
    """``kinds``: frameworks that the keys speak of; ``tree``: the parsed config, ``{}`` when it has no keys."""

    kinds: frozenset[str] = frozenset()
    tree: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: ``# @package`` directive of a Hydra file.
    package: str | None = None


def parse_config(config: Path) -> Any:
    """The parsed config, or ``None`` when it cannot be read (the config checks say why)."""
    try:
        if config.stat().st_size > _BIG * 10:
            return None
        text = config.read_bytes().decode("utf-8-sig")
        suffix = config.suffix.lower()
        if suffix == ".json":
            return json.loads(text)
        if suffix == ".toml":
            return load_toml(text)
        if suffix in (".yaml", ".yml"):
            return yaml.load(text, Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError, TypeError):
        return None
    return None


def config_shape(config: Path) -> Shape:
    """Recognise a config by its keys. Never raises."""
    tree = parse_config(config)
    if not isinstance(tree, dict):
        return Shape()
    tree = {str(k): v for k, v in tree.items()}
    kinds: set[str] = set()
    keys = set(tree)
    nested = _nested_keys(tree)
    body = next((tree[s] for s in ("fit", "validate", "test") if isinstance(tree.get(s), dict)), tree)
    trainer_like = isinstance(body.get("trainer"), dict) and bool({"model", "data"} & set(body))
    plain_trainer = trainer_like and "_target_" not in nested and "defaults" not in keys
    if "class_path" in nested or (plain_trainer and {"seed_everything", "init_args", "ckpt_path"} & nested):
        kinds.add(LIGHTNING_CLI)
    if isinstance(tree.get("defaults"), list) or "_target_" in nested or isinstance(tree.get("hydra"), dict):
        kinds.add(HYDRA)
    if "_component_" in nested:
        kinds.add(TORCHTUNE)
    if "base_model" in keys and {"micro_batch_size", "sequence_len", "datasets", "adapter"} & keys:
        kinds.add(AXOLOTL)
    if tree.get("stage") in ("pt", "sft", "rm", "ppo", "dpo", "kto") and {"finetuning_type", "template"} & keys:
        kinds.add(LLAMA_FACTORY)
    if {"distributed_type", "compute_environment"} <= keys or {"num_processes", "mixed_precision"} <= keys:
        kinds.add(ACCELERATE)
    if "zero_optimization" in keys or {"train_micro_batch_size_per_gpu"} & keys:
        kinds.add(DEEPSPEED)
    hits = keys & _TRAINING_ARGUMENTS
    if len(hits) >= 3 or (len(hits) >= 2 and keys & _SCRIPT_ARGUMENTS):
        kinds.add(TRANSFORMERS)
    return Shape(frozenset(kinds), tree, _package(config))


def _nested_keys(tree: Any) -> set[str]:
    found: set[str] = set()
    todo = [tree]
    seen: set[int] = set()
    while todo and len(found) < 5000:
        node = todo.pop()
        if not isinstance(node, (dict, list)) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            found.update(key for key in node if isinstance(key, str))
            todo.extend(node.values())
        else:
            todo.extend(node)
    return found


def _package(config: Path) -> str | None:
    try:
        with config.open(encoding="utf-8", errors="replace") as file:
            for line, _ in zip(file, range(20)):
                if line.startswith("#") and "@package" in line:
                    return line.partition("@package")[2].strip()
    except OSError:
        pass
    return None
