"""TL203: an optimizer that holds tensors which are not the model's."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import (
    by_module,
    lines_of,
    name_optimizer,
    number,
    place,
    plural,
    trainable_weights,
    uses,
)
from trainlint.recording.membership import Stale, stale_optimizers
from trainlint.recording.source_models import replaced, trained_elsewhere
from trainlint.recording.source_order import NOT_RUN, traces_of


@check("TL203", Recording, severity="error", catalog="O2c")
def stale_optimizer(run: Recording) -> Iterator[Finding]:
    """An optimizer that holds tensors which are not the model's.

    ## What goes wrong
    An optimizer keeps the Parameter objects that it was given. Whatever replaces them in the model afterwards, a new
    head, a module that is built again, `load_state_dict(assign=True)`, `to_empty()`, `resize_token_embeddings`,
    weight norm, `copy.deepcopy`, a wrapper that flattens or shards the parameters, leaves the optimizer with the old
    ones. Backward fills the gradients of the new tensors, the step looks at the old ones, finds none there and skips
    them without a word: that part of the model stays as it was initialised.

    ## How it is detected
    The tensors in every param group are compared with the parameters of every live module by identity, never by the
    order of calls: `.to()` and `.cuda()` keep the Parameter objects and are harmless. A finding needs both sides of
    the fault: tensors in the optimizer into which no gradient arrived and that did not move in any watched step, and
    parameters of the model that stand in their place (same shape, or one size changed as in a new head), into which
    gradients arrived, that no optimizer holds, and whose bits did not change.

    These parameters are reported here and not by TL201.

    Without a run, from the source: a part of the module is assigned, adapters are added, or the module is sharded
    between building the optimizer and its steps, for certain; or a deep copy of the module is trained.

    ## What to do
    Bring the model into its final form first, then build the optimizer from its `parameters()`. Where something must
    be replaced later, add the new tensors with `optimizer.add_param_group`. With FSDP build the optimizer after
    wrapping, or wrap with `use_orig_params=True`. In Lightning, replace modules in `__init__` or `configure_model`,
    which run before `configure_optimizers`.

    ## When it may be wrong
    Tensors outside of modules are legal when they learn: a temperature, an image, a latent code get gradients, and
    float32 master copies get theirs by hand or move by themselves; none of them is reported. A tensor whose gradient
    comes only later in the run is reported only if the model also has parameters that look like its replacement.

    ## References
    torch.optim, "Constructing it"; torch.nn.Module.load_state_dict (assign); torch.nn.Module.to_empty;
    torch.distributed.fsdp.FullyShardedDataParallel (use_orig_params).
    """
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built: the program updates its weights by itself, or not at all")
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    for stale in stale_optimizers(run):
        yield _finding(run, stale)


def _finding(run: Recording, stale: Stale) -> Finding:
    optimizer = stale.optimizer
    roots = {r.id: r for r in run.roots}
    root = roots.get(stale.own[0].root or 0)
    model = root.class_name if root is not None else "the model"
    groups = by_module(stale.own, [p for p in run.parameters if p.requires_grad])
    total = trainable_weights(run, {p.root for p in stale.own})
    norms = dict(zip(run.outsiders.parameters, run.outsiders.gradient_norm, strict=False)) if run.outsiders else {}
    largest = max(stale.own, key=lambda p: norms.get(p.id) or 0.0)
    count = len(stale.held)
    what = f"nothing but {plural(count, 'tensor')}" if stale.whole else plural(count, "tensor")
    if stale.former_root is not None:
        former = roots[stale.former_root].class_name if stale.former_root in roots else "module"
        whose = f"of another {former} than the {model} that is trained"
    else:
        whose = f"that {'is' if count == 1 else 'are'} in no module any more"
    message = (
        f"{name_optimizer(optimizer)} holds {what} {whose}: no gradient arrived in {'it' if count == 1 else 'them'} in "
        f"{plural(optimizer.steps, 'step')}. In no optimizer are {model}'s own: {lines_of(groups, total)}. Gradients "
        f"arrive there ({largest.name}: norm {number(norms.get(largest.id))}) and nothing moved. The optimizer was "
        "built before they were replaced."
    )
    changed = next(((old.shape, new.shape) for old, new in zip(stale.held, stale.own, strict=False)), None)
    if changed is not None and changed[0] != changed[1] and len(changed[0]) == len(changed[1]):
        message += f" (Shape {changed[0]} before, {changed[1]} now.)"
    return Finding(
        message,
        at=optimizer.at,
        evidence={
            "held": count,
            "held_shapes": [list(p.shape) for p in stale.held[:10]],
            "parameters": [p.name for p in stale.own[:50]],
            "tensors": len(stale.own),
            "weights": sum(p.numel for p in stale.own),
            "trainable_weights": total,
            "largest_gradient_norm": norms.get(largest.id),
            "steps": optimizer.steps,
            "whole": stale.whole,
        },
        fix=_fix(run, stale),
        about=f"{optimizer.class_name} {groups[0].pattern}",
    )


def _fix(run: Recording, stale: Stale) -> str:
    wrappers = {w for r in run.roots for w in r.wrappers}
    if "FullyShardedDataParallel" in wrappers:
        return "Build the optimizer after wrapping the model in FSDP, or wrap with use_orig_params=True."
    if uses(run, "lightning"):
        return (
            "Replace modules in __init__ or configure_model, before configure_optimizers runs, and build the optimizer "
            "there from self.parameters()."
        )
    if uses(run, "transformers"):
        return (
            "Change the model (heads, resize_token_embeddings, adapters) before the optimizer is built from its "
            "parameters, or let the Trainer build the optimizer."
        )
    return (
        "Build the optimizer from the model's parameters() once the model is in its final form (head replaced, "
        "materialised, wrapped), or add the new tensors with optimizer.add_param_group({'params': ...})."
    )


# ---------------------------------------------------------------------------------------------- without a run


@check("TL203", SourceFacts, severity="error", catalog="O2c")
def stale_optimizer_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from what happens to the model after the optimizer is built."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in (*replaced(trace), *trained_elsewhere(trace)):
            change, build = (call.at if call is not None else None for call in (fault.call, fault.other))
            adam = fault.optimizer.class_name if fault.optimizer is not None else "the optimizer"
            if fault.kind == "copied":
                text = f"{adam} ({place(build)}) holds the parameters of a module that is never called;"
                text += f" its copy is trained ({place(change)})."
            else:
                part = fault.call.details.get("part") if fault.call is not None else ""
                text = f"{part} replaces parameters ({place(change)}) after {adam} was built over them"
                text += f" ({place(build)}): it keeps the old ones, and the new ones are never stepped."
            yield Finding(
                f"{text} {NOT_RUN}",
                at=build if fault.kind == "copied" else change,
                evidence={"kind": fault.kind, "built": place(build), "changed": place(change)},
                fix="Bring the model into its final form first, then build the optimizer from its parameters().",
                severity=None if fault.sure else Severity.WARNING,
                about=fault.kind,
            )
