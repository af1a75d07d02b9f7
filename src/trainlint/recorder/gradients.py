"""What the backwards between two steps of an optimizer did to its gradients.

Each backward's own share (the difference that it made to ``.grad``) is kept as a small sample of elements, so that at
the step it is known how the shares relate to each other and to what the step used. Gradients that the step before had
used already and that nothing cleared are followed from backward to step.

Where one backward makes one step and gradients are set to None, this costs one sample per backward. Nothing here waits
for a GPU before the step.
"""

from __future__ import annotations

import math
from typing import Any

from . import measure

#: Tensors sampled per optimizer, and elements of each.
PROBES = 64
ELEMENTS = 256
#: Backwards per step whose shares are kept (64 KiB each).
SHARES = 64

#: A parameter's gradient as it was: the tensor's identity and its version. Both stay when nothing writes to it.
Mark = tuple[int, int]


class Sampled:
    """The gradients of some parameters as one flat tensor of fixed layout; those that are missing are zero."""

    def __init__(self, parameters: list[Any]) -> None:
        sizes = [(p, measure.stride_of(measure.local(p).numel(), ELEMENTS)[1]) for p in parameters]
        self.items = [(p, size) for p, size in sizes if size]
        self._zeros: Any = None

    def present(self) -> bool:
        return any(p.grad is not None for p, _ in self.items)

    def take(self) -> Any | None:
        """The sample, on the device; ``None`` when there is no gradient at all."""
        import torch

        views: list[Any] = []
        found = False
        for parameter, size in self.items:
            grad = parameter.grad
            view = measure.sample_view(grad, ELEMENTS) if grad is not None else None
            if view is None or view.numel() != size:
                if self._zeros is None:
                    self._zeros = torch.zeros(2 * ELEMENTS, device=measure.local(parameter).device)
                view = self._zeros[:size]
            else:
                found = True
            views.append(view)
        return torch.cat(views).float() if found and not _capturing(views[0]) else None


class Leftovers:
    """Gradients that were still there, as the last step had left them, when the next backward began."""

    def __init__(self, parameters: list[tuple[int, Any]]) -> None:
        self.found = len(parameters)
        chosen = probes(parameters)
        self.numbers = [n for n, _ in chosen]
        self.parameters = [p for _, p in chosen]
        self.sampled = Sampled(self.parameters)
        self.left = self.sampled.take()
        self.after: Any = None
        self.marks: list[Mark | None] = []

    def begins(self) -> bool:
        """At a later backward: whether all of it is still as the last backward left it."""
        return [mark(p) for p in self.parameters] == self.marks

    def ended(self) -> None:
        self.after = self.sampled.take()
        self.marks = [mark(p) for p in self.parameters]

    def report(self) -> dict[str, Any] | None:
        """At the step: which of them backward added to and the step then used. ``None``: nothing is known."""
        used = self.sampled.take()
        if self.left is None or self.after is None or len(self.sampled.items) != len(self.numbers):
            return None
        own = self.after - self.left
        if used is None:
            return {"parameters": [], "found": self.found}
        sizes = [size for _, size in self.sampled.items]
        products = ((self.left, self.left), (own, own), (used, used), (self.after, self.after), (used, self.after))
        columns = [measure.segment_sums(measure.wide(a) * measure.wide(b), sizes) for a, b in products]
        numbers, left, added = [], 0.0, 0.0
        for number, l2, o2, u2, a2, ua in zip(self.numbers, *columns, strict=True):
            # Clipping and unscaling multiply; whatever else was done to a gradient, it is not the old one any more.
            if l2 > 0 and o2 > 0 and u2 > 0 and a2 > 0 and ua / math.sqrt(u2 * a2) > 0.999:
                numbers.append(number)
                left += l2
                added += o2
        return {
            "parameters": numbers,
            "found": self.found,
            "norm": math.sqrt(left),
            "own_norm": math.sqrt(added),
        }


class GradientTrace:
    """The gradients of one optimizer, followed from step to step."""

    def __init__(self) -> None:
        #: What the optimizer holds, as of its last step.
        self._held: list[tuple[int, Any]] = []
        self.numbers: frozenset[int] = frozenset()
        self._sampled = Sampled([])
        self._before: Any = None
        self._after: Any = None
        self._shares: list[tuple[int, Any]] = []
        self._backwards = 0
        #: What the last step left in ``.grad``; ``None`` before the first step.
        self._left: dict[int, Mark] | None = None
        self._leftovers: Leftovers | None = None

    @property
    def began(self) -> bool:
        return bool(self._held)

    def follow(self, held: list[tuple[int, Any]]) -> None:
        """From now on the optimizer holds these."""
        if [n for n, _ in held] != [n for n, _ in self._held]:
            self._sampled = Sampled([p for _, p in probes(held)])
            self.numbers = frozenset(n for n, _ in held)
        self._held = held

    def backward_begins(self) -> None:
        if not self._backwards and self._left is not None:
            left = [(n, p) for n, p in self._held if n in self._left and mark(p) == self._left[n]]
            self._leftovers = Leftovers(left) if left else None
        elif self._leftovers is not None and not self._leftovers.begins():
            self._leftovers = None
        self._before = self._sampled.take() if self._sampled.present() else None

    def backward_ended(self, seq: int) -> None:
        self._backwards += 1
        if self._leftovers is not None:
            self._leftovers.ended()
        before, self._before = self._before, None
        self._after = self._sampled.take()
        if self._after is not None and self._backwards <= SHARES:
            self._shares.append((seq, self._after if before is None else self._after - before))

    def at_step(self, total: float | None, several_ranks: bool) -> dict[str, Any]:
        """Fields of the step's measurement; ``total``: norm of all gradients that the step uses."""
        import torch

        out: dict[str, Any] = {}
        if self._left is not None and self._backwards:
            leftovers = self._leftovers
            out["carried"] = leftovers.report() if leftovers is not None else {"parameters": [], "found": 0}
        used = self._sampled.take()
        if self._after is None or used is None:
            return out
        # Ranks put their gradients together in the last backward only: its share is not its own.
        whole = 1 < self._backwards == len(self._shares) and not several_ranks
        rows = torch.stack([*([share for _, share in self._shares] if whole else []), used, self._after])
        rows = measure.wide(rows)
        products = (rows @ rows.T).tolist()
        now, then = math.sqrt(products[-2][-2]), math.sqrt(products[-1][-1])
        if total is not None and now:
            out["gradient_norm_after_backward"] = total * then / now
        if whole and all(math.isfinite(x) for row in products for x in row):
            out["share_backwards"] = [seq for seq, _ in self._shares]
            out["share_products"] = [row[:-1] for row in products[:-1]]
        return out

    def step_ended(self, held: list[tuple[int, Any]]) -> None:
        self.follow(held)
        marks = ((n, mark(p)) for n, p in held)
        self._left = {n: m for n, m in marks if m is not None}
        self._leftovers = None
        self._shares, self._before, self._after = [], None, None
        self._backwards = 0


def probes(items: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Parameters to sample, on one device: the largest, and others taken evenly from the rest."""
    floating = [(n, p) for n, p in items if p.is_floating_point() and p.numel() and p.device.type != "meta"]
    by_size = sorted(floating, key=lambda item: -item[1].numel())
    by_size = [(n, p) for n, p in by_size if p.device == by_size[0][1].device]
    large, rest = by_size[: PROBES // 2], by_size[PROBES // 2 :]
    count = min(len(rest), PROBES - len(large))
    return large + [rest[i * len(rest) // count] for i in range(count)]


def mark(parameter: Any) -> Mark | None:
    grad = parameter.grad
    if grad is None:
        return None
    try:
        return id(grad), grad._version
    except RuntimeError:  # made in inference mode: no version is kept
        return None


def _capturing(tensor: Any) -> bool:
    """Inside the capture of a CUDA graph, of which nothing here may become a part."""
    import torch

    return bool(tensor.is_cuda and torch.cuda.is_current_stream_capturing())
