"""TL201: trainable parameters that no optimizer holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import (
    Finding,
    NotApplicable,
    NotObserved,
    ParameterName,
    Recording,
    Severity,
    SourceFacts,
    check,
)
from trainlint.recording.boundary import after_the_epoch
from trainlint.recording.describe import (
    by_module,
    lines_of,
    name_optimizer,
    number,
    percent,
    place,
    plural,
    trainable_weights,
    uses,
)
from trainlint.recording.membership import held_by, stale_optimizers, unheld_parameters
from trainlint.recording.schema import Optimizer, Parameter, RootModule
from trainlint.recording.source_models import left_out
from trainlint.recording.source_order import NOT_RUN, traces_of


@check("TL201", Recording, severity="error", catalog="O2")
def params_not_in_optimizer(run: Recording) -> Iterator[Finding]:
    """Trainable parameters that no optimizer holds.

    ## What goes wrong
    Backward computes gradients for these parameters, and no optimizer ever reads them: they keep their initial
    values for the whole run. A randomly initialised head stays random, the rest of the model learns around it, and
    the loss still falls, only less far. The usual causes: the optimizer was built over one sub-module
    (`AdamW(model.backbone.parameters())`), by a list of name patterns that misses some names, before a layer was
    added or replaced, without the parameters of a loss module (margin heads, learned loss weights), or the layers
    sit in a plain Python list, where `parameters()` does not find them; layers unfrozen after some epochs, while the
    optimizer was built over what was trainable at first. The same fault in its extreme form: an
    optimizer whose groups are empty, or that holds frozen parameters only.

    ## How it is detected
    Every module that was alive at the first step is listed with its trainable parameters, every optimizer with the
    tensors in its groups; they are compared by identity, never by name. A parameter is reported only when all of
    this was seen: it is trainable, no optimizer (stepped or not) holds it, a gradient arrived in it, and its value
    was bit-identical from the first watched step to the last. Where an optimizer still holds what the model had in
    their place before, TL203 reports them instead. The first steps of the next epoch are looked at in the same way:
    parameters that an epoch's end made trainable, or added, and that no group of any optimizer got.

    Parameters of a model that has others in an optimizer are an error. So is a layer kept in a plain list. When all
    of them came from a checkpoint and whole modules were left out, leaving them out may be a way to freeze them: a
    warning. A whole fresh module of its own in train mode, none of whose parameters any optimizer holds, is a
    warning.

    Without a run, from the source: the optimizer is given the parameters of some parts of a module whose class is in
    the project, and its forward uses another part with parameters; or layers stand in a plain list. A finding needs
    that everything the optimizers are given can be read and nothing is frozen.

    ## What to do
    Give the parameters to the optimizer: build it after the model is complete and pass `model.parameters()`, or add
    them with `optimizer.add_param_group`. In Lightning, return an optimizer over `self.parameters()` from
    `configure_optimizers`; with the transformers `Trainer`, put loss parameters on the model, since it optimizes
    `model.named_parameters()` only. When layers are unfrozen later, add them with `add_param_group` at that moment,
    or give them to the optimizer from the start: it skips what has no gradient. Keep layers in `nn.ModuleList`
    instead of a list. If they are meant to stay as they are, say so with `requires_grad_(False)`: it also saves the
    memory and time of their gradients.

    ## When it may be wrong
    A parameter that nobody holds and that moves anyway (updates by hand, master copies in float32, an averaged copy)
    is not reported, nor is one without a gradient. Whole pretrained networks that are only used as a fixed loss
    (perceptual losses), networks in eval mode, and copies of a trained model (teachers, target networks) are left
    alone. A phase later in the program that builds another optimizer for the remaining parameters cannot be seen
    from the first steps.

    ## References
    torch.optim documentation, "Constructing it" and "Optimizer.add_param_group"; torch.nn.ModuleList.
    """
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built: the program updates its weights by itself, or not at all")
    if not any(o.steps for o in run.optimizers):
        raise NotObserved("no optimizer step was seen, so it cannot be told what moves; raise --timeout or --steps")
    parameters = {p.id: p for p in run.parameters}
    roots = {r.id: r for r in run.roots}
    held = [parameters[i] for i in held_by(run) if i in parameters]
    unheld = unheld_parameters(run)
    idle = _nothing_to_train(run, held, unheld)
    if idle is not None:
        yield idle
        return
    # What an optimizer holds outdated twins of is TL203's story.
    replaced = {p.id for stale in stale_optimizers(run) for p in stale.own}
    # What is unfrozen in stages gets into the optimizer when its turn comes.
    later = after_the_epoch(run)
    soon = held_by(later) if later is not None else {}
    unheld = [p for p in unheld if p.id not in replaced and p.id not in soon]
    trained = {p.root for p in held if p.root is not None}
    orphans = [p for p in held if p.root is None]
    if not trained:
        return
    yield from _of_trained_roots(run, [p for p in unheld if p.root in trained], orphans)
    others = [roots[i] for i in dict.fromkeys(p.root for p in unheld) if i in roots and i not in trained]
    listed = [r for r in others if r.unregistered_in]
    if listed:
        yield _in_lists(run, listed, [p for p in unheld if p.root in {r.id for r in listed}])
    for root in others:
        if root not in listed:
            yield from _of_other_root(run, root, [p for p in unheld if p.root == root.id], held)
    late = _unfrozen_later(run)
    if late is not None:
        yield late


def _unfrozen_later(run: Recording) -> Finding | None:
    """Parameters that became trainable with the next epoch, in the model that is trained, and are in no group."""
    later = after_the_epoch(run)
    if later is None:
        return None
    before = {p.id for p in run.parameters if p.requires_grad or p.requires_grad_later}
    parameters = {p.id: p for p in later.parameters}
    held = [parameters[i] for i in held_by(later) if i in parameters]
    masters = {p.shape for p in held if p.root is None and p.gradient_seen}
    trained = {p.root for p in held if p.root is not None}
    late = [p for p in unheld_parameters(later) if p.id not in before and p.root in trained and p.shape not in masters]
    if not late or later.outsiders is None:
        return None
    optimizer = _nearest(later, late)
    norms = dict(zip(later.outsiders.parameters, later.outsiders.gradient_norm, strict=False))
    largest = max(late, key=lambda p: norms.get(p.id) or 0.0)
    steps = sum(1 for m in later.steps if m.optimizer == optimizer.id)
    groups = by_module(late, [p for p in later.parameters if p.requires_grad])
    known = {p.id for p in run.parameters}
    how = "unfrozen" if all(p.id in known for p in late) else "added"
    framework = (
        " In Lightning, BaseFinetuning.unfreeze_and_add_param_group does both." if uses(run, "lightning") else ""
    )
    return Finding(
        f"No optimizer got what was {how} at the end of the epoch: {lines_of(groups, _weights(later, late))}. A "
        f"gradient arrives ({largest.name}: norm {number(norms.get(largest.id))}), and nothing of it changed in the "
        f"next epoch's first {plural(steps, 'step')} of {name_optimizer(optimizer)}.",
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in late[:50]],
            "tensors": len(late),
            "weights": sum(p.numel for p in late),
            "largest_gradient_norm": norms.get(largest.id),
            "steps": steps,
            "optimizer": optimizer.class_name,
        },
        fix="Where they are unfrozen, call optimizer.add_param_group({'params': ...}), or build the optimizer over all "
        f"of model.parameters() from the start.{framework}",
        about=f"{groups[0].pattern}-unfrozen",
    )


def _nothing_to_train(run: Recording, held: Sequence[Parameter], unheld: Sequence[Parameter]) -> Finding | None:
    """An optimizer that steps although nothing in it can move; only when no optimizer of the run does any better."""
    stepping = [o for o in run.optimizers if o.steps]
    if any(_moved_any(run, o) is not False for o in stepping):
        return None
    if any(p.requires_grad or p.requires_grad_later for p in held):
        return None
    first = stepping[0]
    if run.program.world_size > 1 and not held:
        return None  # a sharded optimizer may hold nothing on this rank
    what = f"all {plural(len(held), 'tensor')} in it have requires_grad=False" if held else "its param groups are empty"
    lost = ""
    if unheld:
        groups = by_module(unheld, [p for p in run.parameters if p.requires_grad])
        lost = f" Gradients do arrive in {lines_of(groups, trainable_weights(run, {p.root for p in unheld}))}."
    message = (
        f"{name_optimizer(first)} made {plural(first.steps, 'step')} and trains nothing: "
        f"{what}.{lost} No weight changed."
    )
    return Finding(
        message,
        at=first.at,
        evidence={"optimizer": first.class_name, "steps": first.steps, "held": len(held), "unheld": len(unheld)},
        fix=_give(run, "the model's trainable parameters"),
        about="nothing-to-train",
    )


def _moved_any(run: Recording, optimizer: Optimizer) -> bool | None:
    """Whether any step of an optimizer changed anything; ``None`` when it holds tensors and was not measured."""
    seen = [m for m in run.steps if m.optimizer == optimizer.id]
    if not any(g.parameters for g in optimizer.groups):
        return False
    if not seen:
        return None
    return any(c is not None and c > 0 for m in seen for c in m.changed)


def _of_trained_roots(run: Recording, unheld: Sequence[Parameter], orphans: Sequence[Parameter]) -> Iterator[Finding]:
    """Parameters of a model that has others in an optimizer."""
    # Master copies: the optimizer holds a float32 twin of the same shape, and rounding may hide its copying back.
    twins = [p.shape for p in orphans if p.gradient_seen]
    rest = []
    for p in unheld:
        if p.shape in twins:
            twins.remove(p.shape)
        else:
            rest.append(p)
    if not rest:
        return
    loaded = [p for p in rest if p.origin != "fresh"]
    whole = _whole_modules(run, loaded) if len(loaded) == len(rest) else False
    yield _finding(run, rest, intended=whole)


def _whole_modules(run: Recording, unheld: Sequence[Parameter]) -> bool:
    """Whether no single layer is split into held and unheld tensors."""
    held = set(held_by(run))
    owners = {(p.root, p.name.rpartition(".")[0]) for p in unheld}
    return not any(p.id in held and (p.root, p.name.rpartition(".")[0]) in owners for p in run.parameters)


def _in_lists(run: Recording, roots: Sequence[RootModule], unheld: Sequence[Parameter]) -> Finding:
    """Layers in plain lists, tuples or dicts, which ``parameters()`` does not find."""
    held = held_by(run)
    optimizer = max(run.optimizers, key=lambda o: o.steps)
    norms = dict(zip(run.outsiders.parameters, run.outsiders.gradient_norm, strict=False)) if run.outsiders else {}
    largest = max(unheld, key=lambda p: norms.get(p.id) or 0.0)
    where = {r.id: r.unregistered_in for r in roots}
    weights = sum(p.numel for p in unheld)
    total = weights + sum(p.numel for p in run.parameters if p.id in held)
    names = ", ".join(where[r.id] for r in roots[:3]) + (", ..." if len(roots) > 3 else "")
    first = roots[0].unregistered_in
    container = first.partition("[")[0]
    return Finding(
        f"{plural(len(roots), 'module')} in a plain list ({names}) {'are' if len(roots) > 1 else 'is'} not registered "
        f"and in no optimizer: "
        f"{plural(len(unheld), 'tensor')}, {percent(weights, total)} of the trained weights. A gradient arrives "
        f"({where.get(largest.root or 0, '')}.{largest.name}: norm {number(norms.get(largest.id))}) "
        "and they did not change in "
        f"{plural(optimizer.steps, 'step')} of {name_optimizer(optimizer)}.",
        at=ParameterName(container),
        evidence={
            "modules": [r.unregistered_in for r in roots[:50]],
            "tensors": len(unheld),
            "weights": weights,
            "largest_gradient_norm": norms.get(largest.id),
            "steps": optimizer.steps,
        },
        fix="Keep the layers in torch.nn.ModuleList (or ModuleDict), so that parameters() finds them.",
        about=container,
    )


def _of_other_root(
    run: Recording, root: RootModule, unheld: Sequence[Parameter], held: Sequence[Parameter]
) -> Iterator[Finding]:
    """A module of its own: a forgotten loss head, or something meant to be fixed."""
    if not root.training or any(p.origin != "fresh" for p in unheld):
        return
    shapes = sorted(p.shape for p in run.parameters if p.root == root.id)
    for other in {p.root for p in held}:
        if sorted(p.shape for p in run.parameters if p.root == other) == shapes:
            return  # a copy of a trained model: a teacher or target network
    yield _finding(run, unheld, separate=root)


def _finding(
    run: Recording,
    unheld: Sequence[Parameter],
    *,
    intended: bool = False,
    separate: RootModule | None = None,
) -> Finding:
    roots = {r.id: r.class_name for r in run.roots}
    first_root = unheld[0].root
    model = roots.get(first_root, "the model") if first_root is not None else "the model"
    held = held_by(run)
    candidates = [p for p in run.parameters if p.requires_grad]
    groups = by_module(unheld, candidates)
    total = _weights(run, unheld)
    optimizer = _nearest(run, unheld)
    norms = dict(zip(run.outsiders.parameters, run.outsiders.gradient_norm, strict=False)) if run.outsiders else {}
    largest = max(unheld, key=lambda p: norms.get(p.id) or 0.0)
    proof = (
        f"A gradient arrives ({largest.name}: norm {number(norms.get(largest.id))}) and they did not change in "
        f"{plural(optimizer.steps, 'step')} of {name_optimizer(optimizer)}."
    )
    text = lines_of(groups, total)
    evidence = {
        "parameters": [p.name for p in unheld[:50]],
        "tensors": len(unheld),
        "weights": sum(p.numel for p in unheld),
        "trainable_weights": total,
        "held_tensors": len(held),
        "largest_gradient_norm": norms.get(largest.id),
        "steps": optimizer.steps,
        "optimizer": optimizer.class_name,
    }
    fix = _give(run, "them" if separate is None else f"{model}'s parameters")
    fix += " If they are meant to stay fixed, say so with requires_grad_(False)."
    severity: Severity | None = None
    if separate is not None:
        severity = Severity.WARNING
        message = f"No optimizer holds any parameter of {model}, a module of its own: {text}. {proof}"
    elif intended:
        severity = Severity.WARNING
        message = (
            f"No optimizer holds these trainable parameters of {model}: {text}. {proof} They were loaded from a "
            "checkpoint and whole modules are left out, so this may be meant as freezing."
        )
        fix = (
            "If they are meant to stay fixed, say so with requires_grad_(False) (saves their gradients); else "
            + _give(run, "them")
        )
    else:
        message = f"No optimizer holds these trainable parameters of {model}: {text}. {proof}"
    return Finding(
        message,
        at=ParameterName(groups[0].pattern),
        evidence=evidence,
        fix=fix,
        severity=severity,
        about=groups[0].pattern,
    )


def _weights(run: Recording, parameters: Sequence[Parameter]) -> int:
    return trainable_weights(run, {p.root for p in parameters})


def _nearest(run: Recording, unheld: Sequence[Parameter]) -> Optimizer:
    """The optimizer that holds other parameters of the same root; else the one with the most steps."""
    root = unheld[0].root
    siblings = {p.id for p in run.parameters if p.root == root}
    stepping = [o for o in run.optimizers if o.steps]
    for o in stepping:
        if any(i in siblings for g in o.groups for i in g.parameters):
            return o
    return max(stepping, key=lambda o: o.steps)


def _give(run: Recording, what: str) -> str:
    if uses(run, "lightning"):
        return f"Give {what} to the optimizer that configure_optimizers returns (self.parameters() covers the module)."
    if uses(run, "transformers"):
        return (
            f"Give {what} to the Trainer's optimizer: it optimizes model.named_parameters(), so put them on the model."
        )
    return (
        f"Give {what} to an optimizer: build it from all parameters, or optimizer.add_param_group({{'params': ...}})."
    )


# ---------------------------------------------------------------------------------------------- without a run


@check("TL201", SourceFacts, severity="error", catalog="O2")
def params_not_in_optimizer_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from what the optimizer is given and what the model's forward uses."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in left_out(trace):
            part, owner, optimizer = fault.module, fault.owner, fault.optimizer
            built = place(fault.call.at if fault.call is not None else None)
            of, adam = owner.class_name if owner else "", optimizer.class_name if optimizer else "the optimizer"
            if fault.kind == "listed":
                name = str(part.details.get("listed"))
                text = f"{of}.{name} is a plain list of layers ({place(part.at)}): parameters() does not find them, and"
                fix = "Keep the layers in torch.nn.ModuleList (or ModuleDict), so that parameters() finds them."
            else:
                name = part.name
                text = f"{of}.{name} ({part.class_name}, {place(part.at)}) is used in the forward, and"
                fix = f"Give {name}.parameters() to the optimizer, or say requires_grad_(False) if it is to stay fixed."
            yield Finding(
                f"{text} no optimizer is given its parameters ({adam} at {built}). {NOT_RUN}",
                at=part.at,
                evidence={"module": name, "class": part.class_name, "optimizer": built},
                fix=fix,
                about=f"{of}.{name}",
            )
