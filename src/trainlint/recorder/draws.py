"""What is drawn from a dataset, in a child process: by workers, and beside other datasets.

Whether workers draw the same randomness shows when each draws one and the same sample again and again: a dataset
without randomness gives equal bits every time, one with randomness other bits every time, and workers that share their
randomness the same bits in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from . import sample_hashes
from .child import Tell

#: Draws of one sample by each worker: as many as leave no room for chance, and what must be affordable.
STRAIGHT = 16
FEWEST = 6
#: Turns of two samples that follow.
TURNS = 4
WORKERS = 2
#: Seconds for the draws by workers, and for the samples of two datasets that are compared.
WORKERS_S = 1.0
COMPARE_S = 0.5
#: Two samples that take longer than this are too slow.
SLOW_S = 0.2
#: Samples of one dataset that are compared; positions at which classes are looked at.
COMPARED = 4096
SPREAD = 48
#: Classes in an attribute of the dataset, and positions of a ``Subset``, that are looked at.
LONGEST = 1 << 20
#: Attributes of datasets that hold the class of every sample.
ATTRIBUTES = ("targets", "labels", "_labels", "y", "classes_of_samples")


@dataclass(frozen=True)
class Source:
    """What a DataLoader draws from."""

    number: int
    dataset: Any
    collate: Callable[[Any], Any] | None
    #: Gives the batches of positions, or single positions where ``auto`` is off.
    indices: Any
    auto: bool
    workers: int
    worker_init: Any
    generator: Any


class Hashed:
    """Collate function of the draws: the hash of the sample, and of what the program's own makes of it."""

    def __init__(self, collate: Callable[[Any], Any] | None) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> str:
        text = sample_hashes.of_sample(items)
        if self.collate is not None:
            try:
                text += sample_hashes.of_sample(self.collate(items))
            except Exception:
                pass  # it wants more than one sample
        return text


def positions(source: Source) -> list[Any]:
    """Up to two different positions that the loader itself would ask for."""
    found: list[Any] = []
    for given in islice(iter(source.indices), 4):
        for index in given if source.auto else [given]:
            if index not in found:
                found.append(index)
            if len(found) == 2:
                return found
    return found


class Plan:
    """The positions that workers draw, one after the other to each in turn: lazily, as long as there is time."""

    def __init__(self, first: Any, other: Any, workers: int, auto: bool) -> None:
        self.first, self.other, self.workers, self.auto = first, other, workers, auto
        #: Rounds in which all workers draw ``first``.
        self.straight = 0

    def __iter__(self) -> Iterator[Any]:
        deadline = time.monotonic() + WORKERS_S
        while self.straight < STRAIGHT and (self.straight < FEWEST or time.monotonic() < deadline):
            self.straight += 1
            yield from self._round([self.first] * self.workers)
        pair = [self.first, self.other]
        for turn in range(2 * TURNS):
            yield from self._round([pair[(turn + worker) % 2] for worker in range(self.workers)])

    def _round(self, positions: list[Any]) -> list[Any]:
        return [[p] for p in positions] if self.auto else positions


def by_workers(source: Source, index: Any, tell: Tell) -> None:
    """Tell a ``Draws``: ``index`` of the last time, or ``None`` for one that the loader would ask for.

    Only workers touch the dataset: what it makes at its first sample must not be made before they are started.
    """
    found = positions(source)
    if len(found) < 2:
        raise ValueError("the dataset has fewer than two samples")
    first = found[0] if index is None else next((p for p in found if str(p) == index), _like(found[0], index))
    other = found[1] if found[1] != first else found[0]
    workers = min(source.workers, WORKERS)
    plan = Plan(first, other, workers, source.auto)
    hashes: list[list[str]] = [[] for _ in range(workers)]
    began: float | None = None
    for task, text in enumerate(_loader(source, plan, workers)):
        hashes[task % workers].append(text)
        began = began or time.monotonic()
        if task == 2 * workers and time.monotonic() - began > SLOW_S:
            raise ValueError(
                f"one sample takes {(time.monotonic() - began) / 2:.2f} s to make, too long to draw it often"
            )
    straight = plan.straight
    tell(
        {
            "index": str(first),
            "straight": [h[:straight] for h in hashes],
            "turned": [h[straight + w % 2 :: 2] for w, h in enumerate(hashes)],
            "item_s": round((time.monotonic() - (began or 0.0)) / max(1, len(hashes[0]) - 1), 6),
        }
    )


def _like(position: Any, text: str) -> Any:
    return int(text) if isinstance(position, int) and text.lstrip("-").isdigit() else position


def _loader(source: Source, plan: Plan, workers: int) -> Iterator[str]:
    import torch

    batches: dict[str, Any] = {"batch_sampler": plan} if source.auto else {"sampler": plan, "batch_size": None}
    return iter(
        torch.utils.data.DataLoader(
            source.dataset,
            num_workers=workers,
            prefetch_factor=1,
            collate_fn=Hashed(source.collate),
            worker_init_fn=source.worker_init,
            generator=source.generator,
            multiprocessing_context="fork",
            **batches,
        )
    )


# ------------------------------------------------------------------------------------------------ classes


def base_of(dataset: Any) -> tuple[Any, list[Any] | None]:
    """The dataset below all ``Subset`` and the positions in it; ``None`` for all of them."""
    import torch

    indices: list[Any] | None = None
    for _ in range(8):
        if type(dataset) is not torch.utils.data.Subset:
            break
        own = dataset.indices
        own = own.tolist() if hasattr(own, "tolist") else list(own)
        indices = own if indices is None else [own[i] for i in indices]
        dataset = dataset.dataset
    return dataset, indices


def label_order(source: Source, tell: Tell) -> None:
    """Tell a ``LabelOrder`` of the dataset in its own order, when it has one class per sample."""
    base, indices = base_of(source.dataset)
    name, labels = _attribute(base)
    if labels is not None:
        if indices is not None:
            labels = [labels[i] for i in indices]
        tell({**_runs(labels), "source": name})
        return
    length = len(source.dataset)
    drawn: list[int] = []
    deadline = time.monotonic() + COMPARE_S
    for k in range(min(SPREAD, length)):
        label = _label(source.dataset[k * (length - 1) // max(1, min(SPREAD, length) - 1)])
        if label is None or time.monotonic() > deadline:
            return
        drawn.append(label)
    tell({**_runs(drawn), "whole": length <= SPREAD})


def _attribute(dataset: Any) -> tuple[str, list[int] | None]:
    found = [(name, getattr(dataset, name, None)) for name in ATTRIBUTES]
    tensors = getattr(dataset, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) > 1:
        found.append((f"tensors[{len(tensors) - 1}]", tensors[-1]))
    for name, value in found:
        if value is None or getattr(value, "ndim", 1) != 1 or not hasattr(value, "__len__"):
            continue
        if len(value) != len(dataset) or not 0 < len(value) <= LONGEST:
            continue
        values = value.tolist() if hasattr(value, "tolist") else list(value)
        if all(isinstance(v, (int, str)) for v in values):
            kinds = {v: k for k, v in enumerate(dict.fromkeys(values))}
            return name, [kinds[v] for v in values]
    return "", None


def _label(item: Any) -> int | None:
    value: Any = None
    if isinstance(item, (list, tuple)) and len(item) > 1:
        value = item[-1]
    elif isinstance(item, dict):
        value = next((item[k] for k in item if str(k) in sample_hashes.LABELS), None)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _runs(labels: Sequence[int]) -> dict[str, Any]:
    runs = 1 + sum(1 for a, b in pairwise(labels) if a != b)
    return {"looked_at": len(labels), "runs": runs, "classes": len(set(labels))}


# ------------------------------------------------------------------------------------------------ shared samples


def overlap(training: Source, other: Source, tell: Tell) -> None:
    """Tell an ``Overlap``: by position where both take parts of one dataset, else by the values of drawn samples."""
    mine, own = base_of(training.dataset)
    theirs, others = base_of(other.dataset)
    if mine is theirs:
        whole = range(len(mine))
        a, b = set(whole if own is None else own), set(whole if others is None else others)
        numbers = {"training_samples": len(a), "other_samples": len(b), "shared": len(a & b)}
        tell({"by": "indices", **numbers})
        return
    first, second = _drawn(training.dataset), _drawn(other.dataset)
    known = set(first)
    tell(
        {
            "by": "values",
            "training_samples": len(first),
            "other_samples": len(second),
            "shared": sum(1 for h in second if h in known),
            "repeated": len(first) - len(known),
            "whole": len(first) == len(training.dataset) and len(second) == len(other.dataset),
        }
    )


def _drawn(dataset: Any) -> list[str]:
    """Hashes of samples spread over a dataset, as many as there is time for; samples of one value are left out."""
    length = len(dataset)
    step = -(-length // COMPARED)
    deadline = time.monotonic() + COMPARE_S / 2
    found = []
    for index in range(0, length, step):
        found.append(sample_hashes.inputs_of(dataset[index]))
        if time.monotonic() > deadline:
            break
    return [h for h in found if h]
