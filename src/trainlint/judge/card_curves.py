"""The learning-rate curves of the card, one for the param groups that share it, named by what they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainlint.recording.describe import by_module, plural
from trainlint.recording.projection import Projected
from trainlint.recording.schema import Optimizer, Parameter, Recording
from trainlint.report.model import Curve

Curves = Mapping[tuple[int, int], Projected]

#: What a curve is drawn over when nobody says how long the run is.
UNKNOWN_LENGTH = {
    "schedule": "; drawn as long as the schedule, the run's length is not known",
    "open": "; the schedule has no end of its own and the run's length is not known: drawn to its first low, or until "
    "it hardly changes",
}
#: More different curves than this are told by the highest and the lowest of each shape.
_MANY_CURVES = 4
#: With more groups than this, the points of each are thinned in the JSON report.
_MANY_GROUPS = 8
_THINNED = 100
_KINDS = {"weight": "weights", "bias": "biases", "norm": "norms", "embedding": "embeddings", "other": "others"}


def group_names(recording: Recording, optimizer: Optimizer) -> dict[int, str]:
    """What each param group holds, in a few words: modules, kinds of tensors, or how many."""
    known = {p.id: p for p in recording.parameters}
    held = [[known[i] for i in g.parameters if i in known] for g in optimizer.groups]
    roots = {p.root for group in held for p in group}
    candidates = [p for p in recording.parameters if p.root in roots]
    kinds = [frozenset(p.kind for p in group) for group in held]
    by_kind = len(held) > 1 and all(a and b and not a & b for i, a in enumerate(kinds) for b in kinds[:i])
    return {
        g.index: _holds(group, candidates, kinds[i] if by_kind else None)
        for i, (g, group) in enumerate(zip(optimizer.groups, held, strict=True))
    }


def _holds(group: Sequence[Parameter], candidates: Sequence[Parameter], kinds: frozenset[str] | None) -> str:
    modules = by_module(group, candidates) if group else ()
    if 0 < len(modules) <= 2:
        return ", ".join(m.pattern for m in modules)
    if kinds:
        return " and ".join(_KINDS.get(k, k) for k in sorted(kinds, key=list(_KINDS).index))
    if modules:
        return f"{modules[0].pattern} and {plural(len(group) - len(modules[0].parameters), 'more tensor')}"
    return plural(len(group), "tensor") if group else ""


def group_data(recording: Recording, optimizer: int, curves: Curves) -> list[dict[str, Any]]:
    """Each param group with its observed and projected rates, for machines."""
    owner = next(o for o in recording.optimizers if o.id == optimizer)
    names = group_names(recording, owner)
    own = [(g, p) for (o, g), p in sorted(curves.items()) if o == optimizer]
    return [
        {
            "group": group,
            "holds": names.get(group, ""),
            "observed": [list(point) for point in seen.observed],
            "projected": [list(point) for point in (_thinned(seen.points) if len(own) > _MANY_GROUPS else seen.points)],
            "end_rate": seen.end_rate,
        }
        for group, seen in own
    ]


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    if len(points) <= _THINNED:
        return points
    return [points[round(i * (len(points) - 1) / (_THINNED - 1))] for i in range(_THINNED)]


@dataclass(frozen=True)
class _Shared:
    """The groups of one optimizer that have the same rates."""

    optimizer: int
    groups: tuple[int, ...]
    seen: Projected

    @property
    def peak(self) -> float:
        return max((rate for _, rate in self.seen.points or self.seen.observed), default=0.0)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The same for curves that are multiples of one another."""
        top = self.peak
        points = self.seen.points or self.seen.observed
        return tuple((n, round(rate / top, 6) if top and math.isfinite(top) else rate) for n, rate in points)


def curves(recording: Recording, projected: Curves) -> tuple[Curve, ...]:
    """One observed and, where it can be known, one projected curve for the groups that share it."""
    shared: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for place, seen in sorted(projected.items()):
        shared.setdefault((place[0], seen.points, seen.observed), []).append(place)
    made = [_Shared(places[0][0], tuple(g for _, g in places), projected[places[0]]) for places in shared.values()]
    labels = _labels(recording, projected, made)
    if len(made) > _MANY_CURVES:
        made, labels = _folded(made, labels)
    out: list[Curve] = []
    for one, label in zip(made, labels, strict=True):
        seen = one.seen
        if seen.observed:
            out.append(Curve(label, seen.observed, "observed", "" if seen.points else seen.reason))
        if seen.points:
            note = seen.source + UNKNOWN_LENGTH.get(seen.horizon_source, "")
            out.append(Curve(label, seen.points, "projected", note))
    return tuple(out)


def _labels(recording: Recording, projected: Curves, made: Sequence[_Shared]) -> list[str]:
    owners = {o.id: o for o in recording.optimizers}
    several = len({one.optimizer for one in made}) > 1
    out = []
    for one in made:
        owner = owners[one.optimizer]
        total = sum(1 for o, _ in projected if o == one.optimizer)
        if len(one.groups) == total:
            label = "all groups" if total > 1 else "learning rate"
        else:
            known = group_names(recording, owner)
            names = list(dict.fromkeys(known[g] for g in one.groups if known.get(g)))
            held = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            which = ", ".join(str(g) for g in one.groups[:6]) + (", ..." if len(one.groups) > 6 else "")
            label = f"{'groups' if len(one.groups) > 1 else 'group'} {which}" + (f": {held}" if held else "")
        out.append(f"{owner.class_name} {one.optimizer}, {label}" if several else label)
    return out


def _folded(made: Sequence[_Shared], labels: Sequence[str]) -> tuple[list[_Shared], list[str]]:
    """The highest and the lowest of each shape; what lies between them has the same course at other rates."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for i, one in enumerate(made):
        families.setdefault((one.optimizer, one.shape), []).append(i)
    out: list[_Shared] = []
    names: list[str] = []
    for members in families.values():
        members.sort(key=lambda i: -made[i].peak)
        ends = members if len(members) < 3 else [members[0], members[-1]]
        for i in ends:
            out.append(made[i])
            names.append(labels[i])
        if len(members) > 2:
            names[-1] += f" (lowest of {len(members)} with this course)"
    return out, names
