"""TL906: batch norm over one or two samples."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, check
from trainlint.recording.describe import plural
from trainlint.recording.schema import Loader
from trainlint.recording.schema.samples import NormBatch

#: Samples of which there are too few for statistics.
_FEW = 2
#: Values per channel that make up for few samples.
_VALUES = 256


@check("TL906", Recording, severity="warning")
def tiny_batch_norm(run: Recording) -> Iterator[Finding]:
    """Batch norm over one or two samples.

    ## What goes wrong
    In train mode batch norm takes mean and variance from the batch. Over two samples of a feature vector the result is
    +1 and -1, whatever they were; over one image it depends on that image alone. The running statistics, averages of
    such estimates, are what the model is evaluated with, so it behaves differently the moment it is put into eval. What
    counts is the batch of one rank and one micro-batch: accumulation does not help. With a single value per channel
    torch raises an error, often only in the last, shorter batch of an epoch.

    ## How it is detected
    The shapes that reach batch norm modules in train mode, with gradients. Reported when at least half of the calls
    of a module had one or two samples and fewer than 256 values per channel (height times width times samples); an info
    with more values. The last batch of an epoch is calculated from the length of the dataset: a warning when it has
    one sample, no `drop_last`, and a norm sees one value per channel of it, at which torch raises.

    ## What to do
    A larger batch per rank; `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` under several ranks; GroupNorm or
    LayerNorm, which do not look at the batch; pretrained batch norms in eval mode. `drop_last=True` for the last batch.

    ## When it may be wrong
    Image-to-image models that use batch norm at batch size 1 as instance norm, in train mode at test time too
    (pix2pix), mean it. Norms in eval mode, group, layer and instance norm, norms applied to weights, and inputs whose
    first dimension holds many nodes, points or time steps are silent. Compiled models are not seen.

    ## References
    Ioffe and Szegedy 2015, "Batch Normalization"; Wu and He 2018, "Group Normalization", section 4.1 (error against
    batch size); Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm".
    """
    norms = run.samples.norms if run.samples is not None else ()
    if not norms:
        compiled = any("OptimizedModule" in root.wrappers for root in run.roots)
        if compiled:
            raise NotObserved("norms in compiled models are not seen; run without torch.compile")
        raise NotApplicable("no batch norm was used in train mode")
    modules: dict[tuple[int | None, str], list[NormBatch]] = {}
    for norm in norms:
        modules.setdefault((norm.root, norm.module), []).append(norm)
    tiny = {key: calls for key, calls in modules.items() if _mostly_few(calls)}
    for root in sorted({key[0] for key in tiny}, key=lambda r: -1 if r is None else r):
        yield _finding({key: calls for key, calls in tiny.items() if key[0] == root}, len(modules))
    if not tiny:
        for loader in run.loaders:
            yield from _last_batch(run, loader, norms)


def _mostly_few(calls: list[NormBatch]) -> bool:
    few = sum(c.calls for c in calls if c.samples <= _FEW)
    return 2 * few >= sum(c.calls for c in calls)


def _finding(tiny: dict[tuple[int | None, str], list[NormBatch]], modules: int) -> Finding:
    few = [c for calls in tiny.values() for c in calls if c.samples <= _FEW]
    least = min(few, key=lambda c: (c.values, c.module))
    more = f" and {plural(len(tiny) - 1, 'more batch norm')}" if len(tiny) > 1 else ""
    take = "take their" if len(tiny) > 1 else "takes its"
    values = f"{plural(least.values, 'value')} per channel" if least.values != least.samples else "as many values"
    return Finding(
        f"{least.class_name} {least.module or '(the model)'}{more}, of {modules}, {take} statistics in training "
        f"from {plural(least.samples, 'sample')}: {values}, in {sum(c.calls for c in few)} of "
        f"{sum(c.calls for calls in tiny.values() for c in calls)} calls.",
        at=ParameterName(least.module) if least.module else None,
        evidence={"modules": len(tiny), "samples": least.samples, "values_per_channel": least.values},
        fix="A larger batch per rank (accumulation does not help), SyncBatchNorm under several ranks, GroupNorm, or "
        "pretrained norms in eval mode.",
        severity=None if least.values < _VALUES else "info",
        about="tiny",
    )


def _last_batch(run: Recording, loader: Loader, norms: tuple[NormBatch, ...]) -> Iterator[Finding]:
    """A last batch of one sample, which a norm over single values cannot take."""
    size, samples = loader.batch_size, loader.samples
    if not loader.training or loader.drop_last or not size or not samples or run.program.world_size > 1:
        return
    if size < 2 or samples % size != 1 or loader.batches != samples // size + 1 or samples < size:
        return
    of_batch = [n for n in norms if n.samples == size]
    if not of_batch or len(of_batch) < len(norms):
        return  # something else than one batch is normalised
    single = next((n for n in of_batch if n.values == n.samples), None)
    if single is None:
        return
    yield Finding(
        f"The last batch of every epoch has 1 sample ({samples:,} samples in batches of {size}, drop_last=False), and "
        f'{single.class_name} {single.module} has one value per channel of it: torch raises "Expected more than 1 '
        'value per channel when training" there.',
        at=loader.at,
        evidence={"samples": samples, "batch_size": size, "last_batch": 1},
        fix="drop_last=True, or a batch size that leaves more than one sample.",
        about="last",
    )
