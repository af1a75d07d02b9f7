"""Follows the live config in the watched process: which keys are read, how and where, and which are missing.

A config is recognised when the program reads one of the files that trainlint was given (or that stand on the program's
own command line) with yaml, json or tomllib; when OmegaConf loads it; when Hydra composes it; and as the result of an
``ArgumentParser``. What cannot be followed safely is left alone.
"""

from __future__ import annotations

import atexit
import os
import sys
from types import FrameType, ModuleType
from typing import Any

from . import config_parsers, config_section
from .config_hydra import (
    install_hydra_compose,
    install_hydra_instantiate,
    install_hydra_internal,
    install_hydra_main,
)
from .config_omega import Omega, install_omegaconf
from .config_section import track, trusts_exact_type
from .config_tracker import Tracker
from .core import Recorder, is_user_file
from .patching import ImportHooks, wrap

_SUFFIXES = (".yaml", ".yml", ".json", ".toml")
TRACKER_CAP = 24

_state: ConfigAccess | None = None


class ConfigAccess:
    """The followed configs of one process."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trackers: list[Tracker] = []
        #: Trackers whose reads cannot be seen (a strict parser made dataclasses of it).
        self.unfollowed: set[int] = set()
        self.files = _candidates(recorder)
        self.released = False

    # -- recognising a file

    def file_of(self, stream: Any) -> str | None:
        """The config file that a loader is given: an open file, or its text."""
        if not self.files:
            return None
        if isinstance(stream, (str, bytes)):
            return self._file_of_text(stream)
        name = getattr(stream, "name", None)
        if isinstance(name, (str, os.PathLike)):
            real = os.path.realpath(name)
            return real if real in self.files else None
        value = getattr(stream, "getvalue", None)  # StringIO, BytesIO
        if callable(value):
            text = value()
            return self._file_of_text(text) if isinstance(text, (str, bytes)) else None
        return None

    def _file_of_text(self, text: str | bytes) -> str | None:
        if len(text) < 8:
            return None
        for path in self.files:
            try:
                if abs(os.path.getsize(path) - len(text)) > len(text):
                    continue
                with open(path, "rb") as f:
                    content = f.read(1 << 24)
            except OSError:
                continue
            if isinstance(text, bytes):
                if content == text:
                    return path
            elif content.decode("utf-8-sig", "replace").replace("\r\n", "\n").strip() == text.strip():
                return path
        return None

    def follow(self, data: Any, file: str, by: str, frame: FrameType) -> Any:
        """The loaded data, followed when the user's own code asked for it."""
        try:
            if type(data) is not dict or self.released:
                return data
            kind = {".json": "json", ".toml": "toml"}.get(os.path.splitext(file)[1].lower(), "yaml")
            caller = frame.f_code.co_filename
            if not is_user_file(caller):
                # A library reads it with its own parser (jsonargparse, transformers): its keys are its own matter.
                top = caller.rpartition("site-packages" + os.sep)[2].split(os.sep, 1)[0]
                if top in ("omegaconf", "hydra"):
                    return data  # what they make of it is followed itself
                self.new_tracker(data, kind=kind, by=f"{by} in {top}", files=(file,), followed=False)
                return data
            if trusts_exact_type(caller):
                self.new_tracker(data, kind=kind, by="", files=(file,), followed=False)
                return data
            tracker = self.new_tracker(data, kind=kind, by=f"{by} in {os.path.basename(caller)}", files=(file,))
            return track(data, tracker) if tracker is not None else data
        except Exception as error:
            self.recorder.problem("following the config", error)
            return data

    def new_tracker(self, data: Any, *, followed: bool = True, **facts: Any) -> Tracker | None:
        if self.released or len(self.trackers) >= TRACKER_CAP:
            return None
        tracker = Tracker(self.recorder, data, **facts)
        self.trackers.append(tracker)
        if not followed:
            self.unfollowed.add(id(tracker))
        return tracker

    # -- telling

    def payload(self) -> dict[str, Any]:
        """One ``ConfigFacts`` payload of everything followed. Keys of files and compositions come before flags."""
        ordered = sorted(self.trackers, key=lambda t: t.kind in ("argparse", "dataclass"))
        keys: dict[str, dict[str, Any]] = {}
        missing: dict[str, Any] = {}
        files: list[str] = []
        for tracker in ordered:
            files += [f for f in tracker.files if f not in files]
            for path, payload in tracker.key_payloads().items():
                if id(tracker) in self.unfollowed:
                    payload["reads"] = None
                self._merge(keys, path, payload)
            for path, payload in tracker.missing.items():
                missing.setdefault(path, payload)
        for path in keys:
            missing.pop(path, None)
        kinds = [t.kind for t in ordered]
        return {
            "files": files,
            "kind": kinds[0] if kinds else "",
            "tracked_by": ", ".join(dict.fromkeys(t.by for t in ordered if t.by)),
            "keys": list(keys.values()),
            "missing": list(missing.values()),
        }

    @staticmethod
    def _merge(keys: dict[str, dict[str, Any]], path: str, payload: dict[str, Any]) -> None:
        known = keys.get(path)
        if known is None:
            keys[path] = payload
            return
        explicit = payload["origin"] == "override"
        if payload["value"] == known["value"] or explicit:
            if known["reads"] is None or payload["reads"] is None:
                reads = known["reads"] if payload["reads"] is None else payload["reads"]
            else:
                reads = sorted(known["reads"] + payload["reads"], key=lambda read: read["how"] == "bulk")[:8]
            if explicit:
                keys[path] = {**payload, "reads": reads}
            else:
                known["reads"] = reads
        # An option's default beside a different value in the file is another setting: the file's own reads stand alone.

    def flush(self) -> None:
        if any(t.changed for t in self.trackers):
            for tracker in self.trackers:
                tracker.changed = False
            self.recorder.emit("config", self.payload())

    def release(self, *_: Any) -> None:
        """Leave the program's objects alone from here on: code is about to be compiled."""
        if not self.released:
            self.released = True
            for tracker in self.trackers:
                tracker.release()
            config_section.release()
            config_parsers.release()


def _candidates(recorder: Recorder) -> set[str]:
    found = [os.path.realpath(p) for p in recorder.settings.configs]
    for word in getattr(sys, "orig_argv", [])[1:]:
        value = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        if value.lower().endswith(_SUFFIXES) and os.path.isfile(value):
            found.append(os.path.realpath(value))
    return set(found)


def flush(recorder: Recorder) -> None:
    """Write what is known now, if it changed. Called at every optimizer step and at exit."""
    if _state is None:
        return
    with recorder.working():  # also called from inside other instruments, where a quiet function would be skipped
        try:
            _state.flush()
        except Exception as error:
            recorder.problem("config flush", error)


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Set up; libraries are instrumented when the program imports them."""
    global _state
    state = _state = ConfigAccess(recorder)
    omega = Omega(recorder, state.new_tracker)
    config_parsers.install_argparse(recorder, state.new_tracker)
    for name in ("transformers.hf_argparser", "trl.scripts._hf_argparser"):
        hooks.on_import(name, lambda m: config_parsers.install_hf_parser(recorder, state.new_tracker, m))
    hooks.on_import("trl.scripts.utils", lambda m: config_parsers.install_trl_parser(recorder, state.new_tracker, m))
    if state.files:
        hooks.on_import("yaml", lambda m: _install_yaml(state, m))
        if any(f.lower().endswith(".json") for f in state.files):
            hooks.on_import("json", lambda m: _install_loader(state, m, "json"))
        if any(f.lower().endswith(".toml") for f in state.files):
            for name in ("tomllib", "tomli"):
                hooks.on_import(name, lambda m, name=name: _install_loader(state, m, name))  # type: ignore[misc]
    hooks.on_import("yaml.representer", _represent_sections)
    hooks.on_import("ruamel.yaml.representer", _represent_sections)
    hooks.on_import("omegaconf", lambda m: _install_omegaconf(state, omega, m))
    hooks.on_import("hydra.core.utils", lambda m: install_hydra_main(omega, m))
    hooks.on_import("hydra._internal.hydra", lambda m: install_hydra_internal(omega, m))
    hooks.on_import("hydra.compose", lambda m: install_hydra_compose(omega, m))
    hooks.on_import("hydra._internal.instantiate._instantiate2", lambda m: install_hydra_instantiate(omega, m))
    hooks.on_import("torch.serialization", _allow_dict)
    hooks.on_import("torch._dynamo.callback", lambda m: _before_compiling(state, m))
    atexit.register(flush, recorder)


def _install_yaml(state: ConfigAccess, module: ModuleType) -> None:
    def make(original: Any) -> Any:
        def load(stream: Any, Loader: Any = None, *args: Any, **kwargs: Any) -> Any:
            if Loader is not None:
                args = (Loader, *args)
            file = state.file_of(stream)
            result = original(stream, *args, **kwargs)
            if file is None:
                return result
            frame: FrameType | None = sys._getframe(1)
            own = os.path.dirname(str(module.__file__)) + os.sep
            while frame is not None and frame.f_code.co_filename.startswith(own):
                frame = frame.f_back
            return state.follow(result, file, "yaml.load", frame) if frame is not None else result

        return load

    wrap(module, "load", make)


def _install_loader(state: ConfigAccess, module: ModuleType, name: str) -> None:
    """``json`` and ``tomllib``: ``load`` of a file and ``loads`` of a text."""
    own = os.path.dirname(str(module.__file__)) + os.sep

    def make_for(function: str) -> Any:
        def make(original: Any) -> Any:
            def load(source: Any, *args: Any, **kwargs: Any) -> Any:
                frame = sys._getframe(1)
                if frame.f_code.co_filename.startswith(own):  # json.load calls json.loads
                    return original(source, *args, **kwargs)
                file = state.file_of(source)
                result = original(source, *args, **kwargs)
                return result if file is None else state.follow(result, file, f"{name}.{function}", frame)

            return load

        return make

    wrap(module, "load", make_for("load"))
    wrap(module, "loads", make_for("loads"))


def _install_omegaconf(state: ConfigAccess, omega: Omega, module: ModuleType) -> None:
    install_omegaconf(omega, module)

    def make(original: Any) -> Any:
        def load(file_: Any) -> Any:
            result = original(file_)
            frame = sys._getframe(1)
            name = file_ if isinstance(file_, (str, os.PathLike)) else getattr(file_, "name", None)
            # What Hydra loads is a part of a composition, which is followed when it is complete.
            composing = os.sep + os.path.join("hydra", "_internal") + os.sep in frame.f_code.co_filename
            if not composing and isinstance(name, (str, os.PathLike)) and os.path.realpath(name) in state.files:
                by = f"OmegaConf.load in {os.path.basename(frame.f_code.co_filename)}"
                state.recorder.quiet(omega.adopt)(result, kind="yaml", by=by, files=(os.path.realpath(name),))
            return result

        return load

    wrap(module.OmegaConf, "load", make)


def _represent_sections(module: ModuleType) -> None:
    """YAML writers know dict by its exact type: a section is written as the dict that it is."""
    for name in ("SafeRepresenter", "Representer", "RoundTripRepresenter"):
        cls = getattr(module, name, None)
        if cls is not None:
            for section in (config_section.Section, config_section.Untracked):
                cls.add_representer(section, cls.represent_dict)


def _allow_dict(module: ModuleType) -> None:
    """A section is pickled as a call of dict, which torch.load(weights_only=True) must accept."""
    allow = getattr(module, "add_safe_globals", None)
    if allow is not None:
        allow([dict])


def _before_compiling(state: ConfigAccess, module: ModuleType) -> None:
    """torch.compile looks at types and methods of what compiled code touches: by then everything is as it was."""
    handler = getattr(module, "callback_handler", None)
    register = getattr(handler, "register_start_callback", None)
    if register is not None:
        register(state.release)
