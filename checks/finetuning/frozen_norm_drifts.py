"""TL601: frozen norms whose running statistics move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import number, plural, uses
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
    (`super().train(mode); self.backbone.eval(); return self`), or call `model.backbone.eval()` after it. In
    Lightning, do it in `on_train_epoch_start`, or freeze with `backbone.freeze()` in `setup` (which sets eval, kept
    since 2.2). torchvision has `FrozenBatchNorm2d`.

    ## When it may be wrong
    Adapting only the statistics to new data (AdaBN) is sometimes wanted. Networks whose weights something else moves
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
        if norm.training and not norm.parameters_moved and not _is_copy(run, norm):
            if not alone or (norm.affine and norm.frozen):
                groups.setdefault((norm.root, alone), []).append(norm)
    for (root, alone), norms in groups.items():
        yield _finding(run, root, alone, norms)


def _is_copy(run: Recording, norm: NormDrift) -> bool:
    """It lies in an average, teacher or target of a trained module."""
    root = next((r.class_name for r in run.roots if r.id == norm.root), "")
    name = f"{root}.{norm.name}"
    return any(name.startswith(f"{shadow.name}.") for shadow in run.shadows)


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
    if whole:
        fix = "Call .eval() on it after it was built, and again after every train() of a module around it."
    elif alone or len(insides) > 2:
        fix = (
            "After every model.train(), which sets all children: for m in model.modules(): "
            f"if isinstance(m, {norm.class_name}) and not m.weight.requires_grad: m.eval()."
        )
    else:
        calls = "; ".join(f"model.{name}.eval()" for name in insides)
        fix = f"After every model.train(), which sets all children: {calls}."
    if uses(run, "lightning"):
        fix += " In Lightning: in on_train_epoch_start."
    elif uses(run, "transformers"):
        fix += " The Trainer itself calls model.train() before every step: override train() in the model."
    return fix
