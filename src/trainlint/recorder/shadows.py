"""Copies of a trained module that no optimizer holds: averages, teachers, target networks, references.

A copy that never changes may be a reference and right. What shows that it was meant to follow is an update that ran and
changed nothing: torch's version counters count every in-place write to a parameter, whatever it wrote, and
``AveragedModel.update_parameters`` is a call that can be watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .core import Recorder
from .measure import sample_view
from .modules import dtype_name
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Copies followed, and tensors sampled of each.
COPIES, TENSORS = 8, 64
#: Levels of wrappers that a copy may lie in.
DEPTH = 3
#: Looks taken at a copy: enough for the watch and the epoch boundary.
LOOKS = 60
#: An average over a million steps still takes this share of the difference at every update.
SMALLEST_SHARE = 1e-6
#: Sampled elements that must be due to change before an update that changed none is counted.
LEAST_DUE = 8
#: In half precision an update that changes so few elements is as good as none.
COARSE_SHARE = 0.01
#: Objects looked at in what ``torch.save`` is given.
SAVED_ITEMS = 20_000


class Copy:
    """One copy as it is followed."""

    def __init__(self, number: int, found: _Found, of: str, twin: Any) -> None:
        self.number = number
        self.name, self.module, self.averaged = found.name, found.module, found.averaged
        self.of = of
        self.parameters = found.parameters
        self.pairs = _pairs(self.parameters, list(twin.parameters()))
        self.values, _ = self.sample()
        self.version = self.versions()
        self.at: dict[str, Any] | None = None
        self.looks = self.forwards = self.calls = self.effective = self.idle = self.due = 0
        self.elements = int(self.values.numel()) if self.values is not None else 0
        self.moved = False
        self.saved: str | None = None

    def versions(self) -> int | None:
        """In-place writes to its parameters so far; ``None`` when that cannot be told."""
        try:
            return sum(int(p._version) for p in self.parameters)
        except RuntimeError:  # made under inference_mode: not counted
            return None

    def sample(self) -> tuple[Any, Any]:
        """Elements of the copy and of its twin as they are now, on the copy's device."""
        import torch

        own, other = [], []
        for mine, theirs in self.pairs:
            a, b = sample_view(mine), sample_view(theirs)
            if a is not None and b is not None and a.numel() == b.numel() and mine.stride() == theirs.stride():
                own.append(a.float())
                other.append(b.to(a.device, a.dtype).float())  # as the copy could hold it
        return (torch.cat(own), torch.cat(other)) if own else (None, None)

    def same_parameters(self) -> bool:
        """Its parameters are still the objects that were found (offloading replaces them)."""
        return all(a is b for a, b in zip(self.module.parameters(), self.parameters, strict=False))

    def written(self, before: Any, other: Any, after: Any) -> None:
        """Judge one update that took the copy from ``before`` to ``after`` while its twin was ``other``."""
        if before is None or after is None or before.shape != after.shape:
            return
        changed = int((before != after).sum())
        few = changed == 0 or (self.coarse and changed <= COARSE_SHARE * self.elements)
        if changed:
            self.moved = True
        if not few:
            self.effective += 1
            self.idle = self.due = 0
            return
        due = int(((other - before).abs() * SMALLEST_SHARE > self.rounding() * before.abs()).sum())
        apart = int((other != before).sum())
        if due >= min(LEAST_DUE, self.elements) or (self.coarse and 2 * apart > self.elements):
            self.idle += 1
            self.due = max(self.due, due)

    @property
    def coarse(self) -> bool:
        """Half precision, in which small shares of a difference round away."""
        return int(self.parameters[0].element_size()) < 4

    def rounding(self) -> float:
        import torch

        dtype = self.parameters[0].dtype
        return float(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0

    def payload(self) -> dict[str, Any]:
        own, other = self.sample()
        distance = None
        if own is not None:
            size = float(other.norm())
            distance = float((own - other).norm()) / size if size else None
            self.moved = self.moved or (self.values is not None and bool((own != self.values).any()))
        return {
            "id": self.number,
            "name": self.name,
            "class_name": type(self.averaged if self.averaged is not None else self.module).__name__,
            "of": self.of,
            "tensors": len(self.parameters),
            "weights": sum(p.numel() for p in self.parameters),
            "dtype": dtype_name(self.parameters[0].dtype),
            "calls": self.calls if self.averaged is not None else None,
            "effective_updates": self.effective,
            "idle_updates": self.idle,
            "due": self.due,
            "sampled": self.elements,
            "distance": distance,
            "moved": self.moved,
            "forwards": self.forwards,
            "saved": self.saved,
            "at": self.at,
        }


def _pairs(own: list[Any], other: list[Any]) -> list[tuple[Any, Any]]:
    pairs = list(zip(own, other, strict=False))
    stride = -(-len(pairs) // TENSORS)
    return pairs[:: max(1, stride)]


class UsedHook:
    """Counts the forwards of a copy. Pickles as a no-op, so that saving a whole module still works."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy

    def __call__(self, module: Any, args: Any) -> None:
        import torch

        if not torch.compiler.is_compiling():
            self.copy.forwards += 1

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, is found everywhere

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Shadows:
    """The copies of one process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.copies: list[Copy] = []
        self._known: set[int] = set()

    # -- finding them

    def find(self) -> None:
        """Among the modules of the last scan."""
        held = {
            id(p)
            for watched in self.session.optimizers.watched.values()
            for group in watched.optimizer.param_groups
            for p in group["params"]
        }
        if not held:
            return
        sorting = _Sorting(held)
        for root in self.session.modules.roots:
            sorting.sort(root, type(root).__name__)
        sizes = {len(c.parameters) for c in sorting.idle}
        twins: dict[Any, tuple[str, Any]] = {}
        for name, module in sorting.trained:
            if sum(1 for _ in module.parameters()) in sizes:
                twins.setdefault(_make(module), (name, module))
        # The largest first: of a copy and what lies in it, the copy.
        for found in sorted(sorting.idle, key=lambda c: -sum(p.numel() for p in c.parameters)):
            twin = twins.get(_make(found.module))
            if twin is None or len(self.copies) >= COPIES or any(id(p) in self._known for p in found.parameters):
                continue
            self._known.update(id(p) for p in found.parameters)
            copy = Copy(len(self.copies), found, *twin)
            if copy.values is None:
                continue
            self.copies.append(copy)
            if found.hookable:
                found.module.register_forward_pre_hook(UsedHook(copy))

    # -- looking at them

    def step_begins(self) -> None:
        """What was written to a copy since the last look, while its twin stood as the last step had left it."""
        for copy in self.copies:
            copy.looks += 1
            version = copy.versions()
            if copy.averaged is not None or copy.looks > LOOKS or version is None or version == copy.version:
                continue
            before, (after, other) = copy.values, copy.sample()
            copy.version, copy.values = version, after
            # A first look after no step at all: both may be as they were built.
            if self.session.steps and copy.same_parameters():
                copy.written(before, other, after)

    def update_begins(self, averaged: Any, model: Any) -> Any:
        """``AveragedModel.update_parameters``: what it finds."""
        copy = next((c for c in self.copies if c.averaged is averaged), None)
        if copy is None or copy.calls >= LOOKS:
            return None
        own, other = copy.sample()
        return copy, own, other

    def update_ended(self, token: Any) -> None:
        copy, before, other = token
        copy.calls += 1
        copy.at = self.recorder.user_line()
        if self.session.steps:
            copy.written(before, other, copy.sample()[0])
        copy.values = copy.sample()[0]
        self.write(copy)

    def saved(self, obj: Any, path: str) -> None:
        """Whether what is saved holds tensors of a copy."""
        waiting = [c for c in self.copies if c.saved is None]
        if not waiting:
            return
        places = {t.data_ptr() for t in _tensors(obj)}
        for copy in waiting:
            if copy.parameters[0].data_ptr() in places:
                copy.saved = path
                self.write(copy)

    def write(self, copy: Copy) -> None:
        self.recorder.emit("shadow", copy.payload())

    def close(self) -> None:
        for copy in self.copies:
            self.write(copy)


class _Found:
    """A module none of whose parameters an optimizer holds."""

    def __init__(self, name: str, module: Any, averaged: Any, hookable: bool) -> None:
        self.name, self.module, self.averaged, self.hookable = name, module, averaged, hookable
        self.parameters = list(module.parameters())


class _Sorting:
    """Modules with parameters of an optimizer, and the outermost ones without any with what they wrap."""

    def __init__(self, held: set[int]) -> None:
        self.held = held
        self.trained: list[tuple[str, Any]] = []
        self.idle: list[_Found] = []

    def sort(self, module: Any, name: str, averaged: Any = None, hookable: bool = True, depth: int = 0) -> None:
        parameters = list(module.parameters())
        if not parameters:
            return
        # Hooks inside a compiled module would have it compiled again; scripted ones take none.
        kind = type(module).__name__
        compiled = kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        hookable = hookable and not compiled and "Script" not in kind
        if any(c.__name__ == "AveragedModel" for c in type(module).__mro__):
            averaged = module
        if any(id(p) in self.held for p in parameters):
            self.trained.append((name, module))
        else:
            self.idle.append(_Found(name, module, averaged, hookable))
            depth += 1
        if depth < DEPTH:
            for key, child in module.named_children():
                self.sort(child, f"{name}.{key}", averaged, hookable, depth)


def _make(module: Any) -> Any:
    return tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


def _tensors(obj: Any) -> Iterator[Any]:
    import torch

    stack, seen = [obj], 0
    while stack and seen < SAVED_ITEMS:
        item = stack.pop()
        seen += 1
        if isinstance(item, torch.Tensor):
            if item.layout == torch.strided and item.device.type != "meta":
                yield item
        elif isinstance(item, torch.nn.Module):
            stack.extend(item.parameters())
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.optim.swa_utils import AveragedModel

    from .checkpoints import path_of

    shadows = Shadows(session)
    session.closers.append(shadows.close)
    recorder = session.recorder
    look = recorder.quiet(shadows.step_begins)
    scan = session.modules.scan

    def scan_and_find() -> None:
        scan()
        # The scan runs inside other instruments, where quiet would skip this.
        try:
            shadows.find()
        except Exception as error:
            recorder.problem("shadows.find", error)

    session.modules.scan = scan_and_find

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and shadows.copies:
            look()

    register_optimizer_step_pre_hook(before_step)

    @recorder.quiet
    def update_begins(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return shadows.update_begins(self, model)

    @recorder.quiet
    def update_ended(result: Any, token: Any, *args: Any, **kwargs: Any) -> None:
        if token is not None:
            shadows.update_ended(token)

    wrap(AveragedModel, "update_parameters", around(update_begins, update_ended))

    @recorder.quiet
    def saves(obj: Any, f: Any = None, *args: Any, **kwargs: Any) -> None:
        if shadows.copies:
            shadows.saved(obj, path_of(f) or "a buffer")

    wrap(torch, "save", around(before=saves))

    def on_safetensors(module: Any) -> None:
        wrap(module, "save_file", around(before=saves))

    hooks.on_import("safetensors.torch", on_safetensors)
