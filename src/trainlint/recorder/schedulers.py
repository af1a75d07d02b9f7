"""Learning-rate schedulers: construction, every step, and the whole curve made on a copy."""

from __future__ import annotations

import threading
from typing import Any

from . import curves
from .core import Recorder, clean, scalar
from .modules import inner_optimizer
from .patching import ImportHooks, around, wrap
from .watch import Session


class SchedulerWatch:
    """One scheduler as it is watched."""

    def __init__(self, number: int, scheduler: Any) -> None:
        self.number = number
        self.scheduler = scheduler
        self.at: dict[str, Any] | None = None
        self.snapshot: curves.Snapshot | None = None
        self.missing = ""
        self.calls = 0
        #: Part of a SequentialLR or ChainedScheduler, which steps it.
        self.child = False


class Schedulers:
    """All schedulers of the process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.watched: dict[int, SchedulerWatch] = {}

    def of(self, scheduler: Any) -> SchedulerWatch:
        number = self.recorder.schedulers.of(scheduler)
        found = self.watched.get(number)
        if found is None:
            found = self.watched[number] = SchedulerWatch(number, scheduler)
        return found

    def constructed(self, scheduler: Any) -> None:
        """Take a snapshot of the fresh scheduler, from which the curve is made later."""
        watched = self.of(scheduler)
        if watched.at is None:
            watched.at = self.recorder.user_line()
        for child in (*getattr(scheduler, "_schedulers", ()), *curves.held(scheduler).values()):
            self.of(child).child = True
        self.take_snapshot(watched)

    def take_snapshot(self, watched: SchedulerWatch) -> None:
        watched.calls = 0
        try:
            watched.snapshot = curves.take(watched.scheduler)
            watched.missing = ""
        except curves.CannotCopy as reason:
            watched.snapshot, watched.missing = None, str(reason)

    def close(self) -> None:
        """Write every scheduler that is not part of another, with its curve."""
        for watched in list(self.watched.values()):
            if watched.child:
                continue
            self._write(watched)

    def _write(self, watched: SchedulerWatch) -> None:
        scheduler = watched.scheduler
        optimizer = inner_optimizer(getattr(scheduler, "optimizer", None))
        horizon = curves.horizon(scheduler)
        points: list[tuple[int, list[float]]] = []
        missing = watched.missing
        plan = self.recorder.plan.get("optimizer_steps")
        if watched.snapshot is not None:
            try:
                points, missing = curves.curve(watched.snapshot, horizon, plan)
            except Exception as error:
                missing = f"it could not be stepped on a copy: {type(error).__name__}: {error}"
        self.recorder.emit(
            "scheduler",
            {
                "id": watched.number,
                "class_name": type(scheduler).__name__,
                "optimizer": self.recorder.optimizers.get(optimizer) if optimizer is not None else None,
                "at": watched.at,
                "settings": curves.settings(scheduler),
                "base_rates": [scalar(r) for r in getattr(scheduler, "base_lrs", [])],
                "children": [type(c).__name__ for c in getattr(scheduler, "_schedulers", ())],
                "curve": [{"calls": calls, "rates": rates} for calls, rates in points],
                "curve_missing": missing,
                "horizon_calls": horizon,
                "metric": is_plateau(scheduler),
                "calls": watched.calls,
            },
        )


def is_plateau(scheduler: Any) -> bool:
    """Needs a metric: ReduceLROnPlateau and what derives from it."""
    return any(cls.__name__ == "ReduceLROnPlateau" for cls in type(scheduler).__mro__)


def _place(scheduler: Any, epoch: Any) -> float | None:
    """The number that a program passed to ``step()`` of a scheduler that takes an epoch there."""
    if epoch is None or is_plateau(scheduler) or getattr(epoch, "is_cuda", False):
        return None  # reading a number from the GPU would make the program wait for it
    number = scalar(epoch)
    return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else None


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    schedulers = Schedulers(session)
    session.closers.append(schedulers.close)
    session.schedulers = schedulers
    recorder: Recorder = session.recorder
    depth = threading.local()

    def rates_of(scheduler: Any) -> list[Any]:
        optimizer = getattr(scheduler, "optimizer", None)
        groups = getattr(optimizer, "param_groups", [])
        return [clean(scalar(g.get("lr"))) for g in groups]

    def make_init(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if recorder.busy:
                original(self, *args, **kwargs)
                return
            wrap_step(type(self))
            building = getattr(depth, "building", 0)
            depth.building = building + 1
            try:
                original(self, *args, **kwargs)
            finally:
                depth.building = building
            # A subclass's constructor may go on after the base's: the snapshot of the outermost call wins.
            note_construction(self)

        return init

    note_construction = recorder.quiet(schedulers.constructed)

    @recorder.quiet
    def note_step(scheduler: Any, before: list[Any], initial: bool, epoch: Any) -> None:
        watched = schedulers.of(scheduler)
        if not initial:
            watched.calls += 1
        recorder.event(
            "scheduler_step",
            at=recorder.user_line(),
            scheduler=watched.number,
            rates_before=before,
            rates_after=rates_of(scheduler),
            initial=initial,
            epoch=_place(scheduler, epoch),
        )

    def make_step(original: Any) -> Any:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            inside = getattr(depth, "stepping", 0)
            if inside or recorder.busy:
                return original(self, *args, **kwargs)
            depth.stepping = 1
            before = rates_of(self)
            try:
                return original(self, *args, **kwargs)
            finally:
                depth.stepping = 0
                epoch = args[0] if args else kwargs.get("epoch")
                note_step(self, before, bool(getattr(depth, "building", 0)), epoch)

        return step

    module = torch.optim.lr_scheduler
    base = module.LRScheduler

    def wrap_step(cls: type) -> None:
        """Every class in the line that has a ``step`` of its own."""
        for owner in cls.__mro__:
            if "step" in owner.__dict__ and (issubclass(owner, base) or owner.__name__ == "ReduceLROnPlateau"):
                wrap(owner, "step", make_step)

    @recorder.quiet
    def state_before(self: Any, *args: Any, **kwargs: Any) -> Any:
        return rates_of(self)

    @recorder.quiet
    def state_after(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        watched = schedulers.of(self)
        schedulers.take_snapshot(watched)
        recorder.event(
            "state_loaded",
            at=recorder.user_line(),
            what="scheduler",
            target=watched.number,
            class_name=type(self).__name__,
            empty=not state_dict,
            rates_before=token or [],
            rates_after=rates_of(self),
            path=session.last_loaded,
        )

    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "step"):
            if "__init__" in value.__dict__:
                wrap(value, "__init__", make_init)
            if "step" in value.__dict__:
                wrap(value, "step", make_step)
            if "load_state_dict" in value.__dict__:
                wrap(value, "load_state_dict", around(state_before, state_after))
