"""TL807: values that are not finite, and what made the first of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, SourceLine, check
from trainlint.recording.describe import place, plural
from trainlint.recording.schema import (
    AutocastEntered,
    Backward,
    LossCall,
    NonFinite,
    OptimizerStep,
    Parameter,
    Producer,
    StepMeasurement,
)

#: What an operation needs to stay finite, by parts of torch's names.
_REPAIRS = (
    ("softmax", "Leave at least one position of every row unmasked, or mask with a large negative number "
                "(torch.finfo(x.dtype).min) instead of -inf."),
    ("log", "Keep its argument away from 0: clamp it (x.clamp_min(1e-8)), or use log_softmax, logsigmoid, "
            "binary_cross_entropy_with_logits."),
    ("sqrt", "Add an eps below the root: sqrt(x + 1e-8)."),
    ("div", "Add an eps to the denominator, or clamp it away from 0."),
    ("reciprocal", "Clamp its argument away from 0."),
    ("exp", "Bound its argument (clamp, or subtract the maximum as logsumexp does)."),
    ("pow", "Bound its argument, and keep the base above 0 for powers below 1."),
    ("std", "Make sure that more than one value goes in (correction=0 for one), and add an eps."),
    ("var", "Make sure that more than one value goes in (correction=0 for one), and add an eps."),
    ("mean", "Make sure that something is left to average: the mean of nothing is NaN."),
)  # fmt: skip
_FLOAT16 = "Compute it in float32 (autocast off around it) or in bfloat16: float16 ends at 65504."
_ANOMALY = "torch.autograd.set_detect_anomaly(True) names the operation whose backward made it."


@dataclass(frozen=True)
class _Incident:
    """The first step that used gradients that are not finite, or that found weights that are not."""

    step: OptimizerStep
    measured: StepMeasurement
    #: Parameters concerned, in order.
    parameters: tuple[int, ...]
    #: They were so before the step.
    weights: bool
    #: The last backward before it whose value was not finite.
    backward: Backward | None


@check("TL807", Recording, severity="error", catalog="")
def non_finite(run: Recording) -> Iterator[Finding]:
    """NaN or infinity in loss, gradients or weights.

    ## What goes wrong
    One NaN is enough: it spreads through every sum it is part of, from the loss to all gradients, and with one
    optimizer step to all weights. From then on every output is NaN, and the run goes on without learning anything.
    Where it is first seen, in the logged loss, is far from where it was made.

    ## How it is detected
    The value of every backward, and the norms of gradients and weights at every watched optimizer step. When a loss
    is not finite, the forward is repeated at once on the same batch, while the weights are still what they were, and
    every operation is looked at: the first that makes a NaN out of none, or an infinity out of finite values, is
    named with its module and line. A batch that holds NaN, weights that were NaN before the first step, a loss that
    is NaN though the model's outputs are finite, and gradients that are NaN under a finite loss are told apart.

    ## What to do
    The finding names the operation and what it needs: an eps below a root or in a denominator, a clamp before a
    logarithm, at least one unmasked position in every row of an attention, float32 where float16 runs over. Where
    only the backward makes it, anomaly mode names the operation.

    ## When it may be wrong
    Infinities that are meant are not reported: masks of -inf that a softmax takes away again, masked logits among
    the outputs, a batch whose NaN the model replaces. Neither are steps that a GradScaler skipped, nor losses that the
    program looked at and dropped before its optimizer stepped. A loss that is NaN for want of targets is TL509's. An
    operation that makes a NaN which is thrown away (`torch.where`) before another one makes that of the loss is named
    in its place.

    ## References
    torch.autograd.set_detect_anomaly; PyTorch FAQ on torch.where and NaN gradients; IEEE 754.
    """
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    incident = _first(run)
    if incident is None:
        yield from _at_the_end(run)
        return
    if _without_targets(run, incident.backward):
        raise NotApplicable("the loss is NaN because nothing in the batch is a target: see TL509")
    yield _finding(run, incident)


def _first(run: Recording) -> _Incident | None:
    measured = {(m.optimizer, m.index): m for m in run.steps}
    since: Backward | None = None
    for event in run.events:
        if isinstance(event, Backward):
            if event.value is not None and not math.isfinite(event.value) and not _scaled(event):
                since = event
        elif isinstance(event, OptimizerStep):
            m = measured.get((event.optimizer, event.index))
            if m is None:
                continue
            weights = _broken(m.parameters, m.weight_norm)
            gradients = _broken(m.parameters, m.gradient_norm)
            if weights or gradients:
                return _Incident(event, m, weights or gradients, bool(weights), since)
            since = None
    return None


def _scaled(event: Backward) -> bool:
    return event.loss_scale is not None and event.loss_scale != 1.0


def _broken(parameters: Sequence[int], norms: Sequence[float | None]) -> tuple[int, ...]:
    return tuple(i for i, n in zip(parameters, norms, strict=False) if n is not None and not math.isfinite(n))


def _loss_of(run: Recording, backward: Backward) -> LossCall | None:
    """The call of a loss before a backward that was not finite."""
    found = None
    for event in run.events:
        if event.seq >= backward.seq:
            break
        if isinstance(event, Backward):
            found = None
        elif isinstance(event, LossCall) and event.value is not None and not math.isfinite(event.value):
            found = event
    return found


def _without_targets(run: Recording, backward: Backward | None) -> bool:
    call = _loss_of(run, backward) if backward is not None else None
    target = call.target if call is not None else None
    return target is not None and target.positions > 0 and target.positions == target.ignored


def _finding(run: Recording, incident: _Incident) -> Finding:
    step = f"optimizer step {incident.step.index + 1}"
    backward = incident.backward
    seen = _look(run, incident)
    count = len(incident.parameters)
    evidence: dict[str, object] = {"step": incident.step.index, "parameters": count,
                                   "loss": _text(backward.value) if backward is not None else None}  # fmt: skip
    if incident.weights and incident.step.index == 0:
        names = _names(run, incident.parameters)
        origin = {p.origin for p in run.parameters if p.id in incident.parameters}
        came = f" They come from {', '.join(sorted(origin))}." if origin != {"fresh"} else ""
        return Finding(
            f"{_plural_weights(count)} held NaN or infinities before the first step: {names}.{came}",
            at=backward.at if backward is not None else incident.step.at,
            evidence=evidence,
            fix="Initialise them (after to_empty or torch.empty), or load a checkpoint that is whole.",
            about="weights",
        )
    if backward is None and not incident.weights:
        return _in_backward(run, incident, evidence)
    if backward is None:
        moments = [m for m in run.second_moments if m.optimizer == incident.step.optimizer]
        if any(m.dtype == "float16" and m.eps_rounded == 0 for m in moments):
            raise NotApplicable("the weights are NaN because the optimizer's eps rounds to 0: see TL208")
        return Finding(
            f"{_plural_weights(count)} became NaN or infinite in the step before {step}, from finite gradients: "
            f"{_names(run, incident.parameters)}.",
            at=incident.step.at,
            evidence=evidence,
            fix="Look at the optimizer's arithmetic: an eps of 0 or one that float16 rounds to 0, a rate that is not "
            "finite.",
            about="step",
        )
    head = f"The loss of {step} is {_text(backward.value)}"
    tail = f" Its gradients are not finite for {plural(count, 'parameter')}, and the step wrote them into the weights."
    if seen is not None and seen.inputs and not seen.outputs_finite:
        return Finding(
            f"{head}: the batch itself holds NaN or infinities ({', '.join(seen.inputs[:3])} of {seen.forward}).{tail}",
            at=backward.at,
            evidence={**evidence, "inputs": list(seen.inputs)},
            fix="Clean the data where it is loaded (assert torch.isfinite(x).all() in the dataset), or replace missing "
            "values (torch.nan_to_num) and give the model a mask.",
            about="inputs",
        )
    if seen is not None and seen.producer is not None:
        return _made(seen, seen.producer, head, tail, backward.at, evidence)
    call = _loss_of(run, backward)
    if call is not None:
        given = call.input is not None and call.input.finite is False
        why = (
            "what the model gave to it was not finite already, though the same forward, repeated, was"
            if given
            else "what the model gave to it was finite"
        )
        return Finding(
            f"{head}, and {call.function} made it so: {why}.{tail}",
            at=call.at or backward.at,
            evidence={**evidence, "function": call.function},
            fix="Look at its targets and weights: logarithms of 0, a mean over nothing, a division by a sum of 0. "
            + _ANOMALY,
            about=call.function,
        )
    outputs = ""
    if seen is not None and _finite(seen):
        outputs = f", though the outputs of {seen.forward} are finite for the same batch"
    return Finding(
        f"{head}{outputs}.{tail}",
        at=backward.at,
        evidence=evidence,
        fix=("What is computed from these outputs makes it: a logarithm or root of 0, a division by 0, a mean over "
             "nothing. " if outputs else "") + _ANOMALY,
        about="loss",
    )  # fmt: skip


def _finite(seen: NonFinite | None) -> bool:
    return seen is not None and not seen.left_out and seen.outputs_finite


def _look(run: Recording, incident: _Incident) -> NonFinite | None:
    """What repeating the forward right before that step showed."""
    looks = [n for n in (run.replay.non_finite if run.replay else ()) if n.when == "before-step" and not n.left_out]
    looks = [n for n in looks if n.steps == incident.step.index] or looks
    return next((n for n in looks if not n.outputs_finite), looks[0] if looks else None)


def _made(
    seen: NonFinite, made: Producer, head: str, tail: str, at: SourceLine | None, evidence: dict[str, object]
) -> Finding:
    where = f" in {made.module} ({made.class_name})" if made.module else f" in {seen.forward}"
    what = "NaN" if made.kind == "nan" else "infinite"
    line = f" ({place(made.at)})" if made.at is not None else ""
    message = f"{head}: {made.function}{where}{line} makes {made.count:,} of {made.elements:,} values {what}"
    cause = made
    if made.masked_rows:
        rows = f"{plural(made.masked_rows, 'row')} of it {'are' if made.masked_rows > 1 else 'is'}"
        message += f", because {rows} -inf throughout: every position is masked"
    elif made.from_infinite and seen.source is not None:
        cause = seen.source
        first = f"{cause.module} ({cause.class_name})" if cause.module else seen.forward
        message += f" from infinities; the first of these came from {cause.function} in {first}"
        message += f" ({place(cause.at)})" if cause.at is not None else ""
    elif made.from_infinite:
        message += " from infinities that it was given"
    else:
        message += " from finite values"
    repair = next((text for part, text in _REPAIRS if part in cause.function), _ANOMALY)
    return Finding(
        f"{message}.{tail}",
        at=cause.at or made.at or at,
        evidence={**evidence, "function": made.function, "module": made.module, "kind": made.kind,
                  "count": made.count, "elements": made.elements, "source": cause.function},
        fix=_FLOAT16 if cause.dtype == "float16" and cause.kind == "inf" else repair,
        about=f"{made.module} {made.function}",
    )  # fmt: skip


def _in_backward(run: Recording, incident: _Incident, evidence: dict[str, object]) -> Finding:
    known = {p.id: p for p in run.parameters}
    broken = [known[i] for i in incident.parameters if i in known]
    fine = [i for i, n in zip(incident.measured.parameters, incident.measured.gradient_norm, strict=False)
            if n is not None and math.isfinite(n)]  # fmt: skip
    clean = [known[i] for i in fine if i in known]
    boundary = ""
    last = max(broken, key=lambda p: p.id, default=None)
    later = [p for p in clean if last is not None and p.root == last.root and p.id > last.id]
    if last is not None and later:
        boundary = f" Behind {_module(last)} they are finite ({_module(later[0])}): it is made between the two."
    elif last is not None and not clean:
        boundary = " No gradient is finite: it is made behind the last layer, or in the loss."
    half = any(isinstance(e, AutocastEntered) and e.enabled and e.dtype == "float16" for e in run.events)
    half = half or any(p.dtype == "float16" for p in broken)
    return Finding(
        f"Gradients of {plural(len(incident.parameters), 'parameter')} were NaN or infinite at optimizer step "
        f"{incident.step.index + 1} under a finite loss: the backward makes them ({_names(run, incident.parameters)})."
        f"{boundary}",
        at=incident.step.at,
        evidence={**evidence, "finite": len(fine)},
        fix=("Parts of it run in float16, which ends at 65504: try bfloat16 or float32 first. " if half else "")
        + "Typical: the root, norm or power of 0, whose slope is infinite (add an eps inside), 0/0 that torch.where "
        "hides (replace the argument before the division). " + _ANOMALY,
        about="gradients",
    )


def _module(parameter: Parameter) -> str:
    return parameter.name.rpartition(".")[0] or parameter.name


def _at_the_end(run: Recording) -> Iterator[Finding]:
    """Weights that the last watched step broke."""
    for seen in run.replay.non_finite if run.replay else ():
        if seen.when != "replay" or not seen.weights:
            continue
        names = ", ".join(seen.weights[:3]) + (", ..." if len(seen.weights) > 3 else "")
        yield Finding(
            f"After {plural(seen.steps, 'optimizer step')} {names} of {seen.forward} hold NaN or infinities, though "
            "the gradients of all watched steps were finite.",
            at=next((e.at for e in reversed(run.events) if isinstance(e, OptimizerStep)), None),
            evidence={"weights": list(seen.weights), "steps": seen.steps},
            fix="Look at the optimizer's arithmetic: an eps of 0 or one that float16 rounds to 0, a rate that is not "
            "finite; and at what the program writes into weights itself.",
            about="step",
        )


def _names(run: Recording, parameters: Sequence[int]) -> str:
    known = {p.id: p.name for p in run.parameters}
    names = [known.get(i, str(i)) for i in parameters]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plural_weights(count: int) -> str:
    return plural(count, "parameter")


def _text(value: float | None) -> str:
    if value is None:
        return "unknown"
    return "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value:.3g}"
