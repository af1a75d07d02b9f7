"""TL601: frozen norms whose running statistics move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.boundary import after_the_epoch
from trainlint.recording.describe import number, plural, uses
from trainlint.recording.membership import held_by
from trainlint.recording.schema import NormDrift
from trainlint.recording.weight_loads import file_name


@check("TL601", Recording, severity="error", catalog="O18")
def frozen_norm_drifts(run: Recording) -> Iterator[Finding]:
    """Frozen norms whose running statistics move.

    ## What goes wrong
    `requires_grad_(False)` freezes the weights of a batch norm and not its running mean and variance: in train mode
    every forward moves them toward the new data. The frozen network is then not the pretrained one any more. What is
    trained on top of it sees the statistics of each batch, evaluation uses the running ones, and the two differ; a
    checkpoint that saves only the head cannot be put back on the original backbone.

    ## How it is detected
    The running statistics of every norm are compared between the first backward and the end of the watch. A norm
    counts as frozen when nothing trains it: no optimizer holds a parameter of it that is trainable or gets a
    gradient.

    Error: it lies in a module none of whose parameters are trained, these and the statistics came from a file, and the
    statistics moved. Warning: only the norms are frozen and most of the layers beside them train, or the file brought
    weights and no statistics. Information: the frozen module was never loaded.

    ## What to do
    Put the frozen part in eval mode, and again after every `model.train()`, which sets all children: override `train`
    (`super().train(mode); self.backbone.eval(); return self`), or call `model.backbone.eval()` after it. Lightning
    (since 2.2) keeps the modes that it finds and never calls `train()`: an override of it does nothing there; call
    `self.backbone.eval()` in `on_train_epoch_start`. torchvision has `FrozenBatchNorm2d`.

    ## When it may be wrong
    Adapting only the statistics to new data (AdaBN) is sometimes wanted. Norms left trainable in a network whose other
    layers are frozen (Lightning's `BackboneFinetuning` does so) and those that an optimizer holds from the next epoch
    on are silent. Networks whose weights something else moves
    (an average, a target network) and copies of the trained network are left alone, and so are norms with a momentum
    of 0 or in eval mode, whose statistics do not move.

    ## References
    torch.nn.BatchNorm2d; Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation".
    """
    seen = run.provenance
    if seen is None or seen.norms_compared is None:
        raise NotObserved("running statistics were not looked at twice: fewer than two backwards; raise --steps")
    if not seen.norms_compared:
        raise NotApplicable("no norm with running statistics in any module")
    if not seen.norms_untrained:
        raise NotApplicable("every norm with running statistics is trained")
    groups: dict[tuple[int, bool], list[NormDrift]] = {}
    for norm in seen.norms:
        alone = norm.inside_tensors == 0
        if norm.training and not norm.parameters_moved and not _is_copy(run, norm) and not _left_out(run, norm):
            if not alone or (norm.affine and norm.frozen):
                groups.setdefault((norm.root, alone), []).append(norm)
    for (root, alone), norms in groups.items():
        yield _finding(run, root, alone, norms)


def _is_copy(run: Recording, norm: NormDrift) -> bool:
    """It lies in an average, teacher or target of a trained module."""
    root = next((r.class_name for r in run.roots if r.id == norm.root), "")
    name = f"{root}.{norm.name}"
    return any(name.startswith(f"{shadow.name}.") for shadow in run.shadows)


def _left_out(run: Recording, norm: NormDrift) -> bool:
    """It was left trainable while the layers around it were frozen, or all of it is trained from the next epoch on."""
    around = [p for p in run.parameters if p.root == norm.root and p.name.startswith(f"{norm.inside}.")]
    own = [p for p in around if p.name.startswith(f"{norm.name}.")]
    frozen = sum(p.numel for p in around if not p.requires_grad)
    if norm.affine and not norm.frozen and 2 * frozen > sum(p.numel for p in around):
        return True
    later = after_the_epoch(run)
    held = held_by(later) if later is not None else {}
    return bool(own) and all(p.id in held for p in own)


def _finding(run: Recording, root: int, alone: bool, norms: Sequence[NormDrift]) -> Finding:
    model = next((r.class_name for r in run.roots if r.id == root), "the model")
    from_file = [n for n in norms if n.origin != "fresh"]
    loaded = 2 * sum(n.inside_loaded for n in norms) >= sum(n.inside_tensors for n in norms)
    if alone:
        severity = Severity.WARNING if 2 * len(from_file) >= len(norms) else Severity.INFO
    elif loaded and 2 * len(from_file) >= len(norms):
        severity = Severity.ERROR
    else:
        severity = Severity.WARNING if loaded else Severity.INFO
    worst = max(norms, key=lambda n: n.mean_shift_max or 0.0)
    batches = max((n.batches or 0 for n in norms), default=0)
    file = file_name(from_file[0].origin) if from_file else ""
    source = f" (from {file})" if file else ""
    insides = list(dict.fromkeys(n.inside for n in norms))
    whole = "" in insides
    what = f"all of {model}" if whole else ", ".join(insides[:3]) + (", ..." if len(insides) > 3 else "")
    moved = f"moved in {plural(batches, 'batch')}" if batches else "moved over the watched steps"
    subject = norms[0].name or model if len(norms) == 1 else plural(len(norms), "norm")
    where = (
        f"frozen weights{source} between layers that train"
        if alone
        else f"nothing trains {what}{source}, and train mode is on"
    )
    size = f"{worst.name}: a channel's mean by up to {number(worst.mean_shift_max)} of its standard deviations"
    if worst.variance_ratio is not None:
        size += f", variances times {number(worst.variance_ratio)} (median)"
    return Finding(
        f"The running statistics of {subject} {moved}: {where}. {size}.",
        at=ParameterName(worst.name if whole or alone else f"{insides[0]}.*"),
        evidence={
            "norms": [n.name for n in norms[:50]],
            "count": len(norms),
            "modules": insides[:50],
            "batches": batches,
            "largest_mean_shift": worst.mean_shift_max,
            "variance_ratio": worst.variance_ratio,
            "file": file,
        },
        fix=_fix(run, alone, [i for i in insides if i], whole, worst),
        severity=severity,
        about=f"{model}{'-norms' if alone else ''}",
    )


def _fix(run: Recording, alone: bool, insides: Sequence[str], whole: bool, norm: NormDrift) -> str:
    lightning = uses(run, "lightning")
    model = "self" if lightning else "model"
    if whole:
        return "Call .eval() on it after it was built, and again after every train() of a module around it."
    if alone or len(insides) > 2:
        calls = (
            f"for m in {model}.modules(): if isinstance(m, {norm.class_name}) and not m.weight.requires_grad: m.eval()"
        )
    else:
        calls = "; ".join(f"{model}.{name}.eval()" for name in insides)
    if lightning:
        return f"In on_train_epoch_start: {calls}. (Lightning keeps the modes it finds and does not call train().)"
    fix = f"After every model.train(), which sets all children: {calls}."
    if uses(run, "transformers"):
        fix += " The Trainer itself calls model.train() before every step: override train() in the model."
    return fix
