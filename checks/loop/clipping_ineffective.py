"""TL308: gradient clipping that does not clip the gradients that the step uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.clips import ClipCall, ClipSite, clip_sites, norm_of, step_after
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, percent, place, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.micro_batches import micro_batches
from trainlint.recording.schema import Backward, Clip, Optimizer, Parameter, ScalerEvent
from trainlint.recording.source_loops import useless_clips
from trainlint.recording.source_order import NOT_RUN, traces_of

#: How far over its threshold a norm must be to prove that nothing clipped it.
_OVER = 1.02
#: A first micro-batch that counts less than this beside the last is an error, one that counts nearly the same is fine.
_HALF, _NEARLY = 0.5, 0.95


@check("TL308", Recording, severity="error", catalog="O4")
def clipping_ineffective(run: Recording) -> Iterator[Finding]:
    """Gradient clipping that does not clip the gradients that the step uses.

    ## What goes wrong
    `clip_grad_norm_` works on the gradients it is given, at the moment it is called, and says nothing when that is of
    no use:

    - **after the step**, or before the backward: the step uses unclipped gradients;
    - **before `scaler.unscale_`**: the threshold is held against gradients multiplied by the loss scale (65,536 at
      the start), so that every step is cut down to almost nothing;
    - **nothing to clip**: a generator (`model.parameters()`) that was used up elsewhere, or tensors without a
      gradient (the parameters of another copy of the model);
    - **other parameters** than the optimizer steps: a list that was made before the head was replaced or adapters
      were added;
    - **at every micro-batch** under accumulation: what the earlier ones have added is cut again and again, so they
      count less than the last.

    ## How it is detected
    Every call is placed between the backwards and the steps of the optimizers that hold the tensors it got. The
    gradient norm that each step used is measured; one that exceeds the threshold proves that it was not clipped. The
    loss scale that was still on the gradients is known from the GradScaler. Under accumulation the norms that
    clipping found at each micro-batch say how much less the first counts than the last.

    Without a run, from the source: where the call stands between backward, step and clearing in one pass of the loop,
    whether `unscale_` comes before it, and whether the iterator it is given was used up before.

    ## What to do
    Between the last backward and the step, with a GradScaler after `scaler.unscale_(optimizer)`:
    `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)`. With accelerate: `if accelerator.sync_gradients:
    accelerator.clip_grad_norm_(...)`. In Lightning: `Trainer(gradient_clip_val=...)`, in manual optimization
    `self.clip_gradients(opt, ...)` before `opt.step()`.

    ## When it may be wrong
    Errors are given only where the steps used gradients above the threshold (or, with a loss scale, far below it);
    otherwise it is a warning, since nothing would have been clipped so far. Clipping a part of the model on purpose
    (recurrent layers, one of two networks) is no fault: a part is reported only when the list also holds tensors that
    no optimizer has (warning), or when most of the weights are left out and their gradients were above the threshold
    (information). Thresholds that were multiplied by the loss scale, infinite thresholds (a norm is measured), clipping
    of master copies, and clipping without these functions (by hand, inside an optimizer) are not judged.

    ## References
    torch documentation, "Automatic Mixed Precision examples: gradient clipping"; Pascanu et al. 2013, "On the
    difficulty of training recurrent neural networks".
    """
    timeline = Timeline(run)
    sites = clip_sites(run, timeline)
    if not sites:
        raise NotApplicable("no gradient clipping was called")
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    faulty: set[int] = set()
    for site in sites:
        found = list(_judge(run, timeline, site, sites))
        if found:
            faulty.update(c.optimizer.id for c in site.calls)
        yield from found
    for optimizer in run.optimizers:
        if optimizer.id not in faulty:
            yield from _partly(run, timeline, sites, optimizer)


def _judge(run: Recording, timeline: Timeline, site: ClipSite, sites: Sequence[ClipSite]) -> Iterator[Finding]:
    for detect in (_nothing, _misplaced, _scaled, _every_micro_batch):
        finding = detect(run, timeline, site, sites)
        if finding is not None:
            yield finding
            return


def _covered(sites: Sequence[ClipSite], optimizer: int, low: int, high: int | None) -> bool:
    """Whether any call clipped gradients of an optimizer in time for a step."""
    calls = [c for s in sites for c in s.calls if c.optimizer.id == optimizer and c.when == "last"]
    return any(c.low >= low and c.high == high and c.clip.with_gradient != 0 for c in calls)


@dataclass(frozen=True)
class _Used:
    """What the steps used beside the threshold."""

    norms: tuple[float, ...]
    threshold: float

    @property
    def over(self) -> bool:
        return any(n > _OVER * self.threshold for n in self.norms)

    @property
    def severity(self) -> Severity | None:
        return None if self.over else Severity.WARNING

    def text(self) -> str:
        if not self.norms:
            return ""
        so_far = "" if self.over else " So far nothing would have been clipped."
        return f" The threshold is {number(self.threshold)}, the steps used {_norms(self.norms)}.{so_far}"


def _used(site: ClipSite, norms: Sequence[float | None]) -> _Used:
    """Norms say nothing about a threshold for single elements."""
    return _Used(tuple(n for n in norms if n is not None) if site.method == "norm" else (), site.threshold)


def _norms(norms: Sequence[float]) -> str:
    low, high = min(norms), max(norms)
    same = high <= 1.005 * low
    return f"a gradient norm of {number(high)}" if same else f"gradient norms of {number(low)} to {number(high)}"


# ------------------------------------------------------------------------------------------- nothing to clip


def _nothing(run: Recording, timeline: Timeline, site: ClipSite, sites: Sequence[ClipSite]) -> Finding | None:
    """Calls that get no tensors, or only such as have no gradient although a backward has just made some."""
    idle = [c for c in site.clips if _idle(run, timeline, c)]
    if not idle or 2 * len(idle) < len(site.clips):
        return None
    if all(c.n_tensors for c in idle) and any(c.when == "last" and c.clip.with_gradient for c in site.calls):
        return None  # a network whose turn it is not every time
    norms = []
    optimizer: Optimizer | None = None
    for clip in idle:
        following = step_after(run, timeline, clip.seq)
        if following is None:
            continue
        optimizer, step = following
        low = max((s.seq for s in timeline.steps[optimizer.id] if s.seq < clip.seq), default=0)
        if _covered(sites, optimizer.id, low, step.seq):
            return None
        measurement = timeline.measurements.get(optimizer.id, {}).get(step.index)
        norms.append(norm_of(measurement))
        if clip.n_tensors and measurement is not None and not norms[-1]:
            return None  # the step found no gradient either: there are none, and clipping is not why (TL302)
    if optimizer is None:
        return None
    used = _used(site, norms)
    calls = f"{len(idle)} of {plural(len(site.clips), 'call')}"
    if any(not c.n_tensors for c in idle):
        full = next((c for c in site.clips if c.n_tensors), None)
        what = f"gets no tensors at all in {calls}"
        what += f": its generator was used up by the first ({plural(full.n_tensors, 'tensor')})." if full else (
            ", as from a generator that was used up before."
        )  # fmt: skip
    else:
        what = f"gets {plural(idle[-1].n_tensors, 'tensor')} without any gradient in {calls}: others are trained."
    return Finding(
        f"{_name(site)} {what} Nothing is clipped.{used.text()}",
        at=site.at or optimizer.at,
        evidence={**_evidence(site, used), "calls": len(site.clips), "calls_without_gradients": len(idle)},
        fix="Give it model.parameters() anew at each call (or a list), of the model that the optimizer steps.",
        severity=used.severity,
        about="nothing",
    )


def _idle(run: Recording, timeline: Timeline, clip: Clip) -> bool:
    """Nothing was given, or nothing with a gradient although a backward has come since the last step."""
    if not clip.n_tensors or clip.with_gradient != 0:
        return not clip.n_tensors
    last = max((s.seq for steps in timeline.steps.values() for s in steps if s.seq < clip.seq), default=0)
    return any(isinstance(e, Backward) and last < e.seq < clip.seq for e in run.events)


# ------------------------------------------------------------------------------------------- at the wrong time


def _misplaced(run: Recording, timeline: Timeline, site: ClipSite, sites: Sequence[ClipSite]) -> Finding | None:
    """Every call comes after the step that it was meant for, or before there is a gradient."""
    judged = [c for c in site.calls if c.when != "unknown"]
    early = [c for c in judged if c.when == "early"]
    if not early or len(early) < len(judged):
        return None
    if any(c.high is not None and _covered(sites, c.optimizer.id, c.low, c.high) for c in early):
        return None
    late = [c for c in early if _just_used(c)]
    void = [c for c in early if c.clip.with_gradient == 0 or c.clip.total_norm == 0]
    if len(late) + len(void) < len(early):
        return None  # gradients from elsewhere (assigned by hand): it may well be in place
    optimizer = early[-1].optimizer
    measured = timeline.measurements.get(optimizer.id, {}).values()
    used = _used(site, [norm_of(m, early[-1].clip.parameters) for m in measured])
    step = timeline.steps[optimizer.id][-1]
    backward = next((e for e in reversed(run.events) if isinstance(e, Backward)), None)
    if late:
        what = (
            f"comes after {optimizer.class_name}'s step ({place(step.at) or 'unknown line'}), every time: it clips "
            "gradients that were used already."
        )
    else:
        what = (
            f"comes before backward ({place(backward.at if backward else None) or 'unknown line'}), every time: there "
            "are no gradients yet."
        )
    return Finding(
        f"{_name(site)} {what}{used.text()}",
        at=site.at or step.at,
        evidence={**_evidence(site, used), "calls": len(early), "when": "after-step" if late else "before-backward"},
        fix=_fix(run),
        severity=used.severity,
        about="after-step" if late else "before-backward",
    )


def _just_used(call: ClipCall) -> bool:
    """The gradients that the call got are those that the step before it used."""
    if call.before is None or call.clip.with_gradient == 0:
        return False
    if call.clip.method == "value":
        return True
    norm, found = norm_of(call.before, call.clip.parameters), call.clip.total_norm
    return bool(norm and found and abs(found / norm - 1) < 0.01)


# ------------------------------------------------------------------------------------------- under a loss scale


def _scaled(run: Recording, timeline: Timeline, site: ClipSite, sites: Sequence[ClipSite]) -> Finding | None:
    """Gradients are clipped with the loss scale still on them, at a threshold that does not count it in."""
    calls = [c for c in site.calls if c.clip.scaled and c.when in ("last", "between")]
    if not calls or len(calls) < len(site.calls):
        return None
    call = calls[-1]
    scales = [e.loss_scale for e in run.events if isinstance(e, Backward) and e.seq < call.clip.seq and e.loss_scale]
    if not scales or scales[-1] < 32 or _counted_in(call.clip.threshold, scales[-1]):
        return None
    scale = scales[-1]
    effective = call.clip.threshold / scale
    found = [c.clip.total_norm for c in calls if c.clip.total_norm is not None]
    norms = [n for n in (norm_of(c.after, c.clip.parameters) for c in calls) if n is not None]
    bound = any(n > c.clip.threshold for c in calls if (n := c.clip.total_norm) is not None)
    message = (
        f"{_name(site)} clips gradients that still carry the loss scale of {scale:,.0f}: its threshold of "
        f"{number(call.clip.threshold)} is {number(effective)} to the real gradient."
    )
    if found:
        message += f" It found norms up to {number(max(found))} ({number(max(found) / scale)} without the scale)"
        message += f"; the steps used {_norms(norms)}." if norms else "."
    return Finding(
        message,
        at=site.at or call.optimizer.at,
        evidence={
            "threshold": site.threshold,
            "loss_scale": scale,
            "effective_threshold": effective,
            "norms_found": found[:8],
            "norms_used": norms[:8],
        },
        fix="Call scaler.unscale_(optimizer) after backward and before clipping."
        if not uses(run, "accelerate")
        else "Clip with accelerator.clip_grad_norm_, which takes the loss scale off first.",
        severity=None if bound or call.clip.method == "value" else Severity.WARNING,
        about="scaled",
    )


def _counted_in(threshold: float, scale: float) -> bool:
    """The threshold was multiplied by the scale: their ratio is a short number."""
    ratio = threshold / scale
    return abs(float(f"{ratio:.3g}") / ratio - 1) < 1e-6 if ratio > 0 else False


# ------------------------------------------------------------------------------------------- micro-batches


def _every_micro_batch(run: Recording, timeline: Timeline, site: ClipSite, sites: Sequence[ClipSite]) -> Finding | None:
    """Under accumulation the sum is clipped after every micro-batch: the earlier ones count less than the last."""
    if site.method != "norm" or not any(c.when == "between" for c in site.calls):
        return None
    weights: list[float] = []
    count = 0
    optimizer: Optimizer | None = None
    for each in run.optimizers:
        for interval in timeline.intervals(each.id):
            own = [c for c in site.calls if c.optimizer.id == each.id]
            calls = [c for c in own if interval.after < c.clip.seq < interval.step.seq]
            batches = micro_batches(run, interval, each)
            if batches is None or batches.reaches_more or not batches.told or len(calls) != len(batches.backwards):
                continue
            weight = 1.0
            for call in calls[:-1]:
                norm = call.clip.total_norm
                weight *= min(1.0, call.clip.threshold / norm) if norm else 1.0
            weights.append(weight)
            count, optimizer = len(calls), each
    if optimizer is None or min(weights) > _NEARLY:
        return None
    least = sum(weights) / len(weights)
    return Finding(
        f"{_name(site)} runs at each of the {plural(count, 'micro-batch')} of a step of {name_optimizer(optimizer)}: "
        f"what the earlier ones have added is cut again each time. In {plural(len(weights), 'step')} the first "
        f"micro-batch counted {number(least)} times as much as the last on average.",
        at=site.at or optimizer.at,
        evidence={"threshold": site.threshold, "micro_batches": count, "weight_of_the_first": weights[:16]},
        fix="if accelerator.sync_gradients: accelerator.clip_grad_norm_(...)."
        if uses(run, "accelerate")
        else "Clip once per step: after the last backward, right before optimizer.step().",
        severity=None if least < _HALF else Severity.WARNING,
        about="micro-batches",
    )


# ------------------------------------------------------------------------------------------- a part of it


def _partly(run: Recording, timeline: Timeline, sites: Sequence[ClipSite], optimizer: Optimizer) -> Iterator[Finding]:
    """What is clipped is not what is stepped."""
    calls = [(s, c) for s in sites for c in s.calls if c.optimizer.id == optimizer.id and c.when == "last"]
    if not calls or any(c.clip.scaled for _, c in calls) or _scale_stays_on(run, optimizer):
        return
    clipped = {i for _, c in calls for i in c.clip.parameters}
    parameters = {p.id: p for p in run.parameters}
    held = [parameters[i] for g in optimizer.groups for i in g.parameters if i in parameters]
    measurements = [c.after for _, c in calls if c.after is not None]
    live = {i for m in measurements for i, n in zip(m.parameters, m.gradient_norm, strict=False) if n}
    left = [p for p in held if p.id in live and p.id not in clipped]
    total = sum(p.numel for p in held if p.id in live)
    if not left or not total:
        return
    site = calls[-1][0]
    used = _used(site, [norm_of(m, [p.id for p in left]) for m in measurements])
    share = sum(p.numel for p in left) / total
    strangers = max(_strangers(run, c, parameters) for _, c in calls)
    if not used.over or (share < 0.5 and not strangers):
        return
    groups = by_module(left, held)
    message = (
        f"{_name(site)} leaves out {len(left)} of the {plural(len(live), 'gradient')} that {name_optimizer(optimizer)} "
        f"uses ({percent(share, 1)} of these weights): {lines_of(groups, None)}. Their norm was {_words(used)}."
    )
    if strangers:
        message += (
            f" It gets {plural(strangers, 'tensor')} that no optimizer holds: the list is older than the optimizer."
        )
    yield Finding(
        message,
        at=site.at or optimizer.at,
        evidence={
            **_evidence(site, used),
            "left_out": len(left),
            "share_of_weights": share,
            "tensors_of_no_optimizer": strangers,
        },
        fix="Clip what the optimizer holds: [p for g in optimizer.param_groups for p in g['params']].",
        severity=Severity.WARNING if strangers else Severity.INFO,
        about=groups[0].pattern,
    )


def _words(used: _Used) -> str:
    return f"up to {number(max(used.norms))} beside a threshold of {number(used.threshold)}"


def _strangers(run: Recording, call: ClipCall, parameters: dict[int, Parameter]) -> int:
    """Tensors of a call that no optimizer holds, other than frozen ones."""
    held = {i for o in run.optimizers for g in o.groups for i in g.parameters}
    known = [parameters[i] for i in call.clip.parameters if i in parameters and i not in held]
    return call.clip.n_tensors - len(call.clip.parameters) + sum(1 for p in known if p.requires_grad)


def _scale_stays_on(run: Recording, optimizer: Optimizer) -> bool:
    """A GradScaler is at work and leaves the unscaling to a fused optimizer: norms at the step carry the scale."""
    scalers = [e for e in run.events if isinstance(e, ScalerEvent) and e.enabled]
    return bool(scalers) and not any(e.call == "unscale" for e in scalers)


# ------------------------------------------------------------------------------------------- words


def _name(site: ClipSite) -> str:
    where = place(site.at)
    return f"{site.function} ({where})" if where else site.function


def _evidence(site: ClipSite, used: _Used) -> dict[str, object]:
    return {"threshold": site.threshold, "norms_used": list(used.norms[:8])}


def _fix(run: Recording) -> str:
    if uses(run, "lightning"):
        return "self.clip_gradients(opt, ...) between self.manual_backward(loss) and opt.step(), or gradient_clip_val."
    return "Call it between loss.backward() and optimizer.step()."


# ---------------------------------------------------------------------------------------------- without a run

#: What is wrong with a call, and what to do, by the order in the source.
_IN_SOURCE = {
    "after-step": (
        "comes after {step}, and the gradients are cleared before the next",
        "Clip between backward and step.",
    ),
    "before-backward": ("comes before the backward, when there is no gradient yet", "Clip between backward and step."),
    "scaled": (
        "comes before scaler.unscale_, so the threshold is held against gradients times the loss scale",
        "Call scaler.unscale_(optimizer) before clipping.",
    ),
    "exhausted": (
        "gets an iterator over parameters that {taken} has used up: it clips nothing",
        "Pass model.parameters() itself, or a list.",
    ),
    "another-model": (
        "clips a module of which {step} holds no parameter",
        "Clip the parameters that the next step uses.",
    ),
    "every-micro-batch": (
        "runs at every micro-batch, {step} only under `{test}`: what the earlier ones added is cut again and again",
        "Clip only where step is called, right before it.",
    ),
}


@check("TL308", SourceFacts, severity="error", catalog="O4")
def clipping_ineffective_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from where clipping stands in the loop and what it is given."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in useless_clips(trace):
            text, fix = _IN_SOURCE[fault.kind]
            details = fault.call.details
            said = text.format(
                step=f"{fault.optimizer.name or 'optimizer'}.step() ({place(fault.other.at)})",
                taken=f"{details.get('spent_by')} (line {details.get('spent_line')})",
                test=fault.block.text if fault.block is not None else "",
            )
            yield Finding(
                f"Gradient clipping ({place(fault.call.at)}) {said}. {NOT_RUN}",
                at=fault.call.at,
                evidence={"kind": fault.kind, "clip": place(fault.call.at), "step": place(fault.other.at)},
                fix=fix,
                severity=None if fault.sure else Severity.WARNING,
                about=fault.kind,
            )
