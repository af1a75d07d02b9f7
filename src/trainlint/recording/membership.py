"""Which parameters are in an optimizer, which are not, and which optimizer holds tensors that the model has replaced.

Pure functions over a :class:`~trainlint.recording.schema.Recording`. Everything is compared by identity: names and
the order of calls say nothing (``Module.to`` keeps the Parameter objects, replacing a head does not).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.recording.describe import by_module
from trainlint.recording.schema import Optimizer, Parameter, Recording

__all__ = ["Stale", "held_by", "stale_optimizers", "unheld_parameters"]


@dataclass(frozen=True)
class Stale:
    """Tensors that an optimizer holds in place of the model's, and the model's own that no optimizer holds.

    No gradient arrived in ``held`` and they did not move in any watched step; in ``own`` gradients arrived and nothing
    moved them either.
    """

    optimizer: Optimizer
    held: tuple[Parameter, ...]
    own: tuple[Parameter, ...]
    #: Every tensor of the optimizer is stale: its steps do nothing.
    whole: bool
    #: The module that ``held`` belong to, when it is still alive beside the one that is trained.
    former_root: int | None = None


def held_by(run: Recording) -> dict[int, None]:
    """Ids of all tensors in the groups of all optimizers, stepped or not, in order."""
    return dict.fromkeys(i for o in run.optimizers for g in o.groups for i in g.parameters)


def unheld_parameters(run: Recording) -> list[Parameter]:
    """Trainable parameters of modules that no optimizer holds, in which a gradient arrived and that did not move."""
    if run.outsiders is None:
        return []
    held = held_by(run)
    parameters = {p.id: p for p in run.parameters}
    norms = dict(zip(run.outsiders.parameters, run.outsiders.gradient_norm, strict=False))
    moved = dict(zip(run.outsiders.parameters, run.outsiders.moved, strict=False))
    out = []
    for i in run.outsiders.parameters:
        p = parameters.get(i)
        # Without a module it is an activation or a copy, not a parameter of the model.
        if p is None or p.root is None or i in held or p.numel == 0:
            continue
        frozen = not p.requires_grad or p.requires_grad_later is False
        if not frozen and norms.get(i) and moved.get(i) is False:
            out.append(p)
    return out


def stale_optimizers(run: Recording) -> tuple[Stale, ...]:
    """Optimizers that hold tensors which the model has replaced."""
    parameters = {p.id: p for p in run.parameters}
    held = held_by(run)
    # A tensor outside of modules that does get gradients may be the float32 master copy of a parameter.
    masters = Counter(p.shape for i in held if (p := parameters.get(i)) and p.root is None and p.gradient_seen)
    unheld = [p for p in unheld_parameters(run) if not masters[p.shape]]
    if not unheld:
        return ()
    trained = {parameters[i].root for i in held if i in parameters} - {None}
    out = []
    for optimizer in run.optimizers:
        idle = _idle(run, optimizer)
        own = [parameters[i] for g in optimizer.groups for i in g.parameters if i in parameters]
        whole = bool(own) and all(p.id in idle or not p.requires_grad for p in own)
        orphans = [p for p in own if p.root is None and p.id in idle]
        roots = {p.root for p in own if p.id not in idle} - {None}
        if orphans:
            found = _replaced(run, orphans, unheld, roots, whole=whole, alone=not trained)
            if found:
                out.append(Stale(optimizer, tuple(orphans), tuple(found), whole))
                continue
        out += _former(optimizer, own, idle, unheld, whole=whole)
    return tuple(out)


def _idle(run: Recording, optimizer: Optimizer) -> set[int]:
    """Trainable tensors of an optimizer that had no gradient and did not move in any of its watched steps."""
    measured = [m for m in run.steps if m.optimizer == optimizer.id]
    if not measured:
        return set()
    live = {p.id for p in run.parameters if p.gradient_seen or not p.requires_grad}
    for m in measured:
        columns = zip(m.parameters, m.gradient_norm, m.changed, strict=False)
        live.update(i for i, norm, changed in columns if norm is not None or changed)
    return {i for g in optimizer.groups for i in g.parameters} - live


def _replaced(
    run: Recording,
    orphans: Sequence[Parameter],
    unheld: Sequence[Parameter],
    roots: set[int | None],
    *,
    whole: bool,
    alone: bool,
) -> list[Parameter]:
    """The model's parameters that stand where the orphans stood.

    ``roots``: modules that the optimizer does train. ``alone``: no optimizer holds any parameter of any module.
    """
    if whole and alone:
        return list(unheld)  # whatever their shapes: FSDP flattens them
    out: list[Parameter] = []
    for root in dict.fromkeys(p.root for p in unheld):
        if not whole and root not in roots:
            continue
        members = [p for p in unheld if p.root == root]
        matched = set(_alike(orphans, members))
        for group in by_module(members, [p for p in run.parameters if p.requires_grad]):
            if any(p.id in matched for p in group.parameters):
                out += group.parameters
    return out


def _alike(orphans: Sequence[Parameter], members: Sequence[Parameter]) -> Iterator[int]:
    """Ids of members with an orphan of the same shape, or, for matrices, one that differs in one size only."""
    rest = Counter(p.shape for p in orphans)
    waiting = []
    for p in members:
        if rest[p.shape]:
            rest[p.shape] -= 1
            yield p.id
        else:
            waiting.append(p)
    for p in waiting:
        for shape in rest:
            if rest[shape] and len(shape) == len(p.shape) > 1:
                if sum(a != b for a, b in zip(shape, p.shape, strict=True)) == 1:
                    rest[shape] -= 1
                    yield p.id
                    break


def _former(
    optimizer: Optimizer, own: Sequence[Parameter], idle: set[int], unheld: Sequence[Parameter], *, whole: bool
) -> Iterator[Stale]:
    """The optimizer was built over a module that another of the same make has replaced while the first lives on."""
    for former in dict.fromkeys(p.root for p in own if p.root is not None):
        held = [p for p in own if p.root == former and p.requires_grad]
        if not held or any(p.id not in idle for p in held):
            continue
        for root in dict.fromkeys(p.root for p in unheld if p.root != former):
            members = [p for p in unheld if p.root == root]
            matched = set(_alike(held, members))
            if 2 * len(matched) >= max(len(members), len(held)):
                yield Stale(optimizer, tuple(held), tuple(members), whole, former)
                return
