"""Parameters and buffers in memory that nobody wrote: after ``to_empty``, and ``Parameter(torch.empty(...))``.

A sample of each is kept when the memory is handed out, and compared once the first backward is over. Torch's count of
writes alone proves nothing: writes through ``.data`` are not in it.
"""

from __future__ import annotations

import ast
import linecache
import sys
import weakref
from typing import Any

from .core import is_user_file, line_of
from .measure import sample_view
from .modules import unwrap
from .patching import ImportHooks, around, wrap
from .values import compiling, outside
from .watch import Session

#: Tensors that are followed.
MOST = 4000
#: Names listed.
NAMES = 20

_UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty")
#: Old constructors: with sizes they hand out memory, with values they copy.
_OLD = ("Tensor", "FloatTensor", "HalfTensor", "DoubleTensor", "BFloat16Tensor")


class _Source:
    """One act of handing out memory: a call of ``to_empty``, or a line that makes parameters."""

    def __init__(self, how: str, module: str, at: dict[str, Any] | None, *, zeros_tell: bool) -> None:
        self.how = how
        self.module = module
        self.at = at
        #: Zeros where the memory was zero: nothing in the file writes past torch's count.
        self.zeros_tell = zeros_tell


class _Handed:
    """A tensor as it was handed out."""

    def __init__(self, tensor: Any, source: _Source) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        view = sample_view(tensor)
        self.sample = None if view is None else view.clone()
        self.source = source

    def all(self, what: str) -> bool:
        """Whether all that the memory held is ``zero`` or ``finite``."""
        if self.sample is None:
            return False
        return not bool(self.sample.bool().any()) if what == "zero" else bool(self.sample.isfinite().all())

    def unwritten(self, tensor: Any) -> bool:
        if self.sample is None or tensor._version != self.version:
            return False
        now = sample_view(tensor)
        if now is None or now.dtype != self.sample.dtype or now.numel() != self.sample.numel():
            return False
        return _bits(now.cpu()) == _bits(self.sample.cpu())


def _bits(flat: Any) -> bytes:
    import torch

    return bytes(flat.contiguous().view(torch.uint8).numpy().tobytes())


class Uninitialised:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder = session.recorder
        self.handed: list[_Handed] = []
        self.looked = False
        self._calls: dict[str, list[tuple[int, int]]] = {}
        self._lines: dict[tuple[str, int], _Source] = {}

    # -- memory is handed out

    def emptied(self, result: Any, token: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if self.looked or compiling():
            return
        source = _Source("to_empty", type(module).__name__, self.recorder.user_line(), zeros_tell=False)
        self._follow([*module.parameters(), *module.buffers()], source)

    def made(self, result: Any, token: Any, *args: Any, **kwargs: Any) -> None:
        if self.looked or compiling() or result is None or result.device.type == "meta":
            return
        frame = outside(sys._getframe(1))
        if frame is None or not is_user_file(frame.f_code.co_filename):
            return
        place = (frame.f_code.co_filename, frame.f_lineno)
        if not any(first <= place[1] <= last for first, last in self._uninitialised_calls(place[0])):
            return
        source = self._lines.get(place)
        if source is None:
            text = "".join(linecache.getlines(place[0]))
            owner = frame.f_locals.get("self")
            name = type(owner).__name__ if owner is not None else ""
            source = _Source("torch.empty", name, line_of(frame), zeros_tell=".data" not in text)
            self._lines[place] = source
        self._follow([result], source)

    def _follow(self, tensors: list[Any], source: _Source) -> None:
        for tensor in tensors:
            if len(self.handed) < MOST and tensor.device.type != "meta" and tensor.numel():
                self.handed.append(_Handed(tensor, source))

    def _uninitialised_calls(self, file: str) -> list[tuple[int, int]]:
        """First and last line of each ``Parameter(torch.empty(...))`` in a file."""
        found = self._calls.get(file)
        if found is None:
            found = self._calls[file] = []
            text = "".join(linecache.getlines(file))
            if "empty" in text or any(f"{name}(" in text for name in _OLD):
                try:
                    tree = ast.parse(text)
                except SyntaxError:
                    return found
                found += [
                    (node.lineno, node.end_lineno or node.lineno)
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Call) and _name(node.func) == "Parameter" and _first_is_empty(node)
                ]
        return found

    # -- the first backward is over

    def look(self, *args: Any, **kwargs: Any) -> None:
        if self.looked or compiling():
            return
        self.looked = True
        handed, self.handed = self.handed, []
        if not handed:
            return
        names = self._trained_tensors()
        by_source: dict[_Source, list[tuple[str, Any, bool, _Handed]]] = {}
        last = {id(tensor): h for h in handed if (tensor := h.tensor()) is not None}
        for key, (name, tensor, buffer) in names.items():
            found = last.get(key)
            # Of a frozen parameter of somebody's own it is not known whether it is used.
            if found is not None and (buffer or tensor.requires_grad or found.source.how == "to_empty"):
                by_source.setdefault(found.source, []).append((name, tensor, buffer, found))
        records = [self._record(source, members) for source, members in by_source.items()]
        records = [r for r in records if r["unwritten"]]
        if records:
            self.recorder.emit("numerics", {"unwritten": records})

    def _trained_tensors(self) -> dict[int, tuple[str, Any, bool]]:
        """Tensors of the roots that got a gradient: all but trainable parameters that got none."""
        if not self.session.modules.roots:
            self.session.modules.scan()
        out: dict[int, tuple[str, Any, bool]] = {}
        for root in self.session.modules.roots:
            inner, _ = unwrap(root)
            parameters = list(inner.named_parameters())
            if not any(p.grad is not None for _, p in parameters):
                continue
            for name, p in parameters:
                if p.grad is not None or not p.requires_grad:
                    out[id(p)] = (name, p, False)
            for name, b in inner.named_buffers():
                out[id(b)] = (name, b, True)
        return out

    def _record(self, source: _Source, members: list[tuple[str, Any, bool, _Handed]]) -> dict[str, Any]:
        unwritten = [(n, t, b, h) for n, t, b, h in members if h.unwritten(t)]
        zero = {n for n, _, _, h in unwritten if h.all("zero")}
        if source.how != "to_empty" and not source.zeros_tell:
            unwritten = [m for m in unwritten if m[0] not in zero]
        finite = {n: h.all("finite") for n, _, _, h in unwritten}
        return {
            "how": source.how,
            "module": source.module,
            "at": source.at,
            "tensors": len(members),
            "unwritten": [n for n, *_ in unwritten][: 10 * NAMES],
            "garbage": [n for n, *_ in unwritten if n not in zero][: 10 * NAMES],
            "non_finite": [n for n, *_ in unwritten if not finite[n]][:NAMES],
            "matrices": sum(1 for _, t, _, _ in members if t.ndim >= 2),
            "matrices_unwritten": sum(1 for _, t, _, _ in unwritten if t.ndim >= 2),
            "buffers": [n for n, _, b, _ in unwritten if b][:NAMES],
        }


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _first_is_empty(call: ast.Call) -> bool:
    """Whether the first argument is a call that hands out memory as it is."""
    argument = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "data"), None)
    if not isinstance(argument, ast.Call):
        return False
    name = _name(argument.func)
    if name in _UNINITIALISED:
        return True
    # torch.Tensor([1.0]) copies, torch.Tensor(3, 4) does not; of a name nothing is known.
    sizes = [a for a in argument.args if not isinstance(a, (ast.Starred, ast.List, ast.Tuple, ast.ListComp))]
    return name in _OLD and len(sizes) >= 2 and len(sizes) == len(argument.args)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    watched = Uninitialised(session)
    quiet = session.recorder.quiet
    wrap(torch.nn.Module, "to_empty", around(after=quiet(watched.emptied)))
    wrap(torch.nn.Parameter, "__new__", around(after=quiet(watched.made)))
    wrap(torch.autograd, "backward", around(after=quiet(watched.look)))
