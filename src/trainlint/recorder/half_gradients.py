"""Gradients that are computed in float16: which, and how many of their elements that dtype cannot hold in full."""

from __future__ import annotations

import threading
from typing import Any

from .measure import sample_view
from .patching import around, wrap
from .watch import Session

#: Backwards that are looked at, and tensors in each.
LOOKS = 4
TENSORS = 64
#: Sampled elements that must not be zero before a float32 gradient is said to consist of float16 numbers.
TELLING = 8
#: Smallest number that float16 holds with all its digits.
SMALLEST_NORMAL = 2.0**-14


class HalfGradients:
    """Looks at fresh gradients after the first backwards of a program that uses float16 at all."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder = session.recorder
        self.looks = 0
        #: float16 autocast was entered.
        self.autocast = False

    def install(self) -> None:
        import torch

        quiet = self.recorder.quiet
        wrap(torch.autograd, "backward", around(quiet(self._before), quiet(self._after)))

    def _before(self, *args: Any, **kwargs: Any) -> list[tuple[int, Any]] | None:
        """The trainable parameters without a gradient."""
        import torch

        if self.looks >= LOOKS or torch.compiler.is_compiling():
            return None
        if threading.get_ident() != self.session.training_thread and self.session.backwards:
            return None
        if not self.session.modules.roots:
            self.session.modules.scan()
        trained = [(n, p) for n, p in self.session.modules.parameters.items() if p.requires_grad]
        if not self.autocast and not any(p.dtype == torch.float16 for _, p in trained):
            return None
        return [(n, p) for n, p in trained if p.grad is None]

    def _after(self, result: Any, bare: list[tuple[int, Any]] | None, *args: Any, **kwargs: Any) -> None:
        import torch

        fresh = [(n, p) for n, p in bare or () if p.grad is not None and p.grad.layout == torch.strided]
        if not fresh:
            return
        self.looks += 1
        views = []
        for number, parameter in fresh[:: -(-len(fresh) // TENSORS)]:
            view = sample_view(parameter.grad)
            if view is not None and view.dtype in (torch.float16, torch.float32):
                views.append((number, view.dtype == torch.float16, view))
        if views:
            weights = any(p.dtype == torch.float16 for _, p in fresh)
            payload = {"after": self.recorder._seq, "autocast": self.autocast, "weights": weights, **_count(views)}
            self.recorder.emit("numerics", {"half_gradients": [payload]})


def _count(views: list[tuple[int, bool, Any]]) -> dict[str, Any]:
    import torch

    device = views[0][2].device
    flat = torch.cat([view.float() for _, _, view in views if view.device == device]).cpu()
    sizes = [view.numel() for _, _, view in views if view.device == device]
    half: list[int] = []
    counts = torch.zeros(4, dtype=torch.int64)
    here = [v for v in views if v[2].device == device]
    for (number, own, _), values in zip(here, torch.split(flat, sizes), strict=True):
        small = (values != 0) & (values.abs() < SMALLEST_NORMAL)
        if not own:
            same = values.half().float() == values
            # What is not finite says nothing about the dtype.
            if not bool((same | ~values.isfinite()).all()) or int((same & (values != 0)).sum()) < TELLING:
                continue
        half.append(number)
        counts += torch.stack(
            [torch.tensor(values.numel()), (values == 0).sum(), small.sum(), (~values.isfinite()).sum()]
        )
    elements, zero, subnormal, non_finite = counts.tolist()
    return {
        "tensors": len(sizes),
        "half": len(half),
        "parameters": half,
        "elements": elements,
        "zero": zero,
        "subnormal": subnormal,
        "non_finite": non_finite,
    }
