"""TL206: weight decay that Adam turns into something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import name_optimizer, number, percent, place, plural, uses
from trainlint.recording.schema import (
    ConfigKey,
    Optimizer,
    Parameter,
    ParamGroup,
    ScalerEvent,
    SourceLine,
    StepMeasurement,
)
from trainlint.recording.source_order import NOT_RUN, traces_of

#: From here on a value is of the size that AdamW recipes use; L2 penalties for Adam are a hundred times smaller.
_OF_ADAMW = 0.01
#: torch's own optimizers that divide the decay by the second moment, unless told not to.
_COUPLED = frozenset(("Adam", "NAdam", "RAdam", "Adamax"))


@check("TL206", Recording, severity="warning", catalog="O6")
def coupled_weight_decay(run: Recording) -> Iterator[Finding]:
    """Weight decay that Adam turns into something else.

    ## What goes wrong
    `Adam(weight_decay=wd)` adds `wd * w` to the gradient, and then divides the sum by the square root of its running
    second moment like any other gradient. `AdamW(weight_decay=wd)` shrinks the weight by `lr * wd * w` beside that.
    So the same number means two things: in Adam a weight with a small gradient is pulled to zero far more strongly
    than one with a large gradient, the pull no longer scales with the rate in the same way, and a value copied from
    an AdamW recipe (0.01 to 0.1) is often orders of magnitude too strong.

    ## How it is detected
    The optimizer is torch's Adam, NAdam, RAdam or Adamax, with `weight_decay > 0` and without
    `decoupled_weight_decay`. The norm of each weight and of its gradient, as the last watched step used it, tell how
    much of the gradient the decay is. Adam divides both by about the root mean square of that gradient, so the pull on
    the weights is the one of AdamW divided by that number: it is given for the tensors with the largest and the
    smallest gradients.

    A warning from 0.01 on, the size that is used with AdamW; below that it is an ordinary L2 penalty, worth knowing.

    Without a run, from the source: such an optimizer is built with a number for `weight_decay`.

    ## What to do
    Use `AdamW` with the same value, or `decoupled_weight_decay=True` (NAdam and RAdam have it too). Where an L2
    penalty is what you want, keep it, and tune it as one: 1e-6 to 1e-4 is common.

    ## When it may be wrong
    The effect on the weights is computed from the first steps, whose gradients are often larger than later ones: later
    the pull is stronger still. Optimizers that are not torch's own are not judged, nor is weight decay of SGD, where
    both forms agree up to the rate. A recipe that was tuned with this very optimizer is right as it is.

    ## References
    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; torch.optim.Adam, torch.optim.AdamW.
    """
    stepped = [o for o in run.optimizers if o.steps]
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built")
    if not stepped:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    concerned = [(o, [g for g in o.groups if g.parameters and _decay(g)]) for o in stepped if _adam(o)]
    if not any(groups for _, groups in concerned):
        raise NotApplicable("no Adam with weight_decay is in use")
    parameters = {p.id: p for p in run.parameters}
    for optimizer, groups in concerned:
        coupled = [g for g in groups if not g.hyperparameters.get("decoupled_weight_decay")]
        if coupled:
            yield _finding(run, optimizer, coupled, _pulls(run, optimizer, coupled, parameters))


def _adam(optimizer: Optimizer) -> bool:
    return optimizer.class_name in _COUPLED and optimizer.defined_in.startswith("torch.optim")


def _decay(group: ParamGroup) -> float:
    value = group.hyperparameters.get("weight_decay")
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


@dataclass(frozen=True)
class _Pull:
    """What the decay adds to one tensor's gradient."""

    parameter: Parameter
    gradient: float
    added: float

    @property
    def times_adamw(self) -> float:
        """How much stronger it pulls than the same value in AdamW: 1 / root mean square of what Adam divides by."""
        return math.sqrt(self.parameter.numel / (self.gradient**2 + self.added**2))


def _pulls(
    run: Recording, optimizer: Optimizer, groups: Sequence[ParamGroup], parameters: dict[int, Parameter]
) -> list[_Pull]:
    measured = [m for m in run.steps if m.optimizer == optimizer.id]
    if not measured or _scaled(run, optimizer, groups):
        return []
    last: StepMeasurement = max(measured, key=lambda m: m.index)
    gradient = dict(zip(last.parameters, last.gradient_norm, strict=False))
    weight = dict(zip(last.parameters, last.weight_norm, strict=False))
    out = []
    for group in groups:
        for i in group.parameters:
            g, w = gradient.get(i), weight.get(i)
            if g is None or w is None or i not in parameters or not math.isfinite(g + w):
                continue
            added = _decay(group) * w
            if g > 0 and parameters[i].numel:
                out.append(_Pull(parameters[i], g, added))
    return out


def _scaled(run: Recording, optimizer: Optimizer, groups: Sequence[ParamGroup]) -> bool:
    """Whether the gradients that were measured still had the loss scale on them: fused steps take it off themselves."""
    scaler = [e for e in run.events if isinstance(e, ScalerEvent) and e.enabled and e.optimizer in (optimizer.id, None)]
    steps = any(e.call == "step" for e in scaler)
    return (
        steps
        and any(g.hyperparameters.get("fused") for g in groups)
        and not any(e.call.startswith("unscale") for e in scaler)
    )


def _finding(run: Recording, optimizer: Optimizer, groups: Sequence[ParamGroup], pulls: Sequence[_Pull]) -> Finding:
    decay = max(_decay(g) for g in groups)
    large = decay >= _OF_ADAMW
    rates = [g.hyperparameters.get("lr") for g in groups]
    rate = max((r for r in rates if isinstance(r, (int, float))), default=None)
    message = (
        f"{name_optimizer(optimizer)} adds weight_decay={number(decay)} to the gradient and divides it by its second "
        "moment; it is not the decay of AdamW."
    )
    evidence: dict[str, object] = {
        "optimizer": optimizer.class_name,
        "weight_decay": decay,
        "groups": [g.index for g in groups],
        "rate": rate,
    }
    if pulls:
        added = math.sqrt(sum(p.added**2 for p in pulls))
        gradient = math.sqrt(sum(p.gradient**2 for p in pulls))
        strongest = max(pulls, key=lambda p: (p.times_adamw, p.parameter.name))
        weakest = min(pulls, key=lambda p: (p.times_adamw, p.parameter.name))
        message += (
            f" On these weights it adds {number(added)} to a gradient of norm {number(gradient)} "
            f"({percent(added, gradient)}). Their pull to zero is about {number(strongest.times_adamw)} times that of "
            f"the same value in AdamW"
        )
        if len(pulls) > 1 and strongest.times_adamw > 1.5 * weakest.times_adamw:
            message += (
                f" where gradients are smallest ({strongest.parameter.name}), and "
                f"{number(weakest.times_adamw)} times where they are largest ({weakest.parameter.name})"
            )
        message += "."
        if rate:
            message += f" AdamW would shrink every weight by {number(rate * decay)} of itself a step."
        evidence |= {
            "added_norm": added,
            "gradient_norm": gradient,
            "times_adamw_largest": strongest.times_adamw,
            "times_adamw_smallest": weakest.times_adamw,
            "tensors": len(pulls),
        }
    key = _key(run, decay)
    if large:
        message += " Values of this size come from AdamW recipes."
    if len(groups) < len(optimizer.groups):
        message += f" (In {plural(len(groups), 'param group')} of {len(optimizer.groups)}.)"
    at: Key | SourceLine | None = Key(key.path) if key is not None else optimizer.at
    return Finding(
        message,
        at=at,
        evidence=evidence,
        fix=_fix(run, optimizer, decay, large),
        severity=None if large else Severity.INFO,
        about=optimizer.class_name,
    )


def _key(run: Recording, decay: float) -> ConfigKey | None:
    """The config key that asks for this value."""
    for key in run.config.keys if run.config is not None else ():
        if key.meaning == "weight_decay" and key.reads != () and isinstance(key.value, (int, float)):
            if math.isclose(key.value, decay, rel_tol=1e-6):
                return key
    return None


def _fix(run: Recording, optimizer: Optimizer, decay: float, large: bool) -> str:
    if optimizer.class_name in ("NAdam", "RAdam"):
        text = f"Pass decoupled_weight_decay=True to {optimizer.class_name} for the decay of AdamW."
    elif uses(run, "lightning"):
        text = f"Return torch.optim.AdamW(..., weight_decay={number(decay)}) from configure_optimizers."
    else:
        text = f"Use torch.optim.AdamW(..., weight_decay={number(decay)})."
    return text + (
        " If an L2 penalty is meant, 1e-6 to 1e-4 is usual." if large else " If an L2 penalty is meant, keep it."
    )


# ---------------------------------------------------------------------------------------------- without a run


@check("TL206", SourceFacts, severity="warning", catalog="O6")
def coupled_weight_decay_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read where an Adam of torch is built with a number for its decay."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for call in trace.of_kind("built"):
            optimizer = trace.objects[call.on[0]]
            decay = optimizer.details.get("weight_decay")
            if optimizer.class_name not in _COUPLED or not isinstance(decay, float) or decay <= 0:
                continue
            yield Finding(
                f"{optimizer.class_name} ({place(call.at)}) is given weight_decay={number(decay)}: it adds that to the "
                f"gradient and divides by the second moment, which is not the decay of AdamW. {NOT_RUN}",
                at=call.at,
                evidence={"optimizer": optimizer.class_name, "weight_decay": decay},
                fix="Use AdamW with the same value, or decoupled_weight_decay=True; keep it if an L2 penalty is meant.",
                severity=Severity.WARNING if decay >= _OF_ADAMW else Severity.INFO,
                about=optimizer.name or optimizer.class_name,
            )
