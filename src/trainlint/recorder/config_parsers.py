"""Follows settings that a program takes from its command line: argparse, and parsers built on it."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from types import FrameType, ModuleType
from typing import Any

from .config_tracker import Tracker, sink
from .core import Recorder, is_user_file
from .patching import wrap

_ARGPARSE = os.path.abspath(argparse.__file__)

_tracked: dict[int, tuple[Any, Tracker]] = {}
_nested = threading.local()


class Watched(argparse.Namespace):
    """A Namespace that notes who reads it. An instance becomes one by its class and goes back the same way."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            if name == "__dict__":
                _whole(self, sys._getframe(1))
            return object.__getattribute__(self, name)
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            _miss(self, name, sys._getframe(1))
            raise
        _note(self, name, "attribute", sys._getframe(1))
        return value

    def __contains__(self, key: str) -> bool:
        found = key in object.__getattribute__(self, "__dict__")
        if found:
            _note(self, key, "contains", sys._getframe(1))
        else:
            _miss(self, key, sys._getframe(1))
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        content = object.__getattribute__(self, "__dict__")
        found = _tracked.get(id(self))
        if found is not None:
            found[1].bulk("", "a copy or pickle of the namespace", sys._getframe(1))
        return argparse.Namespace, (), dict(content)


Watched.__name__ = Watched.__qualname__ = "Namespace"
Watched.__module__ = "argparse"


def _note(namespace: Any, name: str, how: str, frame: FrameType) -> None:
    found = _tracked.get(id(namespace))
    if found is not None and frame.f_code.co_filename != _ARGPARSE:
        found[1].read(name, how, frame)


def _miss(namespace: Any, name: str, frame: FrameType) -> None:
    found = _tracked.get(id(namespace))
    if found is not None and frame.f_code.co_filename != _ARGPARSE:
        found[1].miss("", name, None, frame)


def _whole(namespace: Any, frame: FrameType) -> None:
    """``vars(args)`` or ``args.__dict__``; argparse's own look at it (repr, in, ==) is no read."""
    found = _tracked.get(id(namespace))
    if found is not None and os.path.abspath(frame.f_code.co_filename) != _ARGPARSE:
        found[1].bulk("", sink(frame) or "vars()", frame)


def release() -> None:
    """Namespaces go back to their own class."""
    for namespace, tracker in list(_tracked.values()):
        tracker.release()
        try:
            namespace.__class__ = argparse.Namespace
        except TypeError:
            pass
    _tracked.clear()


def _explicit(parser: argparse.ArgumentParser, arguments: Any) -> set[str]:
    """Destinations that stand on the command line."""
    found: set[str] = set()
    known = parser._option_string_actions
    for word in arguments if arguments is not None else sys.argv[1:]:
        if not isinstance(word, str) or not word.startswith("-") or word == "--":
            continue
        option = word.partition("=")[0]
        action = known.get(option)
        if action is None and option.startswith("--"):
            close = {a.dest for o, a in known.items() if o.startswith(option)}
            if len(close) == 1:
                found |= close
            continue
        if action is not None:
            found.add(action.dest)
    return found


def install_argparse(recorder: Recorder, new_tracker: Any) -> None:
    """Follow the namespaces that the user's own code asks an ``ArgumentParser`` for."""

    def make(original: Any) -> Any:
        def parse_known_args(self: Any, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename == argparse.__file__:
                frame = frame.f_back
            outer = getattr(_nested, "found", None)
            if outer is not None:  # a sub-command's parser
                outer |= _explicit(self, args)
                return original(self, args, namespace, **kwargs)
            if frame is None or not is_user_file(frame.f_code.co_filename):
                return original(self, args, namespace, **kwargs)
            _nested.found = explicit = _explicit(self, args)
            try:
                result = original(self, args, namespace, **kwargs)
            finally:
                _nested.found = None
            recorder.quiet(_follow)(result, explicit, frame)
            return result

        return parse_known_args

    def _follow(result: Any, explicit: set[str], frame: FrameType) -> None:
        namespace = result[0]
        if namespace.__class__ is Watched:  # parsed in two rounds into one namespace
            _tracked[id(namespace)][1].add(dict(object.__getattribute__(namespace, "__dict__")), "", "default")
            return
        if type(namespace) is not argparse.Namespace or len(_tracked) > 20:
            return
        content = {k: v for k, v in vars(namespace).items() if not callable(v)}
        tracker = new_tracker(
            content,
            kind="argparse",
            by=f"argparse in {os.path.basename(frame.f_code.co_filename)}",
            origin="default",
            overridden=tuple(explicit),
        )
        if tracker is not None:
            _tracked[id(namespace)] = (namespace, tracker)
            namespace.__class__ = Watched

    wrap(argparse.ArgumentParser, "parse_known_args", make)


def install_hf_parser(recorder: Recorder, new_tracker: Any, module: ModuleType) -> None:
    """``HfArgumentParser`` (and TRL's): a strict parser into dataclasses. Values are noted, reads are not followed."""
    cls = getattr(module, "HfArgumentParser", None)
    if cls is None:
        return

    def after(name: str) -> Any:
        def make(original: Any) -> Any:
            def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
                depth = getattr(_nested, "hf", 0)
                _nested.hf = depth + 1
                try:
                    result = original(self, *args, **kwargs)
                finally:
                    _nested.hf = depth
                if depth == 0:
                    recorder.quiet(_fields)(self, name, result, args, kwargs)
                return result

            return parse

        return make

    def _fields(parser: Any, name: str, result: Any, args: Any, kwargs: Any) -> None:
        import dataclasses

        given: set[str] = set()
        if name == "parse_args_into_dataclasses":
            given = _explicit(parser, kwargs.get("args", args[0] if args else None))
        else:
            source = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(source, dict):
                given = set(dict.keys(source))
        content: dict[str, Any] = {}
        for made in result:
            if dataclasses.is_dataclass(made) and not isinstance(made, type):
                for item in dataclasses.fields(made):
                    if item.name in given:
                        content[item.name] = made.__dict__.get(item.name)
        if content:
            new_tracker(content, kind="dataclass", by=f"HfArgumentParser.{name}", origin="override", followed=False)

    for name in ("parse_args_into_dataclasses", "parse_dict"):
        wrap(cls, name, after(name))
