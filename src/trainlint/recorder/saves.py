"""What is saved: which tensors of the known modules a call of ``torch.save`` or safetensors holds."""

from __future__ import annotations

from typing import Any

from .adapters import place
from .checkpoints import path_of
from .core import Recorder
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Saves that are looked into, and objects looked at in one.
SAVES = 16
ITEMS = 50_000


class Saves:
    """The saves of one process, from the first backward on."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self._looked = 0

    def saved(self, obj: Any, file: Any, function: str) -> None:
        known = self.session.modules.parameters
        if not known or self._looked >= SAVES:
            return
        named, optimizer_state = contents(obj)
        if not named:
            return
        self._looked += 1
        by_place = {place(t) for _, t in named}
        # A copy (moved to the CPU, an average) is known by its name and shape.
        by_name = {(name, tuple(t.shape)) for name, t in named}
        # With what wrappers put before it (``module.``), its key ends in the whole name.
        endings = {(end, tuple(t.shape)) for name, t in named for end in tails(name)[1:]}
        held = [number for number, parameter in known.items() if place(parameter) in by_place]
        for root in self.session.modules.roots:
            alone: dict[Any, list[int]] = {}
            for name, parameter in root.named_parameters():
                number = self.recorder.parameters.get(parameter)
                if number is None:
                    continue
                shape = tuple(parameter.shape)
                *ends, last = tails(name)
                if any((end, shape) in by_name for end in ends) or (ends and (name, shape) in endings):
                    held.append(number)
                elif (last, shape) in by_name:
                    alone.setdefault((last, shape), []).append(number)
            # ``weight`` alone, of a layer saved by itself, says which it is only where one alone has its shape.
            held += [numbers[0] for numbers in alone.values() if len(numbers) == 1]
        if held:
            self.recorder.emit(
                "adapters",
                {
                    "saves": [
                        {
                            "function": function,
                            "path": path_of(file) or "",
                            "parameters": sorted(set(held)),
                            "optimizer_state": optimizer_state,
                            "at": self.recorder.user_line(),
                        }
                    ]
                },
            )


def tails(name: str) -> list[str]:
    """A name and what is left of it without its first parts: ``encoder.fc.weight``, ``fc.weight``, ``weight``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def contents(obj: Any) -> tuple[list[tuple[str, Any]], bool]:
    """Tensors in nested containers and modules with their keys, those of optimizer states left out."""
    import torch

    found: list[tuple[str, Any]] = []
    optimizer_state, looked = False, 0
    stack: list[tuple[str, Any]] = [("", obj)]
    while stack and looked < ITEMS:
        name, item = stack.pop()
        looked += 1
        if isinstance(item, torch.Tensor):
            if item.layout == torch.strided and item.device.type != "meta":
                found.append((name, item))
        elif isinstance(item, torch.nn.Module):
            stack.extend(item.named_parameters())
        elif isinstance(item, dict):
            if "param_groups" in item and "state" in item:
                optimizer_state = True
                continue
            stack.extend((str(k), v) for k, v in item.items())
        elif isinstance(item, (list, tuple)):
            stack.extend((name, v) for v in item)
    return found, optimizer_state


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    saves = Saves(session)
    recorder = session.recorder
    look = recorder.quiet(saves.saved)

    def note(function: str) -> Any:
        def before(obj: Any, f: Any = None, *args: Any, **kwargs: Any) -> None:
            look(obj, kwargs.get("filename", f), function)

        return before

    wrap(torch, "save", around(before=note("torch.save")))

    def on_safetensors(module: Any) -> None:
        for name in ("save_file", "save_model"):
            wrap(module, name, around(before=note(f"safetensors.{name}")))

    hooks.on_import("safetensors.torch", on_safetensors)
