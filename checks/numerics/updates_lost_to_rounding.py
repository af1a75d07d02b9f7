"""TL805: updates that are smaller than the distance between two numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import name_optimizer, number, percent, plural, uses
from trainlint.recording.rounding import Loss, losses

_HALF = ("bfloat16", "float16")


@check("TL805", Recording, severity="error")
def updates_lost_to_rounding(run: Recording) -> Iterator[Finding]:
    """Updates that are smaller than the distance between two numbers.

    ## What goes wrong
    bfloat16 has 8 significant bits: the neighbours of a weight of 0.02 are 1.2e-4 away. An update of less than half
    of that rounds back to the old weight, at this step and at every other one, however many there are. At a rate of
    1e-5 that is what happens to nearly all weights of a model that is trained in pure bfloat16: the loss still falls
    a little, through norms, biases and weights near 0, and then it stays.

    ## How it is detected
    At each watched step a sample of every group with float16 or bfloat16 weights is compared bit by bit before and
    after. The update that was meant is computed from the optimizer's own state (Adam family, SGD with and without
    momentum, Lion, RMSprop, Adagrad) and held against the spacing of the numbers around each weight. Reported is the
    share of the elements with an update that kept their bits, at the rate of the watch and, by the sizes of the same
    updates, at the highest rate of the planned schedule, which decides: an error when most elements and most of the
    squared updates are lost there. For other optimizers no more is known than which elements changed; the finding is a
    warning and needs the footprint of rounding to the nearest number: small weights move, large ones never do.

    ## What to do
    Keep the weights in float32 and compute in bfloat16 under autocast (Lightning `precision="bf16-mixed"`,
    transformers: load the model in float32 and set `bf16=True`). Where memory forbids it: an optimizer with stochastic
    rounding (torchao `AdamW8bit(..., bf16_stochastic_round=True)`), with Kahan summation (optimi, `AnyPrecisionAdamW`)
    or with float32 copies of the weights; or adapters in float32 over frozen bfloat16 weights.

    ## When it may be wrong
    Optimizers that keep what rounds away (float32 copies, compensation terms in their state or attributes) and those
    that round stochastically, which is measured, are silent. Measured are the first steps: Adam's are its largest, so
    later more is lost, not less; the growth of SGD's momentum buffer is allowed for. When the rate is still rising and
    nobody knows where to, nothing is judged. Copies that are kept outside of the optimizer are not seen.

    ## References
    torch.finfo; Zamirai et al. 2020, "Revisiting BFloat16 Training"; Gupta et al. 2015, "Deep Learning with Limited
    Numerical Precision".
    """
    held = {i for o in run.optimizers for g in o.groups for i in g.parameters}
    if not any(p.dtype in _HALF and p.requires_grad for p in run.parameters if p.id in held):
        raise NotApplicable("no optimizer holds float16 or bfloat16 weights")
    seen = losses(run)
    if not seen:
        raise NotObserved("no half-precision weight was measured at a learning rate above 0; raise --steps")
    for optimizer in run.optimizers:
        lost = [loss for loss in seen if loss.optimizer is optimizer and loss.severity]
        if lost:
            yield _finding(run, lost)
    if all(loss.peak is None for loss in seen):
        raise NotObserved("the learning rate is still rising and its peak is not known; raise --steps")


def _finding(run: Recording, lost: Sequence[Loss]) -> Finding:
    optimizer = lost[0].optimizer
    parameters = {p.id: p for p in run.parameters}
    tensors = [p for loss in lost for i in loss.group.parameters if (p := parameters.get(i)) and p.dtype in _HALF]
    worst = max(lost, key=lambda loss: loss.elements)
    which = f" (param {'group' if len(lost) == 1 else 'groups'} {', '.join(str(x.group.index) for x in lost[:6])})"
    share = sum(x.share * x.elements for x in lost) / sum(x.elements for x in lost)
    weights = sum(p.numel for p in tensors)
    message = (
        f"What {name_optimizer(optimizer)} adds to its {worst.dtype} weights"
        f"{which if len(optimizer.groups) > 1 else ''} rounds away ({plural(len(tensors), 'tensor')}, "
        f"{weights:,} weights): in {plural(worst.steps, 'step')} at rate {number(worst.rate)}, "
        f"{percent(share, 1.0)} of the sampled elements with "
        f"{'an update' if worst.formula else 'a gradient'} kept their bits."
    )
    if worst.formula and worst.peak and worst.peak > 1.01 * worst.rate and worst.peak_share is not None:
        message += f" At the planned peak of {number(worst.peak)} it would be {percent(worst.peak_share, 1.0)}."
    if worst.moving_rate is not None:
        message += f" Half of them would move only from a rate of {number(worst.moving_rate)} on."
    if not worst.formula:
        message += " Small weights moved, large ones did not: they were rounded to the nearest number."
    severity = Severity.ERROR if any(x.severity == "error" for x in lost) else Severity.WARNING
    return Finding(
        message,
        at=optimizer.at,
        evidence={
            "dtype": worst.dtype,
            "groups": [x.group.index for x in lost],
            "tensors": len(tensors),
            "steps": worst.steps,
            "rate": worst.rate,
            "lost": share,
            "lost_power": worst.power,
            "peak_rate": worst.peak,
            "lost_at_peak": worst.peak_share,
            "lost_power_at_peak": worst.peak_power,
            "rate_that_moves_half": worst.moving_rate,
            "formula": worst.formula,
        },
        fix=_fix(run, worst.dtype),
        severity=severity,
        about="rounding",
    )


def _fix(run: Recording, dtype: str) -> str:
    if uses(run, "lightning"):
        mode = 'precision="bf16-mixed"' if dtype == "bfloat16" else 'precision="16-mixed"'
        return f"Trainer({mode}), which keeps the weights in float32; or an optimizer with stochastic rounding."
    if uses(run, "transformers"):
        switch = "bf16=True" if dtype == "bfloat16" else "fp16=True"
        return f"Load the model in float32 and set {switch}; or train float32 adapters, or round stochastically."
    return (
        "Keep the weights in float32 and compute in half precision under torch.autocast; else an optimizer with "
        "stochastic rounding, Kahan summation or float32 copies."
    )
