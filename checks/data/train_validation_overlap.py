"""TL905: samples that are trained on and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import percent, place, plural
from trainlint.recording.schema import Loader
from trainlint.recording.schema.samples import LoaderData, Overlap, Samples

#: Shared samples below which nothing is said, and the share of the evaluation's that they must be.
_FEWEST = 3
_SHARE = 0.02
#: Samples of a small world (bit patterns, short sequences) occur again everywhere: so many times more often than within
#: the training data they must be shared.
_BEYOND_CHANCE = 3
#: Callbacks that choose by what an evaluation says.
_CHOOSING = ("EarlyStopping", "EarlyStoppingCallback")


@check("TL905", Recording, severity="warning")
def train_validation_overlap(run: Recording) -> Iterator[Finding]:
    """Samples that are trained on and evaluated on.

    ## What goes wrong
    What the model was trained on says nothing about what it learned: it may have memorised it. An evaluation that
    contains training samples is too good by as much, chooses the wrong checkpoint and stops too late. It happens
    when two random splits are drawn with different seeds, when a validation part is cut off a dataset and the training
    goes on with the whole of it, and when the same rows stand in two files.

    ## How it is detected
    Loaders that take parts of one dataset object (`Subset`, `random_split`) are compared by position, exactly. Of
    others, samples spread over both datasets are drawn in a copy of the process, as many as fit into a quarter of a
    second, and their inputs compared by hash; where no sample can be asked for, the batches that were delivered.
    Samples of one value do not count. Samples shared by chance are known from how often the training data repeats
    itself: three times that share is required.

    ## What to do
    Split once, with one seed, and train on the part: `train, val = random_split(dataset, [0.9, 0.1],
    generator=torch.Generator().manual_seed(0))`. Remove duplicates before splitting.

    ## When it may be wrong
    Measuring on the training data beside the validation data, to see the gap between the two, is good practice: where
    another evaluation shares nothing, nothing is said. An evaluation that lies in the training data as a whole may be
    such a measurement: an info. One on exactly the training data is plain to see in the code: silent, and an info when
    something chooses by it (early stopping, best checkpoint). Augmented samples differ from what they were made of, so
    that two datasets over the same files with random transforms are not seen to overlap.

    ## References
    Kapoor and Narayanan 2023, "Leakage and the reproducibility crisis in machine-learning-based science"; Barz and
    Denzler 2020, "Do we train on test data? Purging CIFAR of near-duplicates".
    """
    later = run.boundary.loaders if run.boundary is not None else ()
    loaders = {loader.id: loader for loader in (*later, *run.loaders)}
    training = {n for n, loader in loaders.items() if loader.training}
    training |= {loader.id for loader in later if loader.training}
    if not training:
        raise NotApplicable("no DataLoader feeds the training")
    if not set(loaders) - training:
        raise NotObserved("no evaluation was seen; it may come later than the end of the first epoch")
    samples = run.samples or Samples()
    data = {d.loader: d for d in samples.loaders}
    measured = [o for o in samples.overlaps if o.training in training and o.other not in training]
    compared = {(o.training, o.other) for o in measured}
    for a in sorted(training):
        for b in sorted(set(loaders) - training):
            if (a, b) not in compared and a in data and b in data and data[a].dataset != data[b].dataset:
                measured += _by_batches(samples, a, b)
    if not measured:
        raise NotObserved("no samples of the training and the evaluation could be compared")
    clean = {o.other for o in measured} - {o.other for o in measured if o.shared}
    if clean:
        return  # what overlaps beside it measures the training
    for overlap in measured:
        finding = _judge(run, overlap, loaders, data)
        if finding is not None:
            yield finding


def _by_batches(samples: Samples, training: int, other: int) -> list[Overlap]:
    first = [h for b in samples.batches if b.loader == training for h in b.hashes if h]
    second = {h for b in samples.batches if b.loader == other for h in b.hashes if h}
    if not first or not second:
        return []
    known = set(first)
    numbers = {"training_samples": len(first), "other_samples": len(second), "shared": len(known & second)}
    return [Overlap(training, other, "values", **numbers, repeated=len(first) - len(known), whole=False)]


def _judge(run: Recording, overlap: Overlap, loaders: dict[int, Loader], data: dict[int, LoaderData]) -> Finding | None:
    if overlap.shared < _FEWEST or overlap.shared < _SHARE * overlap.other_samples:
        return None
    share = overlap.shared / overlap.other_samples
    if overlap.by == "values" and overlap.training_samples:
        if share <= _BEYOND_CHANCE * overlap.repeated / overlap.training_samples:
            return None
    chosen = [name for f in run.frameworks for name in f.callbacks if name in _CHOOSING]
    chosen += ["load_best_model_at_end" for f in run.frameworks if f.settings.get("load_best_model_at_end") is True]
    if overlap.whole and overlap.shared >= overlap.other_samples:
        everything = overlap.shared >= overlap.training_samples - overlap.repeated
        return _contained(overlap, loaders, chosen, everything) if chosen or not everything else None
    return _finding(overlap, loaders, data, share)


def _places(overlap: Overlap, loaders: dict[int, Loader]) -> tuple[str, str]:
    first, second = place(loaders[overlap.training].at), place(loaders[overlap.other].at)
    return f"training ({first})" if first else "training", f"evaluation ({second})" if second else "evaluation"


def _finding(overlap: Overlap, loaders: dict[int, Loader], data: dict[int, LoaderData], share: float) -> Finding:
    training, evaluation = _places(overlap, loaders)
    name = data[overlap.training].class_name if overlap.training in data else "dataset"
    if overlap.by == "indices":
        how = f"at the same positions of one {name}"
        of = f"{overlap.other_samples:,}"
    else:
        how = "with the same values" + ("" if overlap.whole else ", as far as samples were compared")
        of = f"{overlap.other_samples:,}" + ("" if overlap.whole else " compared")
    return Finding(
        f"{overlap.shared:,} of the {of} samples of the {evaluation} are in the {training} data too "
        f"({percent(overlap.shared, overlap.other_samples)}), {how}.",
        at=loaders[overlap.other].at,
        evidence={
            "shared": overlap.shared,
            "evaluation_samples": overlap.other_samples,
            "training_samples": overlap.training_samples,
            "share": share,
            "by": overlap.by,
            "repeated_in_training": overlap.repeated,
        },
        fix="Split once, with one seed, and train on the part only; remove duplicates before splitting.",
        about=f"{overlap.by}",
    )


def _contained(overlap: Overlap, loaders: dict[int, Loader], chosen: list[str], everything: bool) -> Finding:
    """Nothing but training data is evaluated on: a measurement, unless something is chosen by it."""
    training, evaluation = _places(overlap, loaders)
    part = "is" if everything else "is a part of"
    by = f" {chosen[0]} chooses by what the model was trained on." if chosen else ""
    return Finding(
        f"The data of the {evaluation} {part} the {training} data, all {plural(overlap.other_samples, 'sample')} of "
        f"it: it says nothing about data that was not trained on.{by}",
        at=loaders[overlap.other].at,
        evidence={
            "shared": overlap.shared,
            "evaluation_samples": overlap.other_samples,
            "training_samples": overlap.training_samples,
            "chosen_by": chosen,
        },
        fix="Hold data out, and train on the rest only.",
        severity="info",
        about="contained",
    )
