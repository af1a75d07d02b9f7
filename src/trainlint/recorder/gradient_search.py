"""What cuts off the tensors that an optimizer's first step found without a gradient.

The modules that hold them are watched through the next steps (never in compiled models), and so are the calls that take
tensors out of the graph; then everything is taken off again. Where nothing is missed, nothing is watched.
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

from .core import line_of, user_frame
from .gradient_path import Cut, Paths
from .modules import unwrap
from .watch import Session

#: Modules that are watched for a missing gradient, steps that they are watched for, nodes of a graph walked for them.
MODULES, STEPS, NODES = 512, 2, 100_000
#: Calls that take a tensor out of the graph which are looked at in one watch, and nodes walked for each.
LEAVES, BEHIND = 256, 4000
#: The program's own frames around a call that are looked through for what switches gradients off, and its names.
FRAMES = 12
SWITCHES = re.compile(r"\b(no_grad|inference_mode|set_grad_enabled)\b")
#: A line that switches them off for now only, perhaps: by a value, or by a condition.
CONDITIONS = re.compile(r"set_grad_enabled\s*\((?!\s*(mode\s*=\s*)?False)|\bif\b")
#: Key under which a module's output is marked in the metadata of its graph node.
MARK = "trainlint_output"


class Passage:
    """What was seen of one watched module while it was watched."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls = 0
        #: Calls with gradients on, off, and in inference mode.
        self.on = self.off = self.inference = 0
        #: Calls whose output required a gradient, and those whose output lies on a path from a loss.
        self.live = self.reached = 0
        #: Calls from inside a reentrant checkpoint's first run, and the cut that this was.
        self.kept = 0
        self.checkpoint: Any = None
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
        if self.paths.checkpoints:
            # Reentrant checkpointing runs its function with gradients off, and again with them on in backward.
            if not torch.is_grad_enabled():
                passage.checkpoint = passage.checkpoint or self.paths.checkpoints[-1]
                passage.kept += 1
                return
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
                if type(self_) is torch.Tensor and self_.grad_fn is not None and torch.is_grad_enabled():
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
            if owner.checkpoint is not None:
                self.paths.inside(owner.checkpoint, owner.module, parameter)
            elif owner.kept:
                continue
            elif not owner.on:
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
        at = outermost.off_at or outermost.at
        text = linecache.getline(at["file"], at["line"]) if at else ""
        self._add(Cut(cause, at, "a condition" if CONDITIONS.search(text) else ""), outermost, parameter)

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
