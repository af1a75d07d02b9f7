"""What activation functions leave of the units of the layer before them, and how values are spread."""

from __future__ import annotations

import math
import sys
from typing import Any

from . import measure
from .replay_trace import Path, replayed_line

#: Activation functions by torch's names; what counts is the input, before it is overwritten in place.
FUNCTIONS = {"relu": "relu", "relu_": "relu", "relu6": "relu", "tanh": "tanh", "tanh_": "tanh",
             "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}  # fmt: skip
#: Beyond these the output is the end of the range in float32.
ENDS = {"tanh": 9.5, "sigmoid": 17.5}
LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
#: What mixes features afresh: a unit of the layer before is no unit of the result.
BREAKS = ("matmul", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention", "__matmul__", "mm", "addmm",
          "multi_head_attention_forward", "lstm", "gru", "embedding", "bilinear")  # fmt: skip
#: Activations, and tensors of each kind in a histogram.
USES = 256
TENSORS = 64
BINS = 32
#: Elements of a tensor that is looked at as a whole.
LARGEST = 1 << 26
#: Least rows, and least elements of a row, that are compared.
ROWS = 4
#: Elements of a histogram.
SAMPLE = 4096


class Units:
    """Collects the uses while :meth:`mode` is on."""

    def __init__(self, path: Path, parameters: Any, samples: int | None) -> None:
        self.path = path
        self.parameters = parameters
        self.samples = samples
        self.uses: dict[tuple[Any, ...], dict[str, Any]] = {}
        #: Of the last layer: weight, size and dimension of its units, inputs of each, path and class of its module.
        self._layer: tuple[Any, int, bool, int, str, str] | None = None

    def mode(self) -> Any:
        from torch.overrides import TorchFunctionMode

        look = self._look

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                look(func, args, kwargs or {}, sys._getframe(1))
                return func(*args, **(kwargs or {}))

        return Mode()

    def _look(self, func: Any, args: Any, kwargs: Any, frame: Any) -> None:
        import torch

        name = getattr(func, "__name__", "")
        if name in LAYERS:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
                transposed = "transpose" in name
                groups = kwargs.get("groups", 1)
                out = weight.shape[1] * (groups if isinstance(groups, int) else 1) if transposed else weight.shape[0]
                fan_in = weight.shape[0] if transposed else weight[0].numel()
                self._layer = (weight, int(out), name != "linear", int(fan_in), self.path.name, self.path.class_name)
        elif name in BREAKS:
            self._layer = None
        elif name in FUNCTIONS:
            given = args[0] if args else kwargs.get("input")
            if self._layer is not None and isinstance(given, torch.Tensor) and given.is_floating_point():
                self._use(FUNCTIONS[name], given, self._layer, frame)

    def _use(self, function: str, given: Any, layer: tuple[Any, int, bool, int, str, str], frame: Any) -> None:
        import torch

        weight, units, channels, fan_in, name, class_name = layer
        dim = (1 if channels else given.ndim - 1) if given.ndim >= 2 else -1
        if dim < 0 or given.shape[dim] != units or given.numel() == 0 or given.layout != torch.strided:
            return
        others = [d for d in range(given.ndim) if d != dim]
        low, high = given.amin(dim=others), given.amax(dim=others)
        if function == "relu":
            dead, silent = high <= 0, (high == 0) & (low == 0)
        else:
            end = ENDS[function]
            dead = (low > end) | (high < -end)
            silent = torch.zeros_like(dead)
        number = self.parameters.get(weight)
        key = (self.path.name, function, id(weight) if number is None else number)
        known = self.uses.get(key)
        if known is None:
            if len(self.uses) >= USES:
                return
            known = self.uses[key] = {
                "function": function,
                "module": self.path.name,
                "layer": name,
                "layer_class": class_name,
                "units": units,
                "fan_in": fan_in,
                "dead": dead,
                "silent": silent,
                "samples": self.samples or int(given.shape[0]),
                "values": 0,
                "weight": number,
                "at": replayed_line(frame),
            }
        else:
            known["dead"], known["silent"] = known["dead"] & dead, known["silent"] & silent
        known["values"] += given.numel() // units

    def report(self) -> list[dict[str, Any]]:
        return [{**u, "dead": int(u["dead"].sum()), "silent": int(u["silent"].sum())} for u in self.uses.values()]


def measurable(tensor: Any) -> bool:
    """A floating tensor with memory, of a dtype that has arithmetic, of a size that can be looked at."""
    import torch

    return bool(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tensor.element_size() >= 2  # float8 has none
        and tensor.layout == torch.strided
        and 0 < tensor.numel() <= LARGEST
        and tensor.device.type != "meta"
        and not measure.emptied(tensor)
    )


def distribution(what: str, name: str, class_name: str, tensor: Any, samples: int | None = None) -> dict[str, Any]:
    """One ``Distribution``, still on the device: :func:`read` makes numbers of it."""
    import torch

    tensor = tensor.detach()
    sample = measure.sample_view(tensor, SAMPLE)
    low, high = torch.aminmax(tensor)
    sample = (sample if sample is not None else tensor.reshape(-1)[:SAMPLE]).float()
    zeros = tensor.numel() - torch.count_nonzero(tensor)
    numbers = [low.float(), high.float(), sample.mean(), sample.std(correction=0), zeros.double()]
    spread = None
    if (
        samples is not None
        and samples > 1
        and tensor.ndim > 1
        and tensor.shape[0] == samples
        and tensor.shape[1:].numel()
    ):
        rows = tensor.reshape(samples, -1)
        rows = rows[:, :: max(1, rows.shape[1] // SAMPLE)].float()
        spread = (rows - rows[:1]).abs().amax() / rows.abs().amax().clamp_min(1e-30)
    return {
        "what": what,
        "name": name,
        "class_name": class_name,
        "shape": list(tensor.shape),
        "elements": tensor.numel(),
        "numbers": torch.stack([n.double() if n.device.type != "mps" else n.float() for n in numbers]),
        "sample": sample.clone(),
        "spread": spread,
    }


def read(entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a distribution."""
    import torch

    low, high, mean, std, zeros = entry.pop("numbers").tolist()
    sample = entry.pop("sample").cpu()
    counts: list[int] = []
    if math.isfinite(low) and math.isfinite(high) and sample.numel():
        counts = [int(c) for c in torch.histc(sample, BINS, low, high).tolist()] if high > low else [sample.numel()]
    spread = entry.pop("spread")
    return {
        **entry,
        "minimum": low,
        "maximum": high,
        "mean": mean,
        "std": std,
        "zeros": int(zeros),
        "counts": counts,
        "spread": float(spread) if spread is not None else None,
    }


def of_parameters(session: Any) -> list[dict[str, Any]]:
    """Weights and gradients of trained parameters: an even choice, and all whose rows are all the same."""
    modules = session.modules
    known = [(n, p) for n, p in modules.parameters.items() if p.requires_grad and measurable(measure.local(p))]
    chosen = {number for number, _ in evenly(known, TENSORS)}
    out = []
    for number, p in known:
        payload = modules._emitted.get(number) or {}
        name, owner = payload.get("name", str(number)), payload.get("owner", "")
        tensor = measure.local(p)
        same = same_rows(tensor)
        if number in chosen or same:
            out.append({**distribution("weight", name, owner, tensor), "identical_rows": same})
            grad = p.grad
            if grad is not None and measurable(measure.local(grad)):
                entry = distribution("gradient", name, owner, measure.local(grad))
                out.append({**entry, "identical_rows": same_rows(measure.local(grad))})
    return [read(entry) for entry in out]


def same_rows(tensor: Any) -> bool | None:
    """All rows are the same bits; ``None`` for tensors of few or short rows."""
    if tensor.ndim < 2 or tensor.shape[0] < ROWS or tensor[0].numel() < ROWS:
        return None
    middle, last = tensor[len(tensor) // 2], tensor[-1]
    if not bool(((tensor[0] == middle) & (tensor[0] == last)).all()):
        return False
    return bool((tensor == tensor[:1]).all())


def evenly(items: list[Any], most: int) -> list[Any]:
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]
