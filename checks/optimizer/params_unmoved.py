"""TL205: a gradient arrives, the optimizer steps, and nothing changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, plural, trainable_weights
from trainlint.recording.intervals import Timeline
from trainlint.recording.rounding import settled
from trainlint.recording.schema import Optimizer, Parameter, Value

#: Half the distance between neighbouring numbers, relative to their size: smaller updates round away.
_HALF_STEP = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-25, "float64": 2.0**-54}


@check("TL205", Recording, severity="error", catalog="O2 O4")
def params_unmoved(run: Recording) -> Iterator[Finding]:
    """A gradient arrives, the optimizer steps, and nothing changes.

    ## What goes wrong
    The optimizer holds the parameter, its gradient is not zero, the learning rate is above zero, `step()` runs, and
    every element has the same bits as before. A custom optimizer that updates a copy (`p.data.clone()`, a reshaped
    view that became a copy), a step that returns early, or updates so small that they round away: in bfloat16 the
    neighbours of 1.0 are 0.004 to 0.008 away, so a rate of 1e-3 moves no weight of size 1 in however many steps.

    ## How it is detected
    All elements are compared bit by bit before and after each watched step (large tensors: by a sample, and in full
    as soon as the sample stands still). Only steps at a learning rate above zero, with a finite gradient that is not
    zero, count; reported is what stood still in all of them. From the optimizer's hyperparameters and the measured
    gradient the size of the update is estimated: one below the rounding of the parameter's dtype is named as the
    cause.

    ## What to do
    Where the update rounds away, keep the weights in float32 and compute in bfloat16 under autocast, or use an
    optimizer that keeps float32 copies or rounds stochastically; a larger rate only hides it. Where it does not,
    step through the optimizer's `step()`: the tensor it writes to is not the parameter.

    ## When it may be wrong
    Steps at rate 0 (warm-up), steps that a gradient scaler skipped, frozen parameters, and gradients too small for
    the dtype (float32 updates that underflow for single tensors; the rounding noise that reaches a bias in front of
    a batch norm) are left out. Rates that are still rising are not
    judged by their first values when rounding explains the standstill. An optimizer that holds its first updates back
    by itself looks like this, unless it writes the rate it used into its groups (`scheduled_lr`, as schedule-free
    methods do): more `--steps` tell. Half-precision weights whose updates round away as a whole are TL805's
    (updates-lost-to-rounding). If only some tensors of a half-precision
    model stand still and rounding explains it, the finding is a warning.

    ## References
    torch.Tensor.dtype and torch.finfo; Gupta et al. 2015, "Deep Learning with Limited Numerical Precision".
    """
    timeline = Timeline(run)
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    parameters = {p.id: p for p in run.parameters}
    looked = False
    rounded = settled(run)
    for optimizer in run.optimizers:
        seen = _look(optimizer, timeline, parameters)
        elsewhere = {i for g in optimizer.groups if (optimizer.id, g.index) in rounded for i in g.parameters}
        still = [s for s in seen if s.still and not (s.parameter.id in elsewhere and s.half_precision)]
        looked = looked or bool(seen)
        if not still:
            continue
        everything = len(still) == len(seen)
        rising = _rising(run, timeline, optimizer)
        kept = [s for s in still if _counts(s, everything, rising)]
        if kept:
            yield _finding(run, optimizer, kept, len(seen))
    if not looked:
        raise NotObserved(
            "no parameter had a gradient at a step with a learning rate above 0 (warm-up starts at 0?); raise --steps"
        )


@dataclass(frozen=True)
class _Look:
    parameter: Parameter
    steps: int
    still: bool
    gradient_norm: float
    weight_norm: float | None
    rate: float
    #: Size of the update per element that the optimizer's formula gives; ``None``: not a formula that is known.
    expected: float | None
    #: Size of the update per element if the optimizer used the gradient as it is.
    plain: float

    @property
    def weight_size(self) -> float | None:
        n = self.parameter.numel
        return self.weight_norm / math.sqrt(n) if self.weight_norm is not None and n else None

    @property
    def rounds_away(self) -> bool:
        """The expected update is below the spacing of the dtype at the weights' size."""
        half = _HALF_STEP.get(self.parameter.dtype)
        size = self.weight_size
        # The weights of one tensor differ in size: the small ones among them move first, hence the margin.
        return half is not None and self.expected is not None and size is not None and self.expected < 4 * half * size

    @property
    def no_gradient_to_speak_of(self) -> bool:
        """What arrives is rounding noise, such as the gradient of a bias in front of a normalisation."""
        half, size = _HALF_STEP.get(self.parameter.dtype), self.weight_size
        return half is not None and size is not None and self.plain < 4 * half * size

    @property
    def half_precision(self) -> bool:
        return self.parameter.dtype in ("bfloat16", "float16")


def _look(optimizer: Optimizer, timeline: Timeline, parameters: Mapping[int, Parameter]) -> list[_Look]:
    """Every parameter that had a live gradient at a step with a rate above zero, over all such steps."""
    group_of = {i: g.index for g in optimizer.groups for i in g.parameters}
    hyper = {g.index: g.hyperparameters for g in optimizer.groups}
    found: dict[int, list[tuple[float, float | None, float, bool]]] = {}
    for m in timeline.measurements.get(optimizer.id, {}).values():
        rates = timeline.rate_of_parameters(optimizer.id, group_of, m.index)
        exact = set(m.unchanged_exact)
        frozen = set(m.frozen)
        for column, i in enumerate(m.parameters):
            norm = m.gradient_norm[column] if column < len(m.gradient_norm) else None
            rate = rates.get(i)
            if not norm or not math.isfinite(norm) or rate is None or not rate > 0 or i in frozen:
                continue
            weight = m.weight_norm[column] if column < len(m.weight_norm) else None
            found.setdefault(i, []).append((norm, weight, rate, i in exact))
    out = []
    for i, looks in found.items():
        p = parameters.get(i)
        if p is None or p.numel == 0 or not p.requires_grad or p.requires_grad_later is False:
            continue
        settings = hyper[group_of[i]] if i in group_of else {}
        norm, weight, rate, _ = max(looks, key=lambda look: look[2])
        tolerance = settings.get("tolerance_grad")
        if isinstance(tolerance, (int, float)) and norm <= 1e3 * tolerance * math.sqrt(p.numel):
            continue  # LBFGS returns before the first iteration when it has converged
        expected = _update_size(settings, norm / math.sqrt(p.numel), rate)
        if expected is None and p.dtype in ("bfloat16", "float16"):
            expected = rate  # most unknown formulas (Adafactor, sign and matrix methods) normalise the gradient
        out.append(
            _Look(
                p,
                len(looks),
                all(look[3] for look in looks),
                norm,
                weight,
                rate,
                expected,
                rate * norm / math.sqrt(p.numel),
            )
        )
    return out


def _update_size(hyper: Mapping[str, Value], gradient: float, rate: float) -> float | None:
    """Size of the first update per element, for the formulas of torch's optimizers (gradient: root mean square)."""
    scale = hyper.get("d", hyper.get("d0"))  # rate-free methods multiply the rate by what they have estimated
    if isinstance(scale, (int, float)) and scale > 0:
        rate *= scale
    if "betas" in hyper:
        eps = hyper.get("eps")
        return rate * min(1.0, gradient / eps) if isinstance(eps, (int, float)) and eps > 0 else rate
    if "nesterov" in hyper or "dampening" in hyper:
        return rate * gradient
    return None


def _rising(run: Recording, timeline: Timeline, optimizer: Optimizer) -> bool:
    """Whether the rate of the watched steps is still far below what the schedule will reach."""
    rates = [max(r) for r in timeline.rates(optimizer.id) if r]
    if not rates:
        return False
    if any(b > a for a, b in pairwise(rates)):
        return True
    peak = max(
        (max(point.rates) for s in run.schedulers if s.optimizer == optimizer.id for point in s.curve if point.rates),
        default=0.0,
    )
    return max(rates) < 0.5 * peak


def _counts(look: _Look, everything: bool, rising: bool) -> bool:
    if look.expected is None and not everything and look.no_gradient_to_speak_of:
        return False  # an unknown formula may use the gradient as it is
    if not look.rounds_away:
        # Denormal gradients: the product with the rate underflows, whatever the weights are.
        return look.expected is None or look.expected > 1e-30
    if rising:
        return False
    return look.half_precision or everything


def _finding(run: Recording, optimizer: Optimizer, still: list[_Look], looked: int) -> Finding:
    tensors = [s.parameter for s in still]
    groups = by_module(tensors, [p for p in run.parameters if p.requires_grad])
    total = trainable_weights(run, {p.root for p in tensors})
    worst = max(still, key=lambda s: s.gradient_norm)
    rounding = all(s.rounds_away for s in still)
    everything = len(still) == looked
    dtype = worst.parameter.dtype
    steps = max(s.steps for s in still)
    what = "None of the parameters in" if everything else f"{len(still)} of {plural(looked, 'tensor')} in"
    verb = "moves" if everything else ("does not move" if len(still) == 1 else "do not move")
    message = (
        f"{what} {name_optimizer(optimizer)} {verb}: {lines_of(groups, total)}. Gradients arrive "
        f"({worst.parameter.name}: "
        f"norm {number(worst.gradient_norm)}), {plural(steps, 'step')} ran at rate "
        f"{number(worst.rate)}, and every element "
        "is bit-identical."
    )
    half = _HALF_STEP.get(dtype)
    if rounding and half is not None and worst.expected is not None and worst.weight_size is not None:
        message += (
            f" The update rounds away: about {number(worst.expected)} per element, and {dtype} weights of size "
            f"{number(worst.weight_size)} change only by {number(half * worst.weight_size)} or more."
        )
        fix = (
            "Keep the weights in float32 and compute in bfloat16 under autocast, or use an optimizer "
            "with float32 copies "
            "or stochastic rounding."
            if worst.half_precision
            else f"The rate ({number(worst.rate)}) is too small for the gradients: raise it, or look for a wrong unit."
        )
    else:
        fix = "The step writes to something else than the parameter: look for copies (clone, reshape), early returns."
    return Finding(
        message,
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in tensors[:50]],
            "tensors": len(tensors),
            "tensors_with_gradient": looked,
            "steps": steps,
            "rate": worst.rate,
            "gradient_norm": worst.gradient_norm,
            "expected_update": worst.expected,
            "dtype": dtype,
            "rounding": rounding,
        },
        fix=fix,
        severity=Severity.WARNING if rounding and not everything else None,
        about="everything" if everything else groups[0].pattern,
    )
