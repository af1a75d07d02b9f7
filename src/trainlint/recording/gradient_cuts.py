"""Cuts of a gradient's path that are known to keep something from training which was meant to train.

Pure functions over a :class:`~trainlint.recording.schema.Recording`. Not every cut is a fault: what is cut off counts
only when it is trainable, in an optimizer, had no gradient in any watched backward, and something shows the intention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainlint.recording.membership import held_by
from trainlint.recording.schema import AdaptedModel, GradientCut, Parameter, Recording

__all__ = ["CutOff", "cuts_of", "idle_adapters", "proven_cuts"]

#: What ``GradientCut.function`` says of a line that switches gradients off for now only, perhaps.
CONDITION = "a condition"
#: Backwards at which adapters must have been merged or switched off.
_LOOKS = 2


@dataclass(frozen=True)
class CutOff:
    """A cut, and the trainable tensors in optimizers that no gradient reached because of it."""

    cut: GradientCut
    parameters: tuple[Parameter, ...]


def cuts_of(run: Recording) -> tuple[CutOff, ...]:
    """Every cut that was seen, with what it keeps from its gradient; those that keep nothing from one are left out."""
    if run.adapters is None or not run.adapters.cuts:
        return ()
    parameters = {p.id: p for p in run.parameters}
    held = held_by(run)
    had = {i for m in run.steps for i, norm in zip(m.parameters, m.gradient_norm, strict=False) if norm is not None}
    out = []
    explained: set[int] = set()
    # Checkpointing first: modules inside it run with gradients off, which is no cause of its own.
    for cut in sorted(run.adapters.cuts, key=lambda c: c.cause != "checkpoint"):
        lost = tuple(
            p
            for i in cut.parameters
            if (p := parameters.get(i)) is not None
            and i in held
            and i not in had
            and i not in explained
            and p.root is not None
            and p.numel
            and p.requires_grad
            and p.requires_grad_later is None
            and not p.gradient_seen
        )
        if cut.cause == "checkpoint":
            lost = _always(cut, lost, parameters)
        if lost:
            explained.update(p.id for p in lost)
            out.append(CutOff(cut, lost))
    return tuple(out)


def _always(cut: GradientCut, lost: tuple[Parameter, ...], parameters: dict[int, Parameter]) -> tuple[Parameter, ...]:
    """Without what lies in checkpointed modules of which other tensors do train: there it was not the checkpoint."""
    live = {p.name for i in cut.parameters if (p := parameters.get(i)) is not None and p.gradient_seen}
    trained = tuple(f"{m}." for m in cut.modules if any(name.startswith(f"{m}.") for name in live))
    return tuple(p for p in lost if not trained or not p.name.startswith(trained))


def proven_cuts(run: Recording) -> tuple[CutOff, ...]:
    """The cuts that nobody can have meant.

    Checkpointing never means to drop a gradient. Gradients switched off, or a tensor taken out of the graph, may be
    meant, by a program that has every parameter in its optimizer; not where what lies behind are adapters, or layers
    that were left trainable while others just like them were frozen.
    """
    out = []
    adapters = {i for m in (run.adapters.models if run.adapters else ()) for i in (*m.parameters, *m.extra)}
    for found in cuts_of(run):
        if found.cut.cause == "checkpoint":
            out.append(found)
            continue
        if found.cut.function == CONDITION:
            continue
        kept = [p for p in found.parameters if not _twin_trains(p, run)]
        frozen = {(p.root, p.shape, _kind(p.name)) for p in run.parameters if not p.requires_grad and len(p.shape) > 1}
        meant = [p for p in kept if p.id in adapters or (p.root, p.shape, _kind(p.name)) in frozen]
        if meant:
            out.append(CutOff(found.cut, tuple(kept)))
    return tuple(out)


def idle_adapters(model: AdaptedModel) -> str:
    """Why the adapters of a model take no part in its training: ``merged``, ``disabled``; empty when they may."""
    if model.looks < _LOOKS:
        return ""
    return "merged" if model.merged == model.looks else "disabled" if model.disabled == model.looks else ""


def _kind(name: str) -> tuple[str, ...]:
    """A tensor's name without the numbers of layers: ``blocks.3.fc.weight`` -> (blocks, fc, weight)."""
    return tuple(part for part in name.split(".") if not part.isdecimal())


def _twin_trains(parameter: Parameter, run: Recording) -> bool:
    """A tensor of the same shape, whose name differs in one word, does get gradients: this one may be its copy."""
    parts = parameter.name.split(".")
    for other in _alike(parameter, run.parameters):
        differing = [(a, b) for a, b in zip(parts, other.name.split("."), strict=True) if a != b]
        if len(differing) == 1 and not any(word.isdecimal() for word in differing[0]):
            return True
    return False


def _alike(parameter: Parameter, parameters: Iterable[Parameter]) -> Iterable[Parameter]:
    length = parameter.name.count(".")
    return (
        p
        for p in parameters
        if p.gradient_seen and p.id != parameter.id and p.shape == parameter.shape and p.name.count(".") == length
    )
