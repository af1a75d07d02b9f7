"""What the model was given lately: tensors of the fetched batches, and the token ids that embeddings looked up.

The instruments of losses ask it, to lay a target beside the input of the same positions. Only references to a few small
tensors are held, and only while losses are still being measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .core import Recorder
from .loss_inputs import readable
from .patching import ImportHooks, wrap
from .watch import Session

#: Batches that are remembered: accelerate fetches one ahead, the transformers Trainer all micro-batches of a step.
BATCHES = 9
#: Look-ups in embeddings that are remembered: encoder and decoder, tokens and segments.
LOOKUPS = 8
#: Tensors of one batch, and elements of one tensor, that are remembered.
TENSORS = 16
ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Given:
    """A tensor that a model may have been given.

    ``name`` is its key or position in the batch; ``embedded``: an embedding looked it up. ``padding``: the index that
    the embedding was told to be padding.
    """

    tensor: Any
    name: str
    embedded: bool = False
    padding: int | None = None


class Inputs:
    """The tensors of the last batches and look-ups, newest first."""

    def __init__(self) -> None:
        self._batches: deque[list[Given]] = deque(maxlen=BATCHES)
        self._lookups: deque[Given] = deque(maxlen=LOOKUPS)
        #: Nobody will ask any more.
        self.closed = False

    def fetched(self, batch: Any) -> None:
        """Remember the tensors of a batch. What was looked up before belongs to another one."""
        if not self.closed:
            self._lookups.clear()
            self._batches.appendleft([Given(tensor, name) for name, tensor in tensors_of(batch)])

    def embedded(self, ids: Any, padding: int | None) -> None:
        """Remember the ids of a look-up of rows of tokens."""
        if not self.closed and getattr(ids, "ndim", 0) == 2 and _plain(ids) and not any(
            ids is known.tensor for known in self._lookups
        ):  # fmt: skip
            self._lookups.appendleft(Given(ids, "input ids", True, padding))

    def backward(self) -> None:
        """The next loss is that of another forward pass."""
        self._lookups.clear()

    def lookups(self) -> list[Given]:
        return list(self._lookups)

    def batches(self) -> list[list[Given]]:
        return list(self._batches)

    def close(self) -> None:
        """Let go of everything."""
        self.closed = True
        self._batches.clear()
        self._lookups.clear()


def tensors_of(batch: Any, dimensions: int = 3, elements: int = ELEMENTS) -> list[tuple[str, Any]]:
    """Names and tensors of up to so many dimensions and elements in a nested batch; positions are ``batch[1]``."""
    found: list[tuple[str, Any]] = []
    for name, tensor in _walk(batch, "", 0):
        if 1 <= tensor.ndim <= dimensions and _plain(tensor, elements):
            found.append((name or "the batch", tensor))
        if len(found) == TENSORS:
            break
    return found


def _walk(item: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(item, torch.Tensor):
        yield name, item
    elif depth > 3:
        return
    elif isinstance(item, dict) or hasattr(item, "values") and hasattr(item, "keys"):
        for key in list(item.keys())[:TENSORS]:
            yield from _walk(item[key], str(key)[:60], depth + 1)
    elif isinstance(item, (list, tuple)):
        for position, part in enumerate(item[:TENSORS]):
            yield from _walk(part, f"{name or 'batch'}[{position}]", depth + 1)
    elif hasattr(item, "__dataclass_fields__"):
        for key in list(item.__dataclass_fields__)[:TENSORS]:
            yield from _walk(getattr(item, key, None), key, depth + 1)


def _plain(tensor: Any, elements: int = ELEMENTS) -> bool:
    """An ordinary dense tensor of a size that can be looked at."""
    return readable(tensor) and 0 < tensor.numel() <= elements


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder: Recorder = session.recorder
    inputs = session.inputs = Inputs()
    session.closers.append(inputs.close)

    @recorder.quiet
    def looked_up(ids: Any, padding: Any) -> None:
        if not ids.is_floating_point():
            inputs.embedded(ids, padding if isinstance(padding, int) else None)

    def make(original: Any) -> Any:
        def embedding(input: Any, weight: Any, padding_idx: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and isinstance(input, torch.Tensor):
                looked_up(input, padding_idx)
            return original(input, weight, padding_idx, *args, **kwargs)

        return embedding

    wrap(torch.nn.functional, "embedding", make)
