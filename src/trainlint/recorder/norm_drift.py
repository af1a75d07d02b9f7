"""Running statistics of norms that nothing trains: do they move while the rest is trained?

They are looked at when the modules are found, after the first forward, and again at the end of the watch: in bulk, on
a sample of the channels, one transfer per device.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from . import measure
from .modules import unwrap
from .watch import Session

#: Norms that are followed, and channels of each.
NORMS, CHANNELS = 3000, 256


class Norm:
    """A module with running statistics."""

    def __init__(self, root: int, name: str, module: Any, neighbour: Any) -> None:
        self.root = root
        self.name = name
        self.module = module
        #: Parameters whose values tell whether something other than an optimizer moves them.
        self.witnesses = [p for p in (getattr(module, "weight", None), neighbour) if p is not None]


class NormDrift:
    """All norms of all roots."""

    def __init__(self, session: Session, buffers: Mapping[int, str]) -> None:
        self.session = session
        #: File of each statistic that came from one, by its number.
        self.buffers = buffers
        self.norms: list[Norm] = []
        self._known: set[int] = set()
        self._before: list[list[float]] = []
        self._tracked: list[int | None] = []
        self._witnesses: list[tuple[list[tuple[int, Any]], measure.Samples]] = []
        #: Parameters of each root by number, and those that could be trained when they were first seen.
        self._names: dict[int, dict[str, Any]] = {}
        self._trainable: set[int] = set()
        self._written = False

    def begin(self, roots: list[Any]) -> None:
        """Take in the norms that were not there before."""
        import torch

        parameters = self.session.recorder.parameters
        found: list[Norm] = []
        for root in roots:
            inner, _ = unwrap(root)
            modules = dict(inner.named_modules())
            for name, module in modules.items():
                if not isinstance(module, torch.nn.modules.batchnorm._NormBase) or id(module) in self._known:
                    continue
                if getattr(module, "running_mean", None) is None or len(self.norms) + len(found) >= NORMS:
                    continue
                self._known.add(id(module))
                parent = modules.get(name.rpartition(".")[0], inner)
                number = self.session.recorder.roots.of(root)
                found.append(Norm(number, name, module, next(iter(parent.parameters()), None)))
                if number not in self._names:
                    self._names[number] = dict(inner.named_parameters())
                    own = self._names[number].values()
                    self._trainable.update(parameters.of(p) for p in own if p.requires_grad)
        if not found:
            return
        self.norms += found
        self._before += statistics_of([n.module for n in found])
        self._tracked += tracked([n.module for n in found])
        witnesses = {parameters.of(p): p for n in found for p in n.witnesses}
        self._witnesses.append((list(witnesses.items()), measure.Samples(list(witnesses.items()))))

    def close(self) -> None:
        """Write those that moved and that nothing trains."""
        if self._written or self.session.backwards < 2:
            return
        self._written = True
        payload: dict[str, Any] = {"norms_compared": len(self.norms)}
        if self.norms:
            drifts, untrained = self._drifts()
            payload.update(norms=drifts, norms_untrained=untrained)
        self.session.recorder.emit("provenance", payload)

    def _drifts(self) -> tuple[list[dict[str, Any]], int]:
        numbers = self.session.recorder.parameters
        held = self.session.optimizers.holds()
        seen = self.session.modules.gradient_seen
        above: dict[int, set[str]] = {}
        for root, names in self._names.items():
            trained = [
                name
                for name, p in names.items()
                if (n := numbers.of(p)) in held and (p.requires_grad or n in seen or n in self._trainable)
            ]
            above[root] = {prefix for name in trained for prefix in prefixes(name)}
        after = statistics_of([n.module for n in self.norms])
        batches = tracked([n.module for n in self.norms])
        moved = self._moved()
        out = []
        untrained = 0
        for i, norm in enumerate(self.norms):
            inside = next((p for p in prefixes(f"{norm.name}.") if p not in above[norm.root]), None)
            if inside is None:
                continue
            untrained += 1
            if self._before[i] == after[i]:
                continue
            names = self._names[norm.root]
            around = [
                p
                for name, p in names.items()
                if (not inside or name.startswith(f"{inside}.")) and not name.startswith(f"{norm.name}.")
            ]
            module = norm.module
            own = list(module.parameters(recurse=False))
            later, first = batches[i], self._tracked[i]
            out.append(
                {
                    "name": norm.name,
                    "class_name": type(module).__name__,
                    "root": norm.root,
                    "inside": inside,
                    "whole": inside == "",
                    "inside_tensors": len(around),
                    "inside_loaded": sum(numbers.get(p) in self.session.modules.origins for p in around),
                    "origin": self.buffers.get(numbers.of(module.running_mean), "fresh"),
                    "training": bool(module.training),
                    "momentum": module.momentum,
                    "affine": bool(own),
                    "frozen": not any(p.requires_grad for p in own),
                    "parameters_moved": any(numbers.of(p) in moved for p in norm.witnesses),
                    "batches": later - first if first is not None and later is not None else None,
                    **shift(self._before[i], after[i]),
                }
            )
        return out, untrained

    def _moved(self) -> set[int]:
        """Numbers of the witnesses that changed."""
        out: set[int] = set()
        for items, before in self._witnesses:
            numels = {n: measure.local(p).numel() for n, p in items}
            _, changed = before.compare(measure.Samples(items), numels)
            out.update(n for n, share in changed.items() if share > 0)
        return out


def prefixes(name: str) -> list[str]:
    """``a.b.weight`` -> ``["", "a", "a.b"]``."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def statistics_of(norms: list[Any]) -> list[list[float]]:
    """A sample of running means, then of running variances, per norm."""
    import torch

    views = []
    for norm in norms:
        pair = [measure.sample_view(t, CHANNELS) for t in (norm.running_mean, norm.running_var)]
        views.append([v for v in pair if v is not None])
    groups: dict[Any, list[int]] = {}
    for i, pair in enumerate(views):
        if len(pair) == 2:
            groups.setdefault((pair[0].device, pair[0].dtype), []).append(i)
    out: list[list[float]] = [[] for _ in norms]
    for members in groups.values():
        flat = torch.cat([v for i in members for v in views[i]]).float().tolist()
        start = 0
        for i in members:
            size = sum(v.numel() for v in views[i])
            out[i] = flat[start : start + size]
            start += size
    return out


def tracked(norms: list[Any]) -> list[int | None]:
    """Batches that each norm took in, by its own count."""
    import torch

    out: list[int | None] = [None] * len(norms)
    groups: dict[Any, list[int]] = {}
    for i, norm in enumerate(norms):
        if getattr(norm, "num_batches_tracked", None) is not None:
            groups.setdefault(norm.num_batches_tracked.device, []).append(i)
    for members in groups.values():
        counts = torch.stack([norms[i].num_batches_tracked.detach() for i in members]).tolist()
        for i, count in zip(members, counts, strict=True):
            out[i] = int(count)
    return out


def shift(before: list[float], after: list[float]) -> dict[str, float]:
    """How far the means moved in standard deviations, and how the variances changed."""
    half = len(before) // 2
    means = zip(before[:half], after[:half], before[half:], strict=True)
    moved = [abs(b - a) / (max(var, 0.0) + 1e-5) ** 0.5 for a, b, var in means]
    ratios = [b / a for a, b in zip(before[half:], after[half:], strict=True) if a > 0]
    return {
        "mean_shift_max": max(moved),
        "mean_shift_median": statistics.median(moved),
        **({"variance_ratio": statistics.median(ratios)} if ratios else {}),
    }
