"""A recording that goes on across the end of an epoch.

run = Run()
...                      # the watched steps
crossed = Crossed(run)   # the training loader runs dry here
run.sched()              # what the end of the epoch does
crossed.next_epoch()
run.batch().backward().step(adam)
recording = crossed.recording()
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.support.build import Run
from trainlint.recording.schema import Boundary, Recording


class Crossed:
    """Splits what a ``Run`` does into the watch and what followed it."""

    def __init__(self, run: Run, outcome: str = "crossed") -> None:
        self.run = run
        self.outcome = outcome
        self.watch = run.recording()
        self.next: int | None = None
        run.outsider.clear()

    def next_epoch(self) -> Crossed:
        """The next epoch's first batch comes now."""
        self.next = len(self.run.events) + 1
        return self

    def recording(self, **fields: Any) -> Recording:
        whole = self.run.recording()
        boundary = Boundary(
            outcome=self.outcome,
            loader=0,
            batches_delivered=3,
            batches_meant=100,
            next_epoch=self.next,
            roots=whole.roots,
            parameters=whole.parameters,
            optimizers=whole.optimizers,
            schedulers=whole.schedulers,
            loaders=whole.loaders,
            events=whole.events[len(self.watch.events) :],
            steps=whole.steps[len(self.watch.steps) :],
            outsiders=whole.outsiders,
        )
        return dataclasses.replace(self.watch, boundary=boundary, **fields)
