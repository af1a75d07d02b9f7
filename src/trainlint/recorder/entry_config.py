"""The config of an entry function, in the type that the function's annotation asks for.

Loaded from its file by ``bootstrap/run_entry.py`` into the user's interpreter: standard library only.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import enum
import inspect
import json
import os
import types
import typing
from collections.abc import Callable
from typing import Any

NOTHING: Any = object()


class EntryError(Exception):
    """The entry cannot be called; the text says why."""


def near_miss(name: str, names: list[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def with_article(noun: str) -> str:
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


class Config:
    """The config file, read the way its users read it, so that the recorder sees which keys are used."""

    def __init__(self, path: str, parsed: str | None) -> None:
        self.path = path
        self._parsed = parsed
        self._tree: Any = NOTHING

    def tree(self) -> Any:
        if self._tree is NOTHING:
            self._tree = self._read()
        return self._tree

    def mapping(self) -> dict[Any, Any]:
        tree = self.tree()
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise EntryError(f"{self.path} holds {with_article(type(tree).__name__)} and no keys")
        return tree

    def _read(self) -> Any:
        suffix = os.path.splitext(self.path)[1].lower()
        if suffix in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError:
                pass
            else:
                try:
                    with open(self.path, encoding="utf-8") as file:
                        return yaml.safe_load(file)
                except yaml.YAMLError as error:
                    raise EntryError(
                        "{} cannot be parsed: {}".format(self.path, " ".join(str(error).split()))
                    ) from None
        if suffix == ".json":
            try:
                with open(self.path, encoding="utf-8") as file:
                    return json.load(file)
            except ValueError as error:
                raise EntryError(f"{self.path} cannot be parsed: {error}") from None
        if self._parsed is None:
            raise EntryError(f"{self.path} cannot be read: only YAML, JSON and TOML are understood")
        with open(self._parsed, encoding="utf-8") as file:
            return json.load(file)


def argument(function: Callable[..., Any], config: Config | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the call.

    Raises:
        EntryError: the function wants more than a config, or there is none to give.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ((config.mapping(),) if config is not None else ()), {}
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(required) > 1:
        names = ", ".join(p.name for p in required)
        raise EntryError(f"the function needs {len(required)} arguments ({names}); an entry takes the config only")
    first = required[0] if required else takes[0] if takes else None
    if first is None:
        if config is not None and any(p.kind is p.VAR_KEYWORD for p in parameters):
            return (), dict(config.mapping())
        return (), {}
    if config is None:
        if required:
            raise EntryError(f"the function takes {first.name!r} and no config was given: trainlint check CONFIG ...")
        return (), {}
    if not required and first.name in ("argv", "args", "arguments"):
        return (), {}  # `def main(argv=None)`: a command line, not a config
    value = convert(annotation_of(function, first), config)
    return ((), {first.name: value}) if first.kind is first.KEYWORD_ONLY else ((value,), {})


def annotation_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's annotation, resolved when it is written as text."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
        return hints.get(parameter.name, parameter.annotation)
    except Exception:
        return parameter.annotation


def convert(wanted: Any, config: Config) -> Any:
    """The config as ``wanted``: dict (also without annotation), DictConfig, Namespace, dataclass, pydantic, path."""
    for choice in _choices(wanted):
        if choice in (inspect.Parameter.empty, typing.Any, object, dict) or typing.get_origin(choice) in (
            dict,
            collections.abc.Mapping,
            collections.abc.MutableMapping,
        ):
            return config.mapping()
        if isinstance(choice, str):  # an annotation that could not be resolved: its last name says enough
            name = choice.rpartition(".")[2].partition("[")[0]
            if name in ("DictConfig", "ListConfig"):
                return _omegaconf(config)
            if name in ("Namespace", "SimpleNamespace"):
                return namespace(config.mapping(), argparse.Namespace if name == "Namespace" else types.SimpleNamespace)
            return config.path if name in ("str", "Path") else config.mapping()
        if not isinstance(choice, type):
            continue
        if choice is str:
            return config.path
        if issubclass(choice, os.PathLike):
            return _path(choice, config.path)
        if choice.__module__.partition(".")[0] == "omegaconf":
            return _omegaconf(config)
        if issubclass(choice, (argparse.Namespace, types.SimpleNamespace)):
            return namespace(config.mapping(), choice)
        if issubclass(choice, dict) or choice in (collections.abc.Mapping, collections.abc.MutableMapping):
            return (
                config.mapping() if typing.is_typeddict(choice) or choice is dict else _call(choice, config.mapping())
            )
        if dataclasses.is_dataclass(choice) or hasattr(choice, "__attrs_attrs__"):
            return build(choice, config.mapping(), "")
        return _model(choice, config)
    raise EntryError(f"a config cannot be turned into {wanted}")


def _choices(wanted: Any) -> list[Any]:
    """The members of a Union without ``None``, else the annotation itself."""
    if typing.get_origin(wanted) is typing.Annotated:
        wanted = typing.get_args(wanted)[0]
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return [choice for choice in typing.get_args(wanted) if choice is not type(None)]
    return [wanted]


def _omegaconf(config: Config) -> Any:
    from omegaconf import OmegaConf

    if os.path.splitext(config.path)[1].lower() in (".yaml", ".yml", ".json"):
        return OmegaConf.load(config.path)
    return OmegaConf.create(config.mapping())


def _model(wanted: Any, config: Config) -> Any:
    """pydantic (2, then 1), then classes that say how they are made of a dict."""
    tree = config.mapping()
    for name in ("model_validate", "parse_obj", "from_dict"):
        make = getattr(wanted, name, None)
        if callable(make):
            return _call(make, tree, wanted.__name__)
    return _call(lambda values: wanted(**values), tree, wanted.__name__)


def _call(make: Callable[..., Any], tree: Any, name: str | None = None) -> Any:
    try:
        return make(tree)
    except Exception as error:
        what = name or getattr(make, "__qualname__", str(make))
        raise EntryError(f"the config does not fit {what}: {type(error).__name__}: {error}") from error


def namespace(tree: dict[Any, Any], kind: type) -> Any:
    """Sections become namespaces of the same kind; lists keep their dicts."""
    return kind(**{str(k): namespace(v, kind) if isinstance(v, dict) else v for k, v in tree.items()})


# ------------------------------------------------------------------------------------------------ dataclasses


def build(wanted: Any, tree: Any, path: str) -> Any:
    """A dataclass (or attrs class) of a section, nested ones too.

    Raises:
        EntryError: a key that no field takes, a field that no key gives, a value that does not fit.
    """
    if not isinstance(tree, dict):
        raise EntryError("{} must be a section for {}, not {!r}".format(path or "the config", wanted.__name__, tree))
    if dataclasses.is_dataclass(wanted):
        names = [f.name for f in dataclasses.fields(wanted) if f.init]
    else:
        names = [a.alias if hasattr(a, "alias") else a.name for a in wanted.__attrs_attrs__ if a.init]
    unknown = [str(key) for key in tree if key not in names]
    if unknown:
        full = ", ".join((path + "." + key if path else key) + near_miss(key, names) for key in unknown)
        raise EntryError(f"{wanted.__name__} has no field for {full}")
    missing = [name for name in _without_default(wanted) if name not in tree]
    if missing:
        raise EntryError(f"{wanted.__name__} needs {', '.join(missing)}, and {path or 'the config'} does not give it")
    try:
        hints = typing.get_type_hints(wanted)
    except Exception:
        hints = {}
    values = {
        key: fit(hints.get(key, typing.Any), value, path + "." + key if path else key) for key, value in tree.items()
    }
    try:
        return wanted(**values)
    except Exception as error:
        raise EntryError(f"{wanted.__name__} cannot be made of the config: {error}") from error


def _without_default(wanted: Any) -> list[str]:
    if not dataclasses.is_dataclass(wanted):
        return []
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(wanted) if f.init and f.default is none and f.default_factory is none]


def fit(wanted: Any, value: Any, path: str) -> Any:
    """One value for a field; what needs no conversion is passed as it is."""
    choices = _choices(wanted)
    if value is None or any(isinstance(c, type) and not isinstance(value, bool) and type(value) is c for c in choices):
        return value
    for choice in choices:
        origin, inner = typing.get_origin(choice), typing.get_args(choice)
        if isinstance(choice, type) and isinstance(value, dict):
            if dataclasses.is_dataclass(choice) or hasattr(choice, "__attrs_attrs__"):
                return build(choice, value, path)
            if hasattr(choice, "model_validate"):
                return _call(choice.model_validate, value)
        if origin in (list, tuple, set, collections.abc.Sequence) and isinstance(value, (list, tuple)):
            item = inner[0] if inner else typing.Any
            items = [fit(item, v, f"{path}[{i}]") for i, v in enumerate(value)]
            return tuple(items) if origin is tuple else set(items) if origin is set else items
        if origin in (dict, collections.abc.Mapping) and isinstance(value, dict):
            return {k: fit(inner[1] if len(inner) > 1 else typing.Any, v, f"{path}.{k}") for k, v in value.items()}
        if not isinstance(choice, type):
            continue
        if issubclass(choice, enum.Enum):
            member = next((m for m in choice if value in (m.value, m.name)), None)
            if member is not None:
                return member
            raise EntryError("{} must be one of {}, not {!r}".format(path, ", ".join(m.name for m in choice), value))
        if choice is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:  # YAML 1.1 reads 1e-4 as text
                return float(value)
            except ValueError:
                raise EntryError(f"{path} must be a number, not {value!r}") from None
        if choice is tuple and isinstance(value, list):
            return tuple(value)
        if issubclass(choice, os.PathLike) and isinstance(value, str):
            return _path(choice, value)
    return value


def _path(kind: Any, text: str) -> Any:
    import pathlib

    return kind(text) if isinstance(kind, type) and issubclass(kind, pathlib.PurePath) else pathlib.Path(text)
