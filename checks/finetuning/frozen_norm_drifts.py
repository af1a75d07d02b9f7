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
    statistics moved. Warning: only the norms are frozen, in a network that trains, or the file brought weights and no
    statistics. Information: the frozen module was never loaded.

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
    groups: dict[tuple[int, str, bool], list[NormDrift]] = {}
    for norm in seen.norms:
        if norm.training and not norm.parameters_moved and not _is_copy(run, norm):
            alone = norm.inside_tensors == 0
            groups.setdefault((norm.root, "" if alone else norm.inside, alone), []).append(norm)
    for (root, inside, alone), norms in groups.items():
        if alone:
            norms = [n for n in norms if n.affine and n.frozen]
        if norms:
            yield _finding(run, root, inside, alone, norms)


def _is_copy(run: Recording, norm: NormDrift) -> bool:
    """It lies in an average, teacher or target of a trained module."""
    root = next((r.class_name for r in run.roots if r.id == norm.root), "")
    name = f"{root}.{norm.name}"
    return any(name.startswith(f"{shadow.name}.") for shadow in run.shadows)


def _finding(run: Recording, root: int, inside: str, alone: bool, norms: Sequence[NormDrift]) -> Finding:
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
    source = f", loaded from {file}," if file else ""
    what = inside or model
    moved = f"moved in {plural(batches, 'batch')}" if batches else "moved over the watched steps"
    if len(norms) > 1:
        subject = f"The running statistics of {plural(len(norms), 'norm')} {moved}"
    else:
        subject = f"The running statistics of {norms[0].name} {moved}"
    if alone:
        where = (
            f"their weights are frozen{source} and the layers around them train"
            if len(norms) > 1
            else (f"its weights are frozen{source} and the layers around it train")
        )
    else:
        where = f"nothing trains {what}{source} and it is in train mode"
    size = f"{worst.name}: the mean of a channel by up to {number(worst.mean_shift_max)} of its standard deviations"
    if worst.variance_ratio is not None:
        size += f", variances times {number(worst.variance_ratio)} (median)"
    fix = f"Call {what if inside else 'model'}.eval() after every train(), which sets all children."
    if alone:
        fix = "Put these norms in eval mode after every train(), or train their weights too."
    if uses(run, "lightning"):
        fix += " In Lightning: in on_train_epoch_start."
    elif uses(run, "transformers"):
        fix += " The Trainer calls model.train() itself before every step: override train() of the model."
    return Finding(
        f"{subject}: {where}. {size}.",
        at=ParameterName(f"{what}.*" if inside else worst.name),
        evidence={
            "norms": [n.name for n in norms[:50]],
            "count": len(norms),
            "module": inside,
            "batches": batches,
            "largest_mean_shift": worst.mean_shift_max,
            "variance_ratio": worst.variance_ratio,
            "file": file,
        },
        fix=fix,
        severity=severity,
        about=f"{model}.{inside}" if inside else f"{model}{'-norms' if alone else ''}",
    )
