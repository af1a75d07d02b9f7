"""The data of an experiment: loaders that do not run dry, the same batch again, random numbers put back."""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from .core import is_user_file
from .experiment_losses import print_of
from .loss_inputs import readable
from .patching import ImportHooks, around, wrap

if TYPE_CHECKING:
    from .experiment import Experiment

#: Batches that a loader may deliver without a backward, beyond what the training reads ahead.
EVALUATION_BATCHES = 2
#: Steps whose batch may differ: the first pass through the loop comes from other random numbers than the later ones.
DIFFERENT_STEPS = 2
#: Share of the steps that must have had the same batch.
SAME = 0.9


class Pass:
    """One iterator of a DataLoader."""

    def __init__(self, loader: Any, number: int) -> None:
        self.loader = loader
        self.number = number
        self.delivered = 0
        #: A backward followed one of its batches.
        self.used = False
        #: Batches since the last backward.
        self.silent = 0
        #: The iterator that goes on where this one came to its end.
        self.onwards: Any = None


class Data:
    """Loaders and random state of one process."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.recorder = experiment.recorder
        #: Loaders that feed the training.
        self.training: set[int] = set()
        self.repeated_by = ("loader" if experiment.plan.get("loaders") else "random") if experiment.repeats else ""
        self._passes: dict[int, tuple[Any, Pass]] = {}
        self._recent: list[Pass] = []
        #: Most batches of one loader between two backwards.
        self._longest = 1
        self._trained = False
        #: The first batch of each loader, as it came.
        self._first: dict[int, Any] = {}
        self._restore: list[Callable[[], None]] = []
        self._inputs: list[int] = []
        #: What the steps were given, by fingerprint, and at how many of them.
        self._prints: Counter[tuple[int, ...]] = Counter()
        self._hooked = False
        #: An iterator is being opened to go on with a loader that came to its end.
        self._reopening = False

    def different_batches(self) -> int | None:
        """1 when it was the same batch, but for a few steps (an evaluation in between draws random numbers too)."""
        if not self._prints:
            return None
        (_, most), *_ = self._prints.most_common(1)
        return 1 if most >= SAME * self._prints.total() else len(self._prints)

    # -- what the experiment tells

    def backward(self, loss: Any) -> None:
        recent, self._recent = self._recent, []
        if recent:
            self._longest = max(self._longest, sum(1 for one in recent if one is recent[-1]))
            self.training.add(recent[-1].number)
        for one in recent:
            one.silent = 0
            one.used = one.used or one.number in self.training
        if not self._trained:
            self._trained = True
            self._hook_roots()

    def step_ended(self, step: int) -> None:
        if not self.experiment.repeats:
            return
        seen = (*self.experiment.losses.targets, *self._inputs)
        if step >= DIFFERENT_STEPS and seen:
            self._prints[seen] += 1
        self._inputs = []
        if step == 0:
            self._restore = list(_random_states())
        for put_back in self._restore:
            put_back()

    # -- loaders

    def install(self, hooks: ImportHooks) -> None:
        import torch.utils.data.dataloader as module

        quiet = self.recorder.quiet

        @quiet
        def opened(iterator: Any, loader: Any) -> None:
            if not self._reopening:
                self._passes[id(iterator)] = (iterator, Pass(loader, self.recorder.loaders.of(loader)))

        def make_init(original: Any) -> Any:
            def init(iterator: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
                original(iterator, loader, *args, **kwargs)
                opened(iterator, loader)

            return init

        def reset(result: Any, token: Any, iterator: Any, loader: Any = None, first_iter: Any = False) -> None:
            if loader is not None and not first_iter:
                opened(iterator, loader)  # persistent workers keep their iterator

        def make_next(original: Any) -> Any:
            def advance(iterator: Any) -> Any:
                found = self._passes.get(id(iterator))
                if found is None or self.recorder.busy or self._reopening:
                    return original(iterator)
                return self._next(iterator, found[1], original)

            return advance

        base = module._BaseDataLoaderIter
        wrap(base, "__init__", make_init)
        wrap(base, "_reset", around(after=reset))
        wrap(base, "__next__", make_next)

    def _next(self, iterator: Any, one: Pass, original: Callable[[Any], Any]) -> Any:
        if self._trained and not one.used and one.silent >= self._allowance(one):
            raise StopIteration  # an evaluation
        # Which loader feeds the training is known from the first backward on; some batches are read ahead of it.
        may_feed = one.number in self.training or not self._trained
        if one.used and not self.experiment.repeats:
            batch = self._onwards(iterator, one, original)
        elif one.used and one.number in self._first:
            batch = self._again(one)
        else:
            batch = original(iterator)  # its end is that of the pass
            if may_feed and self.experiment.repeats:
                self._first.setdefault(one.number, _copied(batch))
                batch = self._again(one)
        one.delivered += 1
        one.silent += 1
        self._recent.append(one)
        return batch

    def _allowance(self, one: Pass) -> int:
        return EVALUATION_BATCHES + (self._longest if one.number in self.training else 0)

    def _again(self, one: Pass) -> Any:
        # The program may change what it is given: every time a copy of its own.
        return _copied(self._first[one.number])

    def _onwards(self, iterator: Any, one: Pass, original: Callable[[Any], Any]) -> Any:
        """The next batch, through as many epochs as it takes."""
        import torch

        try:
            return original(one.onwards or iterator)
        except StopIteration:
            self._reopening = True
            try:
                # Not the loader's own: a subclass's may be a generator around this very iterator (accelerate).
                one.onwards = torch.utils.data.DataLoader.__iter__(one.loader)
                return original(one.onwards)
            finally:
                self._reopening = False

    # -- inputs of the model, where no loader tells that the batch is the same

    def _hook_roots(self) -> None:
        import torch

        if self._hooked or self.repeated_by != "random":
            return
        self._hooked = True
        modules = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]
        children = {id(c) for m in modules for c in (m.__dict__.get("_modules") or {}).values() if c is not None}
        for root in modules:
            compiled = type(root).__name__ in ("OptimizedModule", "RecursiveScriptModule")
            if id(root) in children or compiled or getattr(root, "_compiled_call_impl", None) is not None:
                continue
            if next(root.parameters(), None) is not None:
                root.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: Any, args: Any, kwargs: Any) -> None:
        import torch

        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        try:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and not value.requires_grad and readable(value):
                    self._inputs.append(print_of(value))
        except Exception as error:
            self.recorder.problem("experiment: the model's input", error)


def _copied(batch: Any) -> Any:
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch  # an object that refuses to be copied is given as it is


def _random_states() -> Iterator[Callable[[], None]]:
    """Functions that put every source of random numbers back to where it stands now."""
    import torch

    state = torch.get_rng_state()
    yield lambda: torch.set_rng_state(state)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(states)
    python = random.getstate()
    yield lambda: random.setstate(python)
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy is not None else None
    if numpy is not None:
        yield lambda: numpy.random.set_state(legacy)
        kinds: tuple[type, ...] = (numpy.random.Generator, numpy.random.RandomState, random.Random)
    else:
        kinds = (random.Random,)
    for own in gc.get_objects():
        if type(own) in kinds:
            yield _own_state(own)
    for generator in _generators(torch.Generator):
        yield _generator_state(generator)


def _own_state(source: Any) -> Callable[[], None]:
    """Of a generator object that the program made."""
    if isinstance(source, random.Random):
        own = source.getstate()
        return lambda: source.setstate(own)
    if hasattr(source, "bit_generator"):
        bits = source.bit_generator
        inner = bits.state
        return lambda: setattr(bits, "state", inner)
    legacy = source.get_state()
    return lambda: source.set_state(legacy)


def _generator_state(generator: Any) -> Callable[[], None]:
    state = generator.get_state()
    return lambda: generator.set_state(state)


def _generators(kind: type) -> list[Any]:
    """torch's generators, which the garbage collector does not list: in the program's names and its objects' fields."""
    places: list[dict[str, Any]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            places += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for module in list(sys.modules.values()):
        if is_user_file(getattr(module, "__file__", None) or ""):
            places.append(vars(module))
    for thing in gc.get_objects():
        if is_user_file(getattr(sys.modules.get(type(thing).__module__), "__file__", None) or ""):
            places.append(getattr(thing, "__dict__", {}))
    found = {id(v): v for place in places for v in list(place.values()) if isinstance(v, kind)}
    return list(found.values())
