"""The run card's lines about time and memory: what a step costs, and where."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainlint.recording.describe import percent, plural
from trainlint.recording.schema import Costs, Recording, StepCost
from trainlint.report.model import CardLine

Section = tuple[list[CardLine], Any]

#: The order in which they follow each other in a step.
PHASES = ("data", "forward", "backward", "optimizer", "other")
WORDS = {"data": "waiting for data", "other": "other work"}

#: A step shorter than this is mostly the overhead of Python and of being watched: its shares say nothing.
SHORT_S = 0.003
#: Times of a step that differ by more than this factor are told as a range.
SPREAD = 2.0
#: What the watched steps must add to a process's memory before one of their phases is named.
GROWTH_BYTES = 64 << 20
GROWTH_SHARE = 0.1


@dataclass(frozen=True)
class Round:
    """One step of every optimizer that steps: what lies between two steps of the one that steps least often."""

    seconds: Mapping[str, float]
    backwards: int
    usable: bool

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def rounds(steps: Sequence[StepCost]) -> list[Round]:
    """The rounds of the watch, in order; what follows the last step of the slowest optimizer is left out."""
    made: dict[int, int] = {}
    for step in steps:
        made[step.optimizer] = made.get(step.optimizer, 0) + 1
    if not made:
        return []
    fewest = min(made.values())
    last = [step.optimizer for step in steps if made[step.optimizer] == fewest][-1]
    out: list[Round] = []
    seconds: dict[str, float] = {}
    backwards, usable = 0, True
    for step in steps:
        for phase, taken in step.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + taken
        backwards += step.backwards
        usable = usable and step.whole and not step.compiled
        if step.optimizer == last:
            out.append(Round(seconds, backwards, usable))
            seconds, backwards, usable = {}, 0, True
    return out


def time(recording: Recording) -> Section:
    """Time per step and the share of each phase, from the steps after the first."""
    costs = recording.costs
    if costs is None or not costs.steps:
        return [], None
    made = rounds(costs.steps)
    settled = [r for r in made[1:] if r.usable]
    chosen = settled or made[-1:]
    step_s = statistics.median(r.total for r in chosen)
    whole = sum(r.total for r in chosen)
    seconds = {p: statistics.median(r.seconds.get(p, 0.0) for r in chosen) for p in PHASES}
    shares = {p: sum(r.seconds.get(p, 0.0) for r in chosen) / whole for p in PHASES} if whole > 0 else {}
    warm_up = "" if settled else _warm_up(made)
    micro_batches = statistics.median(r.backwards for r in chosen)
    several = len({s.optimizer for s in costs.steps}) > 1
    data: dict[str, Any] = {
        "step_s": step_s,
        "steps_measured": len(chosen),
        "fastest_s": min(r.total for r in chosen),
        "slowest_s": max(r.total for r in chosen),
        "includes_start_up": not settled,
        "backwards_per_step": micro_batches,
        "phase_s": None if costs.no_phases else seconds,
        "phase_share": None if costs.no_phases else shares,
        "clock": costs.clock,
        "trainlint_s": costs.own_s,
    }
    if step_s <= 0:
        return [], data
    text = f"{_span(chosen, step_s)} a {'step of each optimizer' if several else 'step'}"
    if micro_batches >= 2 and not several:
        text += f" of {micro_batches:.0f} micro-batches"
    if costs.no_phases:
        note = costs.no_phases
    elif step_s < SHORT_S:
        note = "too short for its phases to be told apart"
    else:
        note = ", ".join(
            f"{WORDS.get(p, p)} {percent(shares[p], 1.0)}"
            for p in PHASES
            if shares[p] >= (0.01 if p == "other" else 1e-9)
        )
    return [CardLine("time", f"{text}: {note}{warm_up}" if note else f"{text}{warm_up}")], data


def _warm_up(made: list[Round]) -> str:
    if len(made) == 1:
        return " (the first step: start-up is part of it)"
    return " (start-up or compilation is part of every step that was watched)"


def _span(chosen: Sequence[Round], median: float) -> str:
    low, high = min(r.total for r in chosen), max(r.total for r in chosen)
    if high > SPREAD * low:
        return f"{seconds_text(low)} to {seconds_text(high)}"
    return seconds_text(median)


def seconds_text(seconds: float) -> str:
    """``0.31 s``, ``4.1 ms``, ``72 s``."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"


def memory(recording: Recording) -> Section:
    """The peak, the phase in which it was reached, and its share of the device."""
    costs = recording.costs
    if costs is None or not costs.peak_bytes:
        return [], None
    device = recording.program.device_memory_bytes if costs.memory_of == "device" else None
    peak, named = costs.peak_bytes, _peak_phase(costs)
    data = {
        "of": costs.memory_of,
        "peak_bytes": peak,
        "peak_phase": named,
        "peak_step": costs.peak_step if named else None,
        "before_bytes": costs.before_bytes,
        "reserved_bytes": costs.reserved_bytes,
        "device_bytes": device,
        "share_of_device": peak / device if device else None,
        "step_is_peak": named == "optimizer" if named else None,
        "step_temporary_bytes": costs.step_temporary_bytes,
        "phases": {
            m.phase: {"at_least_bytes": m.at_least_bytes, "peak_bytes": m.peak_bytes}
            for m in sorted(costs.memory, key=lambda m: PHASES.index(m.phase) if m.phase in PHASES else 9)
        },
    }
    text = f"peak {bytes_text(peak)}"
    if named:
        text += f" in {'the optimizer step' if named == 'optimizer' else WORDS.get(named, named)}"
    if device:
        text += f" ({percent(peak, device)} of {device / 2**30:.0f} GiB"
        reserved = costs.reserved_bytes
        text += f"; {bytes_text(reserved)} with the allocator's reserve)" if reserved and reserved > peak else ")"
    elif costs.memory_of == "process":
        text += " of the process" if named else _beside_training(costs)
    ranks = recording.program.world_size
    if ranks > 1:
        text += f", in one of {plural(ranks, 'process')}"
    return [CardLine("memory", text)], data


def _peak_phase(costs: Costs) -> str:
    """The phase of the peak, where it says something of the training."""
    if costs.peak_phase not in PHASES or costs.peak_bytes is None:
        return ""
    if costs.memory_of == "process":
        growth = costs.peak_bytes - (costs.before_bytes or 0)
        if growth < max(GROWTH_BYTES, GROWTH_SHARE * costs.peak_bytes):
            return ""
    return costs.peak_phase


def _beside_training(costs: Costs) -> str:
    growth = (costs.peak_bytes or 0) - (costs.before_bytes or 0)
    if growth <= 0:
        return " of the process, reached before the first step"
    return f" of the process, to which the watched steps added {bytes_text(growth)}"


def bytes_text(count: int) -> str:
    """``2.1 GiB``, ``340 MiB``."""
    if count >= 2**29:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else "less than 1 MiB"
