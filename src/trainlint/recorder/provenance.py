"""Where each parameter came from: files that are read, state dicts that are loaded, values that are found again.

Names prove nothing. Of every tensor that is read from a file a few values are kept (``fingerprints``), and before the
first optimizer step each parameter is compared with them (``arrivals``). What ``load_state_dict`` and
``from_pretrained`` say of matched and missing keys covers what cannot be recognised by value: constants, quantised and
rearranged weights.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections import Counter
from types import FrameType
from typing import Any

from .arrivals import Arrivals, named, renamed, renaming
from .checkpoints import path_of
from .core import Recorder
from .fingerprints import Index, Part, Sampler, telling, tensors_in
from .norm_drift import NormDrift
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Loads that are looked into, and files that are read for their values.
CALLS, FILES = 300, 2000
#: Files written before the training whose sources are looked for: each time every object is looked at.
WRITES = 24
#: Functions of libraries that load weights, as they are found on the stack.
_LOADERS = ("load_from_checkpoint", "from_pretrained")


class Call:
    """One ``load_state_dict`` or ``from_pretrained`` on a module."""

    def __init__(self, module: Any, how: str, strict: bool | None, at: dict[str, Any] | None, order: int) -> None:
        self.module = weakref.ref(module)
        self.class_name = type(module).__name__
        self.how = how
        self.strict = strict
        self.at = at
        self.order = order
        #: Files' parts that the state dict's tensors were found in.
        self.parts: list[Part] = []
        #: Numbers of the module's tensors, and the tensor of a file that each received; ``None``: the library says so.
        self.received: dict[int, tuple[Part, str] | None] = {}
        #: It was given nothing but the module's own tensors back.
        self.echo = False
        #: What from_pretrained says: keys of the file that have no place in the module, or another shape there.
        self.unexpected: set[str] = set()


class Provenance:
    """What was read and loaded so far."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.sampler = Sampler()
        self.index = Index()
        self.parts: list[Part] = []
        self.orders: dict[int, int] = {}
        self.calls: list[Call] = []
        #: Samples of optimizer states in files -> their file, and the files whose state an optimizer was given.
        self.states: dict[tuple[float, ...], str] = {}
        self.resumed: set[str] = set()
        #: Files that this process wrote, and the parameters (by number) whose values it wrote there.
        self.written: dict[str, set[int]] = {}
        self._paths: set[str] = set()
        self._order = 0
        self._inside: list[int] = []

    def before_training(self) -> bool:
        return not self.session.steps and len(self.calls) < CALLS

    def order(self) -> int:
        self._order += 1
        return self._order

    # -- what is read

    def read(self, path: str, content: Any) -> None:
        """A file was unpickled: keep a few values of its tensors."""
        if len(self._paths) >= FILES:
            return
        at = self.recorder.user_line()
        for name, tensors, optimizer in tensors_in(content):
            samples = self.sampler.take(list(tensors.values()))
            if optimizer:
                self.states.update({s: path for s in samples if s is not None and telling(s)})
                continue
            part = Part(path, name, at)
            for (key, tensor), sample in zip(tensors.items(), samples, strict=True):
                if sample is not None:
                    part.add(key, tuple(tensor.shape), sample)
            self._take_in(part)

    def opened(self, path: str) -> None:
        """A safetensors file was opened; its values are read when they are needed."""
        if len(self._paths) < FILES and os.path.isfile(path):
            self._take_in(Part.of_safetensors(path, self.recorder.user_line()))

    def _take_in(self, part: Part) -> None:
        same = next((p for p in self.parts if (p.path, p.name, p.shapes) == (part.path, part.name, part.shapes)), None)
        if part.shapes and same is None:
            self._paths.add(part.path)
            self.parts.append(part)
            self.orders[id(part)] = self.order()
        elif same is not None and part.shapes:
            # Read again (to find its keys, then for its values): the last reading's line and turn.
            same.at, self.orders[id(same)] = part.at, self.order()

    def find(self, shape: tuple[int, ...], sample: tuple[float, ...]) -> list[tuple[Part, str]]:
        return self.index.find(shape, sample)

    def up_to_date(self) -> None:
        for part in self.parts:
            self.index.add(part)

    def saved(self, path: str, content: Any) -> None:
        """A file is written before the training: the modules that its values are from have not been loaded from it."""
        if len(self.written) >= WRITES:
            return
        pointers = {t.data_ptr() for _, tensors, _ in tensors_in(content) for t in tensors.values()} - {0}
        sources = self.written.setdefault(path, set())
        if not pointers:
            return
        import torch

        for obj in gc.get_objects():
            if issubclass(type(obj), torch.nn.Module):
                for p in obj.__dict__.get("_parameters", {}).values():
                    if p is not None and p.data_ptr() in pointers:
                        sources.add(self.recorder.parameters.of(p))

    # -- what is loaded

    def loaded(self, module: Any, state_dict: Any, strict: bool, result: Any) -> None:
        """``load_state_dict`` returned."""
        call = Call(module, self._how(), strict, self.recorder.user_line(), self.order())
        own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        dropped = set(getattr(result, "unexpected_keys", None) or ())
        values = {str(k): v for k, v in state_dict.items() if hasattr(v, "shape")}
        call.echo = all(k in own and own[k].data_ptr() == v.data_ptr() for k, v in values.items())
        samples = self.sampler.take(list(values.values()))
        self.up_to_date()
        sources: dict[str, list[tuple[Part, str]]] = {}
        for (key, value), sample in zip(values.items(), samples, strict=True):
            if sample is not None and telling(sample):
                sources[key] = self.index.find(tuple(value.shape), sample)
        call.parts = _sources(list(sources.values()))
        if not call.parts and self.parts and not sources:
            call.parts = self._named_alike(values)
        renamings = Counter(renaming(key, k) for key, found in sources.items() for _, k in found[:1])
        renamings[("", "")] += 1
        for key, value in values.items():
            if key in own and key not in dropped and call.parts:
                found = next(((p, k) for p, k in sources.get(key, ()) if p in call.parts), None)
                if found is None and key not in sources:  # a constant: beside what was recognised, by its name
                    shape = tuple(value.shape)
                    names = list(renamed(key, renamings))
                    found = next(((p, k) for p in call.parts for k in names if p.shapes.get(k) == shape), None)
                elif found is None and not sources[key]:
                    # Changed on the way: resized, interpolated.
                    names = list(renamed(key, renamings))
                    if any(k in p.shapes and p.shapes[k] != tuple(value.shape) for p in call.parts for k in names):
                        call.received[self.recorder.parameters.of(own[key])] = None
                if found is not None:
                    call.received[self.recorder.parameters.of(own[key])] = found
        self.calls.append(call)

    def _named_alike(self, values: dict[str, Any]) -> list[Part]:
        """The part last read whose keys and shapes these are, for a state dict of nothing but constants."""
        for part in reversed(self.parts):
            if values and all(part.shapes.get(k) == tuple(v.shape) for k, v in values.items() if v.is_floating_point()):
                return [part]
        return []

    def _how(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        for _ in range(25):
            if frame is None:
                break
            if frame.f_code.co_name in _LOADERS:
                return frame.f_code.co_name
            frame = frame.f_back
        return "load_state_dict"

    def pretrained(self, model: Any, info: Any, since: int) -> None:
        """``from_pretrained`` returned a model and what it says of its keys."""
        read = [p for p in self.parts if self.orders[id(p)] > since]
        if not read:
            return
        within = {id(m) for m in model.modules()}
        self.calls = [c for c in self.calls if c.order <= since or id(c.module()) not in within]
        call = Call(model, "from_pretrained", None, self.recorder.user_line(), self.order())
        mismatched = {str(m[0]) if isinstance(m, (tuple, list)) else str(m) for m in info.get("mismatched_keys") or ()}
        missing = {str(k) for k in info.get("missing_keys") or ()} | mismatched
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        call.received = {
            self.recorder.parameters.of(t): None for name, t in tensors.items() if not named(name, missing)
        }
        call.unexpected = {str(k) for k in info.get("unexpected_keys") or ()} | mismatched
        call.parts = read
        self.calls.append(call)

    def state_loaded(self, state_dict: Any) -> None:
        """An optimizer was given state: a run is resumed from its file."""
        found = next((o for _, o, optimizer in tensors_in(state_dict) if optimizer), {})
        for sample in self.sampler.take(list(found.values())):
            path = self.states.get(sample) if sample is not None else None
            if path is not None:
                self.resumed.add(path)
                return

    def is_resumed(self, path: str) -> bool:
        """Optimizer state came from the same file, or from one beside it that holds nothing else."""
        weights = {p.path for p in self.parts}
        beside = {os.path.dirname(p) for p in self.resumed if p not in weights}
        return path in self.resumed or os.path.dirname(path) in beside


def _sources(found: list[list[tuple[Part, str]]]) -> list[Part]:
    """The parts that most of the tensors are from; one with the same values as another counts once, the last read."""
    rest = [{id(p): p for p, _ in candidates} for candidates in found if candidates]
    out: list[Part] = []
    while rest:
        counts: dict[int, tuple[int, Part]] = {}
        for candidates in rest:
            for number, part in candidates.items():
                counts[number] = (counts.get(number, (0, part))[0] + 1, part)
        best = max(counts.values(), key=lambda c: c[0])[1]
        out.append(best)
        rest = [c for c in rest if id(best) not in c]
    return out


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    recorder = session.recorder
    provenance = Provenance(session)
    arrivals = Arrivals(provenance)
    norms = NormDrift(session, arrivals.buffers)
    session.closers.append(norms.close)

    def origins_of(roots: list[Any]) -> dict[int, str]:
        try:
            norms.begin(roots)
        except Exception as error:
            recorder.problem("finding norms", error)
        return arrivals.settle(roots)

    session.modules.origins_of = origins_of

    @recorder.quiet
    def file_read(result: Any, token: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        path = path_of(f)
        if path is not None and provenance.before_training():
            provenance.read(path, result)

    wrap(torch, "load", around(after=file_read))

    @recorder.quiet
    def file_written(result: Any, token: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        path = path_of(f)
        if path is not None and provenance.before_training():
            provenance.saved(path, obj)

    wrap(torch, "save", around(after=file_written))

    @recorder.quiet
    def module_loaded(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        if provenance.before_training():
            provenance.loaded(self, state_dict, bool(kwargs.get("strict", args[0] if args else True)), result)

    wrap(torch.nn.Module, "load_state_dict", around(after=module_loaded))

    @recorder.quiet
    def state_loaded(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        if provenance.before_training() and state_dict.get("state"):
            provenance.state_loaded(state_dict)

    wrap(torch.optim.Optimizer, "load_state_dict", around(after=state_loaded))

    @recorder.quiet
    def opened(result: Any, token: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        path = path_of(filename)
        if path is not None and provenance.before_training():
            provenance.opened(path)

    def on_reader(module: Any) -> None:
        wrap(module, "safe_open", around(after=opened))

    hooks.on_import("safetensors", on_reader)

    def on_safetensors(module: Any) -> None:
        wrap(module, "load_file", around(after=opened))  # load_model comes here too
        wrap(module, "save_file", around(after=file_written))

    hooks.on_import("safetensors.torch", on_safetensors)

    def on_transformers(module: Any) -> None:
        def make(original: Any) -> Any:
            def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
                if not provenance.before_training():
                    return original(cls, *args, **kwargs)
                wanted = kwargs.pop("output_loading_info", False)
                since = provenance.order()
                result = original(cls, *args, output_loading_info=True, **kwargs)
                if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
                    return result
                note(result[0], result[1], since)
                return result if wanted else result[0]

            return from_pretrained

        @recorder.quiet
        def note(model: Any, info: Any, since: int) -> None:
            provenance.pretrained(model, info, since)

        wrap(module.PreTrainedModel, "from_pretrained", make)

    hooks.on_import("transformers.modeling_utils", on_transformers)
