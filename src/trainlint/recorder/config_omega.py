"""Follows OmegaConf containers.

Nothing is replaced: the accessors of ``DictConfig`` note reads of roots that were marked, after the original has
answered. OmegaConf's (and Hydra's) own calls of them are not reads. What OmegaConf makes of a marked config
(``to_container``, ``merge``, ``create``, copies) stays followed.
"""

from __future__ import annotations

import os
import re
import sys
from types import FrameType, ModuleType
from typing import Any

from . import config_section
from .config_paths import element, join, leaves
from .config_section import Section, plain, section_of, track
from .config_tracker import Tracker, loops_over
from .core import Recorder, is_user_file
from .patching import wrap

#: Folders of omegaconf and hydra: what their own code reads is no use of a key.
_internal: list[str] = []
_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_][\w.\[\]]*)\s*\}")


class Omega:
    """The marked containers of one process."""

    def __init__(self, recorder: Recorder, new_tracker: Any) -> None:
        self.recorder = recorder
        #: Makes and registers a Tracker.
        self.new_tracker = new_tracker
        #: id of a root container -> (the container, tracker, path of the container in the tracked config)
        self.roots: dict[int, tuple[Any, Tracker, str]] = {}
        self.to_container: Any = None
        self.hydra_info: dict[str, Any] = {}

    # -- which containers

    def where(self, node: Any) -> tuple[Tracker, str] | None:
        """Tracker and path of a container, ``None`` when it is not followed."""
        if not self.roots:
            return None
        try:
            entry = self.roots.get(id(node._get_root()))
            if entry is None:
                return None
            return entry[1], _under(entry[2], _path_of(node))
        except Exception:
            return None

    def mark(self, root: Any, tracker: Tracker, path: str = "") -> None:
        """Follow a root container."""
        if len(self.roots) < 500 and hasattr(root, "_get_root"):
            self.roots[id(root)] = (root, tracker, path)

    def raw(self, node: Any) -> Any:
        """Plain content with interpolations as text; ``None`` when that cannot be had."""
        try:
            return self.to_container(node, resolve=False)
        except Exception:
            return None

    def resolved(self, node: Any) -> Any:
        """Plain content, resolved where it can be."""
        try:
            return self.to_container(node, resolve=True)
        except Exception:
            return self.raw(node)

    def adopt(self, root: Any, *, kind: str, by: str, files: Any = (), overridden: Any = ()) -> Tracker | None:
        """Begin to follow a container as a config of its own."""
        raw = self.raw(root)
        if not isinstance(raw, dict):
            return None
        tracker: Tracker | None = self.new_tracker(
            self.resolved(root), kind=kind, by=by, files=files, overridden=overridden
        )
        if tracker is not None:
            _references(raw, "", tracker)
            self.mark(root, tracker)
        return tracker

    def follow(self, made: Any, info: tuple[Tracker, str], later: tuple[Any, ...] = ()) -> None:
        """``made`` continues a followed config: new keys and changed values are taken over.

        What comes from ``later`` configs overrides; other new keys are defaults.
        """
        tracker, path = info
        for other in later:
            content = self.resolved(other) if is_container(other) else plain_section(other)
            if isinstance(content, dict):
                tracker.overridden += tuple(leaf for leaf, _ in leaves(content, path))
        tracker.add(self.resolved(made), path, "default")
        _references(self.raw(made), path, tracker)
        self.mark(made, tracker, path)

    # -- reads

    def note(self, node: Any, key: Any, how: str, value: Any, frame: FrameType) -> None:
        if is_container(value) and type(value).__name__ != "ListConfig":
            return
        if _inside(frame):
            return
        info = self.where(node)
        if info is None:
            return
        tracker, path = info
        by = ""
        if _last_keys.get(id(node)) == (id(frame), frame.f_lasti):
            how, by = "bulk", "**"
        elif id(frame.f_code) in _iterated.get(id(node), ()) and loops_over(frame, key):
            how, by = "bulk", "a loop over the section"
        tracker.read(join(path, key), how, frame, by)

    def miss(self, node: Any, key: Any, default: Any, frame: FrameType) -> None:
        if _inside(frame):
            return
        info = self.where(node)
        if info is not None:
            info[0].miss(info[1], key, default, frame)


#: For containers whose ``keys()`` was just called: the caller's frame and instruction (see config_section).
_last_keys: dict[int, tuple[int, int]] = {}
#: Containers that some code iterates over: container -> code objects.
_iterated: dict[int, set[int]] = {}


def _inside(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(tuple(_internal))


def library(module: ModuleType) -> None:
    """Remember the folder of the top package of ``module``."""
    top = sys.modules.get(module.__name__.partition(".")[0])
    file = getattr(top, "__file__", None)
    folder = os.path.dirname(file) + os.sep if file else ""
    if folder and folder not in _internal:
        _internal.append(folder)


def _path_of(node: Any) -> str:
    """Path of a node from its root. (``_get_full_key`` loses the brackets of list elements after a deepcopy.)"""
    steps: list[tuple[Any, bool]] = []
    parent = node._get_parent()
    while parent is not None and len(steps) < 200:
        steps.append((node._key(), type(parent).__name__ == "ListConfig"))
        node, parent = parent, parent._get_parent()
    path = ""
    for key, in_list in reversed(steps):
        path = element(path, key) if in_list else join(path, key)
    return path


def _under(prefix: str, inner: str) -> str:
    if not prefix or not inner:
        return prefix or inner
    return prefix + inner if inner.startswith("[") else f"{prefix}.{inner}"


def is_container(value: Any) -> bool:
    return type(value).__name__ in ("DictConfig", "ListConfig")


def _references(raw: Any, path: str, tracker: Tracker) -> None:
    """Note every ``${other.key}``: reading the key that holds it reads the other."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            _references(value, join(path, key), tracker)
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            _references(value, f"{path}[{index}]", tracker)
    elif isinstance(raw, str) and "${" in raw:
        for name in _REFERENCE.findall(raw):
            dots = len(name) - len(name.lstrip("."))
            target = name[dots:]
            if dots:
                base = path
                for _ in range(dots):
                    base = base.rpartition(".")[0]
                target = _under(base, target)
            tracker.alias(path, target)


# --------------------------------------------------------------------------------------------- omegaconf


def install_omegaconf(omega: Omega, module: ModuleType) -> None:
    """Instrument ``omegaconf`` right after it was imported."""
    library(module)
    OmegaConf, DictConfig = module.OmegaConf, module.DictConfig
    omega.to_container = OmegaConf.__dict__["to_container"].__func__
    _accept_sections()
    _accessors(omega, DictConfig)
    _copies(omega, DictConfig)
    _makers(omega, OmegaConf)
    _takers(omega, OmegaConf)


def _accept_sections() -> None:
    """OmegaConf takes a dict by its exact type; a section is one."""
    for name in ("omegaconf._utils", "omegaconf.basecontainer", "omegaconf.dictconfig", "omegaconf.omegaconf"):
        module = sys.modules.get(name)
        original = getattr(module, "is_primitive_dict", None)
        if module is None or original is None:
            continue

        def is_primitive_dict(obj: Any, original: Any = original) -> Any:
            return obj.__class__ is Section or original(obj)

        module.is_primitive_dict = is_primitive_dict  # type: ignore[attr-defined]


def _accessors(omega: Omega, cls: type) -> None:
    def reader(how: str) -> Any:
        def make(original: Any) -> Any:
            def accessor(self: Any, key: Any) -> Any:
                if not omega.roots or (isinstance(key, str) and key.startswith("_")):
                    return original(self, key)
                try:
                    value = original(self, key)
                except (AttributeError, KeyError):
                    omega.miss(self, key, None, sys._getframe(1))
                    raise
                omega.note(self, key, how, value, sys._getframe(1))
                return value

            return accessor

        return make

    wrap(cls, "__getattr__", reader("attribute"))
    wrap(cls, "__getitem__", reader("item"))

    def make_get(original: Any) -> Any:
        def get(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            value = original(self, key, *args, **kwargs)
            if omega.roots:
                default = args[0] if args else kwargs.get("default_value")
                if _has(self, key):
                    omega.note(self, key, "get", value, sys._getframe(1))
                else:
                    omega.miss(self, key, default, sys._getframe(1))
            return value

        return get

    wrap(cls, "get", make_get)

    def make_contains(original: Any) -> Any:
        def contains(self: Any, key: Any) -> Any:
            found = original(self, key)
            if omega.roots:
                if found:
                    omega.note(self, key, "contains", None, sys._getframe(1))
                else:
                    omega.miss(self, key, None, sys._getframe(1))
            return found

        return contains

    wrap(cls, "__contains__", make_contains)

    def make_pop(original: Any) -> Any:
        def pop(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            present = bool(omega.roots) and _has(self, key)
            value = original(self, key, *args, **kwargs)
            if present:
                omega.note(self, key, "item", value, sys._getframe(1))
            elif omega.roots:
                omega.miss(self, key, args[0] if args else None, sys._getframe(1))
            return value

        return pop

    wrap(cls, "pop", make_pop)

    def make_all(name: str) -> Any:
        def make(original: Any) -> Any:
            def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
                if omega.roots:
                    frame = sys._getframe(1)
                    info = omega.where(self) if not _inside(frame) else None
                    content = self.__dict__["_content"]
                    if info is not None and isinstance(content, dict):
                        if name == "keys()":
                            _last_keys.clear()
                            _last_keys[id(self)] = (id(frame), frame.f_lasti)
                            _iterated.setdefault(id(self), set()).add(id(frame.f_code))
                        for key in list(content):
                            info[0].read(join(info[1], key), "bulk", frame, name)
                return original(self, *args, **kwargs)

            return taken

        return make

    for method, name in (("keys", "keys()"), ("__iter__", "keys()"), ("items", "items()"), ("values", "values()")):
        wrap(cls, method, make_all(name))


def _has(node: Any, key: Any) -> bool:
    content = node.__dict__.get("_content")
    return isinstance(content, dict) and key in content


def _copies(omega: Omega, cls: type) -> None:
    def make(original: Any) -> Any:
        def copied(self: Any, *args: Any) -> Any:
            made = original(self, *args)
            entry = omega.roots.get(id(self)) if omega.roots else None
            if entry is not None:
                omega.mark(made, entry[1], entry[2])
            return made

        return copied

    wrap(cls, "__deepcopy__", make)
    wrap(cls, "__copy__", make)

    def make_merge(original: Any) -> Any:
        def merged(self: Any, *others: Any, **kwargs: Any) -> Any:
            result = original(self, *(plain_section(o) for o in others), **kwargs)
            if omega.roots:
                info = omega.where(self)
                for other in others:
                    info = info or omega.where(other) if is_container(other) else info
                if info is not None:
                    omega.recorder.quiet(omega.follow)(self, info, others)
            return result

        return merged

    for name in ("merge_with", "merge_with_dotlist", "merge_with_cli"):
        wrap(cls, name, make_merge)


def plain_section(value: Any) -> Any:
    return plain(value) if section_of(value) is not None else value


def _makers(omega: Omega, cls: type) -> None:
    def make_create(original: Any) -> Any:
        def create(*args: Any, **kwargs: Any) -> Any:
            obj = args[0] if args else kwargs.get("obj")
            info = section_of(obj)
            if info is None and omega.roots and is_container(obj):
                info = omega.where(obj)
            if args:
                args = (plain_section(args[0]), *args[1:])
            elif "obj" in kwargs:
                kwargs["obj"] = plain_section(kwargs["obj"])
            made = original(*args, **kwargs)
            if info is not None:
                omega.recorder.quiet(omega.follow)(made, info)
            return made

        return create

    wrap(cls, "create", make_create)

    def make_merge(original: Any) -> Any:
        def merge(*configs: Any, **kwargs: Any) -> Any:
            infos = [section_of(c) or (omega.where(c) if is_container(c) else None) for c in configs]
            made = original(*(plain_section(c) for c in configs), **kwargs)
            found = next((i for i in infos if i is not None), None)
            if found is not None:
                omega.recorder.quiet(omega.follow)(made, found, configs[infos.index(found) + 1 :])
            return made

        return merge

    wrap(cls, "merge", make_merge)
    wrap(cls, "unsafe_merge", make_merge)

    def make_masked(original: Any) -> Any:
        def masked_copy(conf: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(conf, *args, **kwargs)
            info = omega.where(conf)
            if info is not None:
                omega.mark(made, *info)
            return made

        return masked_copy

    wrap(cls, "masked_copy", make_masked)


def _takers(omega: Omega, cls: type) -> None:
    def make_to_container(original: Any) -> Any:
        def to_container(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(cfg, *args, **kwargs)
            return _taken(omega, cfg, result, "OmegaConf.to_container", sys._getframe(1))

        return to_container

    wrap(cls, "to_container", make_to_container)

    def make_to_object(original: Any) -> Any:
        def to_object(cfg: Any) -> Any:
            return _taken(omega, cfg, original(cfg), "OmegaConf.to_object", sys._getframe(1))

        return to_object

    wrap(cls, "to_object", make_to_object)

    def make_dump(name: str) -> Any:
        def make(original: Any) -> Any:
            def dump(*args: Any, **kwargs: Any) -> Any:
                cfg = args[0] if args else kwargs.get("cfg", kwargs.get("config"))
                info = section_of(cfg) or (omega.where(cfg) if omega.roots and is_container(cfg) else None)
                if info is not None:
                    frame = sys._getframe(1)
                    if not _inside(frame):
                        info[0].bulk(info[1], name, frame)
                    if args:
                        args = (plain_section(args[0]), *args[1:])
                return original(*args, **kwargs)

            return dump

        return make

    wrap(cls, "to_yaml", make_dump("OmegaConf.to_yaml"))
    wrap(cls, "save", make_dump("OmegaConf.save"))

    def make_select(original: Any) -> Any:
        def select(cfg: Any, key: str, *args: Any, **kwargs: Any) -> Any:
            value = original(cfg, key, *args, **kwargs)
            frame = sys._getframe(1)
            if omega.roots and not _inside(frame):
                info = omega.where(cfg)
                if info is not None and type(value).__name__ != "DictConfig":
                    path = _under(info[1], str(key))
                    if path in info[0].values:
                        info[0].read(path, "get", frame)
                    else:
                        section, _, name = path.rpartition(".")
                        info[0].miss(section, name, kwargs.get("default"), frame)
            return value

        return select

    wrap(cls, "select", make_select)


def _taken(omega: Omega, cfg: Any, result: Any, by: str, frame: FrameType) -> Any:
    """What a conversion of a followed config gives: followed itself in the user's hands, else a bulk read."""
    if not omega.roots or _inside(frame):
        return result
    try:
        info = omega.where(cfg) if is_container(cfg) else None
        if info is None:
            return result
        caller = frame.f_code.co_filename
        if type(result) is dict and is_user_file(caller) and not config_section.trusts_exact_type(caller):
            return track(result, info[0], info[1])
        info[0].bulk(info[1], by, frame)
    except Exception as error:
        omega.recorder.problem(by, error)
    return result
