"""TL208: the optimizer's own arithmetic runs out of digits."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import name_optimizer, number, percent, plural
from trainlint.recording.schema import Optimizer, ParamGroup, SecondMoment

#: float16 rounds everything up to here to 0 (half of its smallest number, 2**-24).
_FP16_ZERO = 2.0**-25
#: A decay of at most this share rounds back to the same bfloat16 number, whatever the number is (half a unit of 2**-8).
_BF16_STUCK = 2.0**-9
#: Share of the second moments that must be unable to fall before the optimizer as a whole is called stuck.
_MOST = 0.5
_SOME = 0.05


@check("TL208", Recording, severity="error", catalog="O10")
def half_precision_optimizer_math(run: Recording) -> Iterator[Finding]:
    """The optimizer's own arithmetic runs out of digits.

    ## What goes wrong
    When the parameters are float16 or bfloat16, torch keeps Adam's state in that dtype too. Three things happen
    then, and none of them raises:

    - **float16, eps.** The smallest number of float16 is 6e-8, so `eps=1e-8` rounds to 0. Where the second moment is
      0 too, the update divides by zero; elsewhere nothing bounds the step of parameters with tiny gradients.
    - **bfloat16, second moment.** bfloat16 has 8 significant bits, so `v * 0.999` rounds back to `v`: the second
      moment can grow and never fall. It keeps the size of the largest gradients ever seen, and once gradients shrink
      the steps are too small, for good. Measured: after gradients shrank 100-fold, `v` stayed 7 times too large and
      the step 2.7 times too small.
    - Either dtype: a denominator in which eps is lost no longer bounds the step.

    ## How it is detected
    After the watched steps the state of every group that is kept in half precision is sampled, and the optimizer's
    own operations are repeated on it in the dtype that it computes in (fused kernels compute in float32 and round
    what they store): how many second moments are 0 while the gradient is not, how many cannot decay, for how many
    eps is lost. The same elements are carried along in float32 from the first watched step on, with the gradients that
    the steps used: how many take another step, and by what factor. Where only the dtypes are known, the arithmetic
    alone decides and the finding is a warning.

    ## What to do
    Keep parameters and state in float32 and compute in half precision under `torch.autocast` (Lightning
    `precision="bf16-mixed"` instead of `"bf16-true"`; transformers: load the model in float32 and set `bf16=True`).
    If memory forbids it: an optimizer with float32 or 8-bit blockwise state and stochastic rounding, or in bfloat16
    `betas=(0.9, 0.95)`, whose decay of 5% does not round away; in float16 an `eps` of 1e-6 or more.

    ## When it may be wrong
    float32 weights under autocast, float32 state beside half-precision weights, and SGD are not concerned and not
    reported. With `eps=1e-8` bfloat16 itself is fine: it rounds to 1.001e-8. State that an optimizer keeps in a
    second place of its own (error feedback, Kahan sums) is not known to this check.

    ## References
    torch.optim.Adam; torch.finfo; Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training"; Zamirai et
    al. 2020, "Revisiting BFloat16 Training".
    """
    adam = [o for o in run.optimizers if any("betas" in g.hyperparameters for g in o.groups)]
    if not adam:
        raise NotApplicable("no optimizer with a second moment (Adam family) is in use")
    if not any(o.steps for o in adam):
        raise NotObserved("no step of an Adam-family optimizer was seen; raise --timeout or --steps")
    measured = {(m.optimizer, m.group): m for m in run.second_moments}
    for optimizer in adam:
        found: dict[str, list[tuple[ParamGroup, SecondMoment | None]]] = {}
        for group in optimizer.groups:
            moment = measured.get((optimizer.id, group.index))
            for fault in _faults(optimizer, group, moment):
                found.setdefault(fault, []).append((group, moment))
        for fault, groups in found.items():
            yield _finding(optimizer, fault, groups)


def _faults(optimizer: Optimizer, group: ParamGroup, moment: SecondMoment | None) -> Iterator[str]:
    if moment is not None and moment.elements:
        if moment.dtype == "float16":
            if moment.eps and moment.eps_rounded == 0:
                yield "eps"
            elif moment.unbounded > _SOME * moment.elements:
                yield "unbounded"
        if moment.dtype == "bfloat16":
            if moment.stuck > _SOME * moment.elements:
                yield "stuck"
            elif moment.unbounded > _SOME * moment.elements:
                yield "unbounded"
        return
    # Only the dtypes are known: what rounding must do follows from them, what it did is not.
    if not group.parameters or "betas" not in group.hyperparameters:
        return
    state = optimizer.state_dtypes.get("exp_avg_sq")
    eps, betas = group.hyperparameters.get("eps"), group.hyperparameters.get("betas")
    if (
        group.compute_dtype == "float16"
        and state == "float16"
        and isinstance(eps, (int, float))
        and 0 < eps <= _FP16_ZERO
    ):
        if not group.hyperparameters.get("fused"):
            yield "eps"
    beta2 = betas[1] if isinstance(betas, (tuple, list)) and len(betas) > 1 else None
    if group.compute_dtype == "bfloat16" and state == "bfloat16" and isinstance(beta2, (int, float)):
        if 0 < 1 - beta2 <= _BF16_STUCK:
            yield "stuck"


def _finding(optimizer: Optimizer, fault: str, groups: list[tuple[ParamGroup, SecondMoment | None]]) -> Finding:
    moments = [m for _, m in groups if m is not None and m.elements]
    elements = sum(m.elements for m in moments)
    group = groups[0][0]
    dtype = moments[0].dtype if moments else group.compute_dtype or ""
    eps = group.hyperparameters.get("eps")
    betas = group.hyperparameters.get("betas")
    beta2 = moments[0].beta2 if moments else betas[1] if isinstance(betas, (tuple, list)) and len(betas) > 1 else None
    ratios = [m.step_ratio for m in moments if m.step_ratio is not None]
    ratio = max(ratios, key=lambda r: abs(r - 1.0), default=None)
    which = f" (param {'group' if len(groups) == 1 else 'groups'} {', '.join(str(g.index) for g, _ in groups[:6])})"
    how = {m.implementation for m in moments}
    where = f"keeps its state in {dtype}" if how == {"fused"} else f"computes in {dtype}"
    head = f"{name_optimizer(optimizer)} {where}{which if len(optimizer.groups) > 1 else ''}"
    severity: Severity | None = None
    if fault == "eps":
        zero = sum(m.zero for m in moments)
        message = f"{head}, where eps={_plain(eps)} rounds to 0."
        if zero:
            message += (
                f" {percent(zero, elements)} of the sampled elements have a second moment of 0 under "
                "a gradient that is "
                "not 0: their update divides by zero."
            )
        elif moments:
            message += " Nothing bounds the step where the second moment is near 0."
            unbounded = sum(m.unbounded for m in moments)
            severity = None if unbounded else Severity.WARNING
            if unbounded:
                message += f" That holds for {percent(unbounded, elements)} of the sampled elements."
        fix = (
            "Keep weights and state in float32 and compute in float16 under torch.autocast with a GradScaler, "
            "or eps=1e-6."
        )
    elif fault == "stuck":
        stuck = sum(m.stuck for m in moments)
        message = f"{head}, where the second moment cannot fall: v * {_plain(beta2)} rounds back to v"
        if moments:
            message += f" for {percent(stuck, elements)} of {plural(elements, 'sampled element')}"
            severity = None if stuck >= _MOST * elements else Severity.WARNING
        message += ". Once gradients shrink, the steps stay as small as the largest gradients made them."
        fix = (
            "Keep weights and state in float32 and compute in bfloat16 under torch.autocast (Lightning bf16-mixed, "
            "transformers bf16=True on a float32 model); else betas=(0.9, 0.95)."
        )
    else:
        unbounded = sum(m.unbounded for m in moments)
        message = (
            f"{head}, where eps={_plain(eps)} is lost beside the second moment for "
            f"{percent(unbounded, elements)} of the "
            "sampled elements: it no longer bounds their step."
        )
        fix = "Keep weights and state in float32 and compute in half precision under torch.autocast, or raise eps."
    affected = sum(m.affected or 0 for m in moments)
    others = [m.affected_ratio for m in moments if m.affected_ratio is not None]
    if affected >= 0.01 * elements and others:
        worst = max(others, key=lambda r: abs(math.log(r)) if r > 0 else math.inf)
        share = percent(affected, elements)
        message += f" For {share} of the sampled elements the step taken is {number(worst)} times that in float32."
    elif ratio is not None and abs(ratio - 1) > 0.02:
        message += f" The step taken is {number(ratio)} times that in float32 (median)."
    if not moments:
        severity = Severity.WARNING
        message += " (From the dtypes; the state itself was not sampled.)"
    return Finding(
        message,
        at=optimizer.at,
        evidence={
            "dtype": dtype,
            "groups": [g.index for g, _ in groups],
            "eps": eps if isinstance(eps, (int, float)) else None,
            "eps_rounded": moments[0].eps_rounded if moments else None,
            "beta2": beta2,
            "elements": elements,
            "zero": sum(m.zero for m in moments),
            "stuck": sum(m.stuck for m in moments),
            "unbounded": sum(m.unbounded for m in moments),
            "step_ratio": ratio,
            "affected": affected,
            "affected_ratio": [m.affected_ratio for m in moments],
            "implementation": sorted({m.implementation for m in moments if m.implementation}),
        },
        fix=fix,
        severity=severity,
        about=fault,
    )


def _plain(value: object) -> str:
    """A hyperparameter as the user wrote it."""
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
