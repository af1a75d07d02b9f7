"""Train and eval mode: what depends on it, how it stands at each backward and between batches, and who set it.

Modes are read, never hooked: at a backward for the training, and each time a loader is asked for another batch for
evaluations. That dropout was at work is seen at ``torch.nn.functional.dropout``, which the modules call too.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from types import FrameType
from typing import Any

from .core import is_user_file, line_of, user_frame
from .patching import ImportHooks, wrap
from .watch import Session

#: Modules listed per root, and names per event.
SENSITIVE_CAP = 2000
NAMES = 200
#: Events in all, and calls of dropout that are looked at while one loader is read.
EVENTS = 600
CALLS = 1024

#: Functions of torch.nn.functional that drop, with what ``training`` is when it is not passed.
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


class Sensitive:
    """A module that does something else in eval mode."""

    def __init__(self, name: str, module: Any, effect: str, p: float | None) -> None:
        self.name = name
        self.module = module
        self.effect = effect
        self.p = p

    def payload(self) -> dict[str, Any]:
        return {"name": self.name, "class_name": type(self.module).__name__, "effect": self.effect, "p": self.p}


def sensitive(root: Any) -> list[Sensitive]:
    """The modules of a root that drop something or keep running statistics."""
    found: list[Sensitive] = []
    for name, module in root.named_modules():
        if len(found) >= SENSITIVE_CAP:
            break
        effect, p = effect_of(module)
        if effect:
            found.append(Sensitive(name, module, effect, p))
    return found


def effect_of(module: Any) -> tuple[str, float | None]:
    """``dropout`` with its probability, ``norm`` (running statistics), or nothing."""
    import torch

    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return ("norm", None) if getattr(module, "running_mean", None) is not None else ("", None)
    if "drop" in type(module).__name__.lower():  # also DropPath and StochasticDepth, which each library has its own of
        p = next((v for v in (getattr(module, n, None) for n in ("p", "drop_prob", "prob")) if _share(v)), None)
        return ("dropout", p) if p else ("", None)
    if isinstance(module, torch.nn.MultiheadAttention) and _share(module.dropout):
        return "dropout", module.dropout
    if isinstance(module, torch.nn.RNNBase) and _share(module.dropout) and module.num_layers > 1:
        return "dropout", module.dropout
    return "", None


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


class Modes:
    """What is known of the modes of all roots."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder = session.recorder
        #: By number of the root: the module inside its wrappers, what depends on the mode, the wrappers.
        self.known: dict[int, tuple[Any, list[Sensitive], list[Any]]] = {}
        self._names: dict[int, tuple[int, str]] = {}
        #: Last call of train() or eval() on a module, by its id.
        self._called: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._written: dict[tuple[int, str, int | None], Any] = {}
        self._events = 0
        #: The pass over a loader that was last asked for a batch, and calls of dropout since then.
        self._pass: Any = None
        self._sites: set[Any] = set()
        self._calls = 0

    # -- who there is

    def forget(self) -> None:
        """Before another scan: no root is kept alive that the program has let go."""
        self.known.clear()
        self._names.clear()

    def describe(self, number: int, outer: Any, root: Any) -> list[dict[str, Any]]:
        """Take in a root that was found (``root``, in wrappers ``outer``), and say what in it depends on the mode."""
        found = sensitive(root)
        self.known[number] = (root, found, [] if outer is root else [outer])
        for one in found:
            self._names[id(one.module)] = (number, one.name)
        return [one.payload() for one in found]

    # -- who set it

    def called(self, module: Any, mode: bool, seq: int) -> None:
        """``module.train(mode)`` was called, and not by the ``train`` of a module around it."""
        frame = _caller(module)
        parent = frame.f_locals.get("self") if frame is not None and frame.f_code.co_name in ("train", "eval") else None
        if parent is not None and hasattr(parent, "training"):
            how = "override"
        elif frame is not None and is_user_file(frame.f_code.co_filename):
            how = "program"
        else:
            how = "library"
        at = line_of(user_frame(frame))
        record = {"seq": seq, "mode": mode, "how": how, "on": type(module).__name__, "at": at}
        self._called[id(module)] = (weakref.ref(module), record)

    def _setter(self, around: list[Any], root: Any, name: str) -> dict[str, Any] | None:
        """The last call that covers a sub-module."""
        chain, module = [*around, root], root
        for part in name.split(".") if name else ():
            module = module._modules.get(part)
            if module is None:
                break
            chain.append(module)
        calls = []
        for module in chain:
            ref, record = self._called.get(id(module), (None, None))
            if ref is not None and record is not None and ref() is module:
                calls.append(record)
        return max(calls, key=lambda r: int(r["seq"])) if calls else None

    # -- how it stands

    def look(self, when: str, loader: int | None = None, *, anew: bool = False) -> None:
        """Write the modes of every root that has any, where they differ from what was last written for this moment."""
        for number, (root, found, _) in list(self.known.items()):
            if not found or self._events >= EVENTS:
                continue
            asleep = [one for one in found if not one.module.training]
            state: Any = (root.training, tuple(one.name for one in asleep))
            if when == "batch":
                state = (*state, self._updates(found))
            key = (number, when, loader)
            if not anew and self._written.get(key) == state:
                continue
            self._written[key] = state
            self._write(number, root, found, asleep, when, loader)

    def _write(
        self, number: int, root: Any, found: list[Sensitive], asleep: list[Sensitive], when: str, loader: int | None
    ) -> None:
        self._events += 1
        calls: dict[int, dict[str, Any]] = {}
        for one in asleep[:NAMES]:
            made = self._setter(self.known[number][2], root, one.name)
            if made is not None:
                # In eval although train() was the last call: the class keeps it so, or somebody set the attribute.
                how = made["how"] if not made["mode"] else "override"
                call = {"on": made["on"], "how": how, "seq": made["seq"], "at": made["at"], "modules": []}
                calls.setdefault(made["seq"], call)["modules"].append(one.name)
        seq = self.recorder.event(
            "mode_state",
            root=number,
            when=when,
            loader=loader,
            training=bool(root.training),
            in_eval=[one.name for one in asleep[:NAMES]],
            n_eval=len(asleep),
            n_train=len(found) - len(asleep),
            calls=list(calls.values()),
        )
        counters = self._counters(found)
        if counters:
            import torch

            devices = {c.device for c in counters}
            if len(devices) == 1:
                self.recorder.later(seq, "batches_tracked", torch.stack([c.detach() for c in counters]).sum())

    @staticmethod
    def _counters(found: list[Sensitive]) -> list[Any]:
        """``num_batches_tracked`` of the norms: they count each batch that moves the running statistics."""
        counters = (getattr(one.module, "num_batches_tracked", None) for one in found if one.effect == "norm")
        return [c for c in counters if c is not None and c.device.type != "meta"]

    def _updates(self, found: list[Sensitive]) -> int:
        """Changes so often as the counters were written to; no device is asked for their values."""
        return sum(int(c._version) for c in self._counters(found))

    # -- batches and dropout

    def fetching(self, one: Any) -> None:
        """A loader is asked for its next batch: what came before it was done in the modes of now."""
        other = one is not self._pass
        if other:
            self._pass, self._calls = one, 0
            self._sites.clear()
        # Between the batches of a training there is a backward, where modes are looked at anyway.
        if one.delivered == 0 or one.silent:
            self.look("batch", one.loader, anew=one.delivered == 0)

    def dropped(self, frame: FrameType | None, p: Any, training: Any, given: bool) -> None:
        """A call of dropout from ``frame``; ``given``: the call says whether it is training."""
        import torch

        if self._calls >= CALLS or self._events >= EVENTS or frame is None:
            return
        if not _share(p) or not isinstance(training, bool) or threading.get_ident() != self.session.training_thread:
            return
        self._calls += 1
        grad = torch.is_grad_enabled()
        module: Any = frame.f_locals.get("self")
        if not isinstance(module, torch.nn.Module):
            module = None
        own = module is not None and id(module) in self._names
        site = id(module) if own else (frame.f_code.co_filename, frame.f_lineno)
        key = (site, training, grad)
        if key in self._sites:
            return
        self._sites.add(key)
        self._events += 1
        root, name = self._names.get(id(module), (None, "")) if own else (None, "")
        in_user_code = is_user_file(frame.f_code.co_filename)
        self.recorder.event(
            "dropout",
            at=line_of(frame if in_user_code else user_frame(frame)),
            root=root,
            module=name,
            class_name=type(module).__name__ if module is not None else "",
            p=float(p),
            active=training,
            by_default=bool(in_user_code and not given),
            owner_training=bool(module.training) if module is not None else None,
            grad_enabled=grad,
        )


def _caller(module: Any) -> FrameType | None:
    """The frame that called ``module.train()`` or ``module.eval()``: not the recorder's, not those methods."""
    ours = (__package__ or "") + "."
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        own = frame.f_code.co_name in ("train", "eval") and frame.f_locals.get("self") is module
        if not own and not str(frame.f_globals.get("__name__", "")).startswith(ours):
            return frame
        frame = frame.f_back
    return None


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    import torch.utils.data.dataloader as dataloader

    recorder = session.recorder
    modes: Modes = session.modules.modes
    functional = torch.nn.functional
    looked = recorder.quiet(modes.fetching)
    dropped = recorder.quiet(modes.dropped)

    def make_next(original: Any) -> Any:
        def advance(self: Any) -> Any:
            one = session.boundary.passes.of(self)
            if one is not None and threading.get_ident() == session.training_thread:
                looked(one)
            return original(self)

        return advance

    wrap(dataloader._BaseDataLoaderIter, "__next__", make_next)

    def make_for(default: bool) -> Any:
        def make(original: Any) -> Any:
            def dropout(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling() or recorder.busy:
                    return original(*args, **kwargs)
                given = "training" in kwargs or len(args) > 2
                p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
                training = kwargs.get("training", args[2] if len(args) > 2 else default)
                dropped(sys._getframe(1), p, training, given)
                return original(*args, **kwargs)

            return dropout

        return make

    for name in DROPOUTS:
        function = getattr(functional, name, None)
        if function is not None:
            parameter = inspect.signature(function).parameters.get("training")
            wrap(functional, name, make_for(bool(parameter.default) if parameter is not None else True))
