"""What is known of one live config: its leaves, who read them and how, and what was looked for and missing."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from .config_paths import join, kept, leaves
from .core import Recorder, is_user_file, line_of, scalar, user_frame

#: Places kept per key; one is enough to prove a use, a few help a person.
PLACES = 8
MISSING_CAP = 500

#: Part of a library file's path -> what took the section when code of that file reads it.
_SINKS = (
    (os.path.join("json", "encoder.py"), "json.dump"),
    (os.path.join("yaml", "representer.py"), "yaml.dump"),
    (os.sep + "dataclasses.py", "dataclasses.asdict"),
    (os.sep + "pickle.py", "pickle"),
    (os.sep + "pprint.py", "pprint"),
    (os.sep + "copy.py", "copy"),
    (os.sep + "logging" + os.sep, "logging"),
    (os.path.join("mixins", "hparams_mixin.py"), "save_hyperparameters"),
    (os.path.join("utilities", "parsing.py"), "save_hyperparameters"),
    (os.path.join("pytorch", "core", "saving.py"), "save_hyperparameters"),
)
_TRACKING_SERVICES = (
    "wandb",
    "mlflow",
    "tensorboard",
    "tensorboardX",
    "comet_ml",
    "neptune",
    "clearml",
    "swanlab",
    "aim",
)


def sink(frame: FrameType | None) -> str:
    """What library call is taking the section, seen from the frame that reads it; empty for the user's own code."""
    for _ in range(12):
        if frame is None:
            return ""
        name = frame.f_code.co_filename
        if is_user_file(name):
            return ""
        for part, by in _SINKS:
            if part in name:
                return by
        if "site-packages" in name:
            top = name.rpartition("site-packages" + os.sep)[2].split(os.sep, 1)[0]
            if top in _TRACKING_SERVICES:
                return top
        if "loggers" in name and ("lightning" in name):
            return "logger"
        frame = frame.f_back
    return ""


class Tracker:
    """Leaves of one config by path, with the reads seen so far."""

    def __init__(
        self,
        recorder: Recorder,
        data: Any,
        *,
        kind: str,
        by: str,
        files: Iterable[str] = (),
        origin: str = "file",
        overridden: Iterable[str] = (),
    ) -> None:
        self.recorder = recorder
        self.kind = kind
        self.by = by
        self.files = tuple(files)
        self.origin = origin
        #: path -> (value to keep, type, secret)
        self.values: dict[str, tuple[Any, str, bool]] = {}
        self.origins: dict[str, str] = {}
        self.reads: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        self.missing: dict[str, dict[str, Any]] = {}
        #: A second path of the same value -> its first path: YAML aliases, ``${...}``. Reading the one reads the other.
        self.same: dict[str, set[str]] = {}
        self.changed = True
        self.active = True
        self._seen: set[tuple[str, str, int, int]] = set()
        self._lists: dict[str, list[str]] = {}
        self.overridden = tuple(overridden)
        self.add(data)

    # -- what there is

    def add(self, data: Any, prefix: str = "", origin: str | None = None) -> None:
        """Take the leaves of ``data`` in: new paths are added, known ones get the new value."""
        for path, raw in leaves(data, prefix):
            entry = kept(path, raw)
            if path in self.values and self.values[path][0] == entry[0]:
                continue
            new = path not in self.values
            self.values[path] = entry
            self.changed = True
            if any(path == o or path.startswith((o + ".", o + "[")) for o in self.overridden):
                self.origins[path] = "override"
            elif origin is not None and new:
                self.origins[path] = origin
            if new and path.endswith("]"):
                self._index(path)

    def _index(self, path: str) -> None:
        """Remember a list element under the lists that hold it, so that reading the list reads its elements."""
        top = path
        while top.endswith("]"):
            top = top[: top.rfind("[")]
            self._lists.setdefault(top, []).append(path)

    # -- what happened

    def read(self, path: str, how: str, frame: FrameType | None, by: str = "") -> None:
        """Note a read of the leaf (or list of leaves) at ``path`` by the code of ``frame``. Never raises."""
        if frame is None or not self.active or self.recorder.busy:
            return
        mark = (path, how + by, id(frame.f_code), frame.f_lasti)
        if mark in self._seen:
            return
        self._seen.add(mark)
        try:
            if not is_user_file(frame.f_code.co_filename):
                taken = sink(frame)
                if taken:
                    how, by = "bulk", taken
            self.note(path, how, frame, by)
        except Exception as error:
            self.recorder.problem("config read", error)

    def note(self, path: str, how: str, frame: FrameType | None, by: str = "") -> None:
        """Note a read without asking whether this place was seen before."""
        found = [path] if path in self.values else self._lists.get(path, [])
        if not found:
            return
        at = line_of(user_frame(frame))
        where = (how, by, at["file"] if at else "", at["line"] if at else 0)
        for leaf in found:
            places = self.reads.setdefault(leaf, {})
            if by == "**":  # C code asks for the names first, at the same place
                places.pop((how, "keys()", *where[2:]), None)
            if where in places or (len(places) >= PLACES and (how == "bulk" or _individual(places))):
                continue
            places[where] = {"how": how, "at": at, "by": by}
            self.changed = True

    def bulk(self, prefix: str, by: str, frame: FrameType | None, how: str = "bulk") -> None:
        """Note that everything below ``prefix`` was taken at once."""
        if not self.active:
            return
        try:
            for path in list(self.values):
                if not prefix or path == prefix or path.startswith((prefix + ".", prefix + "[")):
                    self.note(path, how, frame, by)
        except Exception as error:
            self.recorder.problem("config read", error)

    def miss(self, section: str, key: Any, default: Any, frame: FrameType | None) -> None:
        """Note that ``key`` was looked for in ``section`` and is not there. Never raises."""
        if (
            not self.active
            or not isinstance(key, str)
            or not key
            or key.startswith("_")
            or len(self.missing) > MISSING_CAP
        ):
            return
        try:
            path = join(section, key)
            if path in self.values or path in self.missing or sink(frame):
                return
            at = line_of(user_frame(frame))
            if at is None:
                return
            self.missing[path] = {"path": path, "default": scalar(default), "at": at}
            self.changed = True
        except Exception as error:
            self.recorder.problem("config read", error)

    def alias(self, path: str, source: str) -> None:
        """``path`` has its value from ``source``."""
        if path != source:
            self.same.setdefault(source, set()).add(path)

    # -- what is told

    def release(self) -> None:
        """Stop: what is not read yet counts as taken from here on by code that cannot be followed."""
        if self.active:
            self.bulk("", "compiled code", sys._getframe(1))
            self.active = False

    def reads_of(self, path: str) -> list[dict[str, Any]]:
        places = dict(self.reads.get(path, {}))
        for other in self._same_values(path):
            places.update(self.reads.get(other, {}))
        ordered = sorted(places.values(), key=lambda read: read["how"] == "bulk")
        return ordered[:PLACES]

    def _same_values(self, path: str) -> set[str]:
        """Every path that has its value from ``path``, directly or through others."""
        if not self.same:
            return set()
        found: set[str] = set()
        queue = [path]
        while queue and len(found) < 200:
            current = queue.pop()
            for source, targets in self.same.items():
                if current == source or current.startswith((source + ".", source + "[")):
                    rest = current[len(source) :]
                    for target in targets:
                        if target + rest not in found:
                            found.add(target + rest)
                            queue.append(target + rest)
        return found

    def key_payloads(self) -> dict[str, dict[str, Any]]:
        """One ``ConfigKey`` payload per path."""
        return {
            path: {
                "path": path,
                "value": value,
                "type": kind,
                "origin": self.origins.get(path, self.origin),
                "reads": self.reads_of(path),
                "secret": secret,
            }
            for path, (value, kind, secret) in self.values.items()
        }


def _individual(places: Mapping[tuple[Any, ...], Any]) -> bool:
    return any(where[0] != "bulk" for where in places)


def loops_over(frame: FrameType, key: Any) -> bool:
    """Whether ``key`` is not written where ``frame`` reads it, so that the read comes from a loop over the section."""
    code = frame.f_code
    constants: set[Any] = set()
    for constant in code.co_consts:
        if isinstance(constant, (tuple, frozenset)):
            constants.update(c for c in constant if isinstance(c, str))
        elif isinstance(constant, str):
            constants.add(constant)
    if key not in constants and key not in code.co_names:
        return True
    recent: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.offset >= frame.f_lasti:
            break
        recent.append(instruction.argval)
    return key not in [v for v in recent[-8:] if isinstance(v, str)]
