"""Batches: DataLoaders as they are iterated."""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from typing import Any

from . import loss_rows
from .core import Recorder
from .loader_facts import batches_in, innermost_sampler
from .loss_rows import ROWS_CALLS
from .patching import ImportHooks, around, wrap
from .samples import Samples
from .watch import Session

#: Values of a batch that its fingerprint is made of, and the golden ratio, whose multiples fall everywhere.
_HASHED = 1024
_GOLDEN = 0.6180339887498949


def first_tensor(batch: Any, depth: int = 0) -> Any:
    """The first tensor in a nested batch, ``None`` when there is none within four levels."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch
    if depth > 3:
        return None
    if isinstance(batch, dict) or hasattr(batch, "values") and hasattr(batch, "keys"):
        items = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        items = list(batch)
    else:
        return None
    for item in items[:16]:
        found = first_tensor(item, depth + 1)
        if found is not None:
            return found
    return None


def fingerprint(tensor: Any) -> str | None:
    """A short hash of a sample of a CPU tensor's values: equal batches have equal fingerprints.

    ``None`` where the sample is one value throughout: borders, padding and masks of other batches are the same.
    """
    import torch

    if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.layout != torch.strided:
        return None
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _HASHED:
        # Not at equal distances: those fall on the same columns of every sample (the empty border of an image).
        place = (torch.arange(_HASHED, dtype=torch.float64, device="cpu") * _GOLDEN) % 1.0
        flat = flat[(place * flat.numel()).long()]
    values = flat.tolist()
    if len(values) > 1 and all(v == values[0] for v in values):
        return None
    return f"{zlib.crc32(f'{tuple(tensor.shape)}{values}'.encode()):08x}"


def describe(loader: Any, number: int) -> dict[str, Any]:
    import torch

    batches_of: Any = getattr(loader, "batch_sampler", None)
    sampler = innermost_sampler(loader)
    batches = batches_in(loader)
    try:
        samples: int | None = len(loader.dataset)
    except Exception:
        samples = None
    shuffle: bool | None = None
    if isinstance(sampler, torch.utils.data.RandomSampler):
        shuffle = True
    elif isinstance(sampler, torch.utils.data.SequentialSampler):
        shuffle = False
    elif hasattr(sampler, "shuffle") and isinstance(sampler.shuffle, bool):
        shuffle = sampler.shuffle
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int):
        size = getattr(batches_of, "batch_size", None)
    return {
        "id": number,
        "class_name": type(loader).__name__,
        "batch_size": size if isinstance(size, int) else None,
        "batches": batches,
        "samples": samples,
        "workers": int(getattr(loader, "num_workers", 0) or 0),
        "shuffle": shuffle,
        # accelerate makes its loaders from a batch sampler, which alone knows then.
        "drop_last": bool(getattr(loader, "drop_last", False) or getattr(batches_of, "drop_last", False)),
    }


def install(session: Session, hooks: ImportHooks) -> None:
    import torch.utils.data.dataloader as module

    recorder: Recorder = session.recorder
    looked_at: Counter[int] = Counter()
    samples = Samples(session)

    def first_batches(loader: int) -> bool:
        looked_at[loader] += 1
        return looked_at[loader] <= ROWS_CALLS

    passes = session.boundary.passes

    @recorder.quiet
    def opened(iterator: Any, loader: Any) -> None:
        number = recorder.loaders.of(loader)
        payload = {**describe(loader, number), "at": recorder.user_line()}
        passes.opened(iterator, number, payload, id(getattr(loader, "dataset", None)), session.done)
        recorder.emit("loader", payload)
        samples.opened(iterator, loader, number)

    @recorder.quiet
    def asked(iterator: Any, index: Any) -> None:
        samples.asked(iterator, index)

    def runs_dry(iterator: Any) -> bool:
        """Whether the recorder ends this pass here. Parks the program when all was seen."""
        one = passes.of(iterator)
        return one is not None and not recorder.busy and session.boundary.fetching(one)

    @recorder.quiet
    def fetched(iterator: Any, batch: Any) -> None:
        one = passes.of(iterator)
        if one is None:
            return
        number = one.loader
        session.batches += 1
        tensor = first_tensor(batch)
        session.inputs.fetched(batch)
        seq = recorder.event(
            "batch",
            at=recorder.user_line(),
            loader=number,
            size=int(tensor.shape[0]) if tensor is not None and tensor.ndim else None,
            shapes=[list(tensor.shape)] if tensor is not None else [],
            fingerprint=fingerprint(tensor) if session.batches <= 500 else None,
            labels=loss_rows.of_labels(batch) if first_batches(number) else None,
        )
        passes.delivered(one, seq)
        samples.fetched(one, seq, batch, int(tensor.shape[0]) if tensor is not None and tensor.ndim else None)

    def make_init(original: Any) -> Any:
        def init(self: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
            original(self, loader, *args, **kwargs)
            opened(self, loader)

        return init

    def make_next(original: Any) -> Any:
        def advance(self: Any) -> Any:
            if runs_dry(self):
                raise StopIteration
            costs = session.costs
            costs.pause()
            costs.enter("data")
            try:
                batch = original(self)
            except StopIteration:
                exhausted(self)
                raise
            finally:
                costs.pause()
                costs.leave()
            fetched(self, batch)
            return batch

        return advance

    def make_next_index(original: Any) -> Any:
        def next_index(self: Any) -> Any:
            index = original(self)
            asked(self, index)
            return index

        return next_index

    def exhausted(iterator: Any) -> None:
        one = passes.of(iterator)
        if one is not None:
            one.exhausted = True

    def reset(result: Any, token: Any, iterator: Any, loader: Any = None, first_iter: Any = False) -> None:
        """Persistent workers keep their iterator: its reset is another pass."""
        if loader is not None and not first_iter:
            opened(iterator, loader)

    base = module._BaseDataLoaderIter
    wrap(base, "__init__", make_init)
    wrap(base, "_reset", around(after=reset))
    wrap(base, "__next__", make_next)
    wrap(base, "_next_index", make_next_index)

    _install_forward(session)


class ForwardHook:
    """Forward pre-hook on a root module, for programs that draw batches without a DataLoader.

    Only put on when no loader was seen and the module is not compiled. Pickles as a no-op, so that saving a whole model
    still works.
    """

    def __init__(self, session: Session, number: int) -> None:
        self.session = session
        self.number = number
        self.recorder = session.recorder

    def __call__(self, module: Any, args: Any, kwargs: Any = None) -> None:
        import torch

        if torch.compiler.is_compiling() or self.recorder.busy:
            return
        self.recorder.quiet(self._note)(module, args, kwargs or {})

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        from .losses import autocast_dtype

        tensor = first_tensor(list(args)) if args else None
        if tensor is None:
            tensor = first_tensor(dict(kwargs))
        self.session.costs.forward_begins()
        self.session.inputs.fetched({**{f"argument {i} of the model": x for i, x in enumerate(args)}, **kwargs})
        self.recorder.event(
            "forward",
            at=self.recorder.user_line(),
            root=self.number,
            training=bool(module.training),
            grad_enabled=torch.is_grad_enabled(),
            autocast=autocast_dtype(tensor),
            size=int(tensor.shape[0]) if tensor is not None and tensor.ndim else None,
            fingerprint=fingerprint(tensor),
        )

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, is found everywhere

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _install_forward(session: Session) -> None:
    """After the first scan: hooks on the roots, when batches come from nowhere that is watched."""
    scan = session.modules.scan

    def scan_and_hook() -> None:
        scan()
        if session.batches:
            return
        for root in session.modules.roots:
            number = session.recorder.roots.get(root)
            if number is None or type(root).__name__ == "OptimizedModule":
                continue
            if getattr(root, "_compiled_call_impl", None) is not None:
                continue
            if type(root).__name__ == "RecursiveScriptModule":
                continue  # takes no hooks
            hooks = root._forward_pre_hooks.values()
            if not any(isinstance(h, ForwardHook) for h in hooks):
                root.register_forward_pre_hook(ForwardHook(session, number), with_kwargs=True)

    session.modules.scan = scan_and_hook
