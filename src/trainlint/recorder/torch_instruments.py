"""Installs the instruments on torch, once torch has been imported."""

from __future__ import annotations

import atexit
import importlib
import os
from types import ModuleType

from .core import Recorder
from .patching import ImportHooks

#: Instrument modules of this package; each has ``install(session, hooks)``.
PARTS = (
    "modules",
    "optimizers",
    "clearing",
    "autograd",
    "loops",
    "batches",
    "losses",
    "schedulers",
    "dataloaders",
    "norm_batches",
    "columns",
    "modes",
    "clipping",
    "amp",
    "checkpoints",
    "uninitialised",
    "histograms",
    "provenance",
    "shadows",
    "adapters",
    "saves",
    "gradient_path",
    "replay",
)

OLDEST = (2, 6)


def version(text: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13)."""
    numbers = text.split("+")[0].split(".")[:2]
    return tuple(int(n) for n in numbers if n.isdigit())


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Called right after ``import torch`` in a watched process."""
    import torch

    from .watch import Session

    if version(str(torch.__version__)) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        recorder.problem(
            "torch", f"torch {torch.__version__} is older than {oldest}, the oldest that is watched in full"
        )
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
