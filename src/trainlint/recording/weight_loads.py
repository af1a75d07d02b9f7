"""What a load of weights amounts to: what would have fitted under other names, and what was meant to stay fresh.

Pure functions over :class:`~trainlint.recording.schema.WeightLoad`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainlint.recording.schema import Forward, NamedShape, Parameter, Recording, WeightLoad

__all__ = ["Renaming", "best_renaming", "file_name", "fitting_shapes", "in_play", "loaded_and_fresh", "module_names"]

#: Components that may stand before the shared end of two names.
_DEPTH = 5
_GENERIC = frozenset(
    ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "last.ckpt", "model.pt", "model.pth")
)


@dataclass(frozen=True)
class Renaming:
    """Tensors of a file that fit fresh parameters once ``theirs`` at the start of their names becomes ``ours``."""

    theirs: str
    ours: str
    tensors: int
    weights: int

    @property
    def one_sided(self) -> bool:
        """A prefix that one side has and the other lacks: what wrapping or unwrapping a model makes."""
        return self.theirs.endswith(self.ours) or self.ours.endswith(self.theirs)


def file_name(path: str) -> str:
    """The file's name; with its folder where many files are called so (``bert/model.safetensors``)."""
    pieces = [p for p in path.replace("\\", "/").split("/") if p]
    return "/".join(pieces[-2:]) if pieces and pieces[-1] in _GENERIC else pieces[-1] if pieces else path


def module_names(load: WeightLoad) -> list[NamedShape]:
    """The fresh parameters by the names that the module which was loaded gives them."""
    prefix = f"{load.module}." if load.module else ""
    return [NamedShape(load.wrapper + t.name.removeprefix(prefix), t.shape) for t in load.fresh]


def best_renaming(load: WeightLoad) -> Renaming | None:
    """The renaming by which most weights of the file that arrived nowhere fit fresh parameters."""
    ours_known, theirs_known = _counterparts(load)
    ends: dict[tuple[str, tuple[int, ...]], list[tuple[str, str]]] = {}
    for tensor in load.left:
        if tensor.name in theirs_known:
            continue
        for head, before, end in _splits(tensor.name):
            ends.setdefault((end, tensor.shape), []).append((head, before))
    found: dict[tuple[str, str], list[NamedShape]] = {}
    for tensor in module_names(load):
        if tensor.name in ours_known:
            continue
        for head, before, end in _splits(tensor.name):
            for other, other_before in ends.get((end, tensor.shape), ()):
                # The shared end is taken as long as it is.
                if (before or other_before) and before != other_before:
                    found.setdefault((other, head), []).append(tensor)
    if not found:
        return None
    (theirs, ours), tensors = max(
        found.items(), key=lambda f: (sum(t.numel for t in f[1]), -len(f[0][0]) - len(f[0][1]), f[0])
    )
    return Renaming(theirs, ours, len(tensors), sum(t.numel for t in tensors))


def _counterparts(load: WeightLoad) -> tuple[set[str], set[str]]:
    """Names in the module and in the file of tensors that are known to belong together, and were left out or differ."""
    prefix = f"{load.module}." if load.module else ""
    ours = {
        load.wrapper + name.removeprefix(prefix) for name in (*load.passed_over, *(m.name for m in load.mismatched))
    }
    theirs = {m.file_name for m in load.mismatched}
    for tensor in load.left if load.passed_over else ():
        parts = tensor.name.split(".")
        if any(".".join(parts[i:]) in ours for i in range(len(parts))):
            theirs.add(tensor.name)
    return ours, theirs


def _splits(name: str) -> list[tuple[str, str, str]]:
    """``a.b.weight`` -> ("", "", "a.b.weight"), ("a.", "a", "b.weight"), ("a.b.", "b", "weight")."""
    parts = name.split(".")
    return [
        ("".join(f"{c}." for c in parts[:i]), parts[i - 1] if i else "", ".".join(parts[i:]))
        for i in range(min(len(parts), _DEPTH))
    ]


def fitting_shapes(load: WeightLoad) -> tuple[int, int]:
    """Fresh parameters, and their weights, for which the file still has a tensor of the same shape under another name.

    Those whose counterpart is known (of another shape, or passed over) are not counted.
    """
    known, taken = _counterparts(load)
    rest = Counter(t.shape for t in load.left if t.name not in taken)
    tensors = weights = 0
    for tensor in module_names(load):
        # A vector of some length fits anything; the matrices tell.
        if tensor.name not in known and len(tensor.shape) > 1 and rest[tensor.shape] > 0:
            rest[tensor.shape] -= 1
            tensors += 1
            weights += tensor.numel
    return tensors, weights


def in_play(run: Recording) -> set[int]:
    """Roots that are trained, or that a forward ran through."""
    held = {i for o in run.optimizers for g in o.groups for i in g.parameters}
    out = {p.root for p in run.parameters if p.root is not None and (p.id in held or p.gradient_seen)}
    ran = {e.root for e in run.events if isinstance(e, Forward)}
    return {r for r in (*out, *ran) if r is not None}


def loaded_and_fresh(parameters: Sequence[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters that came from a file, and the others."""
    loaded = [p for p in parameters if p.origin != "fresh"]
    return loaded, [p for p in parameters if p.origin == "fresh"]
