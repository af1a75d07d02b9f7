"""TL303: backward, step and zero_grad in an order that throws gradients away."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import name_optimizer, place, plural, uses
from trainlint.recording.intervals import Interval, Timeline, clears, new_data, same_line
from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    Forward,
    Optimizer,
    OptimizerStep,
    ScalerEvent,
    SourceLine,
    ZeroGrad,
)
from trainlint.recording.source_loops import LoopFault, cleared_before_step, cleared_every_micro_batch, never_stepped
from trainlint.recording.source_order import NOT_RUN, traces_of

#: Backwards without a step that prove something when nothing says that gradients are being accumulated.
_MANY = 3


@check("TL303", Recording, severity="error", catalog="O4")
def wrong_step_order(run: Recording) -> Iterator[Finding]:
    """Backward, step and zero_grad in an order that throws gradients away.

    ## What goes wrong
    A training iteration is: clear the gradients, backward, step. In another order nothing raises:

    - **no step**: gradients are computed, perhaps cleared, and never used;
    - **step before backward**: with the clearing in front of both, every step finds no gradient and does nothing;
    - **zero_grad between backward and step**: the same, the step finds nothing left;
    - **zero_grad at every micro-batch under accumulation**: only the last micro-batch of each step counts; the
      others are computed and thrown away, so the batch is a fraction of what the config says.

    ## How it is detected
    For every optimizer the timeline is cut into intervals from one of its steps to the next. In each it is known
    which backwards ran, which calls of `zero_grad` cleared gradients that existed, and what gradient the step found.
    Closures (LBFGS, Lightning) run inside the step and are read so. A fault is reported when the intervals show it
    consistently: the backwards made gradients, a clearing removed them, and the step found none and moved nothing;
    or, under accumulation, each micro-batch's gradients were cleared before the next and what the step used was the
    last alone.

    Without a run, from the source: in one pass of a loop no backward lies between clearing and the step that always
    follows it; clearing runs in every pass and the step under a condition that counts; a script never steps the
    optimizer that it clears. The project's own functions are followed; a call that cannot be read, and is handed the
    optimizer, the module or the loss, keeps it silent.

    ## What to do
    `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`, in this order; under accumulation step and
    zero_grad together, once every N micro-batches. With accelerate, put the whole iteration under `with
    accelerator.accumulate(model):`, which makes `step` and `zero_grad` do nothing until it is time. In Lightning's
    manual optimization call `opt.step()` and `opt.zero_grad()` after `self.manual_backward(loss)`.

    ## When it may be wrong
    A step without gradients that happens once (calling `optimizer.step()` first to quiet a scheduler's warning), a
    step that a GradScaler skipped, gradients of another optimizer being cleared (GANs), zero_grad twice or at the
    end, a batch that is skipped now and then, backwards for another purpose (adversarial examples, penalties,
    per-task gradients that are combined by hand) are right and not reported. A program that accumulates over more
    micro-batches than were watched without ever clearing looks like one that never steps: without a clearing that is
    only a warning.

    ## References
    torch.optim documentation, "Taking an optimization step"; "Automatic Mixed Precision examples" (gradient
    accumulation).
    """
    timeline = Timeline(run)
    backwards = timeline.backwards()
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built: the program updates its weights by itself, or not at all")
    if not timeline.steps:
        if not backwards:
            raise NotObserved("neither a backward nor an optimizer step was seen; raise --timeout")
        yield from _no_step(run, timeline, backwards)
        return
    looked = False
    for optimizer in run.optimizers:
        intervals = timeline.intervals(optimizer.id)
        roots = _roots(run, optimizer)
        looked = looked or any(i.had_gradient() is not None for i in intervals)
        lost = _lost(intervals, optimizer, roots)
        if lost is not None:
            yield _lost_finding(run, optimizer, lost, intervals)
            continue
        wiped = _wiped(timeline, intervals, optimizer, roots)
        if wiped is not None:
            yield _wiped_finding(run, optimizer, wiped)
    if not looked:
        raise NotObserved("gradients were not measured at any step; raise --steps")


def _roots(run: Recording, optimizer: Optimizer) -> set[int | None]:
    held = {i for g in optimizer.groups for i in g.parameters}
    return {p.root for p in run.parameters if p.id in held and p.root is not None}


# ------------------------------------------------------------------------------------------------------- no step


def _no_step(run: Recording, timeline: Timeline, backwards: Sequence[Backward]) -> Iterator[Finding]:
    """Backwards, an optimizer, and never a step."""
    if any(isinstance(e, ScalerEvent) and e.call == "step" for e in run.events):
        raise NotObserved(
            "a GradScaler skipped every step so far (it is finding its scale); raise --steps or --timeout"
        )
    if any(o.moved_without_steps for o in run.optimizers):
        raise NotApplicable("the parameters move without torch's optimizer step: something else updates them")
    if run.ending.how not in ("backward-cap", "exit", "steps"):
        raise NotObserved(f"the watch ended ({run.ending.how}) before any optimizer step; raise --timeout")
    if run.ending.how == "exit" and run.ending.error is not None:
        raise NotObserved("the program died before its first optimizer step")
    count = len(backwards) + run.events_dropped.get("backward", 0)
    planned = run.plan.accumulation or 1
    if count < _MANY or count < planned:
        raise NotObserved(f"only {plural(count, 'backward')} came before the watch ended, perhaps all of one step")
    clearings = [e for e in run.events if isinstance(e, ZeroGrad) and e.seq > backwards[0].seq and e.had_gradients]
    by_optimizer = [e for e in clearings if e.optimizer is not None]
    optimizer = next(
        (o for o in run.optimizers if by_optimizer and o.id == by_optimizer[0].optimizer), run.optimizers[0]
    )
    message = (
        f"No optimizer ever stepped: {plural(count, 'backward')} at {_line(backwards[-1].at)}, no call of step() on "
        f"{name_optimizer(optimizer)}."
    )
    if clearings:
        message += (
            f" Gradients were cleared {plural(len(clearings), 'time')} ({_line(clearings[0].at)}) without having "
            "been used."
        )
    sure = bool(by_optimizer) or run.ending.how == "exit"
    if not sure:
        message += " If gradients are accumulated over more micro-batches than that, raise the watch with --timeout."
    yield Finding(
        message,
        at=backwards[-1].at or optimizer.at,
        evidence={"backwards": count, "clearings": len(clearings), "steps": 0, "ending": run.ending.how},
        fix="In manual optimization call opt.step() after self.manual_backward(loss)."
        if uses(run, "lightning")
        else "Call optimizer.step() after loss.backward(), before the gradients are cleared.",
        severity=None if sure else Severity.WARNING,
        about="no-step",
    )


# ------------------------------------------------------------------------------- steps that find nothing to use


@dataclass(frozen=True)
class _Lost:
    intervals: list[Interval]
    backward: Backward
    clearing: ZeroGrad


def _lost(intervals: Sequence[Interval], optimizer: Optimizer, roots: set[int | None]) -> _Lost | None:
    """Steps without any gradient although there were some, which were cleared after the last backward."""
    bad: list[tuple[Interval, Backward, ZeroGrad]] = []
    judged = 0
    for interval in intervals:
        had, backwards = interval.had_gradient(), interval.backwards()
        if had is None or not backwards:
            # Without a backward there is nothing to lose: the step that quiets a scheduler's warning, the rotated loop.
            continue
        judged += 1
        if had or interval.moved():
            continue
        clearing = next(
            (
                e
                for e in reversed(interval.clearings())
                if e.seq > backwards[-1].seq and e.had_gradients and clears(e, optimizer.id, roots)
            ),
            None,
        )
        if clearing is None or _others_step(interval, backwards[-1].seq, clearing.seq, optimizer):
            continue
        bad.append((interval, backwards[-1], clearing))
    # One lost batch may be a batch skipped on purpose; every one is a fault.
    if not bad or len(bad) < judged or (len(bad) == 1 and len(intervals) > 2):
        return None
    return _Lost([b[0] for b in bad], bad[-1][1], bad[-1][2])


def _others_step(interval: Interval, low: int, high: int, optimizer: Optimizer) -> bool:
    """Whether another optimizer stepped in between: the backward was for that one."""
    return any(isinstance(e, OptimizerStep) and e.optimizer != optimizer.id for e in interval.between(low, high))


def _lost_finding(run: Recording, optimizer: Optimizer, lost: _Lost, intervals: Sequence[Interval]) -> Finding:
    step, n = lost.intervals[-1].step, len(lost.intervals)
    between = lost.intervals[-1].between(lost.backward.seq, lost.clearing.seq)
    new_batch = any(isinstance(e, (BatchFetched, Forward)) for e in between)
    before = _earlier(step.at, lost.backward.at) if _comparable(step.at, lost.backward.at) else new_batch
    if before:
        what = (
            f"{optimizer.class_name} steps before backward: zero_grad ({_line(lost.clearing.at)}), step "
            f"({_line(step.at)}), then backward ({_line(lost.backward.at)})."
        )
    else:
        what = (
            f"zero_grad ({_line(lost.clearing.at)}) comes between backward ({_line(lost.backward.at)}) and "
            f"{optimizer.class_name}'s step ({_line(step.at)})."
        )
    return Finding(
        f"{what} It cleared the gradients of {plural(lost.clearing.had_gradients or 0, 'tensor')}; {n} of "
        f"{plural(len(intervals), 'step')} found no gradient at all and moved nothing.",
        at=lost.clearing.at or step.at,
        evidence={
            "kind": "step-before-backward" if before else "cleared-before-step",
            "steps_without_gradient": n,
            "steps": len(intervals),
            "tensors_cleared": lost.clearing.had_gradients,
        },
        fix=_order(run),
        about="step-before-backward" if before else "cleared-before-step",
    )


# -------------------------------------------------------------------------- clearing at every micro-batch


@dataclass(frozen=True)
class _Wiped:
    intervals: int
    backwards: list[Backward]
    clearing: ZeroGrad
    step: OptimizerStep
    proven: bool


def _wiped(
    timeline: Timeline, intervals: Sequence[Interval], optimizer: Optimizer, roots: set[int | None]
) -> _Wiped | None:
    """Several micro-batches before each step, each cleared before the next."""
    found: list[tuple[Interval, list[Backward], ZeroGrad, bool, bool]] = []
    judged = 0
    for interval in intervals:
        backwards = interval.backwards()
        if not backwards:
            continue
        judged += 1
        if len(backwards) < 2 or not same_line(backwards):
            continue
        one = _wiped_once(interval, backwards, optimizer, roots)
        if one is not None:
            found.append((interval, backwards, *one))
    enough = len(found) >= 2 or (len(found) == 1 and len(found[0][1]) > 2)
    if not enough or len(found) < judged or not any(f[3] for f in found):
        return None
    interval, backwards, clearing, _, _ = found[-1]
    return _Wiped(len(found), backwards, clearing, interval.step, all(f[4] for f in found))


def _wiped_once(
    interval: Interval, backwards: Sequence[Backward], optimizer: Optimizer, roots: set[int | None]
) -> tuple[ZeroGrad, bool, bool] | None:
    """The clearing; whether the backwards are known to have had their own data; whether the last alone counted."""
    if interval.had_gradient() is not True:
        return None
    clearing: ZeroGrad | None = None
    told = False
    for a, b in pairwise(backwards):
        between = interval.between(a.seq, b.seq)
        fresh = new_data(interval, a, b)
        if fresh is False or any(isinstance(e, OptimizerStep) for e in between):
            return None
        told = told or fresh is True
        cleared = [e for e in between if isinstance(e, ZeroGrad) and e.had_gradients and clears(e, optimizer.id, roots)]
        if not cleared:
            return None
        clearing = cleared[-1]
    if clearing is None:
        return None
    m = interval.measurement
    used, after = (m.gradient_norm_total, m.gradient_norm_after_backward) if m is not None else (None, None)
    if used is None or after is None:
        return clearing, told, False
    if used > after * 1.01 or (used < after * 0.99 and not interval.clips() and not backwards[-1].loss_scale):
        return None  # gradients were put together by hand from what the backwards left
    # The step used the last share alone if it lies in its direction (clipping by value bends it a little).
    if m is not None and m.share_products and list(m.share_backwards) == [b.seq for b in backwards]:
        last, step = len(backwards) - 1, len(backwards)
        norms = m.share_products[last][last] * m.share_products[step][step]
        if norms > 0 and m.share_products[last][step] < 0.9 * math.sqrt(norms):
            return None
    return clearing, told, True


def _wiped_finding(run: Recording, optimizer: Optimizer, wiped: _Wiped) -> Finding:
    n = len(wiped.backwards)
    share = f"{n - 1} of {n} micro-batches"
    return Finding(
        f"zero_grad ({_line(wiped.clearing.at)}) runs at every micro-batch, "
        f"{optimizer.class_name} steps every {n} "
        f"({_line(wiped.step.at)}): {share} are thrown away, and each step uses the last one alone. Seen in "
        f"{plural(wiped.intervals, 'step')}; the effective batch is 1/{n} of what accumulation is meant to give.",
        at=wiped.clearing.at or wiped.step.at,
        evidence={
            "kind": "cleared-every-micro-batch",
            "micro_batches_per_step": n,
            "steps": wiped.intervals,
            "tensors_cleared": wiped.clearing.had_gradients,
        },
        fix="Put the iteration under `with accelerator.accumulate(model):`."
        if uses(run, "accelerate") and not uses(run, "transformers")
        else "Call zero_grad only where step is called, right after it.",
        severity=None if wiped.proven else Severity.WARNING,
        about="cleared-every-micro-batch",
    )


# ------------------------------------------------------------------------------------------------------- words


def _line(at: SourceLine | None) -> str:
    return place(at) or "an unknown line"


def _comparable(a: SourceLine | None, b: SourceLine | None) -> bool:
    return a is not None and b is not None and (a.file, a.function) == (b.file, b.function)


def _earlier(a: SourceLine | None, b: SourceLine | None) -> bool:
    return a is not None and b is not None and a.line < b.line


def _order(run: Recording) -> str:
    if uses(run, "lightning"):
        return "Order: opt.zero_grad(), self.manual_backward(loss), opt.step()."
    return "Order: optimizer.zero_grad(), loss.backward(), optimizer.step()."


# ---------------------------------------------------------------------------------------------- without a run


@check("TL303", SourceFacts, severity="error", catalog="O4")
def wrong_step_order_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same order, read in a training loop of the source."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in (*cleared_before_step(trace), *cleared_every_micro_batch(trace), *never_stepped(trace)):
            yield _from_source(fault)


def _from_source(fault: LoopFault) -> Finding:
    name, call, other, backward = fault.optimizer.name, fault.call.at, fault.other.at, fault.backward
    fix = "Order: optimizer.zero_grad(), loss.backward(), optimizer.step()."
    if fault.kind == "no-step":
        text = f"{name}.step() is never called: backward at {place(call)}, zero_grad at {place(other)}, and no step."
        fix = "Call optimizer.step() after loss.backward(), before the gradients are cleared."
    elif fault.kind == "cleared-every-micro-batch":
        test = fault.block.text if fault.block is not None else "a condition"
        text = (
            f"zero_grad ({place(call)}) runs in every pass of the loop, {name}.step() ({place(other)}) only under "
            f"`{test}`: every micro-batch but the last is thrown away."
        )
        fix = "Call zero_grad only where step is called, right after it."
    elif fault.kind == "step-before-backward":
        text = (
            f"{name} steps before backward: zero_grad ({place(call)}), step ({place(other)}), then backward "
            f"({place(backward.at if backward else None)}). No step finds a gradient."
        )
    else:
        text = (
            f"zero_grad ({place(call)}) comes between backward ({place(backward.at if backward else None)}) and "
            f"{name}.step() ({place(other)}). No step finds a gradient."
        )
    return Finding(
        f"{text} {NOT_RUN}",
        at=call,
        evidence={"kind": fault.kind, "call": place(call), "other": place(other)},
        fix=fix,
        severity=None if fault.sure else Severity.WARNING,
        about=fault.kind,
    )
