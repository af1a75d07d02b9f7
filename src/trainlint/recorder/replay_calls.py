"""What the trained modules were called with the last time, kept so that the call can be repeated.

Hooks stand on the modules that the program calls itself (roots, or the parts of one that is never called), only for the
watch. Inputs are kept as detached aliases: no graph is held, and torch's version counters tell when one was written to.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import copy
import dataclasses
import enum
import gc
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from .watch import Session

#: Modules whose last call is kept, and modules that hooks are put on.
CALLS = 4
HOOKS = 64

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, slice, range, type)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class Unfit(Exception):
    """The call cannot be repeated; the text says why."""


@dataclasses.dataclass
class Call:
    """A forward call of a module, in training."""

    module: Any
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Tensors among them with the version that they had.
    versions: list[tuple[Any, int | None]] = dataclasses.field(default_factory=list)
    #: (device type, dtype, enabled) of autocast around the call.
    autocast: list[tuple[str, Any, bool]] = dataclasses.field(default_factory=list)
    #: Samples of the batches that loaders gave lately.
    batch_sizes: frozenset[int] = frozenset()
    began: float = 0.0
    #: Seconds from its beginning to the backward that followed: at least what the forward took.
    took: float | None = None
    unfit: str = ""

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in containers of their own.

        Raises:
            Unfit: an input was written to since.
        """
        if self.unfit:
            raise Unfit(self.unfit)
        if any(version is not None and tensor._version != version for tensor, version in self.versions):
            raise Unfit("its inputs were written to in place since")
        found: list[Any] = []
        return hold(self.args, found), hold(self.kwargs, found)


def hold(value: Any, found: list[Any], depth: int = 0) -> Any:
    """A copy of nested arguments in which tensors are detached aliases, which are added to ``found``.

    Raises:
        Unfit: something in it may change when it is used, or cannot be copied.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise Unfit(f"it takes a {type(value).__name__} of layout {value.layout}")
        alias = value.detach()
        found.append(alias)
        return alias
    if isinstance(value, (*_PLAIN, torch.dtype, torch.device, torch.Generator, torch.nn.Module)):
        return value
    if isinstance(value, _FUNCTIONS):
        return value
    if depth > 8:
        raise Unfit("its inputs are nested too deeply")
    kind = type(value)
    if kind in (list, tuple, set, frozenset, torch.Size):
        return kind(hold(v, found, depth + 1) for v in value)
    if kind in (dict, collections.OrderedDict):
        return kind((k, hold(v, found, depth + 1)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(hold(v, found, depth + 1) for v in value))
    if isinstance(value, collections.UserDict):
        twin = copy.copy(value)
        twin.data = hold(dict(value.data), found, depth + 1)
        return twin
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return kind(**{k: hold(v, found, depth + 1) for k, v in fields.items()})
    if kind is types.SimpleNamespace or kind.__name__ == "Namespace":
        return kind(**{k: hold(v, found, depth + 1) for k, v in vars(value).items()})
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) is not None and getattr(value, "size", 0) < 1 << 22:
        return value.copy()
    raise Unfit(f"it takes a {kind.__name__}, whose contents may change with its use")


def tensors(value: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors in nested containers."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth <= 6:
        items = value.values() if isinstance(value, collections.abc.Mapping) else value
        if dataclasses.is_dataclass(items) and not isinstance(items, type):
            items = [getattr(items, f.name, None) for f in dataclasses.fields(items)]
        if isinstance(items, (list, tuple, set, collections.abc.ValuesView)):
            for item in items:
                yield from tensors(item, depth + 1)


def autocast_state() -> list[tuple[str, Any, bool]]:
    import torch

    cuda: Any = torch.cuda
    found = []
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        if enabled or device == "cpu" or cuda.is_initialized():
            found.append((device, torch.get_autocast_dtype(device), enabled))
    return found


class CallHook:
    """Forward pre-hook on one module. Pickles as a no-op, so that saving a whole model still works."""

    def __init__(self, calls: Calls, module: Any, name: str) -> None:
        self.calls = calls
        self.module = weakref.ref(module)
        self.name = name

    def __call__(self, module: Any, args: Any, kwargs: Any = None) -> None:
        import torch

        if torch.compiler.is_compiling():
            return
        if self.calls.recorder.busy or not torch.is_grad_enabled() or self.module() is not module:
            return
        self.calls.note(module, self.name, args, kwargs or {})

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, is found everywhere

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Calls:
    """The last training call of each module that the program calls."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder = session.recorder
        self.note = self.recorder.quiet(self._note)
        self.last: dict[int, Call] = {}
        self._undo: dict[int, Callable[[], None]] = {}
        self._fired: set[int] = set()
        #: Roots that were not called themselves, with the backwards since they were found.
        self._waiting: dict[int, int] = {}
        self._batch_sizes: collections.deque[int] = collections.deque(maxlen=4)
        self._looked = False
        self.closed = False

    # -- putting hooks on

    def look(self, roots: list[Any]) -> None:
        """Put hooks on the roots; on the parts of one that is never called."""
        if self.closed:
            return
        for root in roots:
            if next(root.parameters(), None) is None:
                continue
            self._hook(root, type(root).__name__)
            self._waiting.setdefault(id(root), self.session.backwards)
            uncalled = id(root) not in self._fired and self.session.backwards > self._waiting[id(root)]
            if uncalled or not _has_forward(root) or hasattr(type(root), "training_step"):
                for name, part in _parts(root, type(root).__name__):
                    self._hook(part, name)

    def _hook(self, module: Any, name: str) -> None:
        if id(module) in self._undo or len(self._undo) >= HOOKS or type(module).__name__ == "RecursiveScriptModule":
            return
        hook = CallHook(self, module, name)
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is None:
            self._undo[id(module)] = module.register_forward_pre_hook(hook, with_kwargs=True).remove
            return

        # ``module.compile()`` compiles the hooks as well: the call is noted before it.
        def noted(*args: Any, **kwargs: Any) -> Any:
            hook(module, args, kwargs)
            return compiled(*args, **kwargs)

        def undo() -> None:
            if module._compiled_call_impl is noted:
                module._compiled_call_impl = compiled

        module._compiled_call_impl = noted
        self._undo[id(module)] = undo

    # -- what happens

    def _note(self, module: Any, name: str, args: Any, kwargs: Any) -> None:
        self._fired.add(id(module))
        for part in module.modules() if id(module) not in self.last else ():
            # Whoever calls it from now on does so within this call.
            if part is not module and id(part) in self._undo:
                self._undo.pop(id(part))()
                self.last.pop(id(part), None)
        call = Call(module, name, autocast=autocast_state(), began=time.monotonic())
        found: list[Any] = []
        try:
            call.args, call.kwargs = hold(args, found), hold(kwargs, found)
            call.versions = [(t, None if t.is_inference() else t._version) for t in found]
        except Unfit as error:
            call.unfit = str(error)
        call.batch_sizes = frozenset(self._batch_sizes)
        self.last.pop(id(module), None)
        self.last[id(module)] = call
        while len(self.last) > CALLS:
            del self.last[next(iter(self.last))]

    def fetched(self, batch: Any, batch_size: Any) -> None:
        """A loader gave a batch. Its samples are known where it has a batch size: the leading size of the tensors."""
        if self.closed:
            return
        if self.session.constructed and not self._looked:
            # Everything is set up, and the first forward is about to come.
            self._looked = True
            self.look(root_modules())
        sizes = {int(t.shape[0]) for t in tensors(batch) if t.ndim}
        if not isinstance(batch_size, int):
            return  # one item of the data set may be a set of rows that belong together
        if batch_size in sizes:
            self._batch_sizes.append(batch_size)
        elif len(sizes) == 1 and min(sizes) < batch_size:
            self._batch_sizes.append(sizes.pop())  # the last batch of an epoch

    def backward(self) -> None:
        now = time.monotonic()
        for call in self.last.values():
            if call.took is None:
                call.took = now - call.began

    def close(self) -> None:
        """Take the hooks off and let go of the inputs."""
        self.closed = True
        for undo in self._undo.values():
            undo()
        self._undo.clear()
        self.last.clear()


def root_modules() -> list[Any]:
    """Modules that no other module holds."""
    import torch

    found = [obj for obj in gc.get_objects() if issubclass(type(obj), torch.nn.Module)]
    children = {id(child) for m in found for child in (m.__dict__.get("_modules") or {}).values()}
    return [m for m in found if id(m) not in children]


def _has_forward(module: Any) -> bool:
    import torch

    forward = getattr(type(module), "forward", None)
    return forward is not None and forward is not torch.nn.Module.forward


def _parts(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The outermost modules below that can be called and have parameters."""
    for name, part in module.named_children():
        if next(part.parameters(), None) is None:
            continue
        if _has_forward(part):
            yield f"{path}.{name}", part
        else:
            yield from _parts(part, f"{path}.{name}")
