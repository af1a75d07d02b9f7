"""How many samples batch norms take their statistics from, in train mode."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from .patching import ImportHooks, wrap
from .watch import Session

#: Calls that are counted, and sizes that are written.
CALLS = 20_000
WRITTEN = 64


class NormBatches:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.calls = 0
        #: (id of the module, samples, values per channel) -> the module, calls.
        self._seen: dict[tuple[int, int, int], list[Any]] = {}
        self._written = False

    def normalized(self, module: Any, shape: Any) -> None:
        """A batch norm in train mode is about to see an input of this shape."""
        samples = int(shape[0]) if len(shape) else 0
        values = samples
        for size in shape[2:]:
            values *= int(size)
        self.calls += 1
        self._seen.setdefault((id(module), samples, values), [module, 0])[1] += 1

    def close(self) -> None:
        """Written once: the batches of the epoch boundary are those of any epoch."""
        if self._written or not self._seen:
            return
        self._written = True
        names: dict[int, tuple[int | None, str]] = {}
        for root in self.session.modules.roots:
            number = self.session.recorder.roots.get(root)
            for name, module in root.named_modules():
                names.setdefault(id(module), (number, name))
        found = []
        for (ident, samples, values), (module, calls) in sorted(self._seen.items(), key=lambda kv: kv[0][1:])[:WRITTEN]:
            root_number, name = names.get(ident, (None, ""))
            sizes = {"samples": samples, "values": values, "calls": calls}
            found.append({"root": root_number, "module": name, "class_name": type(module).__name__, **sizes})
        self.session.recorder.emit("samples", {"norms": found})
        self._seen.clear()


def _caller(frame: FrameType | None) -> Any:
    """The ``self`` of the function that called, past other instruments."""
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(__package__ or "\0"):
        frame = frame.f_back
    return frame.f_locals.get("self") if frame is not None else None


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder = session.recorder
    norms = NormBatches(session)
    session.closers.append(norms.close)
    normalized = recorder.quiet(norms.normalized)
    base = torch.nn.modules.batchnorm._BatchNorm

    def make(original: Any) -> Any:
        def batch_norm(input: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and norms.calls < CALLS and torch.is_grad_enabled():
                # Only of modules: normalising weights by this function (standardised convolutions) is something else.
                module = _caller(sys._getframe(1))
                if isinstance(module, base) and module.training and not recorder.busy:
                    normalized(module, input.shape)
            return original(input, *args, **kwargs)

        return batch_norm

    wrap(torch.nn.functional, "batch_norm", make)
