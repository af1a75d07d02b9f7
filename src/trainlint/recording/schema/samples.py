"""The samples that the data loaders really delivered, by hashes of their values, and what drawing from them showed."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


@dataclass(frozen=True)
class LoaderPass:
    """One pass over a DataLoader, as it stood when the part of the recording that it began in was closed.

    ``number`` counts all passes of the process. ``opened`` is the ``seq`` of the last event before it began.
    """

    number: int
    loader: int
    opened: int
    delivered: int = 0
    #: It came to its end by itself.
    exhausted: bool = False
    #: A backward followed one of its batches before another loader's batch came.
    fed: bool = False
    #: Positions in the dataset that the sampler gave for its first batches (the first of each batch); empty where they
    #: are no integers.
    indices: tuple[tuple[int, ...], ...] = ()
    #: What a ``DistributedSampler`` was last told by ``set_epoch``.
    epoch: int | None = None


@dataclass(frozen=True)
class LoaderData:
    """What a DataLoader reads from, and how."""

    loader: int
    #: Number of the dataset object: loaders with the same number read from one object.
    dataset: int
    #: Number of the dataset below all ``Subset`` around it.
    base: int
    class_name: str = ""
    #: It has positions that can be asked for (not an ``IterableDataset``).
    mapped: bool = True
    #: Class of the sampler that orders the samples, and whether that order comes from torch's own code.
    sampler: str = ""
    sampler_of_torch: bool = False
    #: The order is drawn from a ``torch.Generator`` that the program passed.
    own_generator: bool = False
    persistent_workers: bool = False
    #: How its workers are started (``fork``, ``spawn``, ``forkserver``); empty without workers.
    start_method: str = ""
    worker_init: str = ""
    worker_init_at: SourceLine | None = None
    #: Random number generators kept in the dataset, its transforms or the collate function:
    #: ``dataset.transform.rng (numpy Generator)``.
    generators: tuple[str, ...] = ()
    #: Where its ``__getitem__`` is defined, when the program did.
    at: SourceLine | None = None


@dataclass(frozen=True)
class BatchSamples:
    """The samples of one delivered batch."""

    #: ``seq`` of its ``BatchFetched``, and number of its pass.
    seq: int
    loader: int
    number: int
    #: One hash per sample of its largest tensor (the first samples of the batch); empty for one that is all one value.
    hashes: tuple[str, ...] = ()
    #: The class of each sample, where the batch has one integer per sample.
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draws:
    """What worker processes drew, in a child process of the recorder's own, from a training loader's dataset.

    Every worker of ``straight`` drew position ``index`` again and again; afterwards, in ``turned``, one drew it and
    another position by turns and the next worker the other way round: the draws of ``index`` among these. Equal hashes
    are equal bits (of the sample and of what the collate function made of it).
    """

    loader: int
    #: ``watch`` (after the wanted steps) or ``next-epoch``.
    when: str
    index: str = ""
    straight: tuple[tuple[str, ...], ...] = ()
    turned: tuple[tuple[str, ...], ...] = ()
    item_s: float | None = None
    #: Why nothing, or not all, was drawn.
    why: str = ""


@dataclass(frozen=True)
class LabelOrder:
    """The classes of a dataset in its own order: ``runs`` stretches of one class, of ``classes`` classes."""

    loader: int
    looked_at: int
    runs: int
    classes: int
    #: All samples were looked at, not some spread over the dataset.
    whole: bool = True
    #: Attribute that holds the classes; empty when samples were drawn.
    source: str = ""


@dataclass(frozen=True)
class Overlap:
    """Samples that a training loader and another loader share."""

    training: int
    other: int
    #: ``indices`` (both take parts of one dataset object) or ``values`` (hashes of drawn samples).
    by: str
    training_samples: int
    other_samples: int
    shared: int
    #: Samples that occur again within the training data itself, by value.
    repeated: int = 0
    #: Everything was compared.
    whole: bool = True


@dataclass(frozen=True)
class NormBatch:
    """Calls of batch norms in train mode with gradients, from one size of input."""

    root: int | None
    module: str
    class_name: str
    #: Leading size of the input (samples), and values per channel in the statistics.
    samples: int
    values: int
    calls: int = 1


@dataclass(frozen=True)
class DroppedColumn:
    """A column of the dataset that transformers' Trainer removes and the program's own code asks for."""

    name: str
    #: ``compute_loss``, ``data collator`` ...
    asked_by: str
    at: SourceLine | None = None


@dataclass(frozen=True)
class Columns:
    """Columns of the Trainer's training data."""

    trainer: str
    columns: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[DroppedColumn, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Samples:
    """The samples that the data loaders really delivered, by hashes of their values."""

    loaders: tuple[LoaderData, ...] = ()
    passes: tuple[LoaderPass, ...] = ()
    batches: tuple[BatchSamples, ...] = ()
    draws: tuple[Draws, ...] = ()
    labels: tuple[LabelOrder, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    norms: tuple[NormBatch, ...] = ()
    columns: tuple[Columns, ...] = ()
