"""Where the path of a gradient is cut before it reaches what should train, and by what.

Reentrant checkpointing is seen as it happens: torch itself warns of a function none of whose inputs requires a
gradient. Everything else is looked for only where it is missed (:mod:`.gradient_search`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from typing import Any

from .core import Recorder
from .modules import unwrap
from .patching import ImportHooks, wrap
from .watch import Session

#: Calls of checkpointing that are looked into.
CHECKPOINTS = 4096


class Cut:
    """One place as it is counted up."""

    def __init__(self, cause: str, at: Any, function: str = "") -> None:
        self.cause, self.at, self.function = cause, at, function
        self.modules: list[Any] = []
        self.tensors: dict[int, Any] = {}
        self.calls = 0


class Paths:
    """The cuts of one process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.cuts: dict[Any, Cut] = {}
        self._looked = 0
        self._written = False
        #: Reentrant checkpoints that run now, outermost first: the key of the cut that each is, ``None`` for none.
        self.checkpoints: list[Any] = []

    # -- checkpointing

    def checkpointed(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Reentrant checkpointing begins on a function none of whose inputs requires a gradient: the cut's key."""
        if self._looked >= CHECKPOINTS or threading.get_ident() != self.session.training_thread:
            return None
        self._looked += 1
        modules = modules_in(function, arguments)
        tensors = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
        at = self.recorder.user_line()
        key = ("checkpoint", *(type(m).__name__ for m in modules), *((at or {}).get(k) for k in ("file", "line")))
        self.add(key, Cut("checkpoint", at), modules, tensors)
        self.cuts[key].calls += 1
        return key

    def inside(self, key: Any, module: Any, parameter: Any) -> None:
        """A tensor was found to be used inside a checkpoint that cuts the gradient off."""
        known = self.cuts[key]
        self.add(key, known, [] if known.modules else [module], {id(parameter): parameter})

    def add(self, key: Any, cut: Cut, modules: list[Any], tensors: dict[int, Any]) -> None:
        known = self.cuts.setdefault(key, cut)
        known.tensors.update(tensors)
        seen = {id(m) for m in known.modules}
        known.modules.extend(m for m in modules if id(m) not in seen)

    # -- writing

    def close(self) -> None:
        if self._written or not self.cuts:
            return
        self._written = True
        names: dict[int, str] = {}
        for root in self.session.modules.roots:
            inner, _ = unwrap(root)
            for name, module in inner.named_modules():
                names.setdefault(id(module), name or type(inner).__name__)
        numbers = self.recorder.parameters
        payloads = []
        for cut in self.cuts.values():
            if not cut.tensors:
                continue  # nothing below it trains
            found = (numbers.get(t) for t in cut.tensors.values())
            payloads.append(
                {
                    "cause": cut.cause,
                    "modules": [names.get(id(m), type(m).__name__) for m in cut.modules][:100],
                    "class_name": type(cut.modules[0]).__name__ if cut.modules else "",
                    "parameters": sorted(n for n in found if n is not None),
                    "calls": cut.calls,
                    "function": cut.function,
                    "at": cut.at,
                }
            )
        self.recorder.emit("adapters", {"cuts": payloads})


def modules_in(function: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The modules that a function handed to ``checkpoint`` runs: bound, in a partial, in its closure, or passed on."""
    import torch

    found: dict[int, Any] = {}
    stack, looked = [function, *arguments], 0
    while stack and looked < 200:
        item = stack.pop()
        looked += 1
        if isinstance(item, torch.nn.Module):
            found.setdefault(id(item), item)
        elif isinstance(item, functools.partial):
            stack += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, (list, tuple)) and len(item) < 100:
            stack += item
        elif callable(item) and not isinstance(item, type):
            owner = getattr(item, "__self__", None)
            if owner is not None and not isinstance(owner, type(sys)):
                stack.append(owner)
            stack += [
                *(getattr(item, "__defaults__", None) or ()),
                *(getattr(item, "__kwdefaults__", None) or {}).values(),
            ]
            for cell in getattr(item, "__closure__", None) or ():
                with contextlib.suppress(ValueError):
                    stack.append(cell.cell_contents)
            wrapped = getattr(item, "__wrapped__", None)
            if wrapped is not None:
                stack.append(wrapped)
    inside = {id(child) for m in found.values() for child in m.modules() if child is not m}
    return [m for i, m in found.items() if i not in inside]


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.checkpoint import CheckpointFunction

    from .gradient_search import Search

    recorder = session.recorder
    paths = Paths(session)
    search = Search(session, paths)
    noticed = recorder.quiet(paths.checkpointed)

    def apply(cls: Any, function: Any, *args: Any) -> Any:
        cut = None
        if torch.is_grad_enabled() and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            cut = noticed(function, args)
        paths.checkpoints.append(cut)
        try:
            return super(CheckpointFunction, cls).apply(function, *args)
        finally:
            paths.checkpoints.pop()

    # Inherited by classes derived from it, which must stay themselves.
    setattr(CheckpointFunction, "apply", classmethod(apply))

    stepped = recorder.quiet(search.stepped)
    reached = recorder.quiet(search.backward)

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            stepped(optimizer)

    register_optimizer_step_post_hook(after_step)

    def make_backward(original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if search.watching:
                reached(tensors)
            return original(tensors, *args, **kwargs)

        return backward

    wrap(torch.autograd, "backward", make_backward)

    def close() -> None:
        search.stop()
        paths.close()

    session.closers.append(close)
