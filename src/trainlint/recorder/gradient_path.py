"""Where the path of a gradient is cut before it reaches what should train, and by what.

Two ways in. Reentrant checkpointing is seen as it happens: torch itself warns of a function none of whose inputs
requires a gradient. Everything else is looked for only where it is missed: when an optimizer's first step finds tensors
without a gradient, the modules that hold them are watched through the next steps (never in compiled models), and so
are the calls that take tensors out of the graph.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import re
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .core import Recorder, line_of, user_frame
from .modules import unwrap
from .patching import ImportHooks, wrap
from .watch import Session

#: Calls of checkpointing that are looked into.
CHECKPOINTS = 4096
#: Modules that are watched for a missing gradient, steps that they are watched for, nodes of a graph walked for them.
MODULES, STEPS, NODES = 512, 2, 100_000
#: Calls that take a tensor out of the graph which are looked at in one watch, and nodes walked for each.
LEAVES, BEHIND = 256, 4000
#: The program's own frames around a call that are looked through for what switches gradients off, and its names.
FRAMES = 12
SWITCHES = re.compile(r"\b(no_grad|inference_mode|set_grad_enabled)\b")
#: Key under which a module's output is marked in the metadata of its graph node.
MARK = "trainlint_output"


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

    # -- checkpointing

    def checkpointed(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """Reentrant checkpointing begins on a function none of whose inputs requires a gradient."""
        if self._looked >= CHECKPOINTS or threading.get_ident() != self.session.training_thread:
            return
        self._looked += 1
        modules = modules_in(function, arguments)
        tensors = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
        if not tensors:
            return
        at = self.recorder.user_line()
        key = ("checkpoint", *(type(m).__name__ for m in modules), *((at or {}).get(k) for k in ("file", "line")))
        self.add(key, Cut("checkpoint", at), modules, tensors)
        self.cuts[key].calls += 1

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
            for cell in getattr(item, "__closure__", None) or ():
                with contextlib.suppress(ValueError):
                    stack.append(cell.cell_contents)
            wrapped = getattr(item, "__wrapped__", None)
            if wrapped is not None:
                stack.append(wrapped)
    inside = {id(child) for m in found.values() for child in m.modules() if child is not m}
    return [m for i, m in found.items() if i not in inside]


# ------------------------------------------------------------------------------- what is looked for where it is missed


class Passage:
    """What was seen of one watched module while it was watched."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls = 0
        #: Calls with gradients on, off, and in inference mode.
        self.on = self.off = self.inference = 0
        #: Calls whose output required a gradient, and those whose output lies on a path from a loss.
        self.live = self.reached = 0
        #: Where it was called from, and the line around that call that switches gradients off, where the source tells.
        self.at: Any = None
        self.off_at: Any = None


class Hook:
    """Before and after a watched module's forward. Pickles as a no-op, so that saving a whole module still works."""

    def __init__(self, search: Search, passage: Passage, after: bool) -> None:
        self.search, self.passage, self.after = search, passage, after

    def __call__(self, module: Any, args: Any, *output: Any) -> None:
        import torch

        if torch.compiler.is_compiling():
            return
        if self.after:
            self.search.left(self.passage, output[0])
        else:
            self.search.entered(self.passage)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, is found everywhere

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Search:
    """Looks for what cuts tensors off that an optimizer's first step found without a gradient."""

    def __init__(self, session: Session, paths: Paths) -> None:
        self.session, self.paths = session, paths
        self.recorder = session.recorder
        #: By id of the parameter: it, and the modules from its owner outwards.
        self.missed: dict[int, tuple[Any, list[Passage]]] = {}
        self.passages: dict[int, Passage] = {}
        self._handles: list[Any] = []
        self._steps_left = 0
        self._started = False
        self._leaves = 0
        #: Passages of marked outputs by number, and calls that took something behind them out of the graph.
        self._marks: list[Passage] = []
        self._left: list[tuple[str, Any, set[int]]] = []
        self._restore: list[tuple[str, Any]] = []
        self.watching = False
        self.entered = self.recorder.quiet(self._entered)
        self.left = self.recorder.quiet(self._exited)

    # -- from the first step of an optimizer on

    def stepped(self, optimizer: Any) -> None:
        if self.watching:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self.stop()
        elif not self._started and not self.session.done:
            self._start(optimizer)

    def _start(self, optimizer: Any) -> None:
        seen = self.session.modules.gradient_seen
        missing: dict[int, Any] = {}
        found = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None or self.recorder.parameters.get(p) in seen:
                    found += 1
                elif p.requires_grad:
                    missing[id(p)] = p
        if not missing or not found:
            return  # nothing is missed, or everything: then it is the loop that is at fault
        self._started = True
        if compiled(self.session.modules.roots):
            return
        for root in self.session.modules.roots:
            self._collect(unwrap(root)[0], missing)
        if not self.missed or len(self.passages) > MODULES:
            return
        for passage in self.passages.values():
            self._handles.append(passage.module.register_forward_pre_hook(Hook(self, passage, False)))
            self._handles.append(passage.module.register_forward_hook(Hook(self, passage, True)))
        self._watch_leaving()
        self._steps_left = STEPS
        self.watching = True

    def _collect(self, root: Any, missing: dict[int, Any]) -> None:
        for name, module in root.named_modules():
            for parameter in module.__dict__.get("_parameters", {}).values():
                if parameter is None or id(parameter) not in missing or id(parameter) in self.missed:
                    continue
                chain = [root]
                for part in name.split(".") if name else ():
                    chain.append(chain[-1]._modules[part])
                passages = [self.passages.setdefault(id(m), Passage(m)) for m in reversed(chain)]
                self.missed[id(parameter)] = (parameter, passages)

    # -- while the modules run

    def _entered(self, passage: Passage) -> None:
        import torch

        if threading.get_ident() != self.session.training_thread:
            return
        passage.calls += 1
        if torch.is_inference_mode_enabled():
            passage.inference += 1
        elif torch.is_grad_enabled():
            passage.on += 1
        else:
            passage.off += 1
        if passage.at is None:
            frame = user_frame(sys._getframe(1))
            passage.at = line_of(frame)
            if not torch.is_grad_enabled():
                passage.off_at = switched_off(frame)

    def _exited(self, passage: Passage, output: Any) -> None:
        import torch

        if not torch.is_grad_enabled() or threading.get_ident() != self.session.training_thread:
            return
        live = [t for t in _tensors(output) if t.grad_fn is not None]
        if not live:
            return
        passage.live += 1
        self._marks.append(passage)
        for tensor in live:
            tensor.grad_fn.metadata.setdefault(MARK, set()).add(len(self._marks) - 1)

    def leaves(self, function: str, tensor: Any) -> None:
        """A call takes a tensor out of the graph: of which marked outputs is it made?"""
        if self._leaves >= LEAVES or threading.get_ident() != self.session.training_thread or not self._marks:
            return
        self._leaves += 1
        behind = marks_behind([tensor.grad_fn], BEHIND)
        if behind:
            self._left.append((function, line_of(user_frame(sys._getframe(1))), behind))

    def backward(self, tensors: Any) -> None:
        """A backward begins: the marked outputs that it leads to."""
        import torch

        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        for mark in marks_behind([t.grad_fn for t in given if isinstance(t, torch.Tensor)], NODES):
            if mark < len(self._marks):
                self._marks[mark].reached += 1

    # -- the calls that take tensors out of the graph

    def _watch_leaving(self) -> None:
        import torch

        leaves = self.recorder.quiet(self.leaves)
        for name in ("detach", "numpy", "tolist", "item"):
            original = getattr(torch.Tensor, name)

            def call(self_: Any, *args: Any, __original: Any = original, __name: str = name, **kwargs: Any) -> Any:
                if isinstance(self_, torch.Tensor) and self_.grad_fn is not None and torch.is_grad_enabled():
                    leaves(f"Tensor.{__name}", self_)
                return __original(self_, *args, **kwargs)

            self._restore.append((name, torch.Tensor.__dict__.get(name)))
            setattr(torch.Tensor, name, functools.wraps(original)(call))

    def stop(self) -> None:
        """Take everything off again and say what was found."""
        import torch

        if not self.watching:
            return
        self.watching = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, own in self._restore:
            if own is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, own)
        self._restore.clear()
        self._conclude()

    def _conclude(self) -> None:
        for parameter, chain in self.missed.values():
            # One that got its gradient in the meantime was not cut off.
            if parameter.grad is not None or self.recorder.parameters.get(parameter) in (
                self.session.modules.gradient_seen
            ):
                continue
            owner = chain[0]
            if not owner.calls:
                continue
            if not owner.on:
                self._switched_off(parameter, chain)
            elif owner.live and not owner.reached:
                self._taken_out(parameter, chain)

    def _switched_off(self, parameter: Any, chain: list[Passage]) -> None:
        """Every call of the owner was made with gradients off: the outermost module of which that holds."""
        outermost = chain[0]
        for passage in chain[1:]:
            if not passage.calls or passage.on:
                break
            outermost = passage
        cause = "inference_mode" if outermost.inference == outermost.calls else "no_grad"
        self._add(Cut(cause, outermost.off_at or outermost.at), outermost, parameter)

    def _taken_out(self, parameter: Any, chain: list[Passage]) -> None:
        """Its output had a graph, no loss led to it, and a call was seen that took something made of it out."""
        outermost = chain[0]
        for passage in chain[1:]:
            if not passage.live or passage.reached:
                break
            outermost = passage
        numbers = {i for i, passage in enumerate(self._marks) if passage is chain[0]}
        for function, at, behind in self._left:
            if behind & numbers:
                self._add(Cut("leaves", at, function), outermost, parameter)
                return

    def _add(self, cut: Cut, outermost: Passage, parameter: Any) -> None:
        where = cut.at or {}
        key = (cut.cause, cut.function, where.get("file"), where.get("line"))
        self.paths.add(key, cut, [outermost.module], {id(parameter): parameter})
        self.paths.cuts[key].calls = max(self.paths.cuts[key].calls, outermost.calls)


def switched_off(frame: FrameType | None) -> dict[str, Any] | None:
    """The innermost line of the program's own code, around the call in ``frame``, that switches gradients off."""
    for _ in range(FRAMES):
        frame = user_frame(frame)
        if frame is None:
            return None
        code = frame.f_code
        for number in range(frame.f_lineno, code.co_firstlineno - 1, -1):
            if SWITCHES.search(linecache.getline(code.co_filename, number)):
                return {**(line_of(frame) or {}), "line": number}
        frame = frame.f_back
    return None


def marks_behind(nodes: list[Any], most: int) -> set[int]:
    """The marks of outputs on the way down from graph nodes, of which at most so many are looked at."""
    found: set[int] = set()
    stack = [n for n in nodes if n is not None]
    seen: set[Any] = set(stack)
    while stack and len(seen) < most:
        node = stack.pop()
        found |= node.metadata.get(MARK, set())
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def compiled(roots: list[Any]) -> bool:
    """Whether anything may have been compiled: hooks would have it compiled again, or would not be called."""
    backends = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", {})
    if any(backend is not None for backend in backends.values()):  # None: torch keeps its own code from being compiled
        return True
    return any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        or "Script" in type(m).__name__
        for root in roots
        for m in root.modules()
    )


def _tensors(value: Any, depth: int = 0) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4 and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple)):
        for item in value[:64]:
            yield from _tensors(item, depth + 1)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.checkpoint import CheckpointFunction

    recorder = session.recorder
    paths = Paths(session)
    search = Search(session, paths)
    noticed = recorder.quiet(paths.checkpointed)

    def make(original: Any) -> Any:
        def apply(function: Any, preserve_rng_state: Any, *args: Any) -> Any:
            if torch.is_grad_enabled() and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                noticed(function, args)
            return original(function, preserve_rng_state, *args)

        return apply

    wrap(CheckpointFunction, "apply", make)

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
