"""TL606: the gradient's path is cut above what should train."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, check
from trainlint.recording.describe import by_module, lines_of, name_optimizer, place, plural, trainable_weights
from trainlint.recording.gradient_cuts import CutOff, proven_cuts
from trainlint.recording.membership import held_by
from trainlint.recording.schema import Backward, Optimizer

#: Modules named in a message.
_NAMES = 3


@check("TL606", Recording, severity="error")
def everything_frozen_below(run: Recording) -> Iterator[Finding]:
    """The gradient is cut off before it reaches what should train.

    ## What goes wrong
    Adapters or unfrozen layers sit in a model whose other layers are frozen, and something above them stops the
    gradient. The usual cause is reentrant activation checkpointing: it differentiates a block only when one of the
    block's *inputs* requires a gradient. With frozen embeddings none does, so every block returns a constant, and
    the LoRA matrices inside never train. When a head outside of the blocks trains, the loss still falls and nothing
    but a warning of torch's ("None of the inputs have requires_grad=True. Gradients will be None") tells. The other
    causes are a `no_grad` left over from feature extraction around a backbone whose last layers are now meant to
    train, and a `detach`, `.numpy()` or `.item()` between the modules.

    ## How it is detected
    Each call of reentrant checkpointing while gradients are on is looked at: whether any of its inputs requires a
    gradient, and which trainable tensors the function holds. For the other causes the modules of tensors that had no
    gradient at the first step are watched through the following steps: were gradients on when they were called, did
    their output require a gradient, does a path lead from a loss to it, and which call took a tensor made of it out
    of the graph. Reported are trainable tensors, held by an optimizer, that had no gradient in any watched backward.

    Checkpointing is reported whatever it cuts off. A `no_grad` or `detach` may be meant by a program that hands all
    its parameters to the optimizer; it is reported here only when adapters lie behind it, or layers that were left
    trainable while others just like them were frozen. Otherwise TL204 reports the parameters, with the place.

    ## What to do
    Checkpointing: `model.enable_input_require_grads()` (transformers, PEFT) before training, or
    `use_reentrant=False` (`gradient_checkpointing_kwargs={"use_reentrant": False}` in TrainingArguments). `no_grad`
    and `detach`: remove them; parameters with `requires_grad=False` cost no gradient anyway.

    ## When it may be wrong
    Where a function handed to checkpointing runs only part of the module that it is bound to, tensors of the rest
    that get no gradient for another reason are named with it. In compiled models only checkpointing outside of the
    compiled part is seen.

    ## References
    torch.utils.checkpoint ("At least one input and output must have requires_grad=True for the reentrant variant");
    transformers PreTrainedModel.enable_input_require_grads.
    """
    backwards = [e for e in run.events if isinstance(e, Backward)]
    found = proven_cuts(run)
    if not backwards and not found:
        raise NotObserved("no backward was seen; raise --timeout")
    for cut_off in found:
        yield _finding(run, cut_off, backwards)
    if not found and any("OptimizedModule" in r.wrappers for r in run.roots):
        held = held_by(run)
        if any(p.id in held and p.requires_grad and p.gradient_seen is False for p in run.parameters):
            raise NotObserved("the model is compiled, so its modules were not watched; run without torch.compile")


def _finding(run: Recording, cut_off: CutOff, backwards: list[Backward]) -> Finding:
    cut, lost = cut_off.cut, cut_off.parameters
    total = trainable_weights(run, {p.root for p in lost})
    candidates = [p for p in run.parameters if p.requires_grad]
    groups = by_module(lost, candidates)
    what, fix = _words(cut_off)
    optimizer = _holder(run, cut_off)
    in_it = f"in {name_optimizer(optimizer)}, " if optimizer is not None else ""
    died = next((b for b in backwards if b.raised), None)
    if any(run.steps):
        outcome = f"no gradient in {plural(len(backwards), 'backward')}"
    elif died is not None:
        outcome = f"no gradient, and backward{_at(place(died.at))} raised {died.raised}"[:160]
    else:
        outcome = "no gradient"
    weights = sum(p.numel for p in lost)
    return Finding(
        f"{what} {plural(len(lost), 'trainable tensor')} below it, {in_it}got {outcome}: "
        f"{lines_of(groups, total, most=2)}.",
        at=cut.at or ParameterName(groups[0].pattern),
        evidence={
            "cause": cut.cause,
            "modules": list(cut.modules[:50]),
            "function": cut.function,
            "calls": cut.calls,
            "tensors": len(lost),
            "weights": weights,
            "share_of_trainable": round(weights / total, 4) if total else None,
            "parameters": [p.name for p in lost[:50]],
            "backwards": len(backwards),
        },
        fix=fix,
        about=f"{cut.cause} {groups[0].pattern}",
    )


def _words(cut_off: CutOff) -> tuple[str, str]:
    """What cuts where, and what to do about it."""
    cut = cut_off.cut
    shown = ", ".join(cut.modules[:_NAMES]) + (f" and {len(cut.modules) - _NAMES} more" if cut.modules[_NAMES:] else "")
    called = _at(place(cut.at))
    kind = f"{cut.class_name} " if cut.class_name and cut.class_name not in cut.modules else ""
    if cut.cause == "checkpoint":
        return (
            f"Reentrant activation checkpointing stops the gradient at {kind}({shown}){called}: none of its inputs "
            f"requires a gradient in {plural(cut.calls, 'call')}, so nothing inside is differentiated.",
            "Call model.enable_input_require_grads() before training, or use the other kind of checkpointing: "
            'use_reentrant=False (TrainingArguments: gradient_checkpointing_kwargs={"use_reentrant": False}).',
        )
    if cut.cause == "leaves":
        return (
            f"{cut.function}(){called} takes what {kind}({shown}) computed out of the graph: no path leads from the "
            "loss back to it.",
            f"Remove the {cut.function.rpartition('.')[2]} there, or let the loss use the tensor itself. Frozen "
            "parameters need no detach: requires_grad=False is enough.",
        )
    switch = "inference_mode" if cut.cause == "inference_mode" else "no_grad"
    return (
        f"{kind}({shown}) runs with gradients switched off ({switch}){called}.",
        f"Remove the {switch} there. Frozen parameters need none: with requires_grad=False they cost no gradient.",
    )


def _holder(run: Recording, cut_off: CutOff) -> Optimizer | None:
    wanted = {p.id for p in cut_off.parameters}
    return next((o for o in run.optimizers if any(wanted & set(g.parameters) for g in o.groups)), None)


def _at(where: str) -> str:
    return f" at {where}" if where else ""
