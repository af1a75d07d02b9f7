"""What each training setting really is on a run, to be held against what a config declares.

Every function answers for one setting with what was observed, or ``None`` when that could not be seen well enough to
compare. Nothing here knows of configs or severities.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainlint.recording.course import Course
from trainlint.recording.describe import framework_settings, number, place, plural
from trainlint.recording.projection import active_schedulers, own_schedulers, planned_steps
from trainlint.recording.schema import (
    AutocastEntered,
    BatchFetched,
    Clip,
    Forward,
    LossCall,
    Optimizer,
    OptimizerStep,
    Recording,
    Scheduler,
    SeedSet,
    Value,
)
from trainlint.recording.timeline import accumulation, batches_per_step, of_kind, steps_of

__all__ = [
    "Constant",
    "Observed",
    "accumulated",
    "any_close",
    "autocast_switched_off",
    "batch_sizes",
    "clip_thresholds",
    "close",
    "constant_rate",
    "has_warm_up",
    "hyperparameter",
    "low_precision",
    "lowest_rate",
    "peak_rates",
    "planned_epochs",
    "planned_max_steps",
    "seeds",
    "stepping",
]


@dataclass(frozen=True)
class Observed:
    """Values of one setting that are in effect.

    ``text`` continues a sentence: ``Adam runs with weight_decay = 0 (train.py:31; 0 is its default)``.
    ``absent``: the feature is off, or every value is simply the default, so nobody set it.
    """

    values: tuple[float, ...]
    text: str
    absent: bool = False
    #: The values came with an optimizer state that was loaded: from which file, or ``a checkpoint``.
    restored: str = ""


def close(a: float, b: float, share: float = 1e-4) -> bool:
    """Equal but for rounding."""
    return math.isclose(a, b, rel_tol=share, abs_tol=1e-15)


def stepping(run: Recording) -> list[Optimizer]:
    """The optimizers that made at least one step in the watch."""
    stepped = {e.optimizer for e in of_kind(run, OptimizerStep)}
    return [o for o in run.optimizers if o.id in stepped]


# ------------------------------------------------------------------------------------------- hyperparameters


def hyperparameter(run: Recording, name: str, index: int | None = None) -> Observed | None:
    """A hyperparameter of the param groups of every stepping optimizer (``index``: which of a pair, for betas).

    ``None`` when no optimizer has it. Loading a state replaces what the constructor was given: then it is said where
    the value in effect comes from.
    """
    values: list[float] = []
    texts: list[str] = []
    absent = True
    restored = ""
    for optimizer in stepping(run):
        own = _distinct(_part(g.hyperparameters.get(name), index) for g in optimizer.groups)
        if not own:
            continue
        origin = _restored(optimizer)
        restored = restored or origin
        default = _part(optimizer.signature_defaults.get(name), index)
        is_default = default is not None and all(close(v, default) for v in own)
        off = name in ("weight_decay", "momentum") and not any(own)
        absent = absent and (is_default or off)
        values += own
        note = f"; restored from {origin}" if origin else "; its default" if is_default else ""
        where = place(optimizer.at)
        label = name if index is None else f"beta{index + 1}"
        shown = " and ".join(number(v) for v in own[:4])
        texts.append(f"{optimizer.class_name} runs with {label} = {shown}{_aside(where + note)}")
    if not values:
        return None
    return Observed(tuple(values), ", ".join(texts[:2]), absent, restored)


def _restored(optimizer: Optimizer) -> str:
    """The file that an optimizer's state, and with it its hyperparameters, was loaded from; empty when it was not."""
    if not optimizer.state_loaded:
        return ""
    return os.path.basename(optimizer.state_loaded_from or "") or "a checkpoint"


def _aside(text: str) -> str:
    text = text.removeprefix("; ")
    return f" ({text})" if text else ""


def _part(value: Value, index: int | None) -> float | None:
    if index is not None:
        value = value[index] if isinstance(value, (tuple, list)) and len(value) > index else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _distinct(values: Iterable[float | None]) -> list[float]:
    out: list[float] = []
    for value in values:
        if value is not None and not any(close(value, v) for v in out):
            out.append(value)
    return out


# ------------------------------------------------------------------------------------------- rate and schedule


def by_hand(run: Recording) -> bool:
    """Whether source lines of the program assign rates, or the rates moved without a scheduler's step."""
    if run.source is not None and run.source.rate_assignments:
        return True
    for optimizer in stepping(run):
        rates = {s.rates for s in steps_of(run, optimizer.id)}
        if len(rates) > 1 and not [s for s in run.schedulers if s.optimizer == optimizer.id]:
            return True
    return False


def peak_rates(run: Recording) -> Observed | None:
    """Every rate that a setting called learning rate may rightly mean: as built, as scheduled, at the peak.

    ``None`` when rates are set by hand (the peak may come later), or were restored beside a schedule, of which the
    checkpoint holds some later point.
    """
    if by_hand(run):
        return None
    values: list[float] = []
    texts: list[str] = []
    absent = True
    restored = ""
    for optimizer in stepping(run):
        origin = _restored(optimizer)
        restored = restored or origin
        built = [
            _part(g.hyperparameters.get(n), None) for g in optimizer.groups for n in ("initial_lr", "lr", "max_lr")
        ]
        schedulers = [s for s in run.schedulers if s.optimizer == optimizer.id]
        if origin and schedulers:
            return None
        own = _distinct(
            [
                *built,
                *(r for s in schedulers for r in s.base_rates),
                *(max(p.rates[g] for p in s.curve) for s in schedulers for g in _groups(s)),
                *(r for step in steps_of(run, optimizer.id) for r in step.rates),
            ]
        )
        if any(s.metric is False and not s.curve for s in schedulers):
            return None  # a schedule that could not be projected may peak anywhere
        default = _part(optimizer.signature_defaults.get("lr"), None)
        in_force = _distinct(r for step in steps_of(run, optimizer.id) for r in step.rates)
        is_default = default is not None and not schedulers and all(close(r, default) for r in in_force)
        absent = absent and is_default
        values += own
        shown = _distinct([*(Course(s).peak for s in schedulers if s.curve), *in_force]) or in_force
        peak = max(shown, default=0.0)
        note = f"; restored from {origin}" if origin else "; its default" if is_default else ""
        at = "peaks at" if len(in_force) > 1 or schedulers else "runs at"
        texts.append(f"{optimizer.class_name} {at} {number(peak)}{_aside(place(optimizer.at) + note)}")
    return Observed(tuple(values), ", ".join(texts[:2]), absent, restored) if values else None


def _groups(scheduler: Scheduler) -> range:
    return range(min((len(p.rates) for p in scheduler.curve), default=0))


@dataclass(frozen=True)
class Constant:
    """The rate never changes, and why that is sure."""

    rate: float
    text: str


def constant_rate(run: Recording) -> Constant | None:
    """Whether every rate of the run is constant; ``None`` when it is not, or that is not sure."""
    if by_hand(run):
        return None
    optimizers = stepping(run)
    rates: list[float] = []
    flat: list[Scheduler] = []
    for optimizer in optimizers:
        steps = steps_of(run, optimizer.id)
        own = [s for s in run.schedulers if s.optimizer in (optimizer.id, None)]
        if any(not _is_flat(s) for s in own) or len({s.rates for s in steps}) > 1:
            return None
        flat += own
        rates += [r for s in steps for r in s.rates]
    if not rates or any(s.optimizer is not None and not _is_flat(s) for s in run.schedulers):
        return None
    shown = " and ".join(number(r) for r in _distinct(rates)[:3])
    steps_seen = max(len(steps_of(run, o.id)) for o in optimizers)
    if flat:
        why = f"the schedule of {flat[0].class_name}{_aside(place(flat[0].at))} is flat"
    else:
        why = "no scheduler was built"
        if run.source is not None:
            why += " and no source line assigns a rate"
    return Constant(max(rates), f"the rate is constant at {shown} ({plural(steps_seen, 'step')} seen; {why})")


def _is_flat(scheduler: Scheduler) -> bool:
    """A projected curve that never changes. A schedule that follows a metric, or has no curve, is not known to be."""
    return bool(scheduler.curve) and not scheduler.metric and len({p.rates for p in scheduler.curve}) == 1


def has_warm_up(run: Recording) -> tuple[bool, str] | None:
    """Whether the rate rises at the start, and what it does instead; ``None`` when that is not sure."""
    if by_hand(run):
        return None
    texts = []
    for optimizer in stepping(run):
        steps = steps_of(run, optimizer.id)
        schedulers = active_schedulers(run, optimizer.id)
        if not steps or not steps[0].rates:
            return None
        if not schedulers:
            if len({s.rates for s in steps}) > 1:
                return None
            continue
        for scheduler in schedulers:
            if scheduler.metric or len(scheduler.curve) < 2:
                return None
            course = Course(scheduler)
            first = course.rate(0)
            if first is None:
                return None
            if course.peak > first * (1 + 1e-6) or steps[0].rates[course.group] < course.peak * (1 - 1e-6):
                return True, ""
            texts.append(
                f"{scheduler.class_name}{_aside(place(scheduler.at))} starts at its highest rate, {number(course.peak)}"
            )
    return (False, texts[0]) if texts else None


def lowest_rate(run: Recording) -> Observed | None:
    """Where the schedule ends, by its projected curve; ``None`` when there is none or its end is not known."""
    if by_hand(run):
        return None
    found: list[float] = []
    texts: list[str] = []
    for optimizer in stepping(run):
        if len(own_schedulers(run, optimizer.id)) > 1:
            return None  # where they end together is another question than where each ends
        for scheduler in active_schedulers(run, optimizer.id):
            course = Course(scheduler) if scheduler.curve and not scheduler.metric else None
            if course is None or course.horizon is None or course.end is None or course.flat:
                return None
            planned = planned_steps(run)
            if planned is not None and planned[0] < 0.9 * course.horizon:
                return None  # the run ends before the schedule does: a question of length, not of the minimum
            found.append(course.end)
            texts.append(f"{scheduler.class_name}{_aside(place(scheduler.at))} ends at {number(course.end)}")
    return Observed(tuple(found), texts[0], absent=all(r < 1e-12 for r in found)) if found else None


# ------------------------------------------------------------------------------------------- the loop


def low_precision(run: Recording) -> tuple[frozenset[str], str, bool] | None:
    """dtypes below float32 that the forward used, what was seen in words, and whether autocast was seen at all.

    ``None`` when too little of the forward was seen to say.
    """
    autocast = [e for e in of_kind(run, AutocastEntered) if e.enabled]
    dtypes = {_dtype(e.dtype) for e in autocast}
    dtypes |= {_dtype(e.autocast) for e in of_kind(run, Forward) if e.autocast}
    losses = of_kind(run, LossCall)
    dtypes |= {_dtype(e.autocast) for e in losses if e.autocast}
    inner = {_dtype(e.input_dtype) for e in losses if e.input_dtype}
    trained = {p for o in stepping(run) for g in o.groups for p in g.parameters}
    weights = {_dtype(p.dtype) for p in run.parameters if p.id in trained}
    # Frozen low-precision weights (a quantised base) make no mixed precision by themselves, but hide what does.
    every = {_dtype(p.dtype) for p in run.parameters}
    low = {d for d in dtypes | inner | every if d not in ("float32", "float64", "")}
    if not weights:
        return None
    if low:
        return frozenset(low), "", bool(dtypes)
    if not losses and not of_kind(run, Forward) and not run.frameworks:
        return None
    said = ["no autocast was entered", f"weights are {' and '.join(sorted(weights))}"]
    for name in ("lightning", "accelerate"):
        key = "precision" if name == "lightning" else "mixed_precision"
        value = framework_settings(run, name).get(key)
        if value is not None:
            said.insert(0, f"the {'Trainer' if name == 'lightning' else 'Accelerator'} has {key} = {value}")
    return frozenset(), ", ".join(said), bool(dtypes)


def autocast_switched_off(run: Recording) -> bool:
    """Whether the program entered autocast with ``enabled=False`` and never with it on."""
    entered = of_kind(run, AutocastEntered)
    return bool(entered) and not any(e.enabled for e in entered)


def _dtype(name: str | None) -> str:
    return (name or "").rpartition(".")[2]


def accumulated(run: Recording) -> Observed | None:
    """Micro-batches per optimizer step, as watched; ``None`` for several optimizers or when nothing is regular."""
    optimizers = stepping(run)
    if len(optimizers) != 1 or any(s.closure_calls > 1 for s in of_kind(run, OptimizerStep)):
        return None
    backwards = accumulation(run, optimizers[0].id)
    if backwards is None:
        return None
    batches = batches_per_step(run, optimizers[0].id)
    count = min(backwards, batches) if batches else backwards
    told = ""
    for name, key, owner in (
        ("lightning", "accumulate_grad_batches", "the Trainer"),
        ("transformers", "gradient_accumulation_steps", "the Trainer"),
        ("accelerate", "gradient_accumulation_steps", "the Accelerator"),
    ):
        value = framework_settings(run, name).get(key)
        if isinstance(value, int) and not told:
            told = f"; {owner} has {key} = {value}"
            # A Trainer accumulates by itself; an Accelerator only inside accumulate(), which the count shows.
            count = max(count, value) if name != "accelerate" else count
    text = f"every optimizer step follows {plural(count, 'micro-batch')}{told}"
    return Observed((float(count), float(backwards)), text, absent=count == 1)


def clip_thresholds(run: Recording, method: str) -> Observed | None:
    """Thresholds that gradients are clipped at; ``None`` where clipping of this kind would not be seen."""
    if any(w in _OWN_CLIPPING for r in run.roots for w in r.wrappers):
        return None
    clips = [c for c in of_kind(run, Clip) if math.isfinite(c.threshold)]
    same = [c for c in clips if c.method == method] or clips
    if not same:
        return Observed((), "no gradient is clipped", absent=True)
    values = _distinct(c.threshold for c in same)
    shown = " and ".join(number(v) for v in values[:3])
    return Observed(tuple(values), f"gradients are clipped at {shown}{_aside(place(same[0].at))}")


#: Wrappers that clip by a method of their own, which torch's clipping functions do not see.
_OWN_CLIPPING = frozenset(("FullyShardedDataParallel", "DeepSpeedEngine", "FSDP"))


def batch_sizes(run: Recording) -> Observed | None:
    """Sizes that a setting called batch size may rightly mean: per loader, as fetched, per step, over all ranks."""
    training = [x for x in run.loaders if x.training]
    ids = {x.id for x in training}
    built = _distinct(float(x.batch_size) if x.batch_size else None for x in training)
    fetched = _distinct(float(e.size) if e.size else None for e in of_kind(run, BatchFetched) if e.loader in ids)
    if not built or not training:
        return None
    per_step = accumulated(run)
    factors = {1.0, float(max(1, run.program.world_size)), *(per_step.values if per_step else ())}
    values = [v * f * g for v in [*built, *fetched] for f in factors for g in factors]
    where = _aside(place(training[0].at))
    shown = " and ".join(number(v) for v in built[:3])
    return Observed(tuple(_distinct(values)), f"the training loader makes batches of {shown}{where}")


def planned_max_steps(run: Recording) -> Observed | None:
    """Optimizer steps after which a trainer stops; ``None`` without a trainer that says so."""
    for name in ("lightning", "transformers"):
        value = framework_settings(run, name).get("max_steps")
        if isinstance(value, int):
            planned = planned_steps(run)
            values = [float(value)] if value > 0 else []
            if planned is not None:
                values.append(float(planned[0]))
            if not values:
                return Observed((), "the Trainer has no limit of steps", absent=True)
            return Observed(tuple(values), f"the Trainer stops after {values[-1]:,.0f} steps", absent=value <= 0)
    return None


def planned_epochs(run: Recording) -> Observed | None:
    """Epochs after which a trainer stops; ``None`` without a trainer that says so, or when steps rule."""
    for name, key in (("lightning", "max_epochs"), ("transformers", "num_train_epochs")):
        settings = framework_settings(run, name)
        steps = settings.get("max_steps")
        if isinstance(steps, int) and steps > 0:
            return None
        value = settings.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return Observed((float(value),), f"the Trainer stops after {plural_number(value)}", absent=False)
    return None


def plural_number(value: float) -> str:
    return f"{number(value)} epoch" if value == 1 else f"{number(value)} epochs"


def seeds(run: Recording) -> Observed | None:
    """Seeds that were set by any library."""
    values = _distinct(float(e.seed) if e.seed is not None else None for e in of_kind(run, SeedSet))
    if not values:
        return Observed((), "no seed was set", absent=True)
    calls = [e for e in of_kind(run, SeedSet) if e.seed is not None]
    shown = " and ".join(f"{v:.0f}" for v in values[:3])
    return Observed(tuple(values), f"the seed is {shown}{_aside(place(calls[0].at))}")


def any_close(wanted: float, seen: Sequence[float], share: float = 1e-4) -> bool:
    """Whether one of the observed values is the wanted one."""
    return any(close(wanted, v, share) for v in seen)
