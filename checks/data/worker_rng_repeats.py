"""TL902: worker processes, or epochs, draw the same randomness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import place, plural
from trainlint.recording.schema import Loader
from trainlint.recording.schema.samples import Draws, LoaderData

#: Chance that two independent sequences of draws agree, above which nothing is concluded.
_CHANCE = 1e-4


@check("TL902", Recording, severity="error")
def worker_rng_repeats(run: Recording) -> Iterator[Finding]:
    """Worker processes, or epochs, draw the same randomness.

    ## What goes wrong
    Each worker process of a `DataLoader` works on its own copy of the dataset. torch seeds the global generators of
    torch, `random` and NumPy anew in every worker and every epoch. A generator that is kept in the dataset
    (`self.rng = np.random.default_rng(0)`), in a transform or at module level is copied with its state: every worker
    draws the same crops, flips and noise in the same order, and so does every epoch, because the copies are thrown
    away when it ends. A `worker_init_fn` that seeds with a constant, or with the worker's number alone, does the same
    to the global generators.

    ## How it is detected
    By drawing. After the watched steps, in a copy of the process that is thrown away, two workers are started on the
    training dataset as the loader would start them (same `worker_init_fn`, collate function and generator). Each draws
    one and the same sample up to 16 times. If the draws differ within a worker there is randomness; if the whole
    sequence is equal, bit for bit, in both workers, they share it (a chance below 1 in 10,000 is required). Two
    samples drawn by turns tell this from randomness that belongs to the sample. The same is done again in the next
    epoch, and compared with the first.

    ## What to do
    Draw from the global generators, which are seeded per worker and epoch, or make the generator inside the worker:

        def worker_init_fn(worker_id):
            info = torch.utils.data.get_worker_info()
            info.dataset.rng = np.random.default_rng(info.seed)

    `info.seed` (also `torch.initial_seed()`) differs by worker and epoch. With `persistent_workers=True` the epochs
    differ, the workers still do not.

    ## When it may be wrong
    Datasets without randomness, or whose randomness is a function of the index, are silent. Repeats of the epochs
    alone are a warning when the order is shuffled (the same random numbers then meet other samples) or a
    `worker_init_fn` seeds the workers. Not looked at: workers that are spawned (their modules are imported anew),
    iterable datasets, datasets that hold an open file, processes of more than 24 GB, samples that take longer than
    about 0.1 s to make.

    ## References
    torch documentation, "Randomness in multi-process data loading"; pytorch/pytorch issue 5059.
    """
    if not any(loader.workers for loader in run.loaders):
        raise NotApplicable("no DataLoader has worker processes")
    draws = run.samples.draws if run.samples is not None else ()
    if not draws:
        raise NotObserved("the training data of workers was not drawn from; raise --timeout or --steps")
    loaders = {loader.id: loader for loader in run.loaders}
    facts = {data.loader: data for data in run.samples.loaders} if run.samples is not None else {}
    judged = False
    for first in draws:
        if first.when != "watch" or not first.straight or first.loader not in loaders:
            continue
        judged = True
        data = facts.get(first.loader) or LoaderData(first.loader, -1, -1)
        later = next((d for d in draws if d.when == "next-epoch" and d.loader == first.loader and d.straight), None)
        epochs = later is not None and not data.persistent_workers and _same_epochs(first, later)
        if _same_workers(first) or epochs:
            yield _finding(run, loaders[first.loader], data, first, _same_workers(first), epochs)
    if not judged:
        raise NotObserved(next((d.why for d in draws if d.why), "nothing was drawn"))


def _same_workers(draws: Draws) -> bool:
    """Two workers drew one sequence of versions of a sample, whatever they drew in between."""
    if len(draws.straight) < 2 or draws.straight[0] != draws.straight[1] or not _random(draws.straight[0]):
        return False
    # Randomness that counts the draws of each sample follows the sample, not the worker.
    return len(draws.turned) == 2 and draws.turned[0] != draws.turned[1]


def _same_epochs(first: Draws, later: Draws) -> bool:
    if first.index != later.index or len(first.straight) != len(later.straight):
        return False
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(first.straight, later.straight, strict=True)]
    return all(a == b and _random(a) for a, b in pairs)


def _random(sequence: Sequence[str]) -> bool:
    """The draws differ, so much that an equal second sequence is no chance."""
    n = len(sequence)
    counts = Counter(sequence)
    if len(counts) < 2:
        return False
    equal = sum(c * (c - 1) / 2 for c in counts.values())
    return float(((equal + 1) / (n * (n - 1) / 2 + 1)) ** n) < _CHANCE


def _finding(run: Recording, loader: Loader, data: LoaderData, draws: Draws, workers: bool, epochs: bool) -> Finding:
    times, versions = len(draws.straight[0]), len(set(draws.straight[0]))
    where = place(loader.at)
    name = f"the training loader ({where})" if where else "the training loader"
    drawn = f"Sample {draws.index}, drawn {times} times by each of {plural(len(draws.straight), 'worker')}, "
    came = f"came out in {plural(versions, 'version')}"
    if workers:
        again = ", and the same again in the next epoch" if epochs else ""
        text = (
            f"The {loader.workers} workers of {name} draw the same randomness. {drawn}{came}, bit for bit the same and "
            f"in the same order in both{again}."
        )
    else:
        text = (
            f"Every epoch of {name} draws the same randomness. {drawn}{came} in the first epoch, and bit for bit the "
            "same in the next."
        )
    # With another order the repeated numbers meet other samples; a worker_init_fn may count epochs by what is only seen
    # in whole ones.
    weaker = "warning" if not workers and (loader.shuffle is not False or data.worker_init) else None
    # Generators of the dataset are copied into all workers alike: they are not why the epochs alone repeat.
    kept = data.generators if workers else ()
    return Finding(
        f"{text} {_cause(data, kept)}".rstrip(),
        at=data.worker_init_at if not kept and data.worker_init_at is not None else data.at or loader.at,
        evidence={
            "workers": loader.workers,
            "draws": times,
            "versions": versions,
            "workers_equal": workers,
            "epochs_equal": epochs,
            "generators": list(data.generators),
        },
        fix="Make the generator inside the worker, in worker_init_fn: torch.utils.data.get_worker_info().dataset.rng = "
        "np.random.default_rng(torch.initial_seed()); or draw from torch's global generator, which is seeded per "
        "worker and epoch.",
        severity=weaker,
        about=f"{data.class_name}:{'workers' if workers else 'epochs'}",
    )


def _cause(data: LoaderData, generators: Sequence[str]) -> str:
    kept = ", ".join(generators[:3])
    init = f"{data.worker_init} ({place(data.worker_init_at)})" if data.worker_init_at is not None else data.worker_init
    if kept:
        return f"Copied into every worker with its state: {kept}."
    return f"The workers are seeded by worker_init_fn {init}." if init else ""
