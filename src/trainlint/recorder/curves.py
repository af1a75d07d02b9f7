"""The whole learning-rate curve of a scheduler, made on a copy that shares nothing with the program.

The copy has the scheduler's own numbers and a stand-in for its optimizer that holds only the groups' hyperparameters.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import math
import time
import types
import warnings
from typing import Any

from .core import scalar

#: Seconds that stepping a copy may take.
BUDGET_S = 1.0
#: Calls looked at when neither the schedule nor the plan says how long the run is.
DEFAULT_CALLS = 5_000
#: Calls looked at beyond the end of a schedule that has no closed form.
BEYOND_CALLS = 10_000
#: Largest number of calls looked at where the rate has a closed form.
FAR = 1_000_000
#: Change of the rate, as a share of its peak, that is followed to the very call where it happens.
JUMP = 0.01
#: Points that following changes may add to a curve.
EXTRA_POINTS = 600
#: Calls from the start at which every rate is kept: warm-ups are read off exactly.
DENSE = 256
#: Names under which functions for LambdaLR keep the length of the schedule.
LENGTH_NAMES = ("num_training_steps", "total_steps", "max_steps", "t_total", "training_steps")


class CannotCopy(Exception):
    """The scheduler holds something that cannot be copied safely; the text says what."""


class Snapshot:
    """A scheduler's class and own numbers, and the hyperparameters of the groups it sets."""

    def __init__(
        self,
        cls: type,
        numbers: dict[str, Any],
        children: list[Snapshot],
        groups: list[dict[str, Any]],
        held: dict[str, Snapshot],
    ) -> None:
        self.cls = cls
        self.numbers = numbers
        self.children = children
        self.groups = groups
        #: Schedulers that it keeps under names of its own (a warm-up that hands over to another).
        self.held = held

    def build(self, optimizer: Any = None) -> Any:
        """A scheduler that can be stepped freely."""
        if optimizer is None:
            optimizer = stand_in(self.groups)
        made: Any = object.__new__(self.cls)
        made.__dict__.update(copy.deepcopy({k: v for k, v in self.numbers.items() if not callable_value(v)}))
        made.__dict__.update({k: v for k, v in self.numbers.items() if callable_value(v)})
        made.__dict__["optimizer"] = optimizer
        made.__dict__.update({name: held.build(optimizer) for name, held in self.held.items()})
        if self.children:
            made.__dict__["_schedulers"] = [child.build(optimizer) for child in self.children]
        return made


def callable_value(value: Any) -> bool:
    return callable(value) or (isinstance(value, (list, tuple)) and any(callable(v) for v in value))


def take(scheduler: Any) -> Snapshot:
    """A snapshot of a scheduler as it stands.

    Raises:
        CannotCopy: it needs a metric, or holds an object that is neither plain data nor a function.
    """
    if any(cls.__name__ == "ReduceLROnPlateau" for cls in type(scheduler).__mro__):
        raise CannotCopy("it follows a metric")
    optimizer = getattr(scheduler, "optimizer", None)
    if optimizer is None and not getattr(scheduler, "_schedulers", None):
        raise CannotCopy("it has no optimizer")
    groups = [
        {k: _plain(v, k) for k, v in g.items() if k not in ("params", "param_names")}
        for g in getattr(optimizer, "param_groups", [])
    ]
    numbers: dict[str, Any] = {}
    inside = held(scheduler)
    for name, value in scheduler.__dict__.items():
        if name in ("optimizer", "_schedulers") or name in inside:
            continue
        numbers[name] = _plain(value, name)
    children = [take(child) for child in getattr(scheduler, "_schedulers", ())]
    return Snapshot(type(scheduler), numbers, children, groups, {name: take(s) for name, s in inside.items()})


def held(scheduler: Any) -> dict[str, Any]:
    """Schedulers on the same optimizer that a scheduler keeps as attributes, by name."""
    from torch.optim.lr_scheduler import LRScheduler

    own = getattr(scheduler, "optimizer", None)
    return {
        name: value
        for name, value in scheduler.__dict__.items()
        if own is not None and isinstance(value, LRScheduler) and getattr(value, "optimizer", None) is own
    }


_PLAIN = (type(None), bool, int, float, str)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial, types.MethodType)


def _plain(value: Any, name: str) -> Any:
    """A copy of plain data; functions as they are.

    Raises:
        CannotCopy: anything else, since copying it could be large and calling it could change the program.
    """
    if isinstance(value, _PLAIN):
        return value
    if getattr(value, "numel", None) is not None and hasattr(value, "detach"):
        if value.numel() > 4096:
            raise CannotCopy(f"its attribute {name} is a large tensor")
        return value.detach().cpu().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, name) for v in value) if type(value) in (list, tuple) else list(value)
    if isinstance(value, collections.Counter):
        return collections.Counter(value)
    if isinstance(value, dict):
        return {k: _plain(v, name) for k, v in value.items()}
    if isinstance(value, (*_FUNCTIONS, type)):
        return value
    if callable(value):
        inner = getattr(value, "__dict__", {})
        if all(isinstance(v, _PLAIN) for v in inner.values()):
            return copy.deepcopy(value)
    raise CannotCopy(f"its attribute {name} is a {type(value).__name__}")


def stand_in(groups: list[dict[str, Any]]) -> Any:
    """An optimizer with these groups and no parameters."""
    import torch

    made = object.__new__(torch.optim.SGD)
    made.__dict__.update(
        param_groups=[{"params": [], **copy.deepcopy(g)} for g in groups],
        defaults={},
        state=collections.defaultdict(dict),
        _opt_called=True,
    )
    return made


def settings(scheduler: Any) -> dict[str, Any]:
    """The scheduler's public numbers, and what its functions closed over."""
    out: dict[str, Any] = {}
    for name, value in scheduler.__dict__.items():
        if name.startswith("_") or name in ("optimizer", "base_lrs", "last_epoch", "verbose"):
            continue
        if isinstance(value, _PLAIN) or (
            isinstance(value, (list, tuple)) and len(value) <= 16 and all(isinstance(v, _PLAIN) for v in value)
        ):
            out[name] = scalar(value)
        elif isinstance(value, collections.Counter):
            out[name] = sorted(value)
    for function in getattr(scheduler, "lr_lambdas", ())[:1]:
        out.update({f"lr_lambda.{k}": v for k, v in closed_over(function).items()})
    milestones = getattr(scheduler, "_milestones", None)
    if isinstance(milestones, list):
        out["milestones"] = scalar(milestones)
    for index, child in enumerate(getattr(scheduler, "_schedulers", ())):
        for name, value in settings(child).items():
            out[f"{index}.{type(child).__name__}.{name}"] = value
    return out


def closed_over(function: Any) -> dict[str, Any]:
    """Plain numbers and texts that a function for LambdaLR was given: partial arguments and closure."""
    out: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        out.update({k: v for k, v in function.keywords.items() if isinstance(v, _PLAIN)})
        function = function.func
    code = getattr(function, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, _PLAIN):
            out[name] = value
    return out


def horizon(scheduler: Any) -> int | None:
    """Calls of ``step()`` after which the schedule has run its course, when its own settings say so."""
    name = type(scheduler).__name__
    children = getattr(scheduler, "_schedulers", None)
    if children:
        if name == "SequentialLR":
            last = horizon(children[-1])
            milestones = getattr(scheduler, "_milestones", [])
            return milestones[-1] + last if milestones and last is not None else None
        # Parts that run beside each other end when the last one does: never, when one has no end of its own.
        lengths = [h for h in map(horizon, children) if h is not None]
        return max(lengths) if len(lengths) == len(children) else None
    if name in ("CosineAnnealingWarmRestarts", "CyclicLR"):
        return None
    for attribute in ("T_max", "total_steps", "total_iters"):
        value = getattr(scheduler, attribute, None)
        if isinstance(value, (int, float)) and 0 < value < FAR * 1000:
            return int(value)
    milestones = getattr(scheduler, "milestones", None)
    if milestones and name == "MultiStepLR":
        return int(max(milestones))
    for function in getattr(scheduler, "lr_lambdas", ())[:1]:
        known = closed_over(function)
        for key in LENGTH_NAMES:
            value = known.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < FAR * 1000:
                return int(value)
    return None


def grid(limit: int, marks: list[int]) -> list[int]:
    """Numbers of calls at which the rate is kept: dense at the start, even up to each mark, geometric beyond."""
    points = set(range(min(DENSE, limit) + 1))
    for mark in marks:
        if mark <= limit:
            points.update(round(mark * i / 128) for i in range(129))
            points.update(p for p in (mark - 1, mark, mark + 1) if 0 <= p <= limit)
    step = float(DENSE)
    while step < limit:
        points.add(int(step))
        step *= 1.03
    points.add(limit)
    return sorted(p for p in points if 0 <= p <= limit)


def curve(snapshot: Snapshot | None, length: int | None, plan: int | None) -> tuple[list[tuple[int, list[float]]], str]:
    """Rates over calls, and a remark when the curve is cut short or missing."""
    if snapshot is None:
        return [], "no snapshot"
    scheduler = snapshot.build()
    marks = sorted({int(m) for m in (length, plan) if m})
    reach = int((marks[-1] if marks else DEFAULT_CALLS) * 1.1) + 2
    closed = closed_form(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if closed is not None:
            return _closed(closed, scheduler, grid(min(FAR, 20 * reach) if marks else FAR, marks))
        # A schedule that is called too often is far beyond its end when the run is: the program may know how far.
        return _stepped(scheduler, grid(min(max(reach, min(20 * reach, BEYOND_CALLS)), FAR), marks))


def closed_form(scheduler: Any) -> Any:
    """A function from ``last_epoch`` to rates, when the class has one that needs no earlier state."""
    name, module = type(scheduler).__name__, type(scheduler).__module__
    if getattr(scheduler, "_schedulers", None):
        return None
    if module == "torch.optim.lr_scheduler" and hasattr(scheduler, "_get_closed_form_lr"):

        def known(epoch: int) -> list[float]:
            scheduler.last_epoch = epoch
            return [float(r) for r in scheduler._get_closed_form_lr()]

        return known
    if name == "LambdaLR" and module == "torch.optim.lr_scheduler":

        def by_lambda(epoch: int) -> list[float]:
            return [float(b * f(epoch)) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]

        return by_lambda
    return None


def _closed(rates_at: Any, scheduler: Any, points: list[int]) -> tuple[list[tuple[int, list[float]]], str]:
    start = int(scheduler.last_epoch)
    began = time.perf_counter()
    out: list[tuple[int, list[float]]] = []
    for calls in points:
        try:
            rates = rates_at(start + calls)
        except Exception as error:
            return out, f"stops at call {calls}: {type(error).__name__}: {error}"
        if not all(math.isfinite(r) for r in rates):
            return out, f"is not finite from call {calls} on"
        out.append((calls, rates))
        if time.perf_counter() - began > BUDGET_S:
            return out, f"cut at call {calls} to save time"
    return _followed(rates_at, start, out, began), ""


def _followed(
    rates_at: Any, start: int, points: list[tuple[int, list[float]]], began: float
) -> list[tuple[int, list[float]]]:
    """The points, and more between those that differ: a StepLR's step is found to the call, not blurred over a gap."""
    known = dict(points)
    peak = max((abs(r) for rates in known.values() for r in rates), default=0.0)
    open_gaps = [(a, b) for (a, _), (b, _) in itertools.pairwise(points)]
    room = EXTRA_POINTS
    while open_gaps and room and time.perf_counter() - began < BUDGET_S:
        a, b = open_gaps.pop()
        if b - a <= 1 or not _jumps(known[a], known[b], peak):
            continue
        middle = (a + b) // 2
        try:
            rates = rates_at(start + middle)
        except Exception:
            continue
        if not all(math.isfinite(r) for r in rates):
            continue
        known[middle] = rates
        room -= 1
        open_gaps += [(middle, b), (a, middle)]
    return sorted(known.items())


def _jumps(before: list[float], after: list[float], peak: float) -> bool:
    """A change worth following: of the peak, or, of a rate that still trains something, by a third of itself."""
    for a, b in zip(before, after, strict=False):
        change, larger = abs(a - b), max(abs(a), abs(b))
        if change > JUMP * peak or (larger > 1e-5 * peak and change > larger / 3):
            return True
    return False


def _stepped(scheduler: Any, points: list[int]) -> tuple[list[tuple[int, list[float]]], str]:
    optimizer = scheduler.optimizer
    out: list[tuple[int, list[float]]] = []
    began = time.perf_counter()
    done = 0
    room = EXTRA_POINTS
    peak = 0.0
    now = [float(g["lr"]) for g in optimizer.param_groups]
    for calls in points:
        while done < calls:
            before = now
            try:
                scheduler.step()
            except Exception as error:
                return out, f"stops at call {done + 1}: {type(error).__name__}: {error}"
            done += 1
            now = [float(g["lr"]) for g in optimizer.param_groups]
            peak = max(peak, *now, *before)
            if room > 1 and _jumps(before, now, peak) and all(math.isfinite(r) for r in now):
                # Both sides of a jump; a smooth change is less than this from one call to the next.
                out += [point for point in ((done - 1, before), (done, now)) if not out or point[0] > out[-1][0]]
                room -= 2
            if done % 64 == 0 and time.perf_counter() - began > BUDGET_S:
                return out, f"cut at call {done} to save time"
        if not all(math.isfinite(r) for r in now):
            return out, f"is not finite from call {calls} on"
        if not out or calls > out[-1][0]:
            out.append((calls, now))
    return out, ""
