"""Putting everything back after a forward that the program did not ask for.

Random number generators, modes, buffers, and the attributes of modules and of the program's own objects that they hold
are noted before and restored after. Other tensors are protected as they are written to: a dispatch mode sees every
in-place operation, and the first write to memory that existed before keeps a copy of it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from .core import is_user_file

#: Objects that are noted, and entries of one container.
OBJECTS = 50_000
ENTRIES = 100_000
#: Bytes of one buffer, and of all of them, that are copied beforehand.
LARGE = 64 << 20
ALL = 1 << 30
#: How deep the program's own objects are followed from a module.
DEPTH = 6

_VALUES = (int, float, complex, str, bytes, bool, type(None))


class Refused(Exception):
    """The forward does something that must not be done twice."""


class TooLong(Exception):
    """It takes more time than it may."""


class Kept:
    """Everything that a forward of these modules may change, as far as it can be known."""

    def __init__(self, modules: list[Any], others: list[Any]) -> None:
        self._known: dict[int, Any] = {}
        self._copied: set[int] = set()
        self._bytes = 0
        self._undo: list[Callable[[], None]] = []
        self.versions: list[tuple[Any, int]] = []
        self._random()
        classes: set[type] = set()
        for module in modules:
            self._module(module)
            classes.update(type(module).__mro__)
        for cls in classes:
            if _own(cls):
                self._class(cls)
        for other in others:
            self._follow(other, 0)
        # What another thread of the program's has changed in the meantime must not be taken back.
        alone = threading.active_count() == 1
        for loaded in list(sys.modules.values()) if alone else ():
            file = getattr(loaded, "__file__", None)
            if isinstance(file, str) and is_user_file(file) and isinstance(loaded, types.ModuleType):
                self._globals(vars(loaded))

    def restore(self) -> None:
        """Put everything back; every part of it is tried."""
        failed: Exception | None = None
        for undo in reversed(self._undo):
            try:
                undo()
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    def restore_versions(self) -> None:
        """The version counters: what the forward wrote has been put back."""
        import torch

        changed = [(t, v) for t, v in self.versions if t._version != v]
        if changed:
            torch._C._autograd._unsafe_set_version_counter(tuple(t for t, _ in changed), tuple(v for _, v in changed))

    # -- random numbers

    def _random(self) -> None:
        import torch

        python = random.getstate()
        self._undo.append(lambda: random.setstate(python))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            state = numpy.random.get_state()
            self._undo.append(lambda: numpy.random.set_state(state))
        cpu = torch.get_rng_state()
        self._undo.append(lambda: torch.set_rng_state(cpu))
        for name in ("cuda", "xpu"):
            device = getattr(torch, name, None)
            if device is not None and device.is_available() and device.is_initialized():
                for index in range(device.device_count()):
                    self._device_random(device, index)
        if torch.backends.mps.is_available():
            mps = torch.mps.get_rng_state()
            self._undo.append(lambda: torch.mps.set_rng_state(mps))

    def _device_random(self, device: Any, index: int) -> None:
        state = device.get_rng_state(index)
        self._undo.append(lambda: device.set_rng_state(state, index))

    def _generator(self, generator: Any) -> bool:
        """A random number generator of the program's own."""
        import torch

        if isinstance(generator, torch.Generator):
            state = generator.get_state()
            self._undo.append(lambda: _set(generator, state))
        elif isinstance(generator, random.Random):
            known = generator.getstate()
            self._undo.append(lambda: generator.setstate(known))
        elif type(generator).__module__.startswith("numpy.random"):
            bits = getattr(generator, "bit_generator", None)
            if bits is not None:
                now = bits.state
                self._undo.append(lambda: setattr(bits, "state", now))
            elif hasattr(generator, "set_state"):
                legacy = generator.get_state()
                self._undo.append(lambda: generator.set_state(legacy))
        else:
            return False
        return True

    # -- modules

    def _module(self, module: Any) -> None:
        if id(module) in self._known:
            return
        self._known[id(module)] = module
        own = module.__dict__
        saved = dict(own)
        for name in ("_buffers", "_parameters", "_modules"):
            held = own.get(name)
            if isinstance(held, dict):
                self._dict(held)
        for buffer in list((own.get("_buffers") or {}).values()):
            if buffer is not None:
                self._buffer(buffer)
        for parameter in list((own.get("_parameters") or {}).values()):
            if parameter is not None:
                self._parameter(parameter)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for hook in list((own.get(hooks) or {}).values()):
                self._follow(hook, 1)
        for name, value in saved.items():
            if name not in ("_buffers", "_parameters", "_modules") and not name.endswith("_hooks"):
                self._follow(value, 1)
        self._undo.append(lambda: _put_back(own, saved))

    def _buffer(self, buffer: Any) -> None:
        if id(buffer) in self._known or buffer.device.type == "meta":
            return
        self._known[id(buffer)] = buffer
        if not buffer.is_inference():
            self.versions.append((buffer, buffer._version))
        memory = buffer.untyped_storage()
        address, size = memory.data_ptr(), memory.nbytes()
        # Batch norm writes its statistics without telling the dispatcher; quantised weights are too large to copy.
        if address and address not in self._copied and size <= LARGE and self._bytes + size <= ALL:
            self._copied.add(address)
            self._bytes += size
            copy = memory.clone()
            self._undo.append(lambda: memory.copy_(copy) and None)

    def _parameter(self, parameter: Any) -> None:
        if id(parameter) in self._known:
            return
        self._known[id(parameter)] = parameter
        grad, trained = parameter.grad, parameter.requires_grad

        def undo() -> None:
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)

        self._undo.append(undo)
        for tensor in (parameter, grad):
            if tensor is not None and not tensor.is_inference():
                self.versions.append((tensor, tensor._version))

    # -- plain Python

    def _follow(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _VALUES or depth > DEPTH or id(value) in self._known or len(self._known) > OBJECTS:
            return
        import torch

        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                self._module(module)
        elif isinstance(value, (torch.Tensor, type)):
            return
        elif kind in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
            self._dict(value)
            for item in list(value.values())[:ENTRIES]:
                self._follow(item, depth + 1)
        elif kind in (list, collections.deque, set):
            self._sequence(value)
            for item in list(value)[:ENTRIES]:
                self._follow(item, depth + 1)
        elif kind is tuple:
            for item in value:
                self._follow(item, depth + 1)
        elif self._generator(value):
            self._known[id(value)] = value
        elif isinstance(value, types.FunctionType):
            self._known[id(value)] = value
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):
                    content = cell.cell_contents
                    self._undo.append(lambda cell=cell, content=content: _refill(cell, content))  # type: ignore[misc]
                    self._follow(content, depth + 1)
        elif isinstance(value, types.MethodType):
            self._follow(value.__self__, depth)
        elif kind.__module__ == "numpy" and isinstance(getattr(value, "nbytes", None), int) and hasattr(value, "flags"):
            self._array(value)
        elif _own(kind) and isinstance(getattr(value, "__dict__", None), dict):
            self._known[id(value)] = value
            own = value.__dict__
            saved = dict(own)
            self._undo.append(lambda: _put_back(own, saved))
            for item in saved.values():
                self._follow(item, depth + 1)

    def _dict(self, value: Any) -> None:
        if id(value) in self._known or len(value) > ENTRIES:
            return
        self._known[id(value)] = value
        saved = dict(value)
        self._undo.append(lambda: _put_back(value, saved))

    def _sequence(self, value: Any) -> None:
        self._known[id(value)] = value
        if type(value) is list and len(value) > ENTRIES:
            length = len(value)
            self._undo.append(lambda: value.__delitem__(slice(length, None)))
            return
        saved = list(value)

        def undo() -> None:
            now = list(value)
            if len(now) == len(saved) and all(a is b for a, b in zip(now, saved, strict=True)):
                return
            value.clear()
            value.update(saved) if isinstance(value, set) else value.extend(saved)

        self._undo.append(undo)

    def _array(self, value: Any) -> None:
        if value.nbytes > 1 << 24 or value.dtype.hasobject:
            return
        self._known[id(value)] = value
        saved = value.copy()

        def undo() -> None:
            if value.tobytes() != saved.tobytes():
                value[...] = saved

        self._undo.append(undo)

    def _class(self, cls: type) -> None:
        values = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
        for name, value in values.items():
            if type(value) in _VALUES:
                self._undo.append(
                    lambda name=name, value=value: (  # type: ignore[misc]
                        setattr(cls, name, value) if vars(cls).get(name) is not value else None
                    )
                )
            elif type(value) in (dict, list, collections.Counter, collections.deque, set):
                self._follow(value, DEPTH)

    def _globals(self, names: dict[str, Any]) -> None:
        """Counters and lists of the program's own source files."""
        numbers = {k: v for k, v in names.items() if type(v) in _VALUES and not k.startswith("__")}

        def undo() -> None:
            for name, value in numbers.items():
                if names.get(name) is not value:
                    names[name] = value

        self._undo.append(undo)
        for value in list(names.values()):
            if type(value) in (list, dict, collections.Counter, collections.deque, set, collections.defaultdict):
                self._follow(value, DEPTH - 1)
            elif self._known.get(id(value)) is None and not isinstance(value, type):
                if isinstance(value, random.Random) or type(value).__name__ in ("Generator", "RandomState"):
                    if self._generator(value):
                        self._known[id(value)] = value


def _own(cls: type) -> bool:
    """A class of the program's own source."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return isinstance(file, str) and is_user_file(file)


def _put_back(now: Any, saved: dict[Any, Any]) -> None:
    if list(now) != list(saved):
        now.clear()
        now.update(saved)
        return
    for key, value in saved.items():
        if now[key] is not value:
            now[key] = value


def _set(generator: Any, state: Any) -> None:
    generator.set_state(state)


def _refill(cell: Any, content: Any) -> None:
    if cell.cell_contents is not content:
        cell.cell_contents = content


def protection(deadline: float) -> Any:
    """A dispatch mode under which memory that existed before keeps a copy from the first write on.

    ``mode.restore()`` puts it back. Raises :class:`Refused` where ranks talk to each other, :class:`TooLong` after the
    deadline (of ``time.monotonic``), both out of the operation that is about to run.
    """
    from torch.utils import _python_dispatch

    base: Any = _python_dispatch.TorchDispatchMode

    class Protection(base):  # type: ignore[misc]
        #: flex_attention and its like are passed on as they are.
        supports_higher_order_operators = True

        def __init__(self) -> None:
            super().__init__()
            self._new: set[int] = set()
            self._saved: dict[int, tuple[Any, Any]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if time.monotonic() > deadline:
                raise TooLong("it took too long")
            schema = getattr(func, "_schema", None)
            if schema is None:
                return func(*args, **kwargs)
            if getattr(func, "namespace", "") in ("c10d", "_c10d_functional", "c10d_functional"):
                raise Refused("its forward communicates between ranks")
            before = {_address(t) for t in _tensors(args)} | {_address(t) for t in _tensors(kwargs)}
            if schema.is_mutable:
                for position, argument in enumerate(schema.arguments):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        value = args[position] if position < len(args) else kwargs.get(argument.name)
                        for tensor in _tensors(value):
                            self._protect(tensor)
            result = func(*args, **kwargs)
            for tensor in _tensors(result):
                address = _address(tensor)
                if address not in before:
                    self._new.add(address)
            return result

        def _protect(self, tensor: Any) -> None:
            address = _address(tensor)
            if address and address not in self._new and address not in self._saved:
                memory = tensor.untyped_storage()
                self._saved[address] = (memory, memory.clone())

        def restore(self) -> None:
            for memory, copy in self._saved.values():
                if memory.nbytes() == copy.nbytes():
                    memory.copy_(copy)

    return Protection()


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _address(tensor: Any) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except Exception:  # a wrapper without memory of its own
        return 0


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What a forward prints or logs would appear a second time."""
    out, err, level = sys.stdout, sys.stderr, logging.root.manager.disable
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err
            logging.disable(level)
