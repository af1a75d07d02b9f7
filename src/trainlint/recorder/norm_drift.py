"""Running statistics of norms that nothing trains: do they move while the rest is trained?

They are looked at when the modules are found, after the first forward, and again at the end of the watch: in bulk, on
a sample of the channels, one transfer per device.
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Mapping
from typing import Any

from . import measure
from .modules import unwrap
from .watch import Session

#: Norms that are followed, and channels of each.
NORMS, CHANNELS = 3000, 256


class Norm:
    """A module with running statistics, and where it is."""

    def __init__(self, root: int, name: str, module: Any) -> None:
        self.root = root
        self.name = name
        self._module = weakref.ref(module)
        self.before: list[float] = []
        self.tracked: int | None = None

    @property
    def module(self) -> Any:
        return self._module()

    def witnesses(self, root: Any) -> list[Any]:
        """Parameters whose values tell whether something other than an optimizer moves them: its own, and the first
        beside it."""
        parent = root.get_submodule(self.name.rpartition(".")[0])
        found = [getattr(self.module, "weight", None), next(iter(parent.parameters()), None)]
        return [p for p in found if p is not None]


class NormDrift:
    """All norms of all roots."""

    def __init__(self, session: Session, buffers: Mapping[int, str]) -> None:
        self.session = session
        #: File of each statistic that came from one, by its number.
        self.buffers = buffers
        self.norms: list[Norm] = []
        self._known: set[int] = set()
        #: Samples of the witnesses.
        self._witnesses: list[tuple[list[int], measure.Samples]] = []
        self._roots: dict[int, Any] = {}
        #: Parameters that could be trained when they were first seen.
        self._trainable: set[int] = set()
        self._written = False

    def begin(self, roots: list[Any]) -> None:
        """Take in the norms that were not there before."""
        import torch

        parameters = self.session.recorder.parameters
        found: list[Norm] = []
        witnesses: dict[int, Any] = {}
        for root in roots:
            inner, _ = unwrap(root)
            for name, module in inner.named_modules():
                if not isinstance(module, torch.nn.modules.batchnorm._NormBase) or id(module) in self._known:
                    continue
                if getattr(module, "running_mean", None) is None or len(self.norms) + len(found) >= NORMS:
                    continue
                self._known.add(id(module))
                number = self.session.recorder.roots.of(root)
                found.append(Norm(number, name, module))
                if name:
                    witnesses.update((parameters.of(p), p) for p in found[-1].witnesses(inner))
                if number not in self._roots:
                    self._roots[number] = weakref.ref(inner)
                    self._trainable.update(parameters.of(p) for p in inner.parameters() if p.requires_grad)
        if not found:
            return
        self.norms += found
        modules = [n.module for n in found]
        for norm, before, count in zip(found, statistics_of(modules), tracked(modules), strict=True):
            norm.before, norm.tracked = before, count
        self._witnesses.append((list(witnesses), measure.Samples(list(witnesses.items()))))

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
        origins = self.session.modules.origins
        held = self.session.optimizers.holds()
        parameters = {root: dict(inner.named_parameters()) for root, ref in self._roots.items() if (inner := ref())}
        trained = {root: {n for n, p in own.items() if self._trained(p, held)} for root, own in parameters.items()}
        above = {root: {prefix for name in names for prefix in prefixes(name)} for root, names in trained.items()}
        alive = [n for n in self.norms if n.root in parameters and n.module is not None]
        modules = [n.module for n in alive]
        moved = self._moved(parameters)
        out = []
        untrained = 0
        for norm, after, batches in zip(alive, statistics_of(modules), tracked(modules), strict=True):
            inside = next((p for p in prefixes(f"{norm.name}.") if p not in above[norm.root]), None)
            if inside is None:
                continue
            untrained += 1
            if norm.before == after or not after:
                continue
            own = parameters[norm.root]
            around = [n for n in own if within(n, inside) and not within(n, norm.name)]
            if inside == norm.name and inside:
                # Only itself: what lies beside it counts as frozen when most of that is.
                parent = norm.name.rpartition(".")[0]
                beside = [n for n in own if within(n, parent) and not within(n, norm.name)]
                still = [n for n in beside if n not in trained[norm.root]]
                if 2 * sum(own[n].numel() for n in still) > sum(own[n].numel() for n in beside):
                    around = still
            module = norm.module
            weights = list(module.parameters(recurse=False))
            witnesses = norm.witnesses(self._roots[norm.root]()) if norm.name else weights
            out.append(
                {
                    "name": norm.name,
                    "class_name": type(module).__name__,
                    "root": norm.root,
                    "inside": inside,
                    "whole": inside == "",
                    "inside_tensors": len(around),
                    "inside_loaded": sum(numbers.get(own[n]) in origins for n in around),
                    "origin": self.buffers.get(numbers.of(module.running_mean), "fresh"),
                    "training": bool(module.training),
                    "momentum": module.momentum,
                    "affine": bool(weights),
                    "frozen": not any(p.requires_grad for p in weights),
                    "parameters_moved": any(numbers.of(p) in moved for p in witnesses),
                    "batches": batches - norm.tracked if batches is not None and norm.tracked is not None else None,
                    **shift(norm.before, after),
                }
            )
        return out, untrained

    def _trained(self, parameter: Any, held: set[int]) -> bool:
        number = self.session.recorder.parameters.of(parameter)
        if number not in held:
            return False
        seen = self.session.modules.gradient_seen
        return bool(parameter.requires_grad or number in seen or number in self._trainable)

    def _moved(self, parameters: dict[int, dict[str, Any]]) -> set[int]:
        """Numbers of the witnesses that changed."""
        numbers = self.session.recorder.parameters
        tensors = {numbers.of(p): p for own in parameters.values() for p in own.values()}
        out: set[int] = set()
        for members, before in self._witnesses:
            items = [(n, tensors[n]) for n in members if n in tensors]
            if len(items) != len(members):
                continue  # a module is gone
            numels = {n: measure.local(p).numel() for n, p in items}
            _, changed = before.compare(measure.Samples(items), numels)
            out.update(n for n, share in changed.items() if share > 0)
        return out


def within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


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
