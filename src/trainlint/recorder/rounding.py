"""Updates of half-precision weights beside the digits that the weights have: what was meant, and what changed.

The update that a step meant is taken from the optimizer's state right after it. Where the formula is not known, what is
counted is which weights changed, by their size: rounding to the nearest number leaves the large ones still.
"""

from __future__ import annotations

from typing import Any

from .core import scalar
from .measure import SAMPLE, local, numbers
from .modules import dtype_name
from .second_moment import TENSORS, flat_sample

#: Steps that are followed, and groups of one optimizer.
STEPS = 20
GROUPS = 32
#: Bins of powers of two, and the exponent of the first.
BINS = 32
FIRST = -24

#: Significant bits, and the exponent of the smallest subnormal number.
_DIGITS = {"bfloat16": (8, -133), "float16": (11, -24)}
#: State that is no copy of the weights and no memory of what rounding took.
_MOMENTS = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer square_avg grad_avg sum acc_delta exp_inf prev step_size "
    "exp_avg_sq_row exp_avg_sq_col row_var col_var variance mu_product eta mu ax".split()
)


class Rounding:
    """The groups of one optimizer whose parameters are float16 or bfloat16."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.steps = 0
        self.groups: list[tuple[int, _Taken]] = []

    def before(self, optimizer: Any, closure: bool) -> None:
        """Take samples of the weights, and of the gradients unless a closure is still to make them."""
        self.groups = []
        self.steps += 1
        if self.steps > STEPS:
            return
        for index, group in enumerate(optimizer.param_groups[:GROUPS]):
            chosen = _half_precision(group, with_gradients=not closure)
            if chosen:
                self.groups.append((index, _Taken(chosen, group, with_gradients=not closure)))

    def after(self, optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
        """One ``RoundedUpdates`` payload per group that was sampled."""
        skipped = getattr(optimizer, "found_inf", None)
        if not self.groups or (skipped is not None and float(skipped)):
            return []
        out = []
        for index, taken in self.groups:
            payload = taken.end(optimizer, optimizer.param_groups[index])
            if payload is not None:
                out.append({"optimizer": self.number, "group": index, "index": self.steps - 1, **payload})
        self.groups = []
        return [("numerics", {"rounding": out})] if out else []


def _half_precision(group: Any, *, with_gradients: bool) -> list[Any]:
    """Parameters of one half precision and device, spread over the group."""
    import torch

    kind = None
    out = []
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float16, torch.bfloat16) or not parameter.requires_grad:
            continue
        own = (parameter.dtype, parameter.device)
        if parameter.layout != torch.strided or local(parameter).numel() == 0 or kind not in (None, own):
            continue
        if local(parameter).numel() > 64 * SAMPLE and not local(parameter).is_contiguous():
            continue
        if with_gradients and (parameter.grad is None or parameter.grad.layout != torch.strided):
            continue
        kind = own
        out.append(parameter)
    stride = -(-len(out) // TENSORS) if out else 1
    return out[::stride]


class _Taken:
    """Samples of one group before a step."""

    def __init__(self, parameters: list[Any], group: Any, *, with_gradients: bool) -> None:
        self.parameters = parameters
        self.sizes = [flat_sample(p).numel() for p in parameters]
        self.weight = self._of(lambda p: p)
        self.gradient = self._of(lambda p: p.grad) if with_gradients else None
        # A closure may step the scheduler; the rate is read again after the step then.
        self.rate = scalar(group.get("lr")) if with_gradients else None

    def _of(self, get: Any) -> Any:
        """The samples of one tensor per parameter, as one; ``None`` when one is missing or of another size."""
        import torch

        parts = []
        for parameter in self.parameters:
            tensor = get(parameter)
            if not hasattr(tensor, "dtype") or local(tensor).numel() != local(parameter).numel():
                return None
            if tensor.layout != torch.strided:
                return None
            parts.append(flat_sample(tensor))
        return torch.cat(parts)

    def end(self, optimizer: Any, group: Any) -> dict[str, Any] | None:
        import torch

        rate = self.rate if self.rate is not None else scalar(group.get("lr"))
        if not isinstance(rate, (int, float)):
            return None
        gradient = self.gradient if self.gradient is not None else self._of(lambda p: p.grad)
        scale = getattr(optimizer, "grad_scale", None)
        if gradient is not None:
            gradient = gradient.float() if scale is None else gradient.float() / scale.to(gradient.device).float()
        after = self._of(lambda p: p)
        formula, update = self._update(optimizer, group, rate, gradient)
        shown = update if update is not None else gradient
        if shown is None or after is None:
            return None
        changed = after.view(torch.int16) != self.weight.view(torch.int16)
        table = torch.stack([shown.float().abs(), self.weight.float().abs(), changed.float()]).cpu()
        out = {
            "dtype": dtype_name(self.weight.dtype),
            "rate": rate,
            "formula": formula,
            **_count(table, dtype_name(self.weight.dtype), known=update is not None),
        }
        if not type(optimizer).__module__.startswith("torch.optim"):
            out["kept_in"] = self._kept(optimizer, after)
        return out

    def _state(self, optimizer: Any, key: str) -> Any:
        found = self._of(lambda p: _entry(optimizer, p).get(key))
        return None if found is None else found.float()

    def _update(self, optimizer: Any, group: Any, rate: float, gradient: Any) -> tuple[str, Any]:
        """Size of the update that the gradients made, without decoupled decay; ``None`` when it is not known."""
        keys = _entry(optimizer, self.parameters[0])
        if "d" in group or "d0" in group:
            return "", None  # rate-free methods multiply the rate by what they have estimated
        if "exp_avg" in keys and "exp_avg_sq" in keys and "betas" in group:
            return self._adam(optimizer, group, rate)
        if "lion" in type(optimizer).__name__.lower() and "exp_avg" in keys and gradient is not None:
            return "lion", rate * (gradient != 0).float()
        if gradient is None:
            return "", None
        decay = group.get("weight_decay") or 0.0
        if "square_avg" in keys and "alpha" in group:
            return self._rmsprop(optimizer, group, rate, gradient)
        if "sum" in keys and "lr_decay" in group and not decay:
            total = self._state(optimizer, "sum")
            return ("", None) if total is None else ("adagrad", rate * gradient / (total.sqrt() + group["eps"]))
        if "dampening" in group and "nesterov" in group:
            momentum = group.get("momentum") or 0.0
            if not momentum:
                return "sgd", rate * (gradient + decay * self.weight.float())
            buffer = self._state(optimizer, "momentum_buffer")
            if buffer is not None:
                return "sgd", rate * (gradient + momentum * buffer if group["nesterov"] else buffer)
        return "", None

    def _adam(self, optimizer: Any, group: Any, rate: float) -> tuple[str, Any]:
        import torch

        m = self._state(optimizer, "exp_avg")
        v = self._state(optimizer, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        steps = numbers([_entry(optimizer, p).get("step", group.get("step")) for p in self.parameters])
        eps = group.get("eps")
        if m is None or v is None or not isinstance(eps, (int, float)):
            return "", None
        if not all(isinstance(s, (int, float)) and s > 0 for s in steps):
            return "", None
        if group.get("correct_bias", group.get("bias_correction", True)) in (False, 0):
            return "adam", rate * m / (v.sqrt() + eps)
        beta1, beta2 = float(group["betas"][0]), float(group["betas"][1])
        counted = torch.tensor(steps, dtype=torch.float64)
        sizes = torch.tensor(self.sizes)
        first = torch.repeat_interleave(1 - beta1**counted, sizes).float().to(m.device)
        second = torch.repeat_interleave((1 - beta2**counted).sqrt(), sizes).float().to(m.device)
        return "adam", rate * (m / first) / (v.sqrt() / second + eps)

    def _rmsprop(self, optimizer: Any, group: Any, rate: float, gradient: Any) -> tuple[str, Any]:
        if group.get("momentum"):
            buffer = self._state(optimizer, "momentum_buffer")
            return ("", None) if buffer is None else ("rmsprop", rate * buffer)
        square = self._state(optimizer, "square_avg")
        if square is None or group.get("centered") or group.get("weight_decay"):
            return "", None
        return "rmsprop", rate * gradient / (square.sqrt() + group["eps"])

    def _kept(self, optimizer: Any, after: Any) -> str:
        """Where an optimizer that is not torch's keeps the digits that the weights do not have."""
        spacing = _spacing(after.float().abs(), dtype_name(after.dtype))
        for key in _entry(optimizer, self.parameters[0]):
            if key in _MOMENTS:
                continue
            other = self._of(lambda p, key=key: _entry(optimizer, p).get(key))
            if other is None or not other.is_floating_point():
                continue
            same = (other.to(after.dtype) == after).float().mean()
            small = (other.float().abs() <= 1.01 * spacing).float().mean()
            # A full copy of the weights, or the remainder of each of them.
            if float(same) > 0.9 or (float(small) > 0.99 and bool((other != 0).any())):
                return str(key)
        sizes = {local(p).numel() for p in self.parameters}
        return "float32 tensors of its own" if _holds_copies(optimizer, sizes) else ""


def _entry(optimizer: Any, parameter: Any) -> dict[str, Any]:
    state = optimizer.state.get(parameter)
    return state if isinstance(state, dict) else {}


def _holds_copies(optimizer: Any, sizes: set[int]) -> bool:
    """Whether float32 tensors as large as the parameters lie in attributes of the optimizer or of its groups."""
    import torch

    waiting: list[Any] = [v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")]
    waiting += [v for group in optimizer.param_groups for k, v in group.items() if k != "params"]
    most = max(sizes)
    for _ in range(20000):
        if not waiting:
            break
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.dtype in (torch.float32, torch.float64) and (value.numel() in sizes and value.numel() > 1):
                return True
            if value.dtype in (torch.float32, torch.float64) and value.numel() > most > 1:
                return True
        elif isinstance(value, dict):
            waiting += list(value.values())[:5000]
        elif isinstance(value, (list, tuple)):
            waiting += list(value)[:5000]
    return False


def _spacing(size: Any, dtype: str) -> Any:
    """Distance from numbers of this size to their nearest neighbour: below a power of two they lie closer."""
    import torch

    digits, smallest = _DIGITS[dtype]
    mantissa, exponent = torch.frexp(size)
    exponent = exponent - digits - (mantissa == 0.5).int()
    return torch.ldexp(torch.ones_like(size), exponent.clamp(min=smallest))


def _count(table: Any, dtype: str, *, known: bool) -> dict[str, Any]:
    """The counts of ``RoundedUpdates`` from rows on the CPU: size of the update, size of the weight, changed."""
    import torch

    update, weight, changed = table
    table = table[:, update.isfinite() & weight.isfinite() & (update > 0)]
    update, weight, changed = table
    moved = changed > 0
    bin_of_weight = _bin(weight)
    out: dict[str, Any] = {
        "elements": update.numel(),
        "unchanged": int((~moved).sum()),
        "weights": _histogram(bin_of_weight),
        "weights_changed": _histogram(bin_of_weight[moved]),
    }
    if not known or not update.numel():
        return out
    ratio = update.double() / (0.5 * _spacing(weight, dtype).double())
    power = update.double() ** 2
    total = float(power.sum())
    where = _bin(ratio)
    # Whether a power of two moves depends on the direction too.
    usual = torch.frexp(weight).mantissa != 0.5
    small, large = usual & (ratio < 0.9), usual & (ratio >= 2)
    return {
        **out,
        "unchanged_power": float(power[~moved].sum()) / total if total else None,
        "median_ratio": float(ratio.median()),
        "bins": _histogram(where),
        "power": [round(x, 6) for x in (torch.bincount(where, power, minlength=BINS) / (total or 1.0)).tolist()],
        "small": int(small.sum()),
        "small_changed": int((small & moved).sum()),
        "small_expected": float(ratio[small].sum()) / 2,
        "large": int(large.sum()),
        "large_changed": int((large & moved).sum()),
    }


def _bin(values: Any) -> Any:
    import torch

    _, exponent = torch.frexp(values)
    return (exponent.long() - 1 - FIRST).clamp(0, BINS - 1)


def _histogram(where: Any) -> list[int]:
    import torch

    return [int(n) for n in torch.bincount(where, minlength=BINS).tolist()]
