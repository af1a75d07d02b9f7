"""TL507: what is logged as the loss is one part of what backward received."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import number, percent, place, plural
from trainlint.recording.schema import Backward, Logged, LossCall, OptimizerStep
from trainlint.recording.timeline import of_kind

#: Words of a name that claims to be the whole training loss.
_WHOLE = frozenset(
    "loss losses train training trainer total overall objective step batch iter running avg mean epoch metrics".split()
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: A logged value this close to another, as a share, is that value: logs are rounded.
_SAME = 2e-4
#: A part that is at least this much of the whole stands for it.
_NEARLY = 0.99
#: Values that must agree.
_ENOUGH = 2
#: Values shown in a message.
_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """A loss call that is one summand of what the next backward received."""

    call: LossCall
    #: What backward received, without the loss scale; the part's share of it.
    whole: float
    share: float


@check("TL507", Recording, severity="info", catalog="")
def logged_loss_is_not_optimized_loss(run: Recording) -> Iterator[Finding]:
    """What is logged as the loss is one part of what is optimized.

    ## What goes wrong
    The objective is a sum (task loss, auxiliary loss, regularisation), and the curve named `loss` shows one summand.
    The others can grow, vanish or dominate without anybody seeing it: early stopping, the choice of checkpoints and
    comparisons between runs follow a number that is not minimised.

    ## How it is detected
    For each loss function call it is known which value it had and which factor its gradient had in the backward that
    followed, and so which share of what backward received it is. A value that is logged under a name that means the
    whole (`loss`, `train/loss`, `total_loss` ...) is reported when, at two steps or more, it equals one such part of
    less than 99%, and neither what backward received nor that value undivided. Nothing is reported when the whole is
    logged under another name.

    ## What to do
    Log what goes into `backward()` as `loss`, and the parts under names of their own (`loss/task`, `loss/kl`).

    ## When it may be wrong
    Losses before the division by the accumulation, means over steps or epochs, smoothed values and validation losses
    are not reported. Parts that are computed by hand instead of by a function of `torch.nn.functional` are not known
    as such. Logging the task loss alone may be a choice, to compare runs with and without a regulariser: this is
    information, and never more.

    ## References
    lightning.pytorch.LightningModule.log; transformers.Trainer.compute_loss.
    """
    logged = of_kind(run, Logged)
    backwards = [b for b in of_kind(run, Backward) if b.value is not None and math.isfinite(b.value)]
    if not backwards:
        raise NotObserved("no backward of a finite loss was seen; raise --timeout")
    if not logged:
        raise NotApplicable("nothing was logged in the watched steps")
    series: dict[tuple[str, str], list[Logged]] = {}
    for event in logged:
        if event.value is not None and _is_whole(event.name):
            series.setdefault((event.name, event.by), []).append(event)
    if not series:
        raise NotApplicable("nothing was logged under the name of the whole loss")
    parts = _parts(of_kind(run, LossCall), backwards)
    steps = [s.seq for s in of_kind(run, OptimizerStep)]
    compared = False
    reported: set[tuple[str, int]] = set()
    for (name, _), events in sorted(series.items()):
        wholes = [_equals_whole(e, backwards, steps) for e in events]
        if any(wholes):
            compared = True
            continue
        found = [(e, p) for e in events if (p := _part_of(e, parts, steps)) is not None]
        if len(found) < max(_ENOUGH, len(events)) or len({_line(p.call) for _, p in found}) != 1:
            continue
        compared = True
        if _constant_ratio(found) or _whole_is_logged(logged, backwards, steps):
            continue
        key = (name, found[0][1].call.at.line if found[0][1].call.at is not None else 0)
        if key not in reported:
            reported.add(key)
            yield _finding(name, found)
    if not compared:
        raise NotObserved(
            "no logged loss could be told from others (under two values in the watch, means, smoothed values); raise "
            "--steps"
        )


def _is_whole(name: str) -> bool:
    words = [w.lower() for w in _WORDS.findall(name)]
    return bool({"loss", "objective"} & set(words)) and set(words) <= _WHOLE


def _line(call: LossCall) -> tuple[str, str, int]:
    return (call.function, call.at.file, call.at.line) if call.at is not None else (call.function, "", 0)


def _received(backward: Backward) -> float:
    assert backward.value is not None
    return backward.value / (backward.loss_scale or 1.0)


def _parts(calls: Sequence[LossCall], backwards: Sequence[Backward]) -> list[Part]:
    """The calls whose value, times the factor of their gradient, is only part of what backward received."""
    seqs = [b.seq for b in backwards]
    out = []
    for call in calls:
        at = bisect.bisect(seqs, call.seq)
        if at == len(seqs) or call.value is None or call.gradient is None or not math.isfinite(call.value):
            continue
        whole = backwards[at].value
        if not whole:
            continue
        share = call.value * call.gradient.total / whole
        if abs(share) < _NEARLY or abs(share) > 2 - _NEARLY:
            out.append(Part(call, _received(backwards[at]), share))
    return out


def _window(event: Logged, steps: Sequence[int]) -> tuple[int, int]:
    """From the second last step before a logged value to the first after it: what it may be about."""
    at = bisect.bisect(steps, event.seq)
    return steps[at - 2] if at >= 2 else 0, steps[at] if at < len(steps) else event.seq + 10**9


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-7)


def _equals_whole(event: Logged, backwards: Sequence[Backward], steps: Sequence[int]) -> bool:
    low, high = _window(event, steps)
    value = event.value if event.value is not None else math.nan
    inside = [b for b in backwards if low < b.seq < high]
    received = [_received(b) for b in inside]
    whole = [*received, *(v * (b.divided_by or 1.0) for v, b in zip(received, inside, strict=True)), sum(received)]
    return any(_same(value, v) for v in whole)


def _part_of(event: Logged, parts: Sequence[Part], steps: Sequence[int]) -> Part | None:
    low, _ = _window(event, steps)
    value = event.value if event.value is not None else math.nan
    inside = [p for p in parts if low < p.call.seq < event.seq and p.call.value is not None]
    return next((p for p in reversed(inside) if _same(value, p.call.value or 0.0)), None)


def _constant_ratio(found: Sequence[tuple[Logged, Part]]) -> bool:
    """The logged value is what backward received times a constant: the same loss before a division."""
    ratios = [p.whole / e.value for e, p in found if e.value]
    return len(ratios) > 1 and max(ratios) - min(ratios) <= _SAME * abs(max(ratios, key=abs))


def _whole_is_logged(logged: Sequence[Logged], backwards: Sequence[Backward], steps: Sequence[int]) -> bool:
    return any(e.value is not None and _equals_whole(e, backwards, steps) for e in logged)


def _finding(name: str, found: Sequence[tuple[Logged, Part]]) -> Finding:
    first = found[0][1].call
    values = ", ".join(number(e.value) for e, _ in found[:_SHOWN])
    received = ", ".join(number(p.whole) for _, p in found[:_SHOWN])
    mean = sum(p.share for _, p in found) / len(found)
    where = place(first.at)
    what = f"{first.function} ({where})" if where else first.function
    share = f", {percent(mean, 1.0)} of it" if 0 < mean < 1 else ""
    return Finding(
        f'What is logged as "{name}" is {what} alone ({values}), while backward received {received}: it is one part of '
        f"what is optimized{share} over {plural(len(found), 'value')}.",
        at=found[0][0].at or first.at,
        evidence={
            "name": name,
            "function": first.function,
            "logged": [e.value for e, _ in found[:_SHOWN]],
            "received": [p.whole for _, p in found[:_SHOWN]],
            "share": round(mean, 4),
        },
        fix=f'Log the tensor that backward() gets as "{name}", and its parts under names of their own.',
        about=name,
    )
