"""Arms one process: file guard at once, everything else when its library is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

from .core import Recorder
from .patching import ImportHooks
from .settings import Settings

#: instrument module -> the import that it waits for. ``None``: installed at once.
INSTRUMENTS: tuple[tuple[str, str | None], ...] = (
    ("process", None),
    ("where", None),
    ("files", None),
    ("trackers", None),
    ("config_access", None),
    ("torch_instruments", "torch"),
    ("lightning", None),
    ("transformers", None),
    ("accelerate", None),
    ("loggers", None),
    ("seeds", None),
)

#: The same for an experiment, which follows the loss and changes how the program trains; what guards its surroundings
#: stays as it is.
EXPERIMENT: tuple[tuple[str, str | None], ...] = (
    ("process", None),
    ("where", None),
    ("files", None),
    ("trackers", None),
    ("experiment", "torch"),
    ("experiment_trainers", None),
)

recorder: Recorder | None = None
hooks: ImportHooks | None = None


def arm() -> Recorder | None:
    """Arm this process if it is watched. Each instrument module has ``install(recorder, hooks)``."""
    global recorder, hooks
    if recorder is not None:
        return recorder
    settings = Settings.from_environment()
    if settings is None:
        return None
    recorder = Recorder(settings)
    hooks = ImportHooks(recorder.problem)
    sys.meta_path.insert(0, hooks)
    for name, needs in EXPERIMENT if settings.experiment else INSTRUMENTS:
        if needs is None:
            _install(name)
        else:
            hooks.on_import(needs, _installer(name))
    return recorder


def _installer(name: str) -> Callable[[ModuleType], None]:
    return lambda module: _install(name)


def _install(name: str) -> None:
    assert recorder is not None and hooks is not None
    try:
        importlib.import_module(f"{__package__}.{name}").install(recorder, hooks)
    except Exception as error:
        recorder.problem(f"installing {name}", error)
