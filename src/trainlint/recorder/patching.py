"""Putting instruments around the user's libraries: on import, and around calls."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Before = Callable[..., Any]
After = Callable[..., Any]
Installer = Callable[[ModuleType], None]

#: Set on every function that an instrument replaced, to the original.
ORIGINAL = "__trainlint_original__"
#: Names of the instruments that wrapped a function.
LABELS = "__trainlint_labels__"


class ImportHooks(importlib.abc.MetaPathFinder):
    """Calls installers right after a module has been executed, and costs a dictionary look-up for all others."""

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._installers: dict[str, list[Installer]] = {}
        self._report = report
        self._active: set[str] = set()

    def on_import(self, name: str, installer: Installer) -> None:
        """Run ``installer(module)`` once module ``name`` is imported (now, if it is already)."""
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(getattr(loaded, "__spec__", None), "_initializing", False) is False:
            self._run(name, installer, loaded)
            return
        self._installers.setdefault(name, []).append(installer)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._installers or fullname in self._active:
            return None
        self._active.add(fullname)
        try:
            spec: importlib.machinery.ModuleSpec | None = None
            for finder in sys.meta_path:
                if finder is self:
                    continue
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find is not None else None
                if spec is not None:
                    break
        finally:
            self._active.discard(fullname)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        loader = spec.loader
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # The loader goes back to what it was before user code can look at it.
            try:
                del loader.__dict__["exec_module"]
            except (KeyError, AttributeError):
                pass
            original(module)
            for installer in self._installers.pop(fullname, []):
                self._run(fullname, installer, module)

        try:
            setattr(loader, "exec_module", exec_module)
        except AttributeError:
            return None
        return spec

    def _run(self, name: str, installer: Installer, module: ModuleType) -> None:
        try:
            installer(module)
        except Exception as error:
            self._report(f"instrumenting {name}", error)


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace ``owner.name`` by ``make(original)``, keeping name, docstring and signature.

    Does nothing and returns ``False`` when the attribute is missing or the calling instrument has replaced it before;
    several instruments may wrap the same function. Static and class methods keep their kind. ``torch.jit.script`` is
    led to the original.
    """
    label = sys._getframe(1).f_globals.get("__name__", "")
    raw = owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name, None)
    if raw is None and isinstance(owner, type):
        raw = getattr(owner, name, None)
    if raw is None:
        return False
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind is not None else raw
    labels: frozenset[str] = getattr(original, LABELS, frozenset())
    if label in labels:
        return False
    replacement = make(original)
    try:
        functools.update_wrapper(replacement, original)
    except Exception:
        pass
    setattr(replacement, ORIGINAL, original)
    setattr(replacement, LABELS, labels | {label})
    # torch.jit.script cannot compile *args; these two attributes make it compile the original instead.
    setattr(replacement, "__script_if_tracing_wrapper", True)
    setattr(replacement, "__original_fn", getattr(original, "__original_fn", original))
    setattr(owner, name, kind(replacement) if kind is not None else replacement)
    return True


def around(
    before: Before | None = None, after: After | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For :func:`wrap`: call ``before(*args, **kwargs)`` and ``after(result, token, *args, **kwargs)``.

    ``before``'s return value is the ``token``. Both must be quiet (``Recorder.quiet``): they must not raise. When the
    original raises, ``after`` is not called.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            token = before(*args, **kwargs) if before is not None else None
            result = original(*args, **kwargs)
            if after is not None:
                after(result, token, *args, **kwargs)
            return result

        return replacement

    return make
