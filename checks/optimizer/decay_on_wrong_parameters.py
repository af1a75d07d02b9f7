"""TL207: weight decay on norms and biases, and splits that miss them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, percent, plural, uses
from trainlint.recording.length import planned_length
from trainlint.recording.projection import projection
from trainlint.recording.schema import Optimizer, Parameter, ParamGroup

#: Shrink over the whole run from which on decay that somebody chose is worth a word, and decay that is a default.
_CHOSEN, _DEFAULT = 0.02, 0.2


@check("TL207", Recording, severity="warning", catalog="O6")
def decay_on_wrong_parameters(run: Recording) -> Iterator[Finding]:
    """Weight decay on norms and biases, and splits that miss them.

    ## What goes wrong
    Most recipes decay matrices only: the scale of a norm layer has its place around 1 and a bias anywhere, and pulling
    them to 0 regularises nothing. So programs split the parameters into a group with decay and one without. When the
    split goes by names, it silently misses what is called otherwise: `["bias", "LayerNorm.weight"]` fits no norm of a
    Llama, ViT or GPT. Then one group is empty or holds the biases only, and the norms are decayed after all; or
    nothing is decayed, because the pattern fits everything.

    ## How it is detected
    Parameters are known by the module that owns them, not by name. A split is taken to be intended when an optimizer
    has groups with weight decay and groups without, and those without hold no matrices besides embeddings. It was
    missed, a warning, when the group without decay is empty, or holds biases or some of the norms, while norms are
    decayed; or when the group with decay is empty and matrices sit in the one without.

    Without a split, decay on norms (and biases with them) is an information, and only where it matters: the shrink
    that decay alone causes is computed from the learning rate over the whole planned run. Under 2% nothing is said
    (under 20% for a value that is the optimizer's default).

    ## What to do
    Split by shape or by owner instead of by name: `[p for p in model.parameters() if p.ndim >= 2]` with decay, the
    rest without. Count both groups once. In transformers, let the Trainer make the groups: it goes by module class.

    ## When it may be wrong
    Excluding biases alone, or norms alone, can be meant: the first is reported as a warning, the second is not. A norm
    layer is told by its class name; one that does not have "norm" in it is not known. The shrink assumes that gradients
    do not push back, which they do. For optimizers other than torch's SGD and decoupled Adams no shrink is computed.

    ## References
    He et al. 2019, "Bag of Tricks for Image Classification with Convolutional Neural Networks" (no bias decay);
    torch.optim, "Per-parameter options".
    """
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built")
    stepped = [o for o in run.optimizers if o.steps]
    if not stepped:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    if not any(_decay(g) for o in stepped for g in o.groups):
        raise NotApplicable("no param group has weight decay")
    parameters = {p.id: p for p in run.parameters}
    for optimizer in stepped:
        split = _Split.of(optimizer, parameters)
        if split is None:
            continue
        found = _missed(run, optimizer, split)
        if found is None and not split.without and split.spared:
            found = _shrinking(run, optimizer, split)
        if found is not None:
            yield found


def _decay(group: ParamGroup) -> float:
    value = group.hyperparameters.get("weight_decay")
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


@dataclass
class _Split:
    """The trainable parameters of one optimizer, with and without decay."""

    with_decay: list[ParamGroup] = field(default_factory=list)
    without: list[ParamGroup] = field(default_factory=list)
    decayed: list[Parameter] = field(default_factory=list)
    free: list[Parameter] = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: Optimizer, parameters: dict[int, Parameter]) -> _Split | None:
        """``None`` when nothing is decayed."""
        out = cls()
        for group in optimizer.groups:
            if not isinstance(group.hyperparameters.get("weight_decay"), (int, float)):
                continue  # an optimizer that has no such thing
            own = [p for i in group.parameters if (p := parameters.get(i)) and p.requires_grad and p.root is not None]
            (out.with_decay if _decay(group) else out.without).append(group)
            (out.decayed if _decay(group) else out.free).extend(own)
        return out if out.with_decay else None

    @property
    def spared(self) -> list[Parameter]:
        """Decayed, though most recipes spare them."""
        return [p for p in self.decayed if p.kind in ("norm", "bias")]

    @property
    def value(self) -> float:
        return max(_decay(g) for g in self.with_decay)

    def by_kind(self) -> bool:
        """Whether the groups without decay hold what recipes spare: no matrices besides embeddings."""
        return not any(_matrix(p) for p in self.free)


def _matrix(p: Parameter) -> bool:
    return p.kind == "weight" and len(p.shape) > 1


def _weight(p: Parameter) -> bool:
    """The scale of a norm, not its shift."""
    return p.kind == "norm" and not p.name.rpartition(".")[2].startswith("bias")


def _missed(run: Recording, optimizer: Optimizer, split: _Split) -> Finding | None:
    """A split that was intended and did not come out."""
    if not split.without:
        return None
    norms = [p for p in split.decayed if _weight(p)]
    empty = not any(g.parameters for g in split.without)
    if empty and split.spared:
        text = (
            f"its group without weight decay is empty, and {_said(split.spared, run)} are decayed by "
            f"{number(split.value)} like everything else"
        )
        return _split_finding(run, optimizer, split, split.spared, "empty-no-decay", text)
    if not any(g.parameters for g in split.with_decay):
        matrices = [p for p in split.free if _matrix(p)]
        if not matrices:
            return None  # only biases are trained (BitFit), or only norms
        text = (
            f"its group with weight_decay={number(split.value)} is empty: all {plural(len(split.free), 'tensor')}, "
            f"{plural(len(matrices), 'matrix').replace('matrixes', 'matrices')} among them, sit in the group without, "
            "so nothing is decayed"
        )
        return _split_finding(run, optimizer, split, matrices, "empty-decay", text)
    if empty or not split.by_kind() or not norms:
        return None
    kept = [p for p in split.free if _weight(p)]
    biases = [p for p in split.free if p.name.rpartition(".")[2].startswith("bias")]
    if kept:
        text = f"its group without weight decay holds {plural(len(kept), 'norm')} and misses {_said(norms, run)}, which"
    elif biases:
        text = f"its group without weight decay holds biases and no norm: {_said(norms, run)}, which"
    else:
        return None
    text += f" {'is' if len(norms) == 1 else 'are'} decayed by {number(split.value)}"
    return _split_finding(run, optimizer, split, norms, "norms-missed", text)


def _said(chosen: Sequence[Parameter], run: Recording) -> str:
    return lines_of(by_module(chosen, [p for p in run.parameters if p.requires_grad]), None, most=3)


def _split_finding(
    run: Recording, optimizer: Optimizer, split: _Split, chosen: Sequence[Parameter], about: str, text: str
) -> Finding:
    shrink = _shrink(run, optimizer, split)
    tail = ""
    if about != "empty-decay" and shrink is not None and shrink.share >= _CHOSEN:
        tail = f" Over {plural(shrink.steps, 'step')} decay alone shrinks them by {percent(shrink.share, 1)}."
    names = [p.name for p in chosen]
    pattern = f"fits {names[0]}, too," if about == "empty-decay" else f"does not fit {names[0]}"
    return Finding(
        f"{name_optimizer(optimizer)} splits its parameters by weight decay, but {text}.{tail} A list of name patterns "
        f"that {pattern} would do this.",
        at=optimizer.at,
        evidence={
            "weight_decay": split.value,
            "decayed": len(split.decayed),
            "without_decay": len(split.free),
            "parameters": names[:50],
            "tensors": len(names),
            "shrink": shrink.share if shrink else None,
        },
        fix=_fix(run),
        about=about,
    )


def _fix(run: Recording) -> str:
    split = "p.ndim >= 2 with decay, the rest without"
    if uses(run, "transformers"):
        return f"Let the Trainer make the groups (TrainingArguments weight_decay), or split by shape: {split}."
    where = " in configure_optimizers" if uses(run, "lightning") else ""
    return f"Split by shape instead of by name{where}: {split}; look at the size of both groups."


# -------------------------------------------------------------------------------------------- one group for all


@dataclass(frozen=True)
class _Shrink:
    """What decay alone takes from a weight over the planned run."""

    share: float
    steps: int
    source: str


def _shrink(run: Recording, optimizer: Optimizer, split: _Split) -> _Shrink | None:
    """1 - prod(1 - lr * weight_decay) over the planned steps; ``None`` where rate, length or formula are not known."""
    planned = planned_length(run, optimizer.id)
    group = max(split.with_decay, key=_decay)
    factor = _per_rate(optimizer, group)
    if planned is None or factor is None:
        return None
    course = projection(run, optimizer.id, group.index, planned=planned)
    if not course.points or course.horizon_source in ("schedule", "open"):
        return None
    log = 0.0
    points = course.points
    last = course.horizon_steps or points[-1][0]
    for index, (step, rate) in enumerate(points):
        until = points[index + 1][0] if index + 1 < len(points) else last + 1
        part = min(rate * factor, 0.999)
        log += max(until - step, 0) * math.log1p(-part)
    return _Shrink(-math.expm1(log), last, planned[1])


def _per_rate(optimizer: Optimizer, group: ParamGroup) -> float | None:
    """By what share a step at rate 1 shrinks a weight that gets no gradient."""
    if not optimizer.defined_in.startswith("torch.optim"):
        return None
    decay = _decay(group)
    if optimizer.class_name == "AdamW" or group.hyperparameters.get("decoupled_weight_decay"):
        return decay
    if optimizer.class_name == "SGD":
        momentum = group.hyperparameters.get("momentum")
        damped = group.hyperparameters.get("dampening")
        if isinstance(momentum, (int, float)) and 0 <= momentum < 1 and not damped:
            return decay / (1 - momentum)
    return None


def _shrinking(run: Recording, optimizer: Optimizer, split: _Split) -> Finding | None:
    spared = split.spared
    norms = sum(1 for p in spared if p.kind == "norm")
    shrink = _shrink(run, optimizer, split) if norms else None
    if shrink is None:
        return None
    default = optimizer.signature_defaults.get("weight_decay")
    chosen = not (isinstance(default, (int, float)) and math.isclose(default, split.value, rel_tol=1e-6))
    if shrink.share < (_CHOSEN if chosen else _DEFAULT):
        return None
    return Finding(
        f"{name_optimizer(optimizer)} decays {plural(norms, 'norm tensor')} and {plural(len(spared) - norms, 'bias')} "
        f"by {number(split.value)} like the matrices: over {plural(shrink.steps, 'step')} ({shrink.source}) decay "
        f"alone shrinks them by {percent(shrink.share, 1)}.",
        at=optimizer.at,
        evidence={
            "weight_decay": split.value,
            "norms": norms,
            "biases": len(spared) - norms,
            "shrink": shrink.share,
            "steps": shrink.steps,
            "default_value": not chosen,
        },
        fix="If that is not meant, give them a param group with weight_decay 0: p.ndim < 2 selects them.",
        severity=Severity.INFO,
        about="one-group",
    )
