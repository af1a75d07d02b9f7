"""Adam-family arithmetic in half precision: what the second moment and eps really do in the dtype they are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .measure import SAMPLE, local
from .modules import dtype_name

#: Tensors looked at per group.
TENSORS = 64


def second_moments(number: int, optimizer: Any) -> Iterator[dict[str, Any]]:
    """One ``SecondMoment`` payload per group whose ``exp_avg_sq`` is kept in float16 or bfloat16.

    The update of torch's Adam is ``m / (sqrt(v) + eps)``; fused kernels compute in float32 and round only what they
    store, the others round after every operation.
    """
    import torch

    for index, group in enumerate(optimizer.param_groups):
        betas = group.get("betas")
        eps = group.get("eps")
        if not isinstance(betas, (tuple, list)) or len(betas) < 2 or not isinstance(eps, (int, float)):
            continue
        moments: list[tuple[Any, Any]] = []
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            v: Any = state.get("exp_avg_sq") if isinstance(state, dict) else None
            if not hasattr(v, "dtype") or v.dtype not in (torch.float16, torch.bfloat16):
                continue
            v = local(v).reshape(-1)
            grad = parameter.grad
            grad = None if grad is None or grad.layout != torch.strided else local(grad).reshape(-1)
            stride = max(1, v.numel() // SAMPLE)
            moments.append((v[::stride], None if grad is None or grad.numel() != v.numel() else grad[::stride]))
            if len(moments) >= TENSORS:
                break
        if not moments:
            continue
        dtype = moments[0][0].dtype
        fused = bool(group.get("fused"))
        beta2 = float(betas[1])
        rounded = float(torch.tensor(eps, dtype=torch.float32 if fused else dtype).item())
        total = zero = stuck = unbounded = 0
        for v, grad in moments:
            if v.dtype != dtype:
                continue
            total += v.numel()
            decayed = (v.float() * beta2).to(dtype)
            stuck += int(((decayed == v) & (v != 0)).sum().item())
            if grad is not None:
                zero += int(((v == 0) & (grad != 0)).sum().item())
            root = v.sqrt()
            with_eps = (root.float() + eps).to(dtype) if not fused else root.float() + eps
            lost = (
                (with_eps == root) & (root.float() <= 100 * eps)
                if not fused
                else torch.zeros_like(root, dtype=torch.bool)
            )
            unbounded += int(lost.sum().item())
        yield {
            "optimizer": number,
            "group": index,
            "dtype": dtype_name(dtype),
            "eps": float(eps),
            "eps_rounded": rounded,
            "beta2": beta2,
            "elements": total,
            "zero": zero,
            "stuck": stuck,
            "unbounded": unbounded,
        }
