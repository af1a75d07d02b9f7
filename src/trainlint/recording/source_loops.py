"""Faults of a training loop that its source shows: the order of backward, step, zero_grad, clipping and scheduler.

Each function goes through one trace and gives what it found with the lines involved; the checks put it into words.
Silence is the rule: whatever cannot be read, and might make it right, keeps a function from speaking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainlint.recording.schema import SourceBlock, SourceCall, SourceObject
from trainlint.recording.source_order import Trace

#: What a condition or a loop over micro-batches is called.
_ACCUMULATION = ("accum", "micro", "grad_acc")


@dataclass(frozen=True)
class LoopFault:
    """What is wrong with a loop, and where."""

    kind: str
    optimizer: SourceObject
    #: The call that is wrong, and the one that it should stand in another place to.
    call: SourceCall
    other: SourceCall
    #: All of it stands in one function, where nothing is left to chance.
    sure: bool = True
    block: SourceBlock | None = None
    backward: SourceCall | None = None
    scheduler: SourceObject | None = None


def _together(*calls: SourceCall) -> bool:
    return len({(c.at.file, c.at.function) for c in calls}) == 1


def _by_itself(step: SourceCall, optimizer: SourceObject) -> bool:
    """A step that makes its own gradients: a closure, or an optimizer of the project's own."""
    return bool(step.details.get("closure")) or bool(optimizer.details.get("foreign"))


def _backwards(calls: list[SourceCall]) -> list[SourceCall]:
    return [c for c in calls if c.what == "backward"]


def _others_step(t: Trace, loop: int, optimizer: SourceObject) -> bool:
    return bool({o.number for _, o in t.steps(loop)} - t.same(optimizer.number))


# --------------------------------------------------------------------------------------------- TL303


def cleared_before_step(t: Trace) -> Iterator[LoopFault]:
    """Between clearing and the next step there is no backward."""
    seen: set[tuple[int, int]] = set()
    for step, optimizer in t.steps():
        loop = t.loop_of(step)
        if loop is None or (loop, optimizer.number) in seen or _by_itself(step, optimizer):
            continue
        calls = t.inside(loop)
        clearings = [
            c for c in calls if t.clears(c, optimizer, surely=True) and t.before(c, step) and t.always_with(c, step)
        ]
        backwards = _backwards(calls)
        if not clearings or not backwards:
            continue
        clearing = clearings[-1]
        between = t.between(calls, clearing, step)
        if t.hidden(between, optimizer) or any(c.details.get("closure") for c in between if c.what == "step"):
            continue
        seen.add((loop, optimizer.number))
        earlier = [b for b in backwards if t.before(b, clearing)]
        kind = "cleared-before-step" if earlier else "step-before-backward"
        backward = earlier[-1] if earlier else backwards[0]
        sure = _together(clearing, step, backward)
        yield LoopFault(kind, optimizer, clearing, step, sure, backward=backward)


def cleared_every_micro_batch(t: Trace) -> Iterator[LoopFault]:
    """A step every n-th time, and clearing at each."""
    for step, optimizer in t.steps():
        loop = t.loop_of(step)
        counting = t.counting(step, loop) if loop is not None else None
        if loop is None or counting is None or _by_itself(step, optimizer):
            continue
        block = t.trace.blocks[counting]
        if (
            block.kind == "accumulate"
            or optimizer.details.get("prepared") is not None
            or _others_step(t, loop, optimizer)
        ):
            continue
        calls = t.inside(loop)
        backwards = _backwards(calls)
        clearings = [c for c in calls if t.clears(c, optimizer, surely=True) and not t.below(c, loop)]
        if not backwards or not clearings or any(t.below(b, loop) for b in backwards):
            continue
        if t.hidden([c for c in calls if c.what != "backward"], optimizer):
            continue
        named = any(word in block.text.lower() for word in _ACCUMULATION)
        scaled = all(b.details.get("role") == "scaled" for b in backwards)
        sure = _together(step, clearings[0], backwards[0]) and (named or scaled)
        yield LoopFault("cleared-every-micro-batch", optimizer, clearings[0], step, sure, block, backwards[0])


def never_stepped(t: Trace) -> Iterator[LoopFault]:
    """A script that makes an optimizer, clears it in a loop with a backward, and never steps it."""
    if t.trace.entry.function or t.of_kind("step") or any(c.details.get("stepping") for c in t.calls):
        return
    for clearing in t.of_kind("zero_grad"):
        loop = t.loop_of(clearing)
        optimizer = t.objects.get(clearing.on[0]) if clearing.on else None
        if loop is None or optimizer is None or optimizer.kind != "optimizer" or not optimizer.known:
            continue
        backwards = _backwards(t.inside(loop))
        plain = all(b.details.get("via") in ("", "accelerator") for b in backwards)
        if backwards and plain and not any(t.opaque_to(c, optimizer) for c in t.calls):
            yield LoopFault("no-step", optimizer, backwards[-1], clearing, _together(backwards[-1], clearing))
            return


# --------------------------------------------------------------------------------------------- TL304


def never_cleared(t: Trace) -> Iterator[LoopFault]:
    """A loop with backward and step, and nothing anywhere that clears the gradients."""
    if any(c.what == "grads" for c in t.calls):
        return
    seen: set[int] = set()
    for step, optimizer in t.steps():
        loop = t.loop_of(step)
        if loop is None or optimizer.number in seen or not optimizer.known or _by_itself(step, optimizer):
            continue
        backwards = [b for b in _backwards(t.inside(loop)) if t.before(b, step)]
        if not backwards or any(t.opaque_to(c, optimizer) for c in t.calls):
            continue
        kind = "never" if not any(t.clears(c, optimizer, surely=False) for c in t.calls) else ""
        if not kind and _left_out(t, optimizer):
            kind = "left-out"
        if kind:
            seen.add(optimizer.number)
            yield LoopFault(kind, optimizer, step, backwards[-1], _together(step, backwards[-1]))


def _left_out(t: Trace, optimizer: SourceObject) -> list[SourceObject]:
    """Modules of an optimizer that no ``zero_grad`` reaches, when each of them is known."""
    clearings = t.of_kind("zero_grad")
    if optimizer.details.get("understood") is not True or not all(c.on for c in clearings):
        return []
    targets = [t.objects.get(n) for c in clearings for n in c.on]
    held = [t.objects.get(n) for n in optimizer.of]
    if any(o is None or o.kind != "module" or not o.known for o in (*targets, *held)):
        return []
    reached = t.family([o.number for o in targets if o is not None])
    return [o for o in held if o is not None and o.number not in reached]


def modules_left_out(t: Trace, optimizer: SourceObject) -> list[str]:
    """Names of the modules whose gradients nothing clears."""
    return [o.name or o.class_name for o in _left_out(t, optimizer)]


# --------------------------------------------------------------------------------------------- TL306


def undivided(t: Trace) -> Iterator[LoopFault]:
    """A backward per micro-batch with the full mean, and a step every n-th time."""
    for step, optimizer in t.steps():
        loop = t.loop_of(step)
        counting = t.counting(step, loop) if loop is not None else None
        if loop is None or counting is None or _by_itself(step, optimizer):
            continue
        calls, block = t.inside(loop), t.trace.blocks[counting]
        backwards = _backwards(calls)
        if block.kind == "accumulate":
            # Only what accelerate has prepared is held back inside `accumulate`.
            if optimizer.details.get("prepared") is None:
                continue
        elif not backwards or any(counting in b.path for b in backwards):
            continue
        if not backwards or not all(_whole(t, b) for b in backwards) or _others_step(t, loop, optimizer):
            continue
        if any(c.what == "grads" or t.opaque_to(c, optimizer) for c in calls):
            continue
        clearings = [c for c in calls if t.clears(c, optimizer, surely=False)]
        if not clearings or any(counting not in c.path for c in clearings):
            continue
        sure = all(b.details.get("role") == "mean" for b in backwards) and _together(step, *backwards)
        yield LoopFault("undivided", optimizer, backwards[0], step, sure, block)


def _whole(t: Trace, backward: SourceCall) -> bool:
    """Whether a backward gets a full mean, and nothing divides it on the way."""
    if backward.details.get("weighted") or backward.details.get("role") not in ("mean", "model"):
        return False
    if backward.details.get("via") != "accelerator":
        return backward.details.get("via") in ("", "manual")
    by = backward.details.get("by")
    found = t.objects.get(by) if isinstance(by, int) else None
    return found is not None and found.details.get("accumulates") is False


# --------------------------------------------------------------------------------------------- TL308


def useless_clips(t: Trace) -> Iterator[LoopFault]:
    """Clipping after the step, of scaled gradients, of nothing, of another model, at every micro-batch."""
    for step, optimizer in t.steps():
        loop = t.loop_of(step)
        if loop is None:
            continue
        calls = t.inside(loop)
        for clip in calls:
            if clip.what == "clip" and not clip.details.get("measures"):
                kind, sure = _clip_fault(t, loop, calls, clip, step, optimizer)
                if kind:
                    counting = t.counting(step, loop)
                    block = t.trace.blocks[counting] if counting is not None else None
                    yield LoopFault(kind, optimizer, clip, step, sure and _together(clip, step), block)


def _clip_fault(
    t: Trace, loop: int, calls: list[SourceCall], clip: SourceCall, step: SourceCall, optimizer: SourceObject
) -> tuple[str, bool]:
    if clip.details.get("spent_line") is not None:
        return "exhausted", True
    backwards = _backwards(calls)
    if not backwards:
        return "", False
    only = not _others_step(t, loop, optimizer)
    if not _clips(t, clip, optimizer) and not (only and not clip.details.get("understood")):
        return _of_another(t, loop, clip, step, optimizer), False
    if all(t.before(clip, b) for b in backwards) and t.always_with(clip, backwards[0]):
        return _before_backward(t, calls, clip, step, optimizer), True
    if t.before(step, clip):
        return _after_step(t, loop, calls, clip, step, optimizer), True
    scaled = step.details.get("scaler") is not None and step.details.get("enabled") is not False
    by_hand = not clip.details.get("via") and not clip.details.get("times_scale")
    if scaled and by_hand and any(t.before(b, clip) for b in backwards):
        if not any(
            (c.what == "unscale" and (not c.on or set(c.on) & t.same(optimizer.number))) or t.opaque_to(c, optimizer)
            for c in calls
            if t.before(c, clip)
        ):
            return "scaled", step.details.get("enabled") is True
    counting = t.counting(step, loop)
    if counting is not None and t.trace.blocks[counting].kind == "accumulate":
        # Inside accelerate's context the step waits for the last micro-batch by itself, clipping does not.
        each = clip.path[-1] == counting and optimizer.details.get("prepared") is not None
        return ("every-micro-batch", False) if each else ("", False)
    if counting is not None and counting not in clip.path:
        if all(counting not in b.path for b in backwards):
            return "every-micro-batch", False
    return "", False


def _clips(t: Trace, clip: SourceCall, optimizer: SourceObject) -> bool:
    return bool(set(clip.on) & (t.family(optimizer.of) | t.same(optimizer.number)))


def _after_step(
    t: Trace, loop: int, calls: list[SourceCall], clip: SourceCall, step: SourceCall, optimizer: SourceObject
) -> str:
    """Clipped once the step is made, and cleared before the next: nobody sees it."""
    backwards = _backwards(calls)
    if t.loop_of(clip) != loop or not t.always_with(clip, step) or not all(t.before(b, step) for b in backwards):
        return ""
    if any(c.what == "clip" and t.before(c, step) for c in calls):
        return ""
    later = [c for c in calls if t.before(clip, c) or t.before(c, backwards[0])]
    return "after-step" if any(t.clears(c, optimizer, surely=False) for c in later) else ""


def _before_backward(
    t: Trace, calls: list[SourceCall], clip: SourceCall, step: SourceCall, optimizer: SourceObject
) -> str:
    """Clipped when the gradients of the last pass are gone and those of this one have not come."""
    if not t.before(clip, step) or t.hidden([c for c in calls if t.before(c, clip)], optimizer):
        return ""
    if sum(c.what == "clip" for c in calls) > 1:
        return ""
    gone = [c for c in calls if t.clears(c, optimizer, surely=True) and (t.before(c, clip) or t.before(step, c))]
    return "before-backward" if gone else ""


def _of_another(t: Trace, loop: int, clip: SourceCall, step: SourceCall, optimizer: SourceObject) -> str:
    """The next step is of an optimizer that holds none of what was clipped, nor does any later one."""
    both = (clip.details.get("understood"), optimizer.details.get("understood"), clip.on, optimizer.of)
    if not all(both) or not t.always_with(clip, step):
        return ""
    numbers = (*clip.on, *optimizer.of)
    if any(n not in t.objects or not t.objects[n].known for n in numbers):
        return ""
    following = [c for c, _ in t.steps(loop) if t.before(clip, c)]
    if not following or following[0] is not step or any(_clips(t, clip, o) for _, o in t.steps(loop)):
        return ""
    return "another-model"


# --------------------------------------------------------------------------------------------- TL401


def early_schedulers(t: Trace) -> Iterator[LoopFault]:
    """``scheduler.step()`` in a loop, before the first step of its optimizer."""
    for call in t.of_kind("scheduler_step"):
        scheduler = t.objects.get(call.on[0]) if call.on else None
        loops = t.loops_of(call)
        if (
            scheduler is None
            or not loops
            or not scheduler.known
            or not scheduler.of
            or scheduler.details.get("foreign")
        ):
            continue
        if "Plateau" in scheduler.class_name or call.details.get("arguments"):
            continue
        optimizer = t.objects.get(scheduler.of[0])
        if optimizer is None or any(c.what == "loaded" for c in t.calls):
            continue
        steps = [s for s, o in t.steps() if o.number in t.same(optimizer.number)]
        if any(t.before(s, call) for s in steps):
            continue
        if any(t.opaque_to(c, optimizer) or scheduler.number in c.on for c in t.calls if c.what == "opaque"):
            continue
        later = [s for s in steps if loops[-1] in s.path and t.always_with(call, s)]
        if later:
            sure = _together(call, later[0])
            yield LoopFault("early", optimizer, call, later[0], sure, scheduler=scheduler)


def accumulation_named(block: SourceBlock | None) -> bool:
    """Whether a condition speaks of accumulation."""
    return block is not None and any(word in block.text.lower() for word in _ACCUMULATION)


__all__ = [
    "LoopFault",
    "accumulation_named",
    "cleared_before_step",
    "cleared_every_micro_batch",
    "early_schedulers",
    "modules_left_out",
    "never_cleared",
    "never_stepped",
    "undivided",
    "useless_clips",
]
