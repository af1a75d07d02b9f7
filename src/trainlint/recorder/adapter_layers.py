"""Adapters by their structure: PEFT's tuner layers, and low-rank factors beside a weight, written by hand."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from typing import Any

from .measure import local

#: Parameters of a module that may be one hand-written adapter with the layer it sits on.
MEMBERS = 8
#: Names listed of modules that are alike.
NAMES = 512
#: How alike two names (or what is left of them without the words that they share) are for one to be the other misspelt.
NEAR = 0.8


class Layer:
    """One module with an adapter: its name, the module underneath, that one's weight, and the adapter's tensors."""

    def __init__(self, name: str, module: Any, base: Any, weight: Any, tensors: list[Any]) -> None:
        self.name, self.module, self.base, self.weight, self.tensors = name, module, base, weight, tensors


def peft_layers(model: Any) -> Iterator[Layer]:
    """The layers that PEFT has put its adapters on."""
    base_class = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if base_class is None:
        return
    for name, module in model.named_modules():
        if not isinstance(module, base_class) or not hasattr(module, "get_base_layer"):
            continue
        base = module.get_base_layer()
        below = {id(p) for p in base.parameters()}
        tensors = [p for p in module.parameters() if id(p) not in below]
        yield Layer(name, module, base, getattr(base, "weight", None), tensors)


def extra_tensors(model: Any) -> list[Any]:
    """What ``modules_to_save`` and trainable tokens train in place of the modules that they stand for."""
    wrapper = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", None)
    if wrapper is None:
        wrapper = getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None)
    if wrapper is None:
        return []
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, wrapper):
            below = {id(p) for p in module.original_module.parameters()}
            found.update((id(p), p) for p in module.parameters() if id(p) not in below)
    return list(found.values())


def handmade_layers(root: Any, peft: set[int]) -> list[Layer]:
    """Modules that hold a matrix and two factors of low rank whose product has its shape.

    Their shapes alone may be those of a bottleneck beside a square layer. So one of the factors must be all zero, as
    every such adapter begins, or their names must say it, or the matrix is frozen while both factors, the module's own
    parameters, train.

    Args:
        root: the module to look through.
        peft: ids of modules that PEFT's layers are made of.
    """
    inner: set[str] = set()
    found: dict[str, Layer] = {}
    for name, module in root.named_modules():
        if id(module) in peft:
            continue
        parameters = dict(_few_parameters(module))
        layer = _low_rank(name, module, parameters) if 3 <= len(parameters) <= MEMBERS else None
        if layer is not None:
            found[name] = layer
            inner.update(_prefixes(name))
    return [layer for name, layer in found.items() if name not in inner]


def _few_parameters(module: Any) -> Iterator[tuple[str, Any]]:
    for i, pair in enumerate(module.named_parameters()):
        if i > MEMBERS:
            return
        yield pair


def _low_rank(name: str, module: Any, parameters: dict[str, Any]) -> Layer | None:
    matrices = [(n, p) for n, p in parameters.items() if p.ndim == 2]
    for weight_name, weight in matrices:
        for a_name, a in matrices:
            for b_name, b in matrices:
                if len({id(weight), id(a), id(b)}) < 3 or not _product(a, b, tuple(weight.shape)):
                    continue
                if _meant(module, weight, (a_name, a), (b_name, b)):
                    owner = module
                    for part in weight_name.split(".")[:-1]:
                        owner = owner._modules[part]
                    tensors = [p for n, p in parameters.items() if p is a or p is b or _lora(n)]
                    # A parametrization (torch.nn.utils.parametrize) lies inside the layer that it is of.
                    return Layer(name.partition(".parametrizations.")[0], module, owner, weight, tensors)
    return None


def _product(a: Any, b: Any, shape: tuple[int, ...]) -> bool:
    """Whether ``a`` maps into few dimensions and ``b`` out of them, in either orientation."""
    rows, columns = shape
    for inward in ((a.shape[0], a.shape[1]), (a.shape[1], a.shape[0])):
        for outward in ((b.shape[0], b.shape[1]), (b.shape[1], b.shape[0])):
            rank, size = inward
            if size == columns and outward == (rows, rank) and 2 * rank <= min(rows, columns):
                return True
    return False


def _meant(module: Any, weight: Any, a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    if (_lora(a[0]) and _lora(b[0])) or "lora" in type(module).__name__.lower():
        return True
    if weight.requires_grad or not (a[1].requires_grad and b[1].requires_grad):
        return zero(b[1]) and not zero(a[1])
    own = {id(p) for p in module.__dict__["_parameters"].values()}
    return zero(b[1]) or {id(a[1]), id(b[1])} <= own


def named(layer: Layer) -> bool:
    """Whether the names of a hand-written adapter say that it is one."""
    own = {id(t) for t in layer.tensors}
    return "lora" in type(layer.module).__name__.lower() or any(
        id(p) in own and _lora(n) for n, p in layer.module.named_parameters()
    )


def _lora(name: str) -> bool:
    return "lora" in name.lower()


def zero(tensor: Any) -> bool:
    """Every element is 0. Small tensors only: larger ones are no factors of an adapter."""
    if tensor.device.type == "meta" or tensor.numel() > 1 << 22:
        return False
    return not bool(local(tensor.detach()).any())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


# ------------------------------------------------------------------------------------------------------- coverage


def sites(root: Any, layers: list[Layer]) -> list[dict[str, Any]]:
    """The adapted modules by their place in equal layers, beside those there that have no adapter."""
    taken: set[int] = set()
    for layer in layers:
        taken.update(id(m) for m in layer.module.modules())
    groups: dict[Any, dict[str, Any]] = {}
    for layer in layers:
        key = (_pattern(layer.name), _shape(layer.weight))
        group = groups.setdefault(key, {"class_name": type(layer.base).__name__, "wrapped": [], "bare": []})
        group["wrapped"].append(layer.name)
    for name, module in root.named_modules():
        if name and id(module) not in taken:
            weight = module.__dict__.get("_parameters", {}).get("weight")
            found = groups.get((_pattern(name), _shape(weight))) if weight is not None else None
            if found is not None:
                found["bare"].append(name)
    return [
        {
            "name": pattern[-1],
            "class_name": g["class_name"],
            "wrapped": g["wrapped"][:NAMES],
            "bare": g["bare"][:NAMES],
        }
        for (pattern, _), g in groups.items()
    ]


def _pattern(name: str) -> tuple[str, ...]:
    """A module's name without the numbers of layers: the same for all modules at one place of equal layers."""
    return tuple(part for part in name.split(".") if not part.isdecimal()) or (name,)


def leaf(name: str) -> str:
    """The last part of a module's name that is no number: ``q_proj``; of ``fc.0`` it is ``fc``."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(getattr(weight, "shape", ()))


def targets(model: Any, layers: list[Layer], names: list[str]) -> list[dict[str, Any]]:
    """For each name that was to be adapted: how many layers it fits, and bare linear layers of nearly that name."""
    wrapped = [layer.name for layer in layers]
    out = []
    bare: dict[str, None] = {}
    taken = {id(m) for layer in layers for m in layer.module.modules()}
    for name, module in model.named_modules():
        weight = module.__dict__.get("_parameters", {}).get("weight")
        # A matrix that maps activations: linear layers of any make, convolutions; no norms, no embeddings.
        linear = weight is not None and weight.ndim >= 2 and "mbedding" not in type(module).__name__
        if linear and id(module) not in taken and leaf(name):
            bare[leaf(name)] = None
    for asked in names:
        matched = sum(1 for name in wrapped if name == asked or name.endswith(f".{asked}"))
        if matched == 0:
            # A name fits modules that hold the layer too (a block as a whole), and parameters (target_parameters).
            matched = sum(1 for name in wrapped if f".{asked}." in f".{name}.")
        near = [name for name in bare if alike(asked.rpartition(".")[2], name)][:2] if matched == 0 else []
        out.append({"name": asked, "matched": matched, "near": near})
    return out


def alike(a: str, b: str) -> bool:
    """Whether one name may be the other misspelt, or another architecture's word for it.

    ``out_proj`` and ``o_proj``, ``value`` and ``values`` are; ``x_proj`` and ``up_proj``, ``fc1`` and ``fc2`` are not.
    """
    first, second = a.lower().split("_"), b.lower().split("_")
    shared = 0
    while first and second and first[-1] == second[-1]:
        first.pop()
        second.pop()
        shared += 1
    one, other = "_".join(first), "_".join(second)
    if not one or not other or one.rstrip("0123456789") == other.rstrip("0123456789"):
        return a.lower() == b.lower() and a != b
    if shared and (one.startswith(other) or other.startswith(one)):
        return True
    if min(len(one), len(other)) < 3:
        return False
    return difflib.SequenceMatcher(None, one, other).ratio() >= NEAR
