"""TL506: positives far rarer than negatives, and nothing in the loss that says so."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import number, percent, plural
from trainlint.recording.loss_calls import LossLine, lines_of, none_called

_LOSSES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
#: Positives below this share of the targets are called rare, once so many targets were seen.
_RARE = 0.05
_ENOUGH = 200


@check("TL506", Recording, severity="info", catalog="O13")
def class_imbalance_unweighted(run: Recording) -> Iterator[Finding]:
    """Positives far rarer than negatives, and nothing in the loss that says so.

    ## What goes wrong
    Where one target in a hundred is positive, "always negative" is right 99 times and has a small loss. A model may
    stay there for a long time: the loss falls quickly at first, accuracy looks excellent, and recall is 0.

    ## How it is detected
    The targets of the binary losses are counted over the watched batches. Reported when positives are there, are
    below 5% of at least 200 targets, and the loss is a plain mean or sum without `pos_weight` or `weight`.

    ## What to do
    It depends on what is asked of the model. `pos_weight` (negatives per positive, or its square root) trades
    precision for recall; a bias of log(positives / negatives) in the last layer removes the slow start and changes
    nothing else; else watch precision and recall rather than accuracy.

    ## When it may be wrong
    Probabilities that should be calibrated are best learned without weights. Rows with exactly one positive
    (classification by binary losses) are rare by construction, and batches that are all of one class (a
    discriminator's) are no imbalance: silent, as are losses with `reduction="none"`, which are weighted afterwards
    (focal loss). Only the first batches are counted.

    ## References
    torch documentation, `torch.nn.BCEWithLogitsLoss` (pos_weight); Lin et al. 2017, "Focal Loss for Dense Object
    Detection", section 3.3 (initialisation of the bias).
    """
    lines = lines_of(run, _LOSSES)
    if not lines:
        why = none_called(run)
        if why:
            raise NotObserved(why)
        raise NotApplicable("no binary cross-entropy is trained on")
    enough = False
    for line in lines:
        plain = all(c.reduction != "none" and not {"weight", "pos_weight"} & set(c.options) for c in line.calls)
        counted = [t for t in line.targets if t.positives is not None and t.positions]
        targets, positives = sum(t.positions for t in counted), sum(t.positives or 0 for t in counted)
        enough = enough or targets >= _ENOUGH
        if plain and targets >= _ENOUGH and 0 < positives < _RARE * targets and not _one_per_row(line):
            yield _finding(line, targets, positives)
    if not enough:
        raise NotObserved(f"fewer than {_ENOUGH} binary targets were seen; raise --steps")


def _one_per_row(line: LossLine) -> bool:
    """Every sample has exactly one positive: one-hot targets."""
    return all(
        t.samples and t.positions > t.samples and t.positives == t.samples
        for t in line.targets
        if t.positives is not None
    )


def _finding(line: LossLine, targets: int, positives: int) -> Finding:
    weight = (targets - positives) / positives
    return Finding(
        f"{line.name}: {positives:,} of {targets:,} targets of the first {plural(len(line.calls), 'batch')} are "
        f"positive ({percent(positives, targets)}), {number(weight)} negatives for each, and the loss has no weights: "
        "always answering negative costs little.",
        at=line.at,
        evidence={"positives": positives, "targets": targets, "negatives_per_positive": weight},
        fix=f"If positives matter more: pos_weight=torch.tensor({number(weight)}) or less in "
        "binary_cross_entropy_with_logits; judge by precision and recall.",
        about=line.function,
    )
