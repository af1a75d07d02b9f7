"""Installs the instruments on torch, once torch has been imported."""

from __future__ import annotations

import atexit
import importlib
import os
from types import ModuleType

from .core import Recorder
from .patching import ImportHooks

#: Instrument modules of this package; each has ``install(session, hooks)``.
PARTS = ("modules", "optimizers", "autograd", "losses", "schedulers", "dataloaders", "clipping", "amp", "checkpoints")


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Called right after ``import torch`` in a watched process."""
    import torch

    from .watch import Session

    session = Session(recorder)
    for name in PARTS:
        try:
            part: ModuleType = importlib.import_module(f"{__package__}.{name}")
            part.install(session, hooks)
        except Exception as error:
            recorder.problem(f"installing {name}", error)
    # The process instrument registered first, so its "finished" comes after this.
    atexit.register(session.close)
    recorder.mark("torch", version=str(torch.__version__), pid=os.getpid())
