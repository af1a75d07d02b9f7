"""A dict that notes who reads it, for configs that a program holds as plain dicts.

It equals, prints, pickles and iterates as the dict it stands for; copies keep being followed; whatever rebuilds it by
its type (``type(d)(...)``, ``dataclasses.asdict``) gets a plain dict. What remains different is ``type(d) is dict``
(``type(d) == dict`` holds); :func:`trusts_exact_type` keeps it away from programs that ask that.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .config_paths import element, join
from .config_tracker import Tracker, loops_over
from .core import is_user_file

_NONE = object()


class _LooksLikeDict(type):
    """``type(section) == dict`` and ``type(section) in (dict, list)`` hold.

    The hash stays the type's own: registries by type (``copy``, ``yaml``) must find this type, not dict.
    """

    def __eq__(cls, other: object) -> bool:
        return other is dict or other is cls

    def __hash__(cls) -> int:
        return type.__hash__(cls)

    def __repr__(cls) -> str:
        return "<class 'dict'>"


def _compiling() -> bool:
    return False


class Section(dict, metaclass=_LooksLikeDict):  # type: ignore[type-arg]
    """One section of a tracked config. Made by :func:`track` only; calling the class gives a plain dict."""

    __slots__ = ("_tl_iterated", "_tl_keys_at", "_tl_path", "_tl_tracker")
    _tl_tracker: Tracker
    _tl_path: str
    _tl_keys_at: tuple[int, int]
    _tl_iterated: set[int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return dict(*args, **kwargs)

    # -- reads of one key

    def _tl_note(self, key: Any, value: Any, how: str, frame: FrameType) -> None:
        if type(value) is Section:
            return
        if self._tl_keys_at == (id(frame), frame.f_lasti):
            self._tl_tracker.read(join(self._tl_path, key), "bulk", frame, "**")
        elif self._tl_iterated and self._tl_in_loop(key, frame):
            self._tl_tracker.read(join(self._tl_path, key), "bulk", frame, "a loop over the section")
        else:
            self._tl_tracker.read(join(self._tl_path, key), how, frame)

    def _tl_in_loop(self, key: Any, frame: FrameType) -> bool:
        code = frame.f_code
        over = id(code) in self._tl_iterated
        if not over and code.co_name.startswith("<") and frame.f_back is not None:
            over = id(frame.f_back.f_code) in self._tl_iterated
        return over and loops_over(frame, key)

    def __getitem__(self, key: Any) -> Any:
        if _compiling():
            return dict.__getitem__(self, key)
        try:
            value = dict.__getitem__(self, key)
        except KeyError:
            self._tl_tracker.miss(self._tl_path, key, None, sys._getframe(1))
            raise
        self._tl_note(key, value, "item", sys._getframe(1))
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        value = dict.get(self, key, _NONE)
        if _compiling():
            return default if value is _NONE else value
        if value is _NONE:
            self._tl_tracker.miss(self._tl_path, key, default, sys._getframe(1))
            return default
        self._tl_note(key, value, "get", sys._getframe(1))
        return value

    def __contains__(self, key: object) -> bool:
        found = dict.__contains__(self, key)
        if _compiling():
            return found
        if found:
            self._tl_note(key, dict.__getitem__(self, key), "contains", sys._getframe(1))
        else:
            self._tl_tracker.miss(self._tl_path, key, None, sys._getframe(1))
        return found

    def pop(self, key: Any, *default: Any) -> Any:
        present = dict.__contains__(self, key)
        value = dict.pop(self, key, *default)
        if present:
            self._tl_note(key, value, "item", sys._getframe(1))
        else:
            self._tl_tracker.miss(self._tl_path, key, default[0] if default else None, sys._getframe(1))
        return value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        present = dict.__contains__(self, key)
        value = dict.setdefault(self, key, default)
        if present:
            self._tl_note(key, value, "get", sys._getframe(1))
        else:
            self._tl_tracker.miss(self._tl_path, key, default, sys._getframe(1))
        return value

    # -- reads of the whole section

    def _tl_all(self, by: str, frame: FrameType) -> None:
        if _compiling():
            return
        for key, value in dict.items(self):
            if type(value) is not Section:
                self._tl_tracker.read(join(self._tl_path, key), "bulk", frame, by)

    def items(self) -> Any:
        self._tl_all("items()", sys._getframe(1))
        return dict.items(self)

    def values(self) -> Any:
        self._tl_all("values()", sys._getframe(1))
        return dict.values(self)

    def popitem(self) -> Any:
        self._tl_all("popitem()", sys._getframe(1))
        return dict.popitem(self)

    def __or__(self, other: Any) -> Any:
        self._tl_all("|", sys._getframe(1))
        return dict.__or__(self, other)

    # -- names only: a use where the names are the data (names of data sets, of metrics), else none

    def keys(self) -> Any:
        if not _compiling():
            frame = sys._getframe(1)
            self._tl_all("keys()", frame)
            # `**section` and dict(section) call keys() and then every item from C, at one instruction of the caller.
            self._tl_keys_at = (id(frame), frame.f_lasti)
            self._tl_iterated.add(id(frame.f_code))
        return dict.keys(self)

    # Overriding __iter__ is also what makes C code (`**`, dict(), update) go through keys() and __getitem__.
    def __iter__(self) -> Iterator[Any]:
        if not _compiling():
            frame = sys._getframe(1)
            self._tl_all("keys()", frame)
            self._tl_iterated.add(id(frame.f_code))
        return dict.__iter__(self)

    def __reversed__(self) -> Iterator[Any]:
        self._tl_iterated.add(id(sys._getframe(1).f_code))
        return dict.__reversed__(self)

    # -- copies

    def copy(self) -> Any:
        return _bare(self._tl_tracker, self._tl_path, self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        made = _bare(self._tl_tracker, self._tl_path, {})
        memo[id(self)] = made
        for key, value in dict.items(self):
            dict.__setitem__(made, copy.deepcopy(key, memo), copy.deepcopy(value, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickle holds plain dicts; values that leave through it are not followed.
        self._tl_all("pickle", sys._getframe(1))
        return dict, (), None, None, iter(list(dict.items(self)))


class Untracked(dict, metaclass=_LooksLikeDict):  # type: ignore[type-arg]
    """What a section becomes when tracking ends: a dict with nothing of its own (the same layout as Section)."""

    __slots__ = ("_tl_iterated", "_tl_keys_at", "_tl_path", "_tl_tracker")

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (), None, None, iter(list(dict.items(self)))


for _cls in (Section, Untracked):
    _cls.__name__ = _cls.__qualname__ = "dict"
    _cls.__module__ = "builtins"


def _bare(tracker: Tracker, path: str, content: dict[Any, Any]) -> Any:
    made: Any = dict.__new__(Section)
    made._tl_tracker = tracker
    made._tl_path = path
    made._tl_keys_at = (0, 0)
    made._tl_iterated = set()
    for key, value in dict.items(content):
        dict.__setitem__(made, key, value)
    _live.append(made)
    return made


#: Every section made, to be untracked together. Configs are small and few.
_live: list[Any] = []
_LIVE_CAP = 20_000


def track(data: Any, tracker: Tracker, path: str = "") -> Any:
    """``data`` with every plain dict in it replaced by a section. Lists are changed in place: they must be fresh."""
    return _track(data, tracker, path, {})


def _track(data: Any, tracker: Tracker, path: str, memo: dict[int, tuple[Any, str]]) -> Any:
    if type(data) is dict:
        known = memo.get(id(data))
        if known is not None:
            tracker.alias(known[1], path)  # a YAML alias: one object under two paths
            tracker.alias(path, known[1])
            return known[0]
        if len(_live) > _LIVE_CAP or not data:
            return data
        made = _bare(tracker, path, data)
        memo[id(data)] = (made, path)
        for key, value in list(dict.items(data)):
            if type(value) in (dict, list):
                dict.__setitem__(made, key, _track(value, tracker, join(path, key), memo))
        return made
    if type(data) is list and id(data) not in memo:
        memo[id(data)] = (data, path)
        for index, value in enumerate(data):
            if type(value) in (dict, list):
                data[index] = _track(value, tracker, element(path, index), memo)
    return data


def plain(data: Any) -> Any:
    """A copy of ``data`` with sections as plain dicts, without noting a read."""
    if data.__class__ is Section or type(data) is dict:
        return {k: plain(v) for k, v in dict.items(data)}
    if type(data) is list:
        return [plain(v) for v in data]
    return data


def section_of(data: Any) -> tuple[Tracker, str] | None:
    """Tracker and path of a section, ``None`` for anything else."""
    if data.__class__ is Section:
        return data._tl_tracker, data._tl_path
    return None


def release() -> None:
    """Turn every section into a dict that notes nothing (before code is compiled that looks at types and methods)."""
    for made in _live:
        if made.__class__ is Section:
            made.__class__ = Untracked  # type: ignore[assignment]
    _live.clear()


_EXACT = re.compile(rb"type\([^()\n]*(?:\([^()\n]*\))?[^()\n]*\)\s+is\s+(?:not\s+)?dict\b")


def _package(file: str) -> str:
    """The installed top package that a file belongs to; empty for a file of a project."""
    _, found, tail = file.rpartition("site-packages" + os.sep)
    return tail.split(os.sep, 1)[0] if found else ""


def trusts_exact_type(caller: str) -> bool:
    """Whether the program's own code (the project, the package of ``caller``) asks ``type(x) is dict``.

    Then its configs are left alone. Other installed packages are not asked: they do not get the config itself.
    """
    own = _package(caller)
    looked = 0
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or not is_user_file(file):
            continue
        if _package(file) not in ("", own):
            continue
        looked += 1
        if looked > 400:
            break
        try:
            with open(file, "rb") as f:
                if _EXACT.search(f.read(1 << 20)):
                    return True
        except OSError:
            continue
    return False
