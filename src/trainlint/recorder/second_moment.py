"""Adam-family arithmetic in half precision: what the second moment, eps and the step really are in the state's dtype.

Beside the optimizer, a sample of its elements is carried along in float32 from the state that the first watched step
found, with the gradients that the program's own steps use. The difference between the two is the rounding of the
optimizer's arithmetic alone; whether the weights can take the step up is another question (``StepMeasurement``).
"""

from __future__ import annotations

import math
from typing import Any

from .measure import SAMPLE, local
from .modules import dtype_name

#: Tensors looked at per group.
TENSORS = 64
#: Steps that are followed: each costs a few operations on the sample and one transfer per group.
STEPS = 20
#: A step is called another one when it differs from that in float32 by more than this share.
TOLERANCE = 0.1


class SecondMoments:
    """The groups of one optimizer that keep ``exp_avg_sq`` in float16 or bfloat16."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.steps = 0
        self.groups: dict[int, _Sample] = {}

    def before(self, optimizer: Any, closure: bool) -> None:
        """Take the samples as the step will find them. With a closure the gradients come only inside the step."""
        self.steps += 1
        if self.steps > STEPS:
            return
        for index, group in enumerate(optimizer.param_groups):
            betas, eps = group.get("betas"), group.get("eps")
            if not isinstance(betas, (tuple, list)) or len(betas) < 2 or not isinstance(eps, (int, float)):
                continue
            chosen = _half_precision(optimizer, group, with_gradients=not closure)
            if not chosen:
                self.groups.pop(index, None)
                continue
            sample = self.groups.get(index)
            if sample is None or [id(p) for p in sample.parameters] != [id(p) for p in chosen]:
                sample = self.groups[index] = _Sample(optimizer, chosen)
            sample.begin(optimizer, with_gradients=not closure)

    def after(self, optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
        """One ``SecondMoment`` line per group that was sampled."""
        if self.steps > STEPS:
            return []
        ended = [(i, sample.end(optimizer, optimizer.param_groups[i])) for i, sample in self.groups.items()]
        return [
            ("second_moment", {"optimizer": self.number, "group": i, **payload})
            for i, payload in ended
            if payload is not None
        ]


def _half_precision(optimizer: Any, group: Any, *, with_gradients: bool) -> list[Any]:
    """Parameters of one device and dtype whose second moment is, or will be, kept in their own half precision."""
    import torch

    out: list[Any] = []
    kind = None
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float16, torch.bfloat16) or local(parameter).numel() == 0:
            continue
        if with_gradients and parameter.grad is None:
            continue
        state = optimizer.state.get(parameter)
        v: Any = state.get("exp_avg_sq") if isinstance(state, dict) else None
        # 8-bit state, float32 state beside half-precision weights: not this arithmetic.
        if state and (not hasattr(v, "dtype") or v.dtype != parameter.dtype):
            continue
        large = local(parameter).numel() > 64 * SAMPLE and not local(parameter).is_contiguous()
        own = (parameter.dtype, parameter.device)
        if large or parameter.layout != torch.strided or kind not in (None, own):
            continue
        kind = own
        out.append(parameter)
        if len(out) >= TENSORS:
            break
    return out


def flat_sample(tensor: Any) -> Any:
    """At most about ``SAMPLE`` elements in the order of the logical index."""
    flat = local(tensor).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]


class _Sample:
    """Some elements of one group, and their moments in float32."""

    def __init__(self, optimizer: Any, parameters: list[Any]) -> None:
        self.parameters = parameters
        self.sizes = [flat_sample(p).numel() for p in parameters]
        self.m = self._state(optimizer, "exp_avg").float()
        self.v = self._state(optimizer, "exp_avg_sq").float()
        self.weight: Any = None
        self.gradient: Any = None
        self.found: tuple[Any, Any] | None = None

    def _state(self, optimizer: Any, key: str) -> Any:
        """The state's sample; zeros where there is none yet."""
        import torch

        parts = []
        for parameter in self.parameters:
            state = optimizer.state.get(parameter)
            value = state.get(key) if isinstance(state, dict) else None
            usable = hasattr(value, "dtype") and local(value).numel() == local(parameter).numel()
            parts.append(flat_sample(value) if usable else torch.zeros_like(flat_sample(parameter)))
        return torch.cat(parts)

    def _gradients(self, optimizer: Any) -> Any:
        import torch

        if any(p.grad is None or p.grad.layout != torch.strided for p in self.parameters):
            return None
        gradient = torch.cat([flat_sample(p.grad) for p in self.parameters]).float()
        # Fused steps under a GradScaler take the scale off by themselves.
        scale = getattr(optimizer, "grad_scale", None)
        return gradient if scale is None else gradient / scale.to(gradient.device).float()

    def begin(self, optimizer: Any, *, with_gradients: bool) -> None:
        import torch

        self.weight = torch.cat([flat_sample(p) for p in self.parameters]).float()
        self.found = (self._state(optimizer, "exp_avg"), self._state(optimizer, "exp_avg_sq"))
        self.gradient = self._gradients(optimizer) if with_gradients else None

    def end(self, optimizer: Any, group: Any) -> dict[str, Any] | None:
        import torch

        gradient = self.gradient if self.gradient is not None else self._gradients(optimizer)
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        m, v = self._state(optimizer, "exp_avg"), self._state(optimizer, "exp_avg_sq")
        dtype = v.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return None  # the optimizer made its state in another dtype
        fused = bool(group.get("fused"))
        root = v.sqrt()
        counts = {
            "stuck": (((v.float() * beta2).to(dtype) == v) & (v != 0)).sum(),
            "zero": ((v == 0) & (gradient != 0)).sum() if gradient is not None else v.new_zeros(()),
            # Fused kernels add eps in float32.
            "unbounded": (
                v.new_zeros(())
                if fused
                else (((root.float() + eps).to(dtype) == root) & (root.float() <= 100 * eps)).sum()
            ),
        }
        ratio = self._ratio(optimizer, group, gradient, m, v)
        if ratio is not None:
            other = ~((ratio > 1 - TOLERANCE) & (ratio < 1 + TOLERANCE))
            counts["affected"] = other.sum()
            counts["median"] = ratio.median()
            counts["other"] = torch.where(other, ratio, torch.nan).nanmedian()
        values = dict(zip(counts, torch.stack([c.double() for c in counts.values()]).tolist(), strict=True))
        return {
            "dtype": dtype_name(dtype),
            "eps": eps,
            "eps_rounded": float(torch.tensor(eps, dtype=torch.float32 if fused else dtype).item()),
            "beta2": beta2,
            "elements": v.numel(),
            "zero": int(values["zero"]),
            "stuck": int(values["stuck"]),
            "unbounded": int(values["unbounded"]),
            "step_ratio": _finite(values.get("median")),
            "affected": int(values["affected"]) if ratio is not None else None,
            "affected_ratio": _finite(values.get("other")),
            "implementation": implementation(group, self.parameters),
        }

    def _ratio(self, optimizer: Any, group: Any, gradient: Any, m: Any, v: Any) -> Any:
        """Step taken / step in float32 for each element that steps at all; infinite where it divides by zero."""
        import torch

        known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        if gradient is None or not known or group.get("amsgrad") or self.found is None:
            return None
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and float(skipped):
            return None
        beta1, beta2, eps = float(group["betas"][0]), float(group["betas"][1]), float(group["eps"])
        steps = [optimizer.state[p].get("step") for p in self.parameters]
        if any(step is None for step in steps):
            return None
        counted = torch.stack([torch.as_tensor(s).detach().reshape(()) for s in steps]).double().cpu()
        first = torch.repeat_interleave(1 - beta1**counted, torch.tensor(self.sizes)).float().to(m.device)
        second = torch.repeat_interleave((1 - beta2**counted).sqrt(), torch.tensor(self.sizes)).float().to(m.device)
        decay = group.get("weight_decay") or 0.0
        if group.get("maximize"):
            gradient = -gradient
        if decay and not (group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW)):
            gradient = gradient + decay * self.weight
        self.m = self.m.lerp(gradient, 1 - beta1)
        self.v = self.v * beta2 + gradient * gradient * (1 - beta2)
        exact = (self.m / first) / (self.v.sqrt() / second + eps)
        if group.get("fused"):
            # In registers everything is float32; only what the step found had been rounded.
            old_m, old_v = self.found[0].float(), self.found[1].float()
            new_v = old_v * beta2 + gradient * gradient * (1 - beta2)
            taken = (old_m.lerp(gradient, 1 - beta1) / first) / (new_v.sqrt() / second + eps)
        else:
            denominator = (v.sqrt().float() / second).to(v.dtype)
            taken = (m.float() / first) / (denominator.float() + eps).to(v.dtype).float()
        moving = exact.isfinite() & (exact != 0)
        ratio = (taken / exact)[moving]
        return torch.nan_to_num(ratio.abs(), nan=math.inf, posinf=math.inf) if ratio.numel() else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def implementation(group: Any, parameters: list[Any]) -> str:
    """``fused``, ``foreach`` or ``for-loop``, as torch's optimizers choose it for a group."""
    if group.get("fused"):
        return "fused"
    foreach = group.get("foreach")
    if foreach is None and "foreach" in group and not group.get("differentiable"):
        foreach = group.get("fused") is None and all(p.device.type == "cuda" for p in parameters)
    return "foreach" if foreach else "for-loop"
