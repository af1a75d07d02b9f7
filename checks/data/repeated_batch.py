"""TL901: the same batch, or the same order, again and again; sorted data that nobody shuffles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import framework_settings, place, plural
from trainlint.recording.schema import BatchFetched, Loader
from trainlint.recording.schema.samples import LabelOrder, LoaderData, LoaderPass, Samples
from trainlint.recording.timeline import of_kind

#: The same batch so often in a row is no chance.
_IN_A_ROW = 3
#: Positions that two passes must have in common to be called the same order.
_POSITIONS = 8


@check("TL901", Recording, severity="warning")
def repeated_batch(run: Recording) -> Iterator[Finding]:
    """The same batch, or the same order, again and again; sorted data that nobody shuffles.

    ## What goes wrong
    `next(iter(loader))` inside the loop opens the loader anew for every step and, without shuffling, trains on its
    first batch for ever. A `DistributedSampler` without `set_epoch`, or a generator that is seeded again for every
    epoch, gives each epoch the order of the first: the same samples always stand together in a batch, and a cyclic
    schedule always meets the same ones. Data that lies sorted by class and is not shuffled shows the model one class
    for hundreds of steps, then the next.

    ## How it is detected
    - Batches: a hash of each batch and the positions that its sampler asked for. At least three in a row that are
      equal, though the loader has more than one batch and the samples in it differ.
    - Order: the first positions of one pass of the training beside those of the next (the end of the epoch is brought
      on early), for torch's own shuffling samplers. At least eight positions, all equal.
    - Sorted: a loader that does not shuffle, whose dataset's classes (`targets`, `labels`, the tensors of a
      `TensorDataset`, or samples drawn in a copy of the process) form hardly more runs than there are classes, each
      longer than a batch.

    ## What to do
    One `for` loop over the loader per epoch, or one `iter(loader)` kept outside of the loop. `sampler.set_epoch(epoch)`
    at the beginning of every epoch (Lightning, accelerate and the transformers Trainer do it). A generator seeded once,
    before the loop. `shuffle=True` for sorted data.

    ## When it may be wrong
    Training on one batch on purpose, to see whether the model can learn at all, is right for a test: Lightning's
    `overfit_batches` is silent, a loop of one's own is not told apart. A loader with one batch per epoch, data in the
    order of time, language models without shuffling and custom samplers (curriculum, buckets, classes in turn) are
    silent.

    ## References
    torch documentation, `torch.utils.data.distributed.DistributedSampler` ("Warning: ... calling the set_epoch() method
    at the beginning of each epoch is necessary"); Bottou 2012, "Stochastic Gradient Descent Tricks", section 2.2.
    """
    training = _training(run)
    if not training:
        raise NotApplicable("no DataLoader feeds the training")
    samples = run.samples
    if samples is None:
        raise NotObserved("the order of the samples was not recorded")
    data = {d.loader: d for d in samples.loaders}
    said = set()
    for loader in training:
        if loader.batches == 1:
            continue
        found = _same_batch(run, samples, loader) or _same_order(run, samples, data, loader)
        if found is None and loader.shuffle is False:
            found = _sorted(samples, data.get(loader.id), loader)
        # A loader that is made anew for every epoch is one to whoever reads this.
        if found is not None and (loader.at, found.about) not in said:
            said.add((loader.at, found.about))
            yield found


def _training(run: Recording) -> list[Loader]:
    later = run.boundary.loaders if run.boundary is not None else ()
    known = {loader.id: loader for loader in (*later, *run.loaders) if loader.training}
    return [known[n] for n in sorted(known)]


def _named(loader: Loader) -> str:
    where = place(loader.at)
    return f"the training loader ({where})" if where else "the training loader"


# ------------------------------------------------------------------------------------------------ one batch


def _same_batch(run: Recording, samples: Samples, loader: Loader) -> Finding | None:
    trainer = framework_settings(run, "lightning")
    if trainer.get("overfit_batches") or trainer.get("fast_dev_run") or trainer.get("num_training_batches") == 1:
        return None  # asked for
    batches = [e for e in of_kind(run, BatchFetched) if e.loader == loader.id]
    prints = [e.fingerprint for e in batches]
    if len(prints) < _IN_A_ROW or None in prints or len(set(prints)) > 1:
        return None
    passes = [p for p in samples.passes if p.loader == loader.id and p.delivered]
    firsts = {p.indices[0] for p in passes if p.indices}
    same_positions = len(passes) >= _IN_A_ROW and len(firsts) == 1 and all(p.delivered == 1 for p in passes)
    mine = [b.hashes for b in samples.batches if b.loader == loader.id and any(b.hashes)]
    if len(set(mine)) > 1:
        return None  # what the fingerprints do not tell apart, samples do
    hashes = {h for batch in mine for h in batch if h}
    more = loader.samples is None or loader.samples > max(len(hashes), len(next(iter(firsts), ())))
    if not more or not (len(hashes) > 1 or same_positions):
        return None  # all samples are alike, or there are no others
    why = "every step opens the loader anew and takes its first batch" if same_positions else "it delivers nothing else"
    of = f" of {plural(loader.batches, 'batch')}" if loader.batches else ""
    return Finding(
        f"The training saw one and the same batch {len(prints)} times: the first{of} of {_named(loader)}; {why}.",
        at=batches[0].at or loader.at,
        evidence={"equal_batches": len(prints), "batches": loader.batches, "passes": len(passes)},
        fix="Loop over the loader (for batch in loader), or make the iterator once, outside of the loop. If this is a "
        "test of whether one batch can be learned, take it once before the loop.",
        about="batch",
    )


# ------------------------------------------------------------------------------------------------ one order


def _same_order(run: Recording, samples: Samples, data: dict[int, LoaderData], loader: Loader) -> Finding | None:
    """Two passes of the training in one shuffled order."""
    mine = data.get(loader.id)
    if mine is None or not mine.sampler_of_torch or not loader.shuffle:
        return None
    passes = [p for p in samples.passes if p.loader == loader.id and p.fed and p.indices]
    for first, second in pairwise(passes):
        common = _common(first, second)
        if common < _POSITIONS:
            continue
        told = mine.sampler == "DistributedSampler"
        why = (
            f"its DistributedSampler stood at epoch {second.epoch} both times (set_epoch was not called)"
            if told and first.epoch == second.epoch
            else "the generator that shuffles starts from the same seed every time"
        )
        return Finding(
            f"Two epochs of {_named(loader)} had one and the same shuffled order: their first {common} samples are at "
            f"the same positions ({', '.join(map(str, first.indices[0][:6]))}, ...); {why}.",
            at=loader.at,
            evidence={"equal_positions": common, "sampler": mine.sampler, "epoch": second.epoch},
            fix="Call loader.sampler.set_epoch(epoch) at the beginning of every epoch."
            if told
            else "Seed the generator once, before the first epoch (or with a number that contains the epoch).",
            about="order",
        )
    return None


def _common(first: LoaderPass, second: LoaderPass) -> int:
    """Positions that both passes began with; 0 when any differs."""
    pairs = list(zip(first.indices, second.indices, strict=False))
    return sum(len(a) for a, _ in pairs) if all(a == b for a, b in pairs) else 0


# ------------------------------------------------------------------------------------------------ sorted


def _sorted(samples: Samples, data: LoaderData | None, loader: Loader) -> Finding | None:
    order = next((o for o in samples.labels if o.loader == loader.id), None)
    if order is None or data is None or data.sampler != "SequentialSampler" or not _in_runs(order, loader):
        return None
    seen = [b.labels for b in samples.batches if b.loader == loader.id and b.labels]
    if len(seen) < 2 or any(_changes(labels) > 1 for labels in seen):
        return None
    held = len({label for labels in seen for label in labels})
    source = f" ({order.source})" if order.source else ""
    looked = (
        f"the classes of its {order.looked_at:,} samples{source}"
        if order.whole
        else f"the classes of {order.looked_at} samples spread over it"
    )
    return Finding(
        f"{_named(loader).capitalize()} does not shuffle, and its data is sorted by class: {looked} form "
        f"{plural(order.runs, 'run')} of {order.classes} classes. The first {plural(len(seen), 'batch')} held "
        f"{plural(held, 'class')} only.",
        at=loader.at,
        evidence={"runs": order.runs, "classes": order.classes, "looked_at": order.looked_at, "seen_classes": held},
        fix="shuffle=True (or a RandomSampler).",
        about="sorted",
    )


def _in_runs(order: LabelOrder, loader: Loader) -> bool:
    """Hardly more runs than classes, and each longer than a batch."""
    if order.classes < 2 or order.runs > order.classes + order.classes // 10:
        return False
    length = order.looked_at if order.whole else loader.samples
    return length is not None and length / order.runs >= 2 * (loader.batch_size or 1)


def _changes(labels: Sequence[int]) -> int:
    return sum(1 for a, b in pairwise(labels) if a != b)
