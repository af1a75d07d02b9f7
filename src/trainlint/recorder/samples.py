"""The samples that DataLoaders deliver: passes, order, hashes of the first batches, and what drawing from them shows.

``dataloaders`` tells of passes and batches as they come. Once the wanted steps are made, and again in the next epoch,
the training's datasets are drawn from in a child process (:mod:`.child`, :mod:`.draws`); the program's own iterators,
datasets and random number generators are never touched.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from functools import partial
from typing import Any

from . import child, draws, sample_hashes
from .batches import tensors_of
from .core import Identities, Recorder
from .loader_facts import (
    generators_in,
    holds_files,
    innermost_sampler,
    is_mapped,
    line_of_function,
    name_of,
    start_method,
)
from .passes import Pass
from .watch import Session

#: Batches of one loader whose samples are hashed, in the watch and again after it.
BATCHES = 8
#: Batches at the beginning of a pass whose positions are kept, and positions of each.
FIRST_BATCHES = 4
POSITIONS = 32
#: Passes that are written.
PASSES = 64
#: Loaders that are drawn from, and seconds for all draws of one moment. The supervisor takes three for a sign of life.
LOADERS = 4
LIMIT_S = 2.5
#: Seconds that are left of the time for the epoch boundary when the draws in it are over.
SPARE_S = 0.5


class Seen:
    """One pass, with what is needed to draw from its dataset again. Keeps neither loader nor iterator alive."""

    def __init__(self, number: int, loader: int, opened: int, iterator: Any, owner: Any) -> None:
        self.number = number
        self.loader = loader
        self.opened = opened
        self.iterator = weakref.ref(iterator)
        self.owner = weakref.ref(owner)
        self.one: Pass | None = None
        self.indices: list[list[int]] = []
        self.epoch: int | None = None
        self.written = False


class Samples:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.passes: list[Seen] = []
        #: Latest pass of each loader.
        self.latest: dict[int, Seen] = {}
        #: By id of its iterator: passes of which more positions are wanted.
        self._asking: dict[int, Seen] = {}
        self.datasets = Identities()
        self._hashed: Counter[tuple[int, bool]] = Counter()
        self._described: set[int] = set()
        #: Loader -> position that its workers drew.
        self._positions: dict[int, str] = {}
        self._drawn: set[tuple[Any, ...]] = set()
        session.closers.append(self.close)

    # -- what dataloaders tells

    def opened(self, iterator: Any, loader: Any, number: int) -> None:
        if len(self.passes) >= PASSES:
            return
        seen = Seen(len(self.passes), number, self.recorder.next_seq(), iterator, loader)
        seen.one = self.session.boundary.passes.of(iterator)
        epoch = getattr(innermost_sampler(loader), "epoch", None)
        seen.epoch = epoch if isinstance(epoch, int) else None
        self.passes.append(seen)
        self.latest[number] = seen
        self._asking[id(iterator)] = seen
        if number not in self._described:
            self._described.add(number)
            self.recorder.emit("samples", {"loaders": [self._describe(loader, number)]})

    def asked(self, iterator: Any, index: Any) -> None:
        """The sampler gave an iterator the positions of its next batch."""
        seen = self._asking.get(id(iterator))
        if seen is None:
            return
        given = index if isinstance(index, (list, tuple)) else [index]
        if all(hasattr(i, "__index__") for i in given[:POSITIONS]):
            seen.indices.append([int(i) for i in given[:POSITIONS]])
        if len(seen.indices) >= FIRST_BATCHES:
            del self._asking[id(iterator)]

    def fetched(self, one: Pass, seq: int, batch: Any, size: int | None) -> None:
        key = one.loader, self.session.done
        if self._hashed[key] >= BATCHES or not size:
            return
        self._hashed[key] += 1
        hashes, labels = sample_hashes.of_batch(tensors_of(batch, dimensions=6, elements=1 << 32), size)
        number = self.latest[one.loader].number if one.loader in self.latest else -1
        payload = {"seq": seq, "loader": one.loader, "number": number, "hashes": hashes, "labels": labels}
        self.recorder.emit("samples", {"batches": [payload]})

    # -- what a loader reads from

    def _describe(self, loader: Any, number: int) -> dict[str, Any]:
        import torch

        dataset = getattr(loader, "dataset", None)
        base = draws.base_of(dataset)[0]
        sampler = innermost_sampler(loader)
        of_torch = type(sampler) in (
            torch.utils.data.RandomSampler,
            torch.utils.data.SequentialSampler,
            torch.utils.data.DistributedSampler,
        )
        own = getattr(sampler, "generator", None) is not None or getattr(loader, "generator", None) is not None
        init = getattr(loader, "worker_init_fn", None)
        return {
            "loader": number,
            "dataset": self.datasets.of(dataset),
            "base": self.datasets.of(base),
            "class_name": type(base).__name__,
            "mapped": is_mapped(dataset),
            "sampler": type(sampler).__name__ if sampler is not None else "",
            "sampler_of_torch": of_torch,
            "own_generator": own,
            "persistent_workers": bool(getattr(loader, "persistent_workers", False)),
            "start_method": start_method(loader) if getattr(loader, "num_workers", 0) else "",
            "worker_init": name_of(init) if init is not None else "",
            "worker_init_at": line_of_function(init),
            "generators": generators_in({"dataset": dataset, "collate_fn": getattr(loader, "collate_fn", None)})
            if getattr(loader, "num_workers", 0)
            else [],
            "at": line_of_function(getattr(type(base), "__getitem__", None)),
        }

    # -- at the end of the watch, and in the next epoch

    def close(self) -> None:
        began = self.session.boundary.began is not None
        for seen in self.passes:
            if not seen.written:
                seen.written = True
                self.recorder.emit("samples", {"passes": [self._pass(seen)]})
        if self.session.done and self.session.batches:
            when = "next-epoch" if began else "watch"
            why = child.possible()
            if not why:
                self._draw(when)
            for n in self.session.boundary.passes.training() if why else ():
                self._refused(n, when, why)

    def _pass(self, seen: Seen) -> dict[str, Any]:
        one = seen.one
        return {
            "number": seen.number,
            "loader": seen.loader,
            "opened": seen.opened,
            "delivered": one.delivered if one is not None else 0,
            "exhausted": bool(one is not None and one.exhausted),
            "fed": bool(one is not None and one.fed),
            "indices": seen.indices,
            "epoch": seen.epoch,
        }

    def _draw(self, when: str) -> None:
        """Draw what was not drawn yet, the workers' randomness anew in every epoch."""
        training = [n for n in sorted(self.session.boundary.passes.training()) if n in self.latest][:LOADERS]
        others = [n for n in self.latest if n not in training][:LOADERS]
        sources = {n: self._source(n) for n in [*training, *others]}
        jobs: list[tuple[str, dict[str, Any], Any]] = []
        for n in training:
            source = sources[n]
            if isinstance(source, str):
                self._refused(n, when, source)
                continue
            if source.workers:
                why = self._not_by_workers(n)
                if why:
                    self._refused(n, when, why)
                else:
                    work = partial(draws.by_workers, source, self._positions.get(n))
                    jobs.append(("draws", {"loader": n, "when": when}, work))
            if self._sequential(n) and self._first("labels", n):
                jobs.append(("labels", {"loader": n}, partial(draws.label_order, source)))
            for m in others:
                other = sources[m]
                if not isinstance(other, str) and self._first("overlap", source.dataset, other.dataset):
                    facts = {"training": n, "other": m}
                    jobs.append(("overlaps", facts, partial(draws.overlap, source, other)))
        # Workers first, while no sample was drawn in the child itself.
        jobs.sort(key=lambda job: job[0] != "draws")
        limit = LIMIT_S
        if when == "next-epoch":
            limit = min(limit, self.session.boundary._deadline - time.time() - SPARE_S)
        if jobs and limit > 0.3:
            self._run(jobs, limit)

    def _run(self, jobs: list[tuple[str, dict[str, Any], Any]], limit: float) -> None:
        def work(tell: child.Tell) -> None:
            for position, (_, _, job) in enumerate(jobs):
                try:
                    job(lambda result, position=position: tell([position, result]))
                except Exception as error:
                    tell([position, {"why": f"{type(error).__name__}: {error}"[:300]}])

        told, why = child.run(work, limit)
        results = dict(told)
        for position, (part, facts, _) in enumerate(jobs):
            result = results.get(position)
            if result is None and part == "draws":
                result = {"why": why or "nothing was drawn"}
            if result is None or ("why" in result and part != "draws"):
                continue
            if part == "draws" and "index" in result:
                self._positions[facts["loader"]] = result["index"]
            self.recorder.emit("samples", {part: [{**facts, **result}]})

    def _sequential(self, number: int) -> bool:
        one = self.latest[number].one
        return one is not None and one.payload.get("shuffle") is False

    def _refused(self, loader: int, when: str, why: str) -> None:
        self.recorder.emit("samples", {"draws": [{"loader": loader, "when": when, "why": why}]})

    def _first(self, *key: Any) -> bool:
        known = tuple(k if isinstance(k, (str, int)) else self.datasets.of(k) for k in key)
        if known in self._drawn:
            return False
        self._drawn.add(known)
        return True

    def _source(self, number: int) -> draws.Source | str:
        """What a loader draws from, or why it cannot be drawn from."""
        seen = self.latest[number]
        loader, iterator = seen.owner(), seen.iterator()
        if loader is not None:
            dataset, collate, sampler = loader.dataset, loader.collate_fn, loader._index_sampler
            init, auto = loader.worker_init_fn, loader._auto_collation
            workers, generator = loader.num_workers, loader.generator
        elif iterator is not None:
            dataset, collate, sampler = iterator._dataset, iterator._collate_fn, iterator._index_sampler
            init, auto = getattr(iterator, "_worker_init_fn", None), iterator._auto_collation
            workers, generator = iterator._num_workers, None
        else:
            return "its DataLoader is gone"
        if not is_mapped(dataset):
            return "its dataset has no positions that can be asked for"
        if holds_files({"dataset": dataset}):
            return "its dataset holds an open file, whose position a second process would move"
        return draws.Source(number, dataset, collate, sampler, bool(auto), int(workers), init, generator)

    def _not_by_workers(self, number: int) -> str:
        loader = self.latest[number].owner()
        method = start_method(loader) if loader is not None else "fork"
        if method != "fork":
            return f"its workers are started by {method}, which cannot be repeated from within the program"
        return ""
