"""The card's lines on what happens around each step: batches, clipping, precision, loss, resume, logging."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from trainlint.judge.configured import Configured, close, value_text
from trainlint.judge.locate import Locator
from trainlint.recording.describe import number, percent, plural
from trainlint.recording.schema import (
    AutocastEntered,
    Backward,
    BatchFetched,
    Clip,
    FileEvent,
    Forward,
    Logged,
    LossCall,
    OptimizerStep,
    Recording,
    ScalerEvent,
    SeedSet,
    SourceLine,
    StateLoaded,
)
from trainlint.recording.timeline import accumulation, of_kind
from trainlint.report.model import CardLine

Section = tuple[list[CardLine], Any]
At = Callable[[SourceLine | None], str]

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_RATE_NAME = re.compile(r"(?:^|[/_.\s-])(?:lr|lrs|learning[_ -]?rate)(?:$|[/_.\s-])", re.IGNORECASE)


def batches(recording: Recording, wanted: Configured, at: At) -> Section:
    """What feeds the training."""
    lines: list[CardLine] = []
    data = []
    events = of_kind(recording, BatchFetched)
    for loader in recording.loaders:
        if not loader.training:
            continue
        sizes = [e.size for e in events if e.loader == loader.id and e.size is not None]
        size = loader.batch_size if loader.batch_size is not None else (sizes[0] if sizes else None)
        facts = [f"{loader.batches:,} batches" if loader.batches is not None else ""]
        facts.append(f"{loader.samples:,} samples" if loader.samples is not None else "")
        facts.append("" if loader.shuffle is None else "shuffled" if loader.shuffle else "in order")
        facts.append(plural(loader.workers, "worker") if loader.workers else "")
        facts.append(at(loader.at))
        text = ", ".join(f for f in (str(size) if size is not None else "size unknown", *facts) if f)
        asked = wanted.number("batch_size")
        agrees = _same_batch(asked, loader.batch_size, recording)
        note = wanted.place("batch_size") if agrees is False else ""
        lines.append(CardLine("batch size", text, wanted.text("batch_size"), agrees, note))
        data.append(
            {
                "batch_size": size,
                "batches": loader.batches,
                "samples": loader.samples,
                "shuffle": loader.shuffle,
                "workers": loader.workers,
                "drop_last": loader.drop_last,
            }
        )
    seeds = of_kind(recording, SeedSet)
    asked_seed = wanted.number("seed")
    if asked_seed is not None or seeds:
        known = list(dict.fromkeys(s.seed for s in seeds if s.seed is not None))
        text = ", ".join(map(str, known[:4])) if known else ("set" if seeds else "never set")
        agrees = None if asked_seed is None or (seeds and not known) else asked_seed in known
        lines.append(CardLine("seed", text, wanted.text("seed"), agrees))
    return lines, data


def _same_batch(asked: float | None, size: int | None, recording: Recording) -> bool | None:
    if asked is None or size is None:
        return None
    ranks = recording.program.world_size
    per_step = recording.plan.accumulation or 1
    # A config may count one process, all of them, or a whole optimizer step.
    if asked in (size, size * ranks, size * per_step, size * ranks * per_step):
        return True
    return False if sum(loader.training for loader in recording.loaders) == 1 else None


def accumulation_line(recording: Recording, wanted: Configured) -> Section:
    """Backwards per optimizer step."""
    lines: list[CardLine] = []
    data: dict[str, Any] = {"backwards_per_step": None, "framework": None}
    seen = {o.id: n for o in recording.optimizers if (n := accumulation(recording, o.id)) is not None}
    if not seen:
        return lines, data
    by_framework = [
        (f.name, value)
        for f in recording.frameworks
        for name in ("accumulate_grad_batches", "gradient_accumulation_steps")
        if isinstance(value := f.settings.get(name), int)
    ]
    counts = set(seen.values())
    data["backwards_per_step"] = counts.copy().pop() if len(counts) == 1 else sorted(counts)
    data["framework"] = by_framework[0][1] if by_framework else None
    asked = wanted.number("accumulation")
    agrees: bool | None = None
    if asked is not None and len(recording.optimizers) == 1:
        told = by_framework[0][1] if by_framework else None
        observed = next(iter(seen.values()))
        # Several losses per batch make more backwards than micro-batches; fewer than asked is plain.
        agrees = True if asked in (observed, told) else (False if observed < asked or told is not None else None)
    if len(counts) == 1:
        text = f"{plural(counts.pop(), 'backward')} per optimizer step"
    else:
        names = {o.id: o.class_name for o in recording.optimizers}
        text = "; ".join(f"{names[o]} {o}: {plural(n, 'backward')} per step" for o, n in sorted(seen.items()))
    place = wanted.place("accumulation") if agrees is False else ""
    return [CardLine("accumulation", text, wanted.text("accumulation"), agrees, place)], data


def clipping(recording: Recording, wanted: Configured) -> Section:
    """What clips the gradients, and how often it bound in the watch."""
    clips = of_kind(recording, Clip)
    asked = wanted.number("clip_norm")
    by_value = wanted.number("clip_value")
    configured = wanted.text("clip_norm") or wanted.text("clip_value")
    data: dict[str, Any] = {"clips": len(clips), "thresholds": [], "norms": []}
    if not clips:
        wants = bool(asked) or bool(by_value)
        if not (wants or of_kind(recording, OptimizerStep)):
            return [], data
        place = wanted.place("clip_norm", "clip_value") if wants else ""
        return [CardLine("clipping", "none", configured, False if wants else None, place)], data
    kinds = list(dict.fromkeys((c.method, c.threshold) for c in clips))
    norms = [c.total_norm for c in clips if c.total_norm is not None]
    data.update(thresholds=[t for _, t in kinds], methods=[m for m, _ in kinds], norms=norms)
    text = ", ".join(
        f"{method}, no limit (only measured)" if math.isinf(threshold) else f"{method} {number(threshold)}"
        for method, threshold in kinds[:3]
    )
    bound = [c for c in clips if c.method == "norm" and c.total_norm is not None and c.total_norm > c.threshold]
    if norms:
        text += f"; norms {number(min(norms))} to {number(max(norms))}, bound {len(bound)} of {len(norms)} times"
    limits = {m: [t for k, t in kinds if k == m] for m, _ in kinds}
    agrees = None
    if asked is not None and limits.get("norm"):
        agrees = any(close(asked, t) for t in limits["norm"]) or (asked == 0 and all(map(math.isinf, limits["norm"])))
    elif by_value is not None and limits.get("value"):
        agrees = any(close(by_value, t) for t in limits["value"])
    place = wanted.place("clip_norm", "clip_value") if agrees is False else ""
    return [CardLine("clipping", text, configured, agrees, place)], data


def precision(recording: Recording, wanted: Configured) -> Section:
    """The dtype that the forward computes in, and that of the trained weights."""
    entered = [e.dtype for e in of_kind(recording, AutocastEntered) if e.enabled]
    running: list[str] = [e.autocast for e in of_kind(recording, Forward) if e.autocast]
    running += [e.autocast for e in of_kind(recording, LossCall) if e.autocast]
    cast = list(dict.fromkeys(_plain(d) for d in (*entered, *running)))
    sizes: dict[str, int] = {}
    for p in recording.parameters:
        if p.requires_grad:
            sizes[_plain(p.dtype)] = sizes.get(_plain(p.dtype), 0) + p.numel
    weights = sorted(sizes, key=lambda d: (-sizes[d], d))
    scaled = any(e.enabled and e.call in ("scale", "step") for e in of_kind(recording, ScalerEvent))
    data = {"autocast": cast, "weights": weights, "loss_scaling": scaled}
    if not weights and not cast:
        return [], data
    total = sum(sizes.values())
    told = " and ".join(
        _SHORT.get(d, d) + (f" ({percent(sizes[d], total)})" if len(weights) > 1 else "") for d in weights
    )
    text = f"autocast to {', '.join(_SHORT.get(d, d) for d in cast)}, " if cast else "no autocast, "
    text += f"weights {told or 'unknown'}{', loss scaling' if scaled else ''}"
    asked = wanted.precision()
    agrees: bool | None = None
    trained = bool(of_kind(recording, Backward))
    if asked is not None and weights and trained:
        dtype, mixed = asked
        if mixed:
            # Weights wholly in that dtype compute in it too: not what mixed means, but the checks say what it costs.
            agrees = dtype in cast or (None if weights == [dtype] else False)
        else:
            agrees = weights == [dtype] and not cast if dtype == "float32" else weights[0] == dtype
    configured = wanted.text("precision") or wanted.text("bf16", "fp16")
    place = wanted.place("precision", "bf16", "fp16") if agrees is False else ""
    return [CardLine("precision", text, configured, agrees, place)], data


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def losses(recording: Recording, at: At) -> Section:
    """The loss functions that training calls, and the value that backward received first."""
    calls = [c for c in of_kind(recording, LossCall) if c.grad_enabled and c.input_requires_grad]
    kinds: dict[tuple[Any, ...], LossCall] = {}
    for call in calls:
        place = (call.at.file, call.at.line) if call.at else None
        kinds.setdefault((call.function, call.reduction, call.input_dtype, place), call)
    backwards = of_kind(recording, Backward)
    first = next((b.value for b in backwards if b.value is not None), None)
    data = {
        "functions": [
            {"function": c.function, "reduction": c.reduction, "dtype": _plain(c.input_dtype), "at": at(c.at) or None}
            for c in kinds.values()
        ],
        "first_backward": first,
        "dtype": _plain(backwards[0].dtype) if backwards else None,
    }
    lines = []
    for call in list(kinds.values())[:4]:
        facts = [call.reduction or "", _SHORT.get(_plain(call.input_dtype), _plain(call.input_dtype)), at(call.at)]
        lines.append(CardLine("loss", ", ".join(f for f in (call.function, *facts) if f)))
    if len(kinds) > 4:
        lines.append(CardLine("", f"and {len(kinds) - 4} more losses"))
    if backwards:
        line = at(next((b.at for b in backwards if b.at is not None), None))
        value = f"{number(first)} " if first is not None else ""
        dtype = _plain(backwards[0].dtype)
        words = [f"{value}{_SHORT.get(dtype, dtype)}".strip(), line]
        text = ", ".join(f for f in words if f)
        if text:
            lines.append(CardLine("first backward" if lines else "loss", text))
    return lines, data


def resume(recording: Recording, locator: Locator) -> Section:
    """What was loaded before and during the watch."""
    states = [s for s in of_kind(recording, StateLoaded) if not s.empty]
    files = [f for f in of_kind(recording, FileEvent) if f.call == "load"]
    first_step = min((s.seq for s in of_kind(recording, OptimizerStep)), default=None)
    if first_step is not None:
        states = [s for s in states if s.seq < first_step]
        files = [f for f in files if f.seq < first_step]
    by_what: dict[str, list[str]] = {}
    for state in states:
        name = state.class_name or "state"
        where = f" from {locator.file(state.path)}" if state.path else ""
        gaps = [f"{len(state.missing)} missing" if state.missing else ""]
        gaps.append(f"{len(state.unexpected)} unexpected" if state.unexpected else "")
        told = ", ".join(g for g in gaps if g)
        by_what.setdefault(state.what, []).append(f"{name}{where}{f' ({told})' if told else ''}")
    data = {
        "loaded": {what: names[:20] for what, names in by_what.items()},
        "files": list(dict.fromkeys(locator.file(f.path) for f in files))[:50],
    }
    if not by_what:
        paths = list(dict.fromkeys(locator.file(f.path) for f in files))
        text = f"no state loaded; read {', '.join(paths[:3])}" if paths else "nothing loaded"
        return [CardLine("resume", text)], data
    lines = []
    for what, names in by_what.items():
        distinct = list(dict.fromkeys(names))
        more = f", and {len(distinct) - 3} more" if len(distinct) > 3 else ""
        lines.append(CardLine("resume", f"{what} state: {', '.join(distinct[:3])}{more}"))
    return lines, data


def logging(recording: Recording, wanted: Configured) -> Section:
    """What is logged, and whether the learning rate is among it."""
    logged = of_kind(recording, Logged)
    names = list(dict.fromkeys(e.name for e in logged))
    by = list(dict.fromkeys(e.by for e in logged if e.by))
    attached = dict.fromkeys(name for f in recording.frameworks for name in f.loggers)
    by += [name for name in attached if not any(name in known for known in by)]
    rates = sorted({r for s in of_kind(recording, OptimizerStep) for r in s.rates if r > 0})
    as_rate = [n for n in names if _RATE_NAME.search(n)]
    if not as_rate:
        as_rate = list(
            dict.fromkeys(e.name for e in logged if e.value is not None and any(close(e.value, r) for r in rates))
        )
    data = {"names": names[:200], "loggers": by, "learning_rate": as_rate}
    asked = wanted.key("log_lr")
    configured = f"log_lr {value_text(asked.value)}" if asked is not None else ""
    if not names:
        text = f"{', '.join(by)}: nothing logged in the watched steps" if by else "nothing logged in the watched steps"
        return [CardLine("logging", text, configured)], data
    shown = ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")
    rate = f"learning rate as {', '.join(as_rate[:3])}" if as_rate else "no learning rate"
    text = f"{', '.join(by)}: {shown}; {rate}" if by else f"{shown}; {rate}"
    agrees = bool(as_rate) if asked is not None and asked.value is True else None
    return [CardLine("logging", text, configured, agrees)], data
