"""Calls a function that trains: ``python run_entry.py module:function [CONFIG [JSON]]``.

Runs in the user's interpreter, where trainlint may not be installed: standard library only. ``CONFIG`` is the config
file, ``JSON`` a file with the same, parsed, for interpreters without a YAML reader.

The config is handed over in the type that the parameter's annotation asks for (``entry_config.py``). When the function
returns an object with ``model``, ``optimizers``, ``loss`` and ``batches`` (``trainlint.TrainingRun``), a plain loop
trains it.

When the function cannot be called, the reason goes to ``scratch/entry-error.json`` of the run folder and the exit
status is 87. What the function itself raises is the program's own error and passes through.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

HERE = os.path.dirname(os.path.abspath(__file__))

if TYPE_CHECKING:
    from trainlint.recorder import entry_config
else:
    # From its file: this folder is on the path of every watched process, and must not offer more names than it has to.
    _spec = importlib.util.spec_from_file_location(
        "_trainlint_entry_config", os.path.join(os.path.dirname(HERE), "entry_config.py")
    )
    entry_config = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(entry_config)

EntryError = entry_config.EntryError
EXIT_STATUS = 87


def find(entry: str) -> tuple[Callable[..., Any], types.ModuleType]:
    """The function that ``module:function`` or ``path/to/file.py:function`` names, and its module."""
    module_name, _, path = entry.rpartition(":")
    try:
        if module_name.endswith(".py"):
            file = os.path.abspath(module_name)
            if not os.path.isfile(file):
                raise EntryError(f"entry {entry!r}: there is no file {file}")
            sys.path.insert(0, os.path.dirname(file))
            name = os.path.splitext(os.path.basename(file))[0]
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except EntryError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise EntryError(f"entry {entry!r}: there is no module {error.name} in {os.getcwd()}") from None
        raise EntryError(f"entry {entry!r}: module {module_name} does not import: {error}") from error
    except Exception as error:
        raise EntryError(
            f"entry {entry!r}: module {module_name} does not import: {type(error).__name__}: {error}"
        ) from error
    function: Any = module
    for part in path.split("."):
        try:
            function = getattr(function, part)
        except AttributeError:
            names = [n for n in dir(function) if not n.startswith("_") and callable(getattr(function, n, None))]
            near = entry_config.near_miss(part, names)
            raise EntryError(f"entry {entry!r}: {module_name} has no {part}{near}") from None
    if not callable(function):
        raise EntryError(
            f"entry {entry!r}: {path} is {entry_config.with_article(type(function).__name__)} and cannot be called"
        )
    return function, module


# ------------------------------------------------------------------------------------------------ the reference loop


def is_training_run(result: Any) -> bool:
    return all(hasattr(result, name) for name in ("model", "loss", "batches")) and (
        hasattr(result, "optimizers") or hasattr(result, "optimizer")
    )


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def train(run: Any) -> None:
    """Forward, backward, clip, step, scheduler step, zero_grad: until the watch ends the process or the batches end."""
    import torch

    optimizers = _several(getattr(run, "optimizers", None) or getattr(run, "optimizer", None))
    schedulers = _several(getattr(run, "schedulers", None))
    accumulation = int(getattr(run, "accumulation", None) or 1)
    clip = getattr(run, "clip", None)
    run.model.train()
    micro = 0
    while True:
        before = micro
        for batch in run.batches:
            micro += 1
            loss = run.loss(run.model, batch)
            (loss / accumulation).backward()
            if micro % accumulation:
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        if micro == before:
            return


# ------------------------------------------------------------------------------------------------ main


def _is_ours(file: str) -> bool:
    return file.startswith(("<frozen importlib", os.path.dirname(HERE) + os.sep)) or os.path.dirname(
        os.path.abspath(file)
    ) == os.path.dirname(importlib.__file__)


def report(error: EntryError) -> None:
    """Leave the reason for the supervisor, and on stderr for people."""
    cause = error.__cause__
    lines = []
    if cause is not None:
        trace = cause.__traceback__
        # The frames above the user's code are ours and the import system's.
        while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        if trace is not None or isinstance(cause, SyntaxError):
            lines = "".join(traceback.format_exception(type(cause), cause, trace)).splitlines()
    folder = os.environ.get("TRAINLINT_RUN_DIR")
    if folder:
        with open(os.path.join(folder, "scratch", "entry-error.json"), "w", encoding="utf-8") as file:
            json.dump({"text": str(error), "traceback": lines[-60:]}, file)
    if lines:
        print("\n".join(lines), file=sys.stderr)
    print(f"trainlint: {error}", file=sys.stderr, flush=True)


def main() -> None:
    words: list[Any] = [*sys.argv[1:], None, None]
    entry, config_path, parsed = words[:3]
    # As for `python -m`: the current folder instead of this file's.
    sys.path[:] = [""] + [p for p in sys.path if os.path.abspath(p or os.getcwd()) != HERE]
    if config_path:
        sys.path.append(os.path.dirname(os.path.abspath(config_path)))
    try:
        function, module = find(entry)
        # The program's own arguments: none of ours.
        sys.argv[:] = [getattr(module, "__file__", None) or entry]
        config = entry_config.Config(config_path, parsed) if config_path else None
        args, kwargs = entry_config.argument(function, config)
    except EntryError as error:
        report(error)
        sys.exit(EXIT_STATUS)
    result = function(*args, **kwargs)
    if inspect.iscoroutine(result):
        import asyncio

        result = asyncio.run(result)
    if is_training_run(result):
        train(result)


if __name__ == "__main__":
    main()
