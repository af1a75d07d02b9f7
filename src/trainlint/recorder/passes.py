"""Passes over DataLoaders, and which of them feed the training."""

from __future__ import annotations

from typing import Any


class Pass:
    """One pass over a DataLoader: an iterator from its opening to its end."""

    def __init__(self, loader: int, payload: dict[str, Any], dataset: int, opened: int, after_watch: bool) -> None:
        self.loader = loader
        #: The ``loader`` line that describes it.
        self.payload = payload
        #: Identity of its dataset: a loader that is built anew for each epoch keeps it.
        self.dataset = dataset
        #: Opened, or asked for its first batch, after the last wanted step.
        self.after_watch = after_watch
        self.opened = opened
        self.delivered = 0
        #: ``seq`` of the event of its first batch.
        self.first_seq: int | None = None
        #: Count of the clock at its last batch.
        self.last = opened
        #: It came to its end by itself.
        self.exhausted = False
        #: Windows that it had a batch in, of those since its first.
        self.windows = 0
        self.first_window: int | None = None
        #: Batches since the last backward.
        self.silent = 0
        #: A backward followed one of its batches before another loader's batch came.
        self.fed = False
        #: Made to run dry: it delivers no more.
        self.dry = False
        #: Batches that it may still deliver before it runs dry, once that is known.
        self.left: int | None = None

    @property
    def batches(self) -> int | None:
        """Its length as the program knows it."""
        length = self.payload.get("batches")
        return length if isinstance(length, int) else None

    @property
    def finished(self) -> bool:
        return self.exhausted or (self.batches is not None and self.delivered >= self.batches)


class Passes:
    """All passes of the process. A *window* is what lies between two backwards that have batches of their own."""

    def __init__(self) -> None:
        self._clock = 0
        self._known: dict[int, Pass] = {}
        self._recent: list[Pass] = []
        #: Windows so far.
        self.windows = 0
        #: Most batches of one loader in one window.
        self.longest = 0
        #: Passes that fed a backward, in the order of their first.
        self.fed: list[Pass] = []
        #: Batches that went into windows, all loaders together.
        self.used = 0

    def of(self, iterator: Any) -> Pass | None:
        return self._known.get(id(iterator))

    def opened(self, iterator: Any, loader: int, payload: dict[str, Any], dataset: int, after_watch: bool) -> None:
        self._clock += 1
        self._known[id(iterator)] = Pass(loader, payload, dataset, self._clock, after_watch)

    def delivered(self, done: Pass, seq: int) -> None:
        self._clock += 1
        if done.first_seq is None:
            done.first_seq = seq
        done.delivered += 1
        done.silent += 1
        done.last = self._clock
        self._recent.append(done)

    def backward(self) -> list[Pass]:
        """A backward (or a step without one) uses what was fetched since the last; the last of it fed it."""
        recent, self._recent = self._recent, []
        if not recent:
            return []
        self.windows += 1
        counts: dict[int, int] = {}
        for one in recent:
            counts[one.loader] = counts.get(one.loader, 0) + 1
            one.silent = 0
        for one in {id(p): p for p in recent}.values():
            one.windows += 1
            if one.first_window is None:
                one.first_window = self.windows
        feeding = recent[-1]
        self.longest = max(self.longest, counts[feeding.loader])
        self.used += len(recent)
        if not feeding.fed:
            feeding.fed = True
            self.fed.append(feeding)
        return recent

    def training(self) -> set[int]:
        """Loaders that feed the training: the last one before a backward, and those fetched beside it every time."""
        return {one.loader for one in self.fed} | {one.loader for one in self._known.values() if self._beside(one)}

    def _beside(self, one: Pass) -> bool:
        """One pass, fetched from again and again between backwards; an evaluation is a pass of its own each time."""
        if one.first_window is None:
            return False
        return one.windows >= 2 and 2 * one.windows > self.windows - one.first_window + 1

    def datasets(self) -> set[int]:
        return {one.dataset for one in self.fed}

    def began_anew(self) -> bool:
        """Whether the training began another pass after one had delivered its last batch."""
        for i, later in enumerate(self.fed):
            for earlier in self.fed[:i]:
                if later.opened > earlier.last and (later.loader == earlier.loader or earlier.finished):
                    return True
        return False
