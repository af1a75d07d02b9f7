"""TL806: gradients in float16 from a loss that nothing scales."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import percent, place, plural, uses
from trainlint.recording.schema import AutocastEntered, Backward, HalfGradients, ScalerEvent
from trainlint.recording.timeline import of_kind

#: Share of the gradients that are not zero whose digits float16 loses, from which the harm counts as shown.
_MUCH = 0.05
_SOME = 0.005
#: A constant factor on the loss of this much is a loss scale of the program's own.
_SCALED = 8.0


@check("TL806", Recording, severity="error")
def fp16_without_scaler(run: Recording) -> Iterator[Finding]:
    """Gradients in float16 from a loss that nothing scales.

    ## What goes wrong
    float16 holds numbers below 6e-5 with ever fewer digits and none below 6e-8. Gradients of that size are ordinary,
    and the more so the better the model fits: they become 0 on the way back, first in the layers far from the loss.
    A loss scale (`GradScaler`) multiplies the loss so that they stay in range, and takes the factor off again before
    the step. Without it the run trains with part of its gradients missing, and nothing fails.

    ## How it is detected
    After the first backwards a sample of each fresh gradient is read. It was computed in float16 when it has that
    dtype, or, for float32 weights under float16 autocast, when every sampled element is a float16 number. For those
    backwards it is known whether a GradScaler had scaled the loss, and, from the graph, whether a constant factor
    stands on it. When 5% and more of the elements that are not zero lie below 6e-5, the loss of digits is shown: an
    error. Otherwise the gradients still fit, as they may at the start: a warning.

    ## What to do
    `scaler = torch.amp.GradScaler(device)`, `scaler.scale(loss).backward()`, `scaler.step(optimizer)`,
    `scaler.update()`. Or bfloat16, which has the range of float32 and needs no scale: `torch.autocast(device,
    dtype=torch.bfloat16)`, Lightning `precision="bf16-mixed"`, transformers `bf16=True`. float16 weights
    (`model.half()`) belong to inference: keep them in float32 and use autocast.

    ## When it may be wrong
    Frozen float16 models get no gradient and are not looked at. A factor of 8 and more on the loss, or in
    `backward(gradient=...)`, counts as a scale of the program's own. Float16 that lies between float32 layers only
    (a float16 backbone under float32 adapters) leaves no trace in the gradients of the weights and is not seen.

    ## References
    Micikevicius et al. 2018, "Mixed Precision Training"; torch.amp.GradScaler.
    """
    autocasts = [e for e in of_kind(run, AutocastEntered) if e.dtype == "float16" and e.enabled]
    halves = [p for p in run.parameters if p.dtype == "float16" and p.requires_grad]
    if not autocasts and not halves:
        raise NotApplicable("nothing is trained in float16")
    looks = run.numerics.half_gradients if run.numerics is not None else ()
    if not looks:
        raise NotObserved("no gradient was seen after a backward in float16; raise --timeout or --steps")
    backwards = of_kind(run, Backward)
    unscaled = []
    for look in looks:
        backward = max((b for b in backwards if b.seq <= look.after), key=lambda b: b.seq, default=None)
        if look.half and look.elements and backward is not None and not _scaled(backward):
            unscaled.append((look, backward))
    if unscaled:
        finding = _finding(run, unscaled, autocasts)
        if finding is not None:
            yield finding


def _scaled(backward: Backward) -> bool:
    if backward.loss_scale is not None:
        return True
    if backward.gradient_argument is not None and abs(backward.gradient_argument) >= _SCALED:
        return True
    return backward.divided_by is not None and abs(backward.divided_by) <= 1 / _SCALED


def _lost(look: HalfGradients) -> float:
    """Share of the gradients that are not zero and have lost digits."""
    present = look.elements - look.zero - look.non_finite
    return look.subnormal / present if present > 0 else 0.0


def _finding(
    run: Recording, unscaled: list[tuple[HalfGradients, Backward]], autocasts: list[AutocastEntered]
) -> Finding | None:
    look, backward = max(unscaled, key=lambda pair: _lost(pair[0]))
    lost = _lost(look)
    harmed = lost >= _MUCH
    if not harmed and backward.divided_by is None:
        return None  # what stands on the loss is not known, and the gradients fit
    if lost < _SOME and backward.micro_loss_reduction == "sum":
        return None  # a sum over many elements is a scale of its own
    how = "float16 weights" if look.weights else f"autocast, {place(autocasts[0].at)}" if autocasts else "float16"
    disabled = [e for e in of_kind(run, ScalerEvent) if not e.enabled]
    nothing = "while the GradScaler is disabled" if disabled else "and nothing scales the loss"
    of = plural(look.tensors, "gradient")
    message = (
        f"{look.half} of {of} {'is' if look.half == 1 else 'are'} computed in float16 ({how}), {nothing}. Of the "
        f"sampled elements, {percent(look.zero, look.elements)} are 0; of the others {percent(lost, 1.0)} lie below "
        "6.1e-5, where float16 loses digits"
    )
    message += "." if harmed else " - few yet, but gradients shrink as the loss falls."
    if uses(run, "lightning"):
        fix = 'Trainer(precision="bf16-mixed") or "16-mixed", which brings a scaler; no autocast of its own.'
    elif uses(run, "transformers") or uses(run, "accelerate"):
        fix = "Let the trainer do it: fp16=True (mixed_precision='fp16') on a float32 model brings a scaler; or bf16."
    else:
        fix = (
            "scaler = torch.amp.GradScaler(device); scaler.scale(loss).backward(); scaler.step(optimizer); "
            "scaler.update(). Or dtype=torch.bfloat16, which needs none."
        )
        if look.weights:
            fix = "Keep the weights in float32 and use autocast with a GradScaler, or bfloat16, which needs none."
    return Finding(
        message,
        at=backward.at or (autocasts[0].at if autocasts else None),
        evidence={
            "tensors": look.tensors,
            "float16": look.half,
            "elements": look.elements,
            "zero": look.zero,
            "subnormal": look.subnormal,
            "non_finite": look.non_finite,
            "float16_weights": look.weights,
            "scaler_disabled": bool(disabled),
            "divided_by": backward.divided_by,
        },
        fix=fix,
        severity=Severity.ERROR if harmed else Severity.WARNING,
        about="scaler",
    )
