"""TL204: parameters that the optimizer holds and no gradient reaches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import (
    TensorGroup,
    by_module,
    lines_of,
    name_optimizer,
    place,
    plural,
    trainable_weights,
)
from trainlint.recording.gradient_cuts import cuts_of, idle_adapters, proven_cuts
from trainlint.recording.intervals import Timeline, clears
from trainlint.recording.membership import stale_optimizers
from trainlint.recording.schema import Optimizer, Parameter

#: Steps that are needed before "never" means anything: late heads and alternating branches get their gradient later.
_STEPS = 2
#: Loaded parts below this share of the trainable weights that stay unused (a pooler) are worth knowing, no more.
_SMALL = 0.01
#: Names of containers whose members are alternatives of each other, used only to say less.
_ALTERNATIVES = re.compile(r"expert|head|branch|adapter|task|codebook|route|moe|domain|modalit", re.IGNORECASE)


@check("TL204", Recording, severity="warning", catalog="O2a O3")
def params_without_gradient(run: Recording) -> Iterator[Finding]:
    """Parameters that the optimizer holds and no gradient reaches.

    ## What goes wrong
    The parameter is trainable and the optimizer holds it, but backward never fills its `.grad`, so every step skips
    it: it keeps its initial value, without even weight decay. Usually the forward pass does not use the module (a
    flag chose another branch, a decoder for another output space, a layer left out of the loop), or its output is
    detached, computed under `no_grad`, or passes through an operation without a derivative (`argmax`, `.item()`, a
    conversion to NumPy) before it reaches the loss.

    ## How it is detected
    At every optimizer step the gradient of each held parameter is measured as the step used it. A parameter is
    reported when it had no gradient at all (`None`, not zero) in any of at least two steps, in which other
    parameters of the same optimizer had one. Where a whole optimizer finds nothing, it is reported when the
    backwards before each of its steps led to parameters that others hold (a generator's images detached in its own
    turn, an encoder cut off from a decoder with an optimizer of its own). Parameters are grouped by module, with
    their share of the trainable weights.

    A gradient that is exactly zero is no finding: LoRA's first matrix, zero-initialised residual branches and heads
    have one at the first steps, rightly. Conditional computation is told apart by its siblings: when a parallel
    module with the same tensors gets a gradient in some steps and not in others, or when members of an alternative
    set (experts, heads, adapters, the entries of a `ModuleDict`) do get gradients, the idle ones are taken for not
    chosen. Where the cut itself was seen (`no_grad`, a `detach`), its line is named; what nobody can have meant to
    cut off (adapters, reentrant checkpointing) is left to TL606.

    ## What to do
    Find where the module's output leaves the graph: `loss.grad_fn` and `output.requires_grad` right after the module
    tell. Remove the `detach`/`no_grad`, or feed its output into the loss. If the module is not meant to be used with
    this configuration, do not build it, or freeze it with `requires_grad_(False)`: under DistributedDataParallel
    unused parameters raise or stall unless `find_unused_parameters=True`.

    ## When it may be wrong
    A branch that trains only later or rarely (an auxiliary loss from step 1,000 on, a head for a task that did not
    come up in the watched batches) looks like this from the first steps. Unused parts that came from a checkpoint
    and make up less than 1% of the trainable weights (the pooler of an encoder) are given as information only.

    ## References
    torch.Tensor.grad; torch.nn.parallel.DistributedDataParallel (find_unused_parameters).
    """
    timeline = Timeline(run)
    measured = {o.id: len(timeline.measurements.get(o.id, {})) for o in run.optimizers}
    if not measured or max(measured.values()) < _STEPS:
        raise NotObserved(f"fewer than {_STEPS} optimizer steps were measured; raise --steps or --timeout")
    parameters = {p.id: p for p in run.parameters}
    partly = _sometimes(timeline)
    # Tensors of a module that another has replaced are TL203's story.
    outdated = {p.id for stale in stale_optimizers(run) for p in stale.held}
    # What is cut off and cannot be meant to be is TL606's.
    outdated.update(p.id for found in proven_cuts(run) for p in found.parameters)
    # So are adapters that were merged or switched off TL604's.
    for model in run.adapters.models if run.adapters else ():
        outdated.update(model.parameters if idle_adapters(model) else ())
    for optimizer in run.optimizers:
        if measured[optimizer.id] < _STEPS:
            continue
        silent, live = _split(optimizer, timeline, parameters)
        silent = [p for p in silent if p.id not in outdated]
        within = bool(live)
        if silent and not live:
            # No gradient anywhere in it: the loop is at fault (TL302, TL303), unless it trains what others hold.
            live = _trained_elsewhere(timeline, optimizer, silent, parameters)
        if not silent or not live:
            continue
        candidates = [*silent, *live]
        groups = []
        for root in dict.fromkeys(p.root for p in silent):
            family = _Family(live, root)
            classes = {s.name: s.class_name for r in run.roots if r.id == root for s in r.submodules}
            own = by_module([p for p in silent if p.root == root], candidates)
            groups += [g for g in own if not _conditional(g, family, partly, classes)]
        groups.sort(key=lambda g: -g.numel)
        if groups:
            yield _finding(run, optimizer, groups, live, measured[optimizer.id], within=within)


def _split(
    optimizer: Optimizer, timeline: Timeline, parameters: dict[int, Parameter]
) -> tuple[list[Parameter], list[Parameter]]:
    """Held trainable parameters that never had a gradient at a step, and those that had one."""
    seen: dict[int, bool] = {}
    for m in timeline.measurements[optimizer.id].values():
        for i, norm in zip(m.parameters, m.gradient_norm, strict=False):
            seen[i] = seen.get(i, False) or norm is not None
    silent, live = [], []
    for i, had in seen.items():
        p = parameters.get(i)
        if p is None or p.root is None or p.numel == 0:
            continue
        if had or p.gradient_seen:
            live.append(p)
        elif p.requires_grad and p.requires_grad_later is None:
            silent.append(p)
    return silent, live


def _trained_elsewhere(
    timeline: Timeline, optimizer: Optimizer, silent: Sequence[Parameter], parameters: dict[int, Parameter]
) -> list[Parameter]:
    """What other optimizers train, when each step of this one comes after a backward that led to parameters."""
    roots = {p.root for p in silent}
    for interval in timeline.intervals(optimizer.id):
        backwards = interval.backwards()
        if not any(b.reaches_parameters for b in backwards):
            return []
        if any(clears(e, optimizer.id, roots) for e in interval.between(backwards[-1].seq, interval.step.seq)):
            return []
    others = (o for o in timeline.recording.optimizers if o.id != optimizer.id and o.id in timeline.measurements)
    return [p for other in others for p in _split(other, timeline, parameters)[1]]


def _sometimes(timeline: Timeline) -> set[int]:
    """Parameters with a gradient in some steps and none in others: conditional computation, seen at work."""
    with_one: set[int] = set()
    without: set[int] = set()
    for steps in timeline.measurements.values():
        for m in steps.values():
            if not any(norm is not None for norm in m.gradient_norm):
                continue  # a step without any gradient says nothing about one module
            for i, norm in zip(m.parameters, m.gradient_norm, strict=False):
                (without if norm is None else with_one).add(i)
    return with_one & without


def _conditional(group: TensorGroup, family: _Family, partly: set[int], classes: Mapping[str, str]) -> bool:
    """Whether a parallel module of the same make was chosen instead of this one."""
    path = group.pattern.removesuffix(".*")
    parts = path.split(".")
    # Every module on the path may be the alternative: experts.5, or experts.5.fc1.weight when only that was named.
    for depth in range(len(parts), 0, -1):
        module, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
        own = {p.name[len(module) + 1 :]: p.shape for p in group.parameters if p.name.startswith(module + ".")}
        if not own:
            own = {"": group.parameters[0].shape}
        siblings = family.siblings(parent, own)
        if partly and any(p.id in partly for tensors in siblings.values() for p in tensors):
            return True
        if siblings and classes.get(parent) in ("ModuleDict", "ParameterDict"):
            return True
        if siblings and _ALTERNATIVES.search(parts[depth - 2] if depth > 1 else ""):
            return True
        if _ALTERNATIVES.search(parts[depth - 1]) and any(_ALTERNATIVES.search(name) for name in siblings):
            return True
    return False


class _Family:
    """The live parameters of one root, by what they are to each module above them."""

    def __init__(self, live: Sequence[Parameter], root: int | None) -> None:
        #: (path of the parent, name below one of its children) -> (that child, parameter)
        self._members: dict[tuple[str, str], list[tuple[str, Parameter]]] = {}
        self._known: dict[tuple[str, frozenset[tuple[str, int]]], dict[str, list[Parameter]]] = {}
        for p in live:
            if p.root == root:
                parts = p.name.split(".")
                for depth in range(len(parts)):
                    key = (".".join(parts[:depth]), ".".join(parts[depth + 1 :]))
                    self._members.setdefault(key, []).append((parts[depth], p))

    def siblings(self, parent: str, own: Mapping[str, tuple[int, ...]]) -> dict[str, list[Parameter]]:
        """Children of ``parent`` that have live tensors of the same names and as many dimensions each."""
        make = frozenset((tail, len(shape)) for tail, shape in own.items())
        known = self._known.get((parent, make))
        if known is None:
            found: dict[str, list[Parameter]] = {}
            for tail, dimensions in make:
                for name, p in self._members.get((parent, tail), ()):
                    if len(p.shape) == dimensions:
                        found.setdefault(name, []).append(p)
            known = {name: tensors for name, tensors in found.items() if len(tensors) == len(make)}
            self._known[parent, make] = known
        return known


def _finding(
    run: Recording,
    optimizer: Optimizer,
    groups: Sequence[TensorGroup],
    live: Sequence[Parameter],
    steps: int,
    *,
    within: bool,
) -> Finding:
    tensors = [p for g in groups for p in g.parameters]
    total = trainable_weights(run, {p.root for p in tensors})
    weights = sum(p.numel for p in tensors)
    small = weights < _SMALL * total and all(p.origin != "fresh" for p in tensors)
    others = len(live)
    where = "in the same steps" if within else "of the same backwards, all in other optimizers: this one trains nothing"
    subject = "It is" if len(tensors) == 1 else "They are"
    cut = _cut(run, tensors)
    return Finding(
        f"No gradient reached these parameters in {plural(steps, 'step')} of {name_optimizer(optimizer)}: "
        f"{lines_of(groups, total)}. {subject} trainable and in the optimizer; "
        f"{plural(others, 'other tensor')} did get "
        f"gradients {where}. Every step skips them, so they stay at their initial values.{cut}",
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in tensors[:50]],
            "tensors": len(tensors),
            "weights": weights,
            "share_of_trainable": round(weights / total, 4) if total else None,
            "groups": {g.pattern: len(g.parameters) for g in groups[:20]},
            "with_gradient": others,
            "steps": steps,
        },
        fix=f"Feed the output of {_named(groups)} into the loss without detach or no_grad. If this configuration does "
        "not use it, do not build it, or set requires_grad_(False) on it.",
        severity=Severity.INFO if small else None,
        about=groups[0].pattern,
    )


def _cut(run: Recording, tensors: Sequence[Parameter]) -> str:
    """Where the path to most of these tensors was seen to be cut; empty when that is not known."""
    wanted = {p.id for p in tensors}
    for found in cuts_of(run):
        if 2 * len(wanted & {p.id for p in found.parameters}) > len(wanted):
            where = place(found.cut.at)
            by = f"{found.cut.function}()" if found.cut.cause == "leaves" else found.cut.cause
            return f" The path to them is cut by {by}{f' at {where}' if where else ''}."
    return ""


def _named(groups: Sequence[TensorGroup]) -> str:
    names = [g.pattern.removesuffix(".*") for g in groups[:3]]
    return ", ".join(names) + (", ..." if len(groups) > 3 else "")
