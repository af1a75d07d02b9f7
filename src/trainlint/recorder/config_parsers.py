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
    """``HfArgumentParser`` (transformers, and TRL's copy): a parser into dataclasses.

    That a key became an argument is noted as a read; what the dataclass does with it is not followed. Of a file that
    the parser reads itself, the keys that became none are known to be dropped (``allow_extra_keys=True``).
    """
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
                    recorder.quiet(_parsed)(self, name, result, args, kwargs, sys._getframe(1))
                return result

            return parse

        return make

    def _parsed(parser: Any, name: str, result: Any, args: Any, kwargs: Any, frame: FrameType) -> None:
        import dataclasses

        made = [m for m in result if dataclasses.is_dataclass(m) and not isinstance(m, type)]
        fields = {item.name: m.__dict__.get(item.name) for m in made for item in dataclasses.fields(m) if item.init}
        by = f"HfArgumentParser.{name}"
        if name == "parse_args_into_dataclasses":
            given = _explicit(parser, kwargs.get("args", args[0] if args else None))
            content = {key: value for key, value in fields.items() if key in given}
            if content:
                new_tracker(content, kind="dataclass", by=by, origin="override", followed=False)
            return
        source = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(source, dict):
            return
        content = {key: dict.get(source, key) for key in dict.keys(source)}
        if not frame.f_code.co_name.startswith("parse_"):
            # A dict of the user's own: others may read the rest of it.
            content = {key: value for key, value in content.items() if key in fields}
        _taken(new_tracker, content, fields, by, frame)

    for name in ("parse_args_into_dataclasses", "parse_dict"):
        wrap(cls, name, after(name))


def install_trl_parser(recorder: Recorder, new_tracker: Any, module: ModuleType) -> None:
    """``TrlParser``: keys of the config file become defaults of options; TRL's own scripts drop the others silently."""
    cls = getattr(module, "TrlParser", None)
    if cls is None or "set_defaults_with_config" not in vars(cls):
        return

    def make(original: Any) -> Any:
        def set_defaults_with_config(self: Any, **config: Any) -> Any:
            remaining = original(self, **config)
            recorder.quiet(_defaults_set)(config, remaining, sys._getframe(1))
            return remaining

        return set_defaults_with_config

    def _defaults_set(config: dict[str, Any], remaining: Any, frame: FrameType) -> None:
        # What no option is named after comes back as "--key", "value".
        left = {word.removeprefix("--") for word in remaining[::2]} if isinstance(remaining, list) else set()
        _taken(new_tracker, config, set(config) - left, "TrlParser", frame)

    wrap(cls, "set_defaults_with_config", make)


def _taken(new_tracker: Any, content: dict[str, Any], taken: Any, by: str, frame: FrameType) -> None:
    """Keys that a parser was given, of which some became arguments."""
    tracker = new_tracker(content, kind="dataclass", by=by, origin="file") if content else None
    if tracker is not None:
        for key in content:
            if key in taken:
                tracker.bulk(key, by, frame, how="item")
