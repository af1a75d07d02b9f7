"""TL909: a loader without batches, or one that leaves out much of its data."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, Recording, check
from trainlint.recording.describe import percent, place, plural
from trainlint.recording.schema import Backward, BatchFetched, Loader, OptimizerStep
from trainlint.recording.timeline import of_kind

#: Share of the data that drop_last may leave out of every epoch.
_SHARE = 0.2


@check("TL909", Recording, severity="error")
def loader_yields_nothing_or_little(run: Recording) -> Iterator[Finding]:
    """A loader without batches, or one that leaves out much of its data.

    ## What goes wrong
    With `drop_last=True` a dataset smaller than one batch has no batches at all. The loop runs its epochs over
    nothing, every schedule and checkpoint is as if it had trained, and the program ends with status 0. With more ranks
    each has a smaller share of the data, so a program that worked on one GPU does this on eight. Where the dataset is
    a little larger than one batch, `drop_last` leaves out up to half of it, and without shuffling it is the same half
    in every epoch.

    ## How it is detected
    Every DataLoader that was iterated is recorded with its length, the length of its dataset, its batch size and
    `drop_last`, also when no backward ever comes; passes that ended by themselves without a batch are counted too (a
    dataset without a length). An error when the program ended without any step and its loaders had delivered no batch,
    or it had built an optimizer (batches may have gone to a first evaluation);
    a warning for an empty loader beside one that trains. A training loader that drops more than 20% of its data in
    every epoch is a warning when it does not shuffle (the same samples are never seen) and an info when it does.

    ## What to do
    `drop_last=False` for small datasets and for evaluation, a smaller batch size, or check the filter that left so
    little data.

    ## When it may be wrong
    A loader that is empty on purpose (an optional second data source) gives a warning. One batch per epoch is
    full-batch training and silent. Under several ranks the dropped share is not judged: a sampler deals the data out
    first.

    ## References
    torch documentation, `torch.utils.data.DataLoader` (drop_last).
    """
    later = run.boundary.loaders if run.boundary is not None else ()
    loaders = {loader.id: loader for loader in (*later, *run.loaders)}
    if not loaders:
        raise NotApplicable("no DataLoader was iterated")
    delivered = {e.loader for e in of_kind(run, BatchFetched)}
    ended_well = run.ending.how == "exit" and not run.ending.exit_code and not run.ending.error
    trained = any(isinstance(e, (Backward, OptimizerStep)) for e in run.events)
    # With an optimizer the program was to train; batches may then have come to an evaluation (a sanity check).
    nothing = ended_well and not trained and (not delivered or bool(run.optimizers))
    said: set[tuple[str, int] | None] = set()
    for number in sorted(loaders):
        loader = loaders[number]
        place_of = (loader.at.file, loader.at.line) if loader.at is not None else None
        if _empty(run, loader):
            if place_of is None or place_of not in said:
                yield _no_batches(run, loader, nothing)
            said.add(place_of)
        elif loader.training and run.program.world_size <= 1:
            yield from _dropped(loader)


def _empty(run: Recording, loader: Loader) -> bool:
    if loader.batches is not None:
        return loader.batches == 0
    passes = [p for p in (run.samples.passes if run.samples is not None else ()) if p.loader == loader.id]
    return bool(passes) and all(p.exhausted and not p.delivered for p in passes)


def _named(loader: Loader, kind: str) -> str:
    where = place(loader.at)
    return f"The {kind} iterated at {where}" if where else f"A {kind}"


def _no_batches(run: Recording, loader: Loader, nothing: bool) -> Finding:
    size, samples = loader.batch_size, loader.samples
    if samples and size and loader.drop_last:
        why = f"drop_last=True drops the {plural(samples, 'sample')} of its dataset, fewer than one batch of {size}"
        fix = f"drop_last=False, or a batch size of at most {samples}."
    elif samples:
        why = f"its dataset has {plural(samples, 'sample')}, but its sampler gives none"
        fix = "Look at the sampler: which positions does it give, and to which rank?"
    elif samples == 0:
        why = "its dataset is empty"
        fix = "Look at what should have filled the dataset: the path, the split, the filter."
    else:
        why = "its dataset ended without giving a sample"
        fix = "Look at what should have filled the dataset: the path, the split, the filter."
    end = " No optimizer step was made: the program ends as if it had trained." if nothing else ""
    return Finding(
        f"{_named(loader, loader.class_name)} has no batches: {why}.{end}",
        at=loader.at,
        evidence={"samples": samples, "batch_size": size, "drop_last": loader.drop_last, "batches": loader.batches},
        fix=fix,
        severity=None if nothing else "warning",
        about="empty",
    )


def _dropped(loader: Loader) -> Iterator[Finding]:
    samples, size, batches = loader.samples, loader.batch_size, loader.batches
    if not loader.drop_last or not samples or not size or not batches:
        return
    left = samples - batches * size
    if left < size and left > _SHARE * samples:
        same = loader.shuffle is False
        which = "the same ones every time, because it does not shuffle" if same else "others each time"
        yield Finding(
            f"{_named(loader, 'training loader')} drops {left:,} of {samples:,} samples ({percent(left, samples)}) "
            f"from every epoch, {which}: {plural(batches, 'batch')} of {size}, and drop_last=True.",
            at=loader.at,
            evidence={"dropped": left, "samples": samples, "batch_size": size, "batches": batches},
            fix="drop_last=False, or a batch size that divides the data better.",
            severity="warning" if same else "info",
            about="dropped",
        )
