"""Models with adapters: where these sit, whether they take part, and what the model's own save would hold.

PEFT's models are known by its classes; adapters written by hand by their shapes. Modes of the adapters are read at the
begin of a backward, never hooked.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from .adapter_layers import Layer, extra_tensors, handmade_layers, named, peft_layers, sites, targets
from .core import Recorder
from .modules import unwrap
from .patching import ImportHooks, around, wrap
from .values import attribute
from .watch import Session

#: Models that are described, and backwards at which their adapters' modes are looked at.
MODELS = 8
LOOKS = 12
#: Names listed of norms whose statistics drift.
NORMS = 50


class Adapted:
    """One model with adapters as it is followed. ``config``: PEFT's own, ``None`` for hand-written adapters."""

    def __init__(self, root: Any, name: str, model: Any, layers: list[Layer], configs: Mapping[str, Any]) -> None:
        self.root, self.name, self.model, self.layers, self.configs = root, name, model, layers, configs
        self.looks = self.disabled = self.merged = 0
        self.statistics = {
            n: (m.running_mean, m.running_mean.detach().clone())
            for n, m in model.named_modules()
            if getattr(m, "running_mean", None) is not None and m.running_mean.device.type != "meta"
        }

    def look(self) -> None:
        """Before a backward: do the adapters take part?"""
        switched = [m for m in (layer.module for layer in self.layers) if hasattr(m, "merged_adapters")]
        if not switched:
            return
        self.looks += 1
        self.disabled += all(bool(m.disable_adapters) for m in switched)
        self.merged += all(bool(m.merged_adapters) for m in switched)

    def drifting(self) -> list[str]:
        return [n for n, (now, before) in self.statistics.items() if bool((now.to(before.device) != before).any())]


class Adapters:
    """The adapted models of one process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.found: list[Adapted] = []
        self._known: set[int] = set()
        self._written = False

    def find(self) -> None:
        """Among the modules of the last scan, each model once."""
        for root in self.session.modules.roots:
            inner, _ = unwrap(root)
            if len(self.found) >= MODELS or next(inner.parameters(), None) is None:
                continue
            inside: set[int] = set()
            for name, model, configs in peft_models(inner):
                inside.update(id(m) for m in model.modules())
                if id(model) not in self._known:
                    self._known.add(id(model))
                    self.found.append(Adapted(root, name, model, list(peft_layers(model)), configs))
            if id(inner) not in self._known and not inside:
                layers = handmade_layers(inner, inside)
                if layers:
                    self._known.add(id(inner))
                    self.found.append(Adapted(root, "", inner, layers, {}))

    def backward(self) -> None:
        for one in self.found:
            if one.looks < LOOKS:
                one.look()

    def close(self) -> None:
        if self._written or not self.found:
            return
        self._written = True
        self.recorder.emit("adapters", {"models": [self._payload(one) for one in self.found]})

    def _payload(self, one: Adapted) -> dict[str, Any]:
        model, config = one.model, active_config(one.model, one.configs)
        extra = extra_tensors(model)
        adapter = {id(t): t for layer in one.layers for t in layer.tensors}
        adapter.update((id(p), p) for p in prompt_tensors(model))
        asked = attribute(config, "target_modules")
        names = sorted(map(str, asked)) if isinstance(asked, (list, tuple, set)) else []
        payload: dict[str, Any] = {
            "root": self.recorder.roots.get(one.root),
            "name": one.name,
            "class_name": type(model).__name__,
            "library": "peft" if one.configs else "",
            "named": bool(one.configs) or all(named(layer) for layer in one.layers),
            "method": method(config) if one.configs else "low-rank",
            "adapters": [str(name) for name in one.configs],
            "targets": targets(model, one.layers, names),
            "target_pattern": asked if isinstance(asked, str) else "",
            "layers_asked": attribute(config, "layers_to_transform") is not None
            or bool(attribute(config, "exclude_modules")),
            "modules_to_save": [str(m) for m in attribute(config, "modules_to_save") or ()],
            "inference_mode": attribute(config, "inference_mode"),
            "sites": sites(model, one.layers),
            "parameters": self._numbers(adapter.values()),
            "extra": self._numbers(extra),
            "adapted_weights": self._numbers(layer.weight for layer in one.layers if layer.weight is not None),
            "members": self._numbers(model.parameters()),
            "looks": one.looks,
            "disabled": one.disabled,
            "merged": one.merged,
        }
        if one.configs:
            payload.update(self._saved(one))
        return payload

    def _numbers(self, tensors: Any) -> list[int]:
        numbers = (self.recorder.parameters.get(t) for t in tensors)
        return list(dict.fromkeys(n for n in numbers if n is not None))

    def _saved(self, one: Adapted) -> dict[str, Any]:
        """What the model's own save would hold, by asking PEFT for it; nothing is written."""
        if any("FullySharded" in type(m).__name__ for m in one.root.modules()):
            return {"not_saved_because": "its tensors are spread over processes"}
        try:
            held, asked_hub = held_by_save(one.model, one.configs)
        except Exception as error:
            return {"not_saved_because": f"{type(error).__name__}: {error}"[:200]}
        places = {place(t) for t in held.values()}
        own = [p for p in one.model.parameters() if place(p) in places]
        left = [n for n in one.drifting() if place(one.statistics[n][0]) not in places]
        return {"saved": self._numbers(own), "drifting_norms": left[:NORMS], "vocabulary_unknown": asked_hub}


def peft_models(root: Any) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """The outermost models with PEFT's adapters at or below ``root``: name, model, configs by adapter."""
    base = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    if base is None:
        return []
    out: list[tuple[str, Any, Mapping[str, Any]]] = []
    inside: set[int] = set()
    for name, module in root.named_modules():
        if id(module) in inside:
            continue
        native = bool(module.__dict__.get("_hf_peft_config_loaded"))  # transformers' own `model.add_adapter`
        configs = module.__dict__.get("peft_config") if native else attribute(module, "peft_config")
        if (isinstance(module, base) or native) and isinstance(configs, Mapping) and configs:
            out.append((name, module, configs))
            inside.update(id(m) for m in module.modules())
    return out


def active_config(model: Any, configs: Mapping[str, Any]) -> Any:
    """The config of the adapter that is active, else of the first."""
    active = attribute(model, "active_adapter")
    if not isinstance(active, (str, list, tuple)):
        active = next(iter(configs), None)
    name = active[0] if isinstance(active, (list, tuple)) and active else active
    return configs.get(name) if isinstance(name, str) and name in configs else next(iter(configs.values()), None)


def method(config: Any) -> str:
    kind = attribute(config, "peft_type")
    return str(getattr(kind, "value", kind))


def prompt_tensors(model: Any) -> list[Any]:
    """What prompt and prefix tuning learn: no layer of the model holds it."""
    encoder = attribute(model, "prompt_encoder")
    return list(encoder.parameters()) if hasattr(encoder, "parameters") else []


def held_by_save(model: Any, configs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tensors of all adapters that ``save_pretrained`` would write, and whether it would have asked a hub.

    PEFT compares the vocabulary with that of the base model's own config to tell whether embeddings must be saved. It
    may read that config from disk here, but nothing is asked of a hub for this.
    """
    module = sys.modules["peft.utils.save_and_load"]
    original = getattr(module, "check_file_exists_on_hf_hub", None)
    asked = []

    def unknown(*args: Any, **kwargs: Any) -> None:
        asked.append(args)

    held: dict[str, Any] = {}
    try:
        if original is not None:
            setattr(module, "check_file_exists_on_hf_hub", unknown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in configs:
                for key, tensor in module.get_peft_model_state_dict(model, adapter_name=name).items():
                    held[f"{name}.{key}"] = tensor
    finally:
        if original is not None:
            setattr(module, "check_file_exists_on_hf_hub", original)
    return held, bool(asked)


def place(tensor: Any) -> Any:
    """Where a tensor's values lie: the same for a parameter and what ``state_dict`` hands out for it."""
    try:
        return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape)
    except RuntimeError:  # a kind of tensor without storage
        return id(tensor)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    adapters = Adapters(session)
    session.closers.append(adapters.close)
    recorder = session.recorder
    scan = session.modules.scan

    def scan_and_find() -> None:
        scan()
        # The scan runs inside other instruments, where quiet would skip this.
        try:
            adapters.find()
        except Exception as error:
            recorder.problem("adapters.find", error)

    session.modules.scan = scan_and_find

    @recorder.quiet
    def begins(*args: Any, **kwargs: Any) -> None:
        if adapters.found and not torch.compiler.is_compiling():
            adapters.backward()

    wrap(torch.autograd, "backward", around(before=begins))
