"""Faults of models and losses that the source shows: what no optimizer holds, what was replaced, modes, loss inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainlint.recording.schema import SourceCall, SourceLine, SourceObject
from trainlint.recording.source_order import Trace

#: Parts that are meant to be trained by nobody, as programs call them.
_NOT_TRAINED = ("target", "teacher", "ema", "momentum", "frozen", "reference", "ref_", "old", "key", "_k")


@dataclass(frozen=True)
class ModelFault:
    """What is wrong with a module, and where."""

    kind: str
    module: SourceObject
    call: SourceCall | None = None
    other: SourceCall | None = None
    optimizer: SourceObject | None = None
    owner: SourceObject | None = None
    sure: bool = True


# --------------------------------------------------------------------------------------------- TL201


def left_out(t: Trace) -> Iterator[ModelFault]:
    """Parts of a trained module that its forward uses and no optimizer was given."""
    built = {c.on[0]: c for c in t.of_kind("built") if c.on}
    optimizers = [o for o in t.trace.objects if o.kind == "optimizer" and "alternatives" not in o.details]
    if not built or any(o.number not in built or o.details.get("understood") is not True for o in optimizers):
        return
    held = [t.objects[n] for o in optimizers for n in o.of if n in t.objects]
    if not held or not all(m.known for m in held) or t.of_kind("added"):
        return
    covered = _covered(t, held)
    freezes = t.of_kind("freeze")
    for module in t.trace.objects:
        owner = t.objects.get(module.of[0]) if module.kind == "module" and module.of else None
        if owner is None or module.number in covered or not _is_trained(module):
            continue
        listed = bool(module.details.get("listed"))
        around = t.family([owner.number])
        if not listed and (module.number in t.family([m.number for m in held]) or _exempt(module)):
            continue
        if not {m.number for m in held} & around or any(not c.on or module.number in t.family(c.on) for c in freezes):
            continue
        if any(c.what == "opaque" and set(c.on) & around for c in t.calls) or not _trains(t, around):
            continue
        if not listed and owner.details.get("read") is not True and not _lightning(t, around):
            continue
        optimizer = next((o for o in optimizers if set(o.of) & around), optimizers[0])
        yield ModelFault("listed" if listed else "part", module, built.get(optimizer.number), None, optimizer, owner)


def _covered(t: Trace, held: list[SourceObject]) -> set[int]:
    """Modules whose parameters the optimizers get: those they were given, and all that is registered below."""
    out: set[int] = set()
    queue = [m.number for m in held]
    while queue:
        number = queue.pop()
        if number not in out:
            out.add(number)
            queue += t.same(number)
            queue += [
                m.number
                for m in t.trace.objects
                if m.kind == "module" and number in m.of and not m.details.get("listed")
            ]
    return out


def _is_trained(module: SourceObject) -> bool:
    plain = ("parametric", "trained")
    return all(module.details.get(k) for k in plain) and not module.details.get("frozen")


def _exempt(module: SourceObject) -> bool:
    return any(word in module.name.lower() for word in _NOT_TRAINED)


def _lightning(t: Trace, numbers: set[int]) -> bool:
    return any(t.objects[n].details.get("lightning") for n in numbers if n in t.objects)


def _trains(t: Trace, numbers: set[int]) -> bool:
    """Whether a module is called with gradients, and something steps."""
    called = any(c.what == "forward" and c.details.get("grad") is not False and set(c.on) & numbers for c in t.calls)
    return called and bool(t.steps() or t.of_kind("objective"))


# --------------------------------------------------------------------------------------------- TL203


def replaced(t: Trace) -> Iterator[ModelFault]:
    """Parts of a module that are replaced between building the optimizer and its steps."""
    for change in t.of_kind("replaced"):
        for build in t.of_kind("built"):
            optimizer = t.objects.get(build.on[0])
            if optimizer is None or not t.before(build, change) or optimizer.details.get("understood") is not True:
                continue
            if not set(change.on) & t.parts(optimizer.of):
                continue
            used = [s for s, o in t.steps() if o.number in t.same(optimizer.number) and t.before(change, s)]
            used += [c for c in t.of_kind("objective") if t.before(change, c)]
            if not used or not t.always_with(change, used[0]) or t.of_kind("added"):
                continue
            again = [b for b in t.of_kind("built") if t.before(change, b)]
            if any(set(t.objects[b.on[0]].of) & t.family(change.on) for b in again if b.on[0] in t.objects):
                continue
            module = t.objects[change.on[0]]
            yield ModelFault("replaced", module, change, build, optimizer)


def trained_elsewhere(t: Trace) -> Iterator[ModelFault]:
    """An optimizer over a module that is never called, while a copy of it is trained."""
    for build in t.of_kind("built"):
        optimizer = t.objects.get(build.on[0])
        if optimizer is None or optimizer.details.get("understood") is not True:
            continue
        held = [t.objects.get(n) for n in optimizer.of]
        around = t.family(optimizer.of)
        if not held or any(m is None or not m.known for m in held):
            continue
        if any(t.objects[n].details.get("used") for n in around if n in t.objects):
            continue
        for step, stepped in t.steps():
            loop = t.loop_of(step)
            if stepped.number != optimizer.number or loop is None or any(t.opaque_to(c, optimizer) for c in t.calls):
                continue
            called = [c for c in t.inside(loop) if c.what == "forward" and c.details.get("grad")]
            copies = [
                c for c in called for n in c.on if n in t.objects and t.objects[n].details.get("copy_of") in around
            ]
            if copies and not any(set(c.on) & around for c in called):
                yield ModelFault("copied", t.objects[copies[0].on[0]], copies[0], build, optimizer)
                break


# --------------------------------------------------------------------------------------------- TL305


def stays_in_eval(t: Trace) -> Iterator[ModelFault]:
    """``eval()`` inside a loop that trains, and no ``train()`` in it; or before it, and none at all."""
    seen: set[int] = set()
    trains = t.of_kind("train")
    for call in t.of_kind("eval"):
        for number in call.on:
            module = t.objects.get(number)
            if module is None or module.kind != "module" or number in seen:
                continue
            around = t.family([number])
            if not _held(t, around) or any(not c.on or number in t.family(c.on) for c in t.of_kind("freeze")):
                continue
            loops = t.loops_of(call)
            loop = loops[0] if loops else None
            back = [c for c in trains if (loop is None or loop in c.path) and (not c.on or set(c.on) & around)]
            if back or _leaves(t, call):
                continue
            forward = _training_forward(t, number, around, loop)
            if forward is None or any(c.what == "opaque" and number in c.on for c in t.calls):
                continue
            if t.before(call, forward) and not t.always_with(call, forward):
                continue
            if loop is None and not t.before(call, forward):
                continue
            seen.add(number)
            known = module.details.get("modal") is True and module.details.get("read") is True
            straight = loop is not None and not t.before(call, forward)
            yield ModelFault(
                "stays-in-eval" if straight else "eval-before", module, call, forward, sure=known and straight
            )


def _held(t: Trace, numbers: set[int]) -> bool:
    """Whether an optimizer has parameters of these modules, or it is not known what it has."""
    optimizers = [o for o in t.trace.objects if o.kind == "optimizer"]
    if not optimizers and t.of_kind("objective"):
        return True  # a trainer makes it
    return any(set(o.of) & numbers or not o.known for o in optimizers)


def _training_forward(t: Trace, number: int, around: set[int], loop: int | None) -> SourceCall | None:
    """The forward of a module that a backward and a step of its optimizer follow in the same loop."""
    for forward in t.of_kind("forward"):
        at = t.loop_of(forward)
        if number not in forward.on or not forward.details.get("grad"):
            continue
        if loop is not None and loop not in forward.path:
            continue
        if at is None:
            # A hook that a trainer calls for each batch.
            if any(t.before(forward, c) for c in t.of_kind("objective")) and not t.steps():
                return forward
            continue
        calls = t.inside(at)
        ends = [c for c in calls if c.what in ("backward", "objective") and t.before(forward, c)]
        steps = [s for s, o in t.steps(at) if set(o.of) & around or (not o.of and not o.known)]
        if ends and (steps or ends[0].what == "objective"):
            return forward
    return None


def _leaves(t: Trace, call: SourceCall) -> bool:
    """Whether the branch that a call stands in ends by leaving the loop or the function."""
    lines = {b.line for b in t.trace.blocks if b.kind == "unless"}
    return any(b.kind in ("if", "else", "except") and b.line in lines for b in t.blocks(call))


def evaluated_in_train_mode(t: Trace) -> Iterator[ModelFault]:
    """A model with dropout or batch norm that is evaluated, in a program that never calls ``eval()`` on it."""
    for module in t.trace.objects:
        plain = module.details.get("modal") is True and module.details.get("read") is True
        if module.kind != "module" or not module.known or not plain:
            continue
        around = t.family([module.number])
        if any(not c.on or set(c.on) & around for c in t.of_kind("eval")):
            continue
        if any(c.details.get("unsure") for c in t.of_kind("train")):
            continue
        if any(c.what == "opaque" and module.number in c.on for c in t.calls):
            continue
        if not any(set(o.of) & around for _, o in t.steps()):
            continue
        forwards = [c for c in t.of_kind("forward") if module.number in c.on]
        training = [c for c in forwards if c.details.get("grad") is True]
        without = [c for c in forwards if c.details.get("grad") is False and not _trains_here(t, c)]
        if training and without:
            yield ModelFault("evaluated-in-train", module, without[0], training[0], sure=False)


def always_drops(t: Trace) -> Iterator[SourceCall]:
    """``F.dropout(x)`` without ``training=`` in a module that the program also calls without gradients."""
    seen: set[tuple[str, int]] = set()
    for call in t.of_kind("dropout"):
        place = (call.at.file, call.at.line)
        if call.details.get("inside") and call.details.get("grad") is False and place not in seen:
            seen.add(place)
            yield call


def _trains_here(t: Trace, call: SourceCall) -> bool:
    loop = t.loop_of(call)
    return loop is not None and any(c.what == "backward" for c in t.inside(loop))


# --------------------------------------------------------------------------------------------- TL302, TL5


def detached(t: Trace) -> Iterator[SourceCall]:
    """Backwards on what is known to have no gradient."""
    for call in t.of_kind("backward", "objective"):
        if call.details.get("attached") is False and call.details.get("cut_by"):
            yield call


@dataclass(frozen=True)
class LossUse:
    """A call of a loss of torch whose input was made by a known operation."""

    call: SourceCall
    function: str
    made_by: str
    made_at: SourceLine | None
    #: A backward is known to come back to it.
    trained: bool


def loss_uses(t: Trace) -> Iterator[LossUse]:
    """Losses with gradients on, with what made their input. Those that are only looked at are left out."""
    reached: set[object] = set()
    returned: set[object] = set()
    for call in t.calls:
        numbers = call.details.get("losses")
        if isinstance(numbers, tuple):
            (returned if call.what == "returned" else reached).update(numbers)
    for call in t.of_kind("loss"):
        made_by, number = call.details.get("made_by"), call.details.get("number")
        used = number in reached or number in returned
        if not isinstance(made_by, str) or call.details.get("grad") is False or not used:
            continue
        file, line = call.details.get("made_file"), call.details.get("made_line")
        made_at = SourceLine(file, line) if isinstance(file, str) and isinstance(line, int) else None
        yield LossUse(call, str(call.details.get("function")), made_by, made_at, number in reached)
