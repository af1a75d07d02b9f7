"""TL304: gradients that a step has used are still there when the next backward adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import (
    by_module,
    framework_settings,
    lines_of,
    name_optimizer,
    number,
    place,
    plural,
    uses,
)
from trainlint.recording.intervals import Interval, Timeline
from trainlint.recording.schema import CarriedGradients, Optimizer, ZeroGrad
from trainlint.recording.source_loops import modules_left_out, never_cleared
from trainlint.recording.source_order import NOT_RUN, traces_of

#: Share of a step's own gradient below which what was carried over changes nothing (a loss scale divides it away).
_NEGLIGIBLE = 0.01


@check("TL304", Recording, severity="error", catalog="O4d O4")
def gradients_never_zeroed(run: Recording) -> Iterator[Finding]:
    """Gradients that a step has used are still there when the next backward adds to them.

    ## What goes wrong
    `backward()` adds to `.grad`. Where nothing clears it after a step, the next step uses the sum of its own gradient
    and all earlier ones: every batch is counted again at every later step, the gradient grows with the number of
    steps, and the direction lags behind the weights. The loss often falls at first and then swings or diverges, like
    a learning rate that is far too high. It may concern some tensors only: `model.zero_grad()` does not reach
    parameters of the loss or of a second module that the optimizer also holds.

    ## How it is detected
    After every optimizer step it is noted which gradients are left. At the next backward those that nobody has
    written to since, and that are not zero, are sampled before and after it. When backward added to them and the next
    step used the sum (clipping and loss scaling allowed for), that step used old gradients, and the sample says how
    large they were beside the new ones. How they might have been cleared makes no difference: `zero_grad` of any
    object, `p.grad = None`, `zero_()`, a custom optimizer's own step, a trainer. An error when it happened at every
    step of the watch after the first; a warning when at some, or when what was left over is too small to matter.

    Without a run, from the source: a loop with backward and step in a program that clears no gradient anywhere, or
    clears other modules than the optimizer was given.

    ## What to do
    Call `optimizer.zero_grad()` once per step, before the backward (under accumulation: before the first backward of
    each step). In Lightning's manual optimization: `opt.zero_grad()`. Clear through the optimizer rather than the
    model when it holds parameters of other modules.

    ## When it may be wrong
    Gradients that are carried over on purpose (a hand-made momentum that keeps them unscaled) look the same.
    Everything else that leaves gradients behind is right as long as they are cleared before their own step, and is
    not reported: a generator's backward that reaches the discriminator, sharpness-aware steps, closures, parameters
    that got no new gradient this time (experts, embeddings), frozen ones. Of optimizers with more than 64 tensors
    concerned, a selection is sampled.

    ## References
    torch.optim documentation, "Taking an optimization step"; torch.optim.Optimizer.zero_grad.
    """
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    looked = False
    for optimizer in run.optimizers:
        intervals = [i for i in timeline.intervals(optimizer.id) if i.measurement and i.measurement.carried]
        looked = looked or bool(intervals)
        found = [c for c in map(_carried, intervals) if c is not None]
        # Once, at the beginning, is a pass to warm up or to find sizes.
        if found and (len(found) == len(intervals) or found[-1].interval.step.index > 1):
            yield _finding(run, optimizer, found, len(intervals))
    if not looked:
        if all(len(steps) < 2 for steps in timeline.steps.values()):
            raise NotObserved("gradients can be left over from the second step on, and one was watched; raise --steps")
        raise NotApplicable("no step after the first had a backward of its own")


@dataclass(frozen=True)
class _Carried:
    interval: Interval
    gradients: CarriedGradients

    @property
    def ratio(self) -> float:
        """Norm of the old gradients over that of the step's own."""
        return self.gradients.norm / self.gradients.own_norm if self.gradients.own_norm else 0.0


def _carried(interval: Interval) -> _Carried | None:
    m = interval.measurement
    carried = m.carried if m is not None else None
    return _Carried(interval, carried) if carried is not None and carried.parameters else None


def _finding(run: Recording, optimizer: Optimizer, found: Sequence[_Carried], judged: int) -> Finding:
    last = found[-1]
    always = len(found) == judged
    matters = max(c.ratio for c in found) >= _NEGLIGIBLE
    backward = next((e for e in last.interval.backwards()), None)
    what, about = _what(run, optimizer, last)
    steps = f"{'' if always else f'{len(found)} of '}{plural(judged, 'step')} after the first"
    at = "at all" if always and judged > 1 else "at"
    message = (
        f"{name_optimizer(optimizer)} uses old gradients again: {at} {steps}, {what} still held those of the step "
        f"before when backward ({place(backward.at if backward else None) or 'unknown line'}) added to them. Step "
        f"{last.interval.step.index + 1}: {number(last.gradients.norm)} left over, "
        f"{number(last.gradients.own_norm)} of its own (norms)."
    )
    if not matters:
        message += " The loss scale divides what is left over until it hardly counts."
    clearings = _clearings(run, found)
    message += f" {_why(run, optimizer, clearings, always)}"
    return Finding(
        message,
        at=(backward.at if backward else None) or last.interval.step.at or optimizer.at,
        evidence={
            "steps": len(found),
            "steps_judged": judged,
            "tensors": last.gradients.found,
            "norm_left_over": [c.gradients.norm for c in found][:8],
            "norm_of_its_own": [c.gradients.own_norm for c in found][:8],
            "clearings": len(clearings),
        },
        fix=_fix(run, clearings),
        severity=None if always and matters else Severity.WARNING,
        about=about,
    )


def _what(run: Recording, optimizer: Optimizer, carried: _Carried) -> tuple[str, str]:
    """The tensors concerned, in words, and what tells this finding from others."""
    gradients = carried.gradients
    m = carried.interval.measurement
    with_gradient = sum(1 for n in m.gradient_norm if n is not None) if m is not None else 0
    # Tensors that had no gradient before or have none now are few; the others are all of them.
    if gradients.found >= 0.9 * with_gradient:
        return f"its {plural(with_gradient, 'gradient')}", optimizer.class_name
    held = {i for g in optimizer.groups for i in g.parameters}
    candidates = [p for p in run.parameters if p.id in held]
    wanted = set(gradients.parameters)
    groups = by_module([p for p in candidates if p.id in wanted], candidates)
    name = groups[0].pattern if groups else optimizer.class_name
    what = lines_of(groups, None)
    if name == "everything" and len(groups) == 1:
        name = next((r.class_name for r in run.roots if r.id == groups[0].parameters[0].root), name)
        what = f"all of {name}"
    return f"{gradients.found} of its {plural(with_gradient, 'gradient')} ({what})", name


def _clearings(run: Recording, found: Sequence[_Carried]) -> list[ZeroGrad]:
    """What was cleared in the intervals concerned, before their first backward: something else, or nothing."""
    out = []
    for carried in found:
        backwards = carried.interval.backwards()
        if backwards:
            out += [e for e in carried.interval.clearings() if e.seq < backwards[0].seq]
    return out


def _why(run: Recording, optimizer: Optimizer, clearings: Sequence[ZeroGrad], always: bool) -> str:
    if not clearings:
        if any(isinstance(e, ZeroGrad) for e in run.events):
            return "Nothing cleared them in between." if always else "At the other steps they were cleared."
        return "zero_grad was never called."
    last = clearings[-1]
    where = f" ({place(last.at)})" if last.at is not None else ""
    if last.optimizer is not None and last.optimizer != optimizer.id:
        other = next((o for o in run.optimizers if o.id == last.optimizer), None)
        return f"zero_grad{where} is called on {name_optimizer(other) if other else 'another optimizer'}."
    if last.optimizer is None:
        root = next((r.class_name for r in run.roots if r.id == last.root), "a module")
        return f"zero_grad{where} is called on {root}, which does not hold them."
    return f"zero_grad{where} does not reach them."


def _fix(run: Recording, clearings: Sequence[ZeroGrad]) -> str:
    if uses(run, "lightning") and framework_settings(run, "lightning").get("automatic_optimization") is False:
        return "opt.zero_grad() after opt.step(), for every optimizer."
    if clearings:
        return "Call zero_grad on this optimizer: it reaches every parameter that it holds."
    if uses(run, "transformers") or uses(run, "lightning"):
        return "Let the trainer clear gradients: remove the override of its training step, or call zero_grad in it."
    return "Call optimizer.zero_grad() once per step, before loss.backward()."


# ---------------------------------------------------------------------------------------------- without a run


@check("TL304", SourceFacts, severity="error", catalog="O4d O4")
def gradients_never_zeroed_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read in a loop whose program nowhere clears what the optimizer steps."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in never_cleared(trace):
            name = fault.optimizer.name or fault.optimizer.class_name
            missed = modules_left_out(trace, fault.optimizer)
            what = (
                "Nothing clears the gradients" if fault.kind == "never" else f"No zero_grad reaches {', '.join(missed)}"
            )
            yield Finding(
                f"{what}: backward ({place(fault.other.at)}) adds to .grad in every pass of the loop, {name}.step() "
                f"({place(fault.call.at)}) uses the sum of all passes so far. {NOT_RUN}",
                at=fault.call.at,
                evidence={"backward": place(fault.other.at), "step": place(fault.call.at), "left_out": missed},
                fix=f"Call {name}.zero_grad() once per step, before the backward.",
                severity=None if fault.sure else Severity.WARNING,
                about=name,
            )
