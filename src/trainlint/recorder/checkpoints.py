"""Checkpoint files read and written, and states loaded from them."""

from __future__ import annotations

import os
from typing import Any

from .core import Recorder
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Keys listed of a file.
KEYS = 40


def path_of(file: Any) -> str | None:
    """The absolute path of a path or an open file; ``None`` for buffers."""
    if isinstance(file, (str, os.PathLike)):
        return os.path.abspath(os.fsdecode(file))
    name = getattr(file, "name", None)
    return os.path.abspath(name) if isinstance(name, str) and os.path.exists(name) else None


def keys_of(obj: Any) -> list[str]:
    return [str(k) for k in list(obj)[:KEYS]] if isinstance(obj, dict) else []


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder

    @recorder.quiet
    def loaded(result: Any, token: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        path = path_of(f)
        if path is not None:
            session.last_loaded = path
            recorder.event(
                "file", at=recorder.user_line(), call="load", path=path, function="torch.load", keys=keys_of(result)
            )

    @recorder.quiet
    def saved(result: Any, token: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        path = path_of(f)
        if path is not None:
            recorder.event(
                "file", at=recorder.user_line(), call="save", path=path, function="torch.save", keys=keys_of(obj)
            )

    wrap(torch, "load", around(after=loaded))
    wrap(torch, "save", around(after=saved))

    @recorder.quiet
    def module_loaded(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        strict = kwargs.get("strict", args[0] if args else True)
        missing = list(getattr(result, "missing_keys", []) or [])
        recorder.event(
            "state_loaded",
            at=recorder.user_line(),
            what="module",
            target=recorder.roots.get(self),
            class_name=type(self).__name__,
            empty=not state_dict,
            strict=bool(strict),
            tensors=len(state_dict),
            missing=missing[:200],
            unexpected=list(getattr(result, "unexpected_keys", []) or [])[:200],
            path=session.last_loaded,
        )

    wrap(torch.nn.Module, "load_state_dict", around(after=module_loaded))

    def on_safetensors(module: Any) -> None:
        def make(name: str, call: str) -> None:
            @recorder.quiet
            def done(result: Any, token: Any, *args: Any, **kwargs: Any) -> None:
                candidates = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, os.PathLike))]
                path = path_of(candidates[0]) if candidates else None
                if path is None:
                    return
                if call == "load":
                    session.last_loaded = path
                keys = keys_of(result if call == "load" else (args[0] if args else None))
                recorder.event(
                    "file", at=recorder.user_line(), call=call, path=path, function=f"safetensors.{name}", keys=keys
                )

            wrap(module, name, around(after=done))

        for name in ("load_file", "load_model"):
            make(name, "load")
        for name in ("save_file", "save_model"):
            make(name, "save")

    hooks.on_import("safetensors.torch", on_safetensors)

    def on_reader(module: Any) -> None:
        # transformers and PEFT read through this; it is a class that cannot be derived from, so a function stands in.
        @recorder.quiet
        def opened(result: Any, token: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            path = path_of(filename)
            if path is not None:
                session.last_loaded = path
                recorder.event(
                    "file",
                    at=recorder.user_line(),
                    call="load",
                    path=path,
                    function="safetensors.safe_open",
                    keys=[str(k) for k in list(result.keys())[:KEYS]],
                )

        wrap(module, "safe_open", around(after=opened))

    hooks.on_import("safetensors", on_reader)
