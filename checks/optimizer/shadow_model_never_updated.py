"""TL211: an averaged or teacher copy that does not follow the model."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import percent, plural, uses
from trainlint.recording.schema import Shadow

#: Updates without an effect that it takes.
_UPDATES = 2
_HALF = ("bfloat16", "float16")


@check("TL211", Recording, severity="error")
def shadow_model_never_updated(run: Recording) -> Iterator[Finding]:
    """An averaged or teacher copy that does not follow the model.

    ## What goes wrong
    A moving average of the weights, a momentum teacher or a target network is updated beside every step, and the
    update changes nothing: the decay is 1 (a percentage, an integer division, a schedule at its end), it averages the
    copy with itself or with a model that is not the one in training, or the copy is in half precision, where a
    thousandth of a small difference rounds away. What is evaluated, distilled from or saved in the end is the model as
    it was initialised, or as it was when the update last worked.

    ## How it is detected
    A copy is a module with the same parameters as a trained one, none of which an optimizer holds. A frozen reference
    (a distillation teacher, the reference of preference tuning) is one too and rightly stays as it is, so a copy that
    merely does not change is no finding. It was meant to change when updates of it ran: calls of
    `AveragedModel.update_parameters`, or in-place writes to its parameters between the steps, which torch counts. Such
    an update is idle when no sampled element of the copy changed, although the trained model differed from it by so
    much that an average over a million steps had to show. Two idle updates in a row make a finding: an error when the
    copy is also used (a forward pass, or its tensors in a saved file, the end of the epoch included), else a warning,
    as it is for copies in half precision.

    An `AveragedModel` that is evaluated or saved and was never updated gives a warning.

    ## What to do
    Look at the decay that the update really gets, and at the model it reads from. In plain code:
    `ema.lerp_(p, 1 - decay)` under `no_grad`, with decay below 1; `AveragedModel(model,
    multi_avg_fn=get_ema_multi_avg_fn(0.999))` and `update_parameters(model)` after each step. Keep the average in
    float32 even where the model is not.

    ## When it may be wrong
    An update that is written to take effect only every few steps by averaging with weight 0 in between looks idle. An
    average that starts late and is evaluated before gives the warning about `AveragedModel`. Not seen: copies that are
    no modules (dictionaries of tensors), writes through `.data`, and loops that only rebind a name (`e = d * e + ...`),
    which leave no trace.

    ## References
    torch.optim.swa_utils.AveragedModel; Tarvainen and Valpola 2017, "Mean teachers are better role models".
    """
    if not any(o.steps for o in run.optimizers):
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    if not run.shadows:
        raise NotApplicable("no module is a copy of a trained one")
    for shadow in run.shadows:
        if shadow.idle_updates >= _UPDATES:
            yield _idle(run, shadow)
        elif shadow.calls == 0 and not shadow.moved and _used(shadow):
            yield _never(run, shadow)


def _used(shadow: Shadow) -> str:
    """How the copy is used, as a phrase; empty when it was not."""
    uses = []
    if shadow.forwards:
        uses.append(f"was used in {plural(shadow.forwards, 'forward pass')}")
    if shadow.saved:
        name = shadow.saved.replace("\\", "/").rsplit("/", 1)[-1]
        uses.append("was saved" if shadow.saved == "a buffer" else f"was saved to {name}")
    return " and ".join(uses)


def _size(shadow: Shadow) -> str:
    return f"{shadow.name} ({plural(shadow.tensors, 'tensor')})"


def _evidence(shadow: Shadow) -> dict[str, object]:
    return {
        "copy": shadow.name,
        "of": shadow.of,
        "tensors": shadow.tensors,
        "dtype": shadow.dtype,
        "calls": shadow.calls,
        "idle_updates": shadow.idle_updates,
        "effective_updates": shadow.effective_updates,
        "due": shadow.due,
        "sampled": shadow.sampled,
        "distance": shadow.distance,
        "forwards": shadow.forwards,
        "saved": shadow.saved is not None,
    }


def _idle(run: Recording, shadow: Shadow) -> Finding:
    half = shadow.dtype in _HALF
    used = _used(shadow)
    what = "calls of update_parameters" if shadow.calls is not None else "updates in place"
    last = "the last " if shadow.effective_updates else ""
    apart = f", while the model has moved away by {percent(shadow.distance, 1)} of its norm" if shadow.distance else ""
    much = "at most 1%" if half else "none"
    message = (
        f"{_size(shadow)}, a copy of the trained {shadow.of}, does not follow it: {last}{shadow.idle_updates} {what} "
        f"changed {much} of {plural(shadow.sampled, 'sampled element')}{apart}."
    )
    if half:
        message += f" It is kept in {shadow.dtype}, where a small share of a small difference rounds away."
        fix = "Keep the averaged copy in float32 (ema.float()), and convert it only for use."
    else:
        message += f" {plural(shadow.due, 'element')} had to change under any decay below 1." if shadow.due else ""
        fix = (
            "Look at the decay that the update gets (1 keeps the copy as it is) and at the model it reads from: "
            "ema.lerp_(p, 1 - decay) with decay < 1, from the model that the optimizer steps."
        )
    if used:
        message += f" It {used}."
    return Finding(
        message,
        at=shadow.at or ParameterName(shadow.name),
        evidence=_evidence(shadow),
        fix=fix,
        severity=None if used and not half else Severity.WARNING,
        about=shadow.name,
    )


def _never(run: Recording, shadow: Shadow) -> Finding:
    steps = max(o.steps for o in run.optimizers)
    where = "in optimizer_step or on_train_batch_end" if uses(run, "lightning") else "after optimizer.step()"
    return Finding(
        f"{_size(shadow)}, the average of {shadow.of}, was never updated in {plural(steps, 'step')}: it is the model "
        f"as it was copied, and it {_used(shadow)}.",
        at=ParameterName(shadow.name),
        evidence=_evidence(shadow),
        fix=f"Call update_parameters(model) {where}; if the average starts later, use the model itself until then.",
        severity=Severity.WARNING,
        about=shadow.name,
    )
