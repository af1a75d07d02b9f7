"""TL302: backward is called on a loss that no trainable parameter is connected to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import name_optimizer, number, place, plural, uses
from trainlint.recording.gradient_cuts import proven_cuts
from trainlint.recording.intervals import Interval, Timeline
from trainlint.recording.schema import Backward, Event, Forward, LossCall, Optimizer, OptimizerStep, SourceLine
from trainlint.recording.source_models import detached
from trainlint.recording.source_order import NOT_RUN, traces_of

#: What torch says of a tensor without a graph, and Python of a number.
_REFUSED = re.compile(r"does not require grad and does not have a grad_fn")
_NUMBER = re.compile(r"'(?:float|int|numpy\.\w+|ndarray)' object has no attribute 'backward'")
_INFERENCE = re.compile(r"[Ii]nference tensor|Inplace update to inference")
#: The last place that a traceback names.
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@check("TL302", Recording, severity="error", catalog="O3")
def loss_detached(run: Recording) -> Iterator[Finding]:
    """Backward on a loss that no trainable parameter is connected to.

    ## What goes wrong
    The loss was cut off from the model on its way: computed under `no_grad` or `inference_mode`, made new with
    `torch.tensor(loss)` or from `.item()`, detached, taken through NumPy or `argmax`. PyTorch then refuses
    ("element 0 of tensors does not require grad"). The usual cure, `loss.requires_grad_()`, silences it and trains
    nothing: the loss is now a leaf of its own, backward computes d loss / d loss = 1, every gradient stays None, the
    optimizer steps over nothing, and the printed loss wanders with the batches.

    ## How it is detected
    At every backward the graph is walked from the loss until it meets a trainable parameter of any module or
    optimizer, which takes a handful of nodes when all is well. Where it meets none, the gradients of all parameters
    are looked at before and after. A finding needs one of these:

    - PyTorch refused the loss because it has no graph;
    - every backward of a line is called on a leaf, a tensor that was told to require a gradient and was computed
      from nothing, and the steps find no gradient (a warning where other losses give them some);
    - no backward that belongs to a step of an optimizer leads to a parameter, no gradient changed, and the step
      found none.

    The loss call before it tells the cause: gradients switched off, an input without a graph, or a loss that had a
    graph which was lost on the way to backward.

    Without a run, from the source: everything that the loss is put together from is known to have no gradient
    (`no_grad`, `detach`, `item`, `torch.tensor` of a result), also through the project's own functions.

    ## What to do
    Remove `requires_grad_()` from the loss and follow `requires_grad` back from the loss: the first tensor for which
    it is False is where the graph ends. Keep `no_grad` and `inference_mode` to evaluation, `.item()` and `.detach()`
    to what is logged; add losses as tensors (`total = total + loss`), never as `torch.tensor([...])`; replace
    `argmax` or rounding by something with a derivative (softmax, a straight-through estimator).

    ## When it may be wrong
    Backwards that are meant for an input (adversarial examples, saliency maps) and cached gradients do not lead to a
    parameter either: they are reported only when the optimizer's steps find no gradient at all. A batch without
    targets whose loss is a constant is not reported while other batches are connected. Where the graph runs through
    a custom autograd function that may hold another graph (reentrant checkpointing), the finding is a warning, and
    needs that no gradient arrived. A part of the model that is cut off is TL204's question. Gradients taken by
    `torch.autograd.grad` or `torch.func` are not followed.

    ## References
    torch documentation, "Autograd mechanics: locally disabling gradient computation"; torch.Tensor.requires_grad_.
    """
    backwards = [e for e in _events(run) if isinstance(e, Backward)]
    refused = [b for b in backwards if not b.requires_grad]
    died = run.ending.error or (run.boundary.reason if run.boundary is not None else "")
    if refused and (_REFUSED.search(died) or len(refused) == len(backwards)):
        if proven_cuts(run):
            raise NotApplicable("the cut that the loss has no gradient from is known: TL606 says where it is")
        yield _refused(run, refused[-1], backwards)
        return
    number_or_inference = _NUMBER.search(died) or _INFERENCE.search(died)
    if number_or_inference and (run.ending.how == "exit" or run.boundary is not None):
        yield _died(run, died)
        return
    if not backwards:
        raise NotObserved(
            "no backward was seen: the program did not reach one, or takes its gradients by torch.autograd.grad or "
            "torch.func, which are not followed"
        )
    found = False
    for same in _by_line(backwards):
        # A leaf of one element that is no parameter; a batch without targets may have a constant for its loss.
        leaves = [b for b in same if b.requires_grad and b.grad_fn is None and b.numel == 1]
        if len(leaves) == len(same) and all(b.reaches_parameters is False for b in leaves):
            leaf = _leaf(run, leaves)
            if leaf is not None:
                found = True
                yield leaf
    if found:
        return
    cut = [_cut_before_any_step(run, backwards)] if died and not _stepped(run) else _cut_from_optimizers(run)
    for finding in cut:
        found = found or finding is not None
        if finding is not None:
            yield finding
    if not found and all(b.reaches_parameters is None and not b.gradients_changed for b in backwards):
        raise NotObserved("the graphs of the losses could not be followed (compiled, too large, or custom functions)")


# ------------------------------------------------------------------------------------------- kinds of the fault


def _refused(run: Recording, backward: Backward, backwards: Sequence[Backward]) -> Finding:
    cause = _cause(run, backward)
    before = f" after {plural(len(backwards) - 1, 'backward')} that had one" if len(backwards) > 1 else ""
    if all(not b.requires_grad for b in backwards):
        before = ""
    return _finding(
        f"backward ({_line(backward.at)}) was called on a loss without a graph{before}, which PyTorch refuses. "
        f"{cause.text}",
        backward,
        cause,
        {"kind": "refused", "value": backward.value, "backwards": len(backwards)},
    )


def _died(run: Recording, died: str) -> Finding:
    """The program died before it could call backward: on a number, or on a tensor of inference_mode."""
    at = _last_frame(run.ending.traceback)
    losses = [e for e in _events(run) if isinstance(e, LossCall)]
    loss = losses[-1] if losses else None
    a_number = _NUMBER.search(died)
    if a_number:
        what = "backward was called on a plain number: .item(), float() or NumPy took the loss out of its graph."
        fix = "Call backward on the loss tensor; take .item() only of what is logged."
    else:
        what = "The loss was computed under inference_mode, so it can have no gradient."
        fix = "Run the training forward outside torch.inference_mode(); keep that to evaluation."
    where = f" The loss: {loss.function} at {_line(loss.at)}." if loss is not None else ""
    return Finding(
        f"{what} The program died of it ({' '.join(died.split())[:200]}).{where}",
        at=at or (loss.at if loss is not None else None),
        evidence={"kind": "number" if a_number else "inference", "error": died[:300]},
        fix=fix,
        about="died",
    )


def _leaf(run: Recording, backwards: Sequence[Backward]) -> Finding | None:
    """Every backward of a line is called on a leaf; ``None`` when that does no harm as far as was seen."""
    last = backwards[-1]
    values = {b.value for b in backwards if b.value is not None}
    empty, stepped = _empty_steps(run), _stepped(run)
    severity: Severity | None = None
    if empty is not None:
        effect = (
            f"no gradient reaches any parameter: {plural(empty[1], 'step')} of {name_optimizer(empty[0])} found none"
        )
        # All zero: the watched batches may have had no targets, for which such a constant is a common stand-in.
        severity = Severity.WARNING if values == {0.0} else None
    elif not stepped:
        effect = "no gradient reaches any parameter"
        severity = Severity.WARNING if values == {0.0} else None
    elif len(values) > 1:
        effect = "adds nothing to the gradients that other losses give"
        severity = Severity.WARNING
    else:
        return None  # a constant beside the training: a device warming up, a stand-in for a loss without targets
    cause = _cause(run, last)
    return _finding(
        f"The loss given to backward ({_line(last.at)}) is a leaf: it was told to require a gradient and was computed "
        f"from nothing (value {number(last.value)}, no grad_fn), in all {plural(len(backwards), 'backward')} there. "
        f"It is differentiated by itself and {effect}. {cause.text}",
        last,
        cause,
        {
            "kind": "leaf",
            "backwards": len(backwards),
            "value": last.value,
            "steps_without_gradient": empty[1] if empty is not None else None,
        },
        severity=severity,
    )


def _stepped(run: Recording) -> bool:
    return any(isinstance(e, OptimizerStep) for e in run.events)


def _cut_before_any_step(run: Recording, backwards: Sequence[Backward]) -> Finding | None:
    """The program died before its first step, and none of its backwards had led to a parameter."""
    if not all(_leads_nowhere(b) for b in backwards):
        return None
    constant = {b.value for b in backwards} == {0.0}
    return _cut(run, backwards, "the program died before its first optimizer step", 0, sure=not constant)


def _cut_from_optimizers(run: Recording) -> Iterator[Finding]:
    """Backwards with a graph that leads to no parameter, and steps that find nothing."""
    timeline = Timeline(run)
    for optimizer in run.optimizers:
        intervals = timeline.intervals(optimizer.id)
        cut: list[tuple[Interval, list[Backward]]] = []
        judged = 0
        for interval in intervals:
            own = _own(interval, optimizer)
            if not own or interval.had_gradient() is None:
                continue
            judged += 1
            if not interval.had_gradient() and all(_leads_nowhere(b) for b in own):
                cut.append((interval, own))
        # One batch without targets is no fault of the loop.
        if cut and len(cut) == judged:
            found_none = f"{plural(len(cut), 'step')} of {name_optimizer(optimizer)} found none"
            yield _cut(run, [b for _, own in cut for b in own], found_none, len(cut))


def _own(interval: Interval, optimizer: Optimizer) -> list[Backward]:
    """The backwards since another optimizer last stepped: those before it were for that one."""
    backwards = interval.backwards()
    others = [e.seq for e in interval.events if isinstance(e, OptimizerStep) and e.optimizer != optimizer.id]
    after = [b for b in backwards if b.seq > others[-1]] if others else backwards
    return after or backwards


def _leads_nowhere(backward: Backward) -> bool:
    settled = backward.reaches_parameters is False or (backward.reaches_parameters is None and bool(backward.hidden))
    return settled and backward.gradients_changed == 0 and backward.raised is None


def _cut(run: Recording, backwards: Sequence[Backward], then: str, steps: int, *, sure: bool = True) -> Finding:
    last = backwards[-1]
    cause = _cause(run, last)
    hidden = next((b.hidden for b in backwards if b.hidden), "")
    ends = f"{plural(last.leaves, 'tensor')}, none of them a parameter" if last.leaves else "no parameter"
    through = f" It runs through {hidden}, which may hold a graph of its own." if hidden else ""
    return _finding(
        f"The loss given to backward ({_line(last.at)}) is not connected to any trainable parameter: its graph ends "
        f"in {ends}. No gradient changed in {plural(len(backwards), 'backward')}, and {then}.{through} {cause.text}",
        last,
        cause,
        {
            "kind": "cut",
            "backwards": len(backwards),
            "leaves": last.leaves,
            "hidden": hidden or None,
            "steps_without_gradient": steps,
            "value": last.value,
        },
        severity=Severity.WARNING if hidden or not sure else None,
    )


def _finding(
    message: str,
    backward: Backward,
    cause: _Cause,
    evidence: dict[str, object],
    severity: Severity | None = None,
) -> Finding:
    loss = cause.loss
    return Finding(
        message,
        at=cause.at or backward.at,
        evidence={
            **evidence,
            "backward": _line(backward.at),
            "loss": f"{loss.function} at {_line(loss.at)}" if loss is not None else None,
            "cause": cause.kind,
        },
        fix=cause.fix,
        severity=severity,
        about=str(evidence["kind"]),
    )


# ------------------------------------------------------------------------------------------------------- cause


@dataclass(frozen=True)
class _Cause:
    kind: str
    text: str
    fix: str
    at: SourceLine | None = None
    loss: LossCall | None = None


def _cause(run: Recording, backward: Backward) -> _Cause:
    """Where the graph was lost, as the loss call and the forward before this backward show it."""
    loss = _loss_of(run, backward)
    patched = backward.requires_grad and backward.grad_fn is None
    unpatch = " Remove requires_grad_() from the loss: it only hides this." if patched else ""
    parameters = run.parameters
    if parameters and not any(p.requires_grad or p.requires_grad_later for p in parameters):
        return _Cause(
            "all-frozen",
            f"Every parameter ({plural(len(parameters), 'tensor')}) has requires_grad=False.",
            f"Unfreeze what is meant to train (requires_grad_(True)).{unpatch}",
            loss.at if loss is not None else None,
            loss,
        )
    keep = "Keep it to evaluation: the training forward and the loss have to run with gradients on."
    if backward.inference:
        return _Cause(
            "inference-mode",
            f"It was computed under inference_mode{_by(loss)}.",
            f"{keep}{unpatch}",
            loss.at if loss else None,
            loss,
        )
    if loss is not None and not loss.grad_enabled:
        where = f"{loss.function} ({_line(loss.at)}) ran with gradients switched off (no_grad or set_grad_enabled)."
        return _Cause("no-grad", where, f"{keep}{unpatch}", loss.at, loss)
    if loss is None and not backward.grad_enabled:
        text = "Gradients are switched off where backward is called, and so they were where the loss was made."
        return _Cause("no-grad", text, f"{keep}{unpatch}", backward.at, None)
    if loss is not None and not loss.input_requires_grad:
        forward = _forward_of(run, loss)
        if forward is not None and not forward.grad_enabled:
            text = f"The forward pass ({_line(forward.at)}) ran with gradients switched off."
            return _Cause("no-grad", text, f"{keep}{unpatch}", forward.at or loss.at, loss)
        frozen = any(not p.requires_grad for p in parameters)
        text = (
            f"The input of {loss.function} ({_line(loss.at)}) already had none: the model's output was detached, "
            "computed under no_grad, or taken through argmax, .item() or NumPy"
            + ("; or reentrant gradient checkpointing began at frozen layers." if frozen else ".")
        )
        fix = f"Hand the model's own output to {loss.function}, with gradients on and without detach.{unpatch}"
        return _Cause("input", text, fix, loss.at, loss)
    if loss is not None:
        same = _same_value(loss, backward)
        value = f" (the same value, {number(loss.value)})" if same else ""
        text = (
            f"The result of {loss.function} ({_line(loss.at)}) had a graph; what backward got{value} does not have "
            "it: detach(), .item(), torch.tensor() or NumPy lies in between."
        )
        made = "training_step return" if uses(run, "lightning") else "backward get"
        fix = f"Let {made} the loss itself; add losses as tensors, take .item() only of what is logged.{unpatch}"
        return _Cause("between", text, fix, loss.at if uses(run, "lightning") else backward.at, loss)
    text = "detach(), .item(), torch.tensor(), NumPy, argmax or no_grad lies between the model and the loss."
    fix = f"Follow requires_grad back from the loss to the first tensor for which it is False.{unpatch}"
    return _Cause("unknown", text, fix, backward.at, None)


def _by(loss: LossCall | None) -> str:
    return f" ({loss.function}, {_line(loss.at)})" if loss is not None else ""


def _loss_of(run: Recording, backward: Backward) -> LossCall | None:
    """The loss call that this backward's tensor comes from: of those since the last backward, one of its value."""
    since: list[LossCall] = []
    for e in _events(run):
        if e.seq >= backward.seq:
            break
        if isinstance(e, LossCall):
            since.append(e)
        elif isinstance(e, Backward):
            since = []
    alike = [e for e in since if _same_value(e, backward)]
    return alike[-1] if alike else since[-1] if since else None


def _same_value(loss: LossCall, backward: Backward) -> bool:
    if loss.value is None or backward.value is None:
        return False
    return math.isclose(loss.value, backward.value / (backward.loss_scale or 1.0), rel_tol=1e-4, abs_tol=1e-12)


def _forward_of(run: Recording, loss: LossCall) -> Forward | None:
    forwards = [e for e in run.events if isinstance(e, Forward) and e.seq < loss.seq]
    return forwards[-1] if forwards else None


# ------------------------------------------------------------------------------------------------------- facts


def _events(run: Recording) -> tuple[Event, ...]:
    return (*run.events, *run.boundary.events) if run.boundary is not None else run.events


def _by_line(backwards: Sequence[Backward]) -> list[list[Backward]]:
    lines: dict[tuple[str, int] | None, list[Backward]] = {}
    for b in backwards:
        lines.setdefault((b.at.file, b.at.line) if b.at is not None else None, []).append(b)
    return list(lines.values())


def _empty_steps(run: Recording) -> tuple[Optimizer, int] | None:
    """The optimizer whose steps all found no gradient, and how many."""
    timeline = Timeline(run)
    for optimizer in run.optimizers:
        intervals = timeline.intervals(optimizer.id)
        if intervals and all(i.had_gradient() is False for i in intervals):
            return optimizer, len(intervals)
    return None


def _last_frame(traceback: Sequence[str]) -> SourceLine | None:
    """The innermost place in the program's own code that the traceback names."""
    found = [m for line in traceback if (m := _FRAME.search(line)) and "site-packages" not in m[1]]
    return SourceLine(found[-1][1], int(found[-1][2]), found[-1][3]) if found else None


def _line(at: SourceLine | None) -> str:
    return place(at) or "an unknown line"


# ---------------------------------------------------------------------------------------------- without a run


@check("TL302", SourceFacts, severity="error", catalog="O3")
def loss_detached_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read where the loss is put together from what has no gradient."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for call in detached(trace):
            how, file, line = (call.details.get(k) for k in ("cut_by", "cut_file", "cut_line"))
            where = SourceLine(file, line) if isinstance(file, str) and isinstance(line, int) else None
            patched = call.details.get("patched_line")
            by_hand = (
                f" requires_grad was set on it by hand (line {patched}), which connects it to nothing."
                if patched
                else ""
            )
            what = "returns" if call.what == "objective" else "calls backward on"
            yield Finding(
                f"{place(call.at)} {what} a loss that no parameter is connected to: `{how}` ({place(where)}) cut it "
                f"off from the model.{by_hand} {NOT_RUN}",
                at=call.at,
                evidence={"cut_by": how, "cut_at": place(where), "requires_grad_set": bool(patched)},
                fix="Compute the loss from the model's own output, outside of no_grad, and keep .item(), .detach() and "
                "torch.tensor() to what is logged.",
                about=str(how),
            )
