"""Saying things about a recording in few words: names of tensors by module, shares, rates, places, steps.

Pure text over plain data; used by checks and cards so that the same thing is always called the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainlint.recording.schema import Optimizer, Parameter, Recording, Scheduler, SourceLine

__all__ = [
    "TensorGroup",
    "by_module",
    "lines_of",
    "name_optimizer",
    "name_scheduler",
    "number",
    "percent",
    "place",
    "plural",
    "trainable_weights",
    "uses",
]


@dataclass(frozen=True)
class TensorGroup:
    """Parameters under one module path that share a fate.

    ``pattern`` is ``head.*`` when it speaks for every candidate tensor below ``head``, ``everything`` when they lie all
    over the root, or a single tensor's own name.
    """

    pattern: str
    parameters: tuple[Parameter, ...]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    def text(self, total: int | None = None) -> str:
        """``gene_decoder.*: 14 tensors, 61% of the trainable weights``; ``total`` is the number of weights."""
        n = len(self.parameters)
        what = f"{n} tensors" if n != 1 else f"1 tensor {self.parameters[0].shape}"
        share = f", {percent(self.numel, total)} of the trainable weights" if total else ""
        return f"{self.pattern}: {what}{share}"


def by_module(chosen: Sequence[Parameter], candidates: Iterable[Parameter]) -> tuple[TensorGroup, ...]:
    """Group parameters by the highest module below which *every* candidate was chosen.

    ``candidates`` are the parameters the choice was made from. Two roots are never mixed.
    The largest group comes first; ties go by name.
    """
    chosen_ids = {p.id for p in chosen}
    rest: dict[int | None, set[str]] = {}
    for p in candidates:
        if p.id not in chosen_ids:
            prefixes = rest.setdefault(p.root, set())
            prefixes.update(_prefixes(p.name))
    groups: dict[tuple[int | None, str], list[Parameter]] = {}
    for p in chosen:
        mixed = rest.get(p.root, set())
        prefix = next((x for x in _prefixes(p.name) if x not in mixed), p.name)
        groups.setdefault((p.root, prefix), []).append(p)
    out = [TensorGroup(_pattern([p.name for p in members]), tuple(members)) for members in groups.values()]
    return tuple(sorted(out, key=lambda g: (-g.numel, g.pattern, g.parameters[0].id)))


def _pattern(names: Sequence[str]) -> str:
    """The innermost module that all names lie in."""
    if len(names) == 1:
        return names[0]
    first, *others = (_prefixes(name) for name in names)
    shared = [prefix for prefix in first if all(prefix in other for other in others)][-1]
    return f"{shared}.*" if shared else "everything"


def _prefixes(name: str) -> list[str]:
    """``a.b.weight`` -> ``["", "a", "a.b"]``: the modules above a tensor, outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def lines_of(groups: Sequence[TensorGroup], total: int | None, *, most: int = 4) -> str:
    """The groups as one phrase, the largest first, the tail counted; the same module of many layers is one group."""
    if len(groups) > most:
        groups = _folded(groups)
    shown = [g.text(total) for g in groups[:most]]
    left = groups[most:]
    if left:
        tensors = sum(len(g.parameters) for g in left)
        names = f"{', '.join(g.pattern for g in left[:2])}{', ...' if len(left) > 2 else ''}"
        shown.append(f"and {plural(tensors, 'more tensor')} ({names})")
    return "; ".join(shown)


def _folded(groups: Sequence[TensorGroup]) -> Sequence[TensorGroup]:
    """Groups whose names differ in their first number only, as one: ``h.0.ln``, ``h.1.ln`` -> ``h.0-1.ln``."""
    alike: dict[tuple[int | None, tuple[str, ...], int], dict[int, TensorGroup]] = {}
    for group in groups:
        parts = group.pattern.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
        key = (*parts[:place], "#", *parts[place + 1 :]) if place >= 0 else tuple(parts)
        number_in_name = int(parts[place]) if place >= 0 else len(alike)
        alike.setdefault((group.parameters[0].root, key, place), {})[number_in_name] = group
    out: list[TensorGroup] = []
    for (_, key, place), members in alike.items():
        if len(members) == 1:
            out += members.values()
            continue
        name = ".".join((*key[:place], _ranges(sorted(members)), *key[place + 1 :]))
        out.append(TensorGroup(name, tuple(p for n in sorted(members) for p in members[n].parameters)))
    return sorted(out, key=lambda g: (-g.numel, g.pattern, g.parameters[0].id))


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def trainable_weights(recording: Recording, roots: Iterable[int | None]) -> int:
    """Weights that are trainable at the start, in the given roots."""
    wanted = set(roots)
    return sum(p.numel for p in recording.parameters if p.root in wanted and p.requires_grad)


# ------------------------------------------------------------------------------------------------------- words


def plural(n: int, noun: str) -> str:
    """``1 step``, ``3 steps``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}es" if noun.endswith(("s", "x", "ch")) else f"{n:,} {noun}s"


def percent(part: float, whole: float | None) -> str:
    """A share as a person writes it: ``61%``, ``0.4%``, ``under 0.1%``."""
    if not whole:
        return "0%"
    value = 100 * part / whole
    if 0 < value < 0.1:
        return "under 0.1%"
    if value < 10 and not math.isclose(value, round(value), abs_tol=0.05):
        return f"{value:.1f}%"
    # 100% is said only of everything.
    return f"{min(round(value), 99) if part < whole else round(value)}%"


def number(value: float | None) -> str:
    """A rate, a norm, a threshold: three significant digits, ``3e-05`` as ``3e-5``."""
    if value is None:
        return "unknown"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    text = f"{value:.3g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def place(at: SourceLine | None) -> str:
    """``train.py:31``; empty when unknown. The report itself gives the full path."""
    return f"{at.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{at.line}" if at is not None else ""


def _named(name: str, at: SourceLine | None) -> str:
    where = place(at)
    return f"{name} ({where})" if where else name


def name_optimizer(optimizer: Optimizer) -> str:
    """``AdamW (train.py:31)``."""
    return _named(optimizer.class_name, optimizer.at)


def name_scheduler(scheduler: Scheduler) -> str:
    """``OneCycleLR (train.py:33)``."""
    return _named(scheduler.class_name, scheduler.at)


def uses(recording: Recording, framework: str) -> bool:
    """Whether a framework's trainer drives this run."""
    return any(f.name == framework for f in recording.frameworks)


def framework_settings(recording: Recording, framework: str) -> Mapping[str, object]:
    """The settings of a framework's trainer; empty when it is not in use."""
    for f in recording.frameworks:
        if f.name == framework:
            return f.settings
    return {}
