"""What backward sends to a loss: whether it is optimized at all, with which factor, and at which of its elements."""

from __future__ import annotations

from typing import Any

from .core import Recorder
from .loss_inputs import readable
from .loss_targets import together


def watch(recorder: Recorder, seq: int, result: Any, padding: Any) -> None:
    """Note the first gradient that arrives at ``result`` in the event ``seq``.

    A hook on the tensor sees it before any later change in place (``loss /= n``) and adds no node to the graph.
    ``padding``: where an unreduced loss has padding, in its shape, or ``None``.
    """
    import torch

    if not result.requires_grad or not readable(result):
        return
    seen: list[bool] = []

    @recorder.quiet
    def arrived(gradient: Any) -> None:
        if seen or torch.compiler.is_compiling():
            return
        seen.append(True)
        with torch.no_grad():
            _note(recorder, seq, gradient.detach(), padding)

    result.register_hook(lambda gradient: arrived(gradient))


def _note(recorder: Recorder, seq: int, gradient: Any, padding: Any) -> None:
    import torch

    elements = gradient.numel()
    if elements == 1:
        recorder.later_fields(seq, together([gradient.sum()]), lambda values: {"gradient": {"total": values[0]}})
        return
    size = gradient.abs()
    present = size > 0
    numbers = [
        gradient.double().sum() if gradient.device.type != "mps" else gradient.sum(),
        present.sum(),
        torch.where(present, size, torch.inf).amin(),
        size.amax(),
    ]
    if padding is not None and padding.shape == gradient.shape:
        numbers.append((present & padding.to(gradient.device)).sum())

    def fields(values: list[float]) -> dict[str, Any]:
        found = {"total": values[0], "elements": elements, "nonzero": int(values[1])}
        if values[1]:
            found.update(smallest=values[2], largest=values[3])
        if len(values) > 4:
            found["padding_nonzero"] = int(values[4])
        return {"gradient": found}

    recorder.later_fields(seq, together(numbers), fields)
