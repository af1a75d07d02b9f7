"""One extra eager forward over the last watched batch, and what is looked at in it.

It runs where the watch ends, before the program goes on to the end of its epoch. Whatever it changes is put back
(:mod:`.replay_state`): what the program does afterwards is what it would have done without.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import replay_mixing, replay_non_finite, replay_units
from .patching import ImportHooks, around, wrap
from .replay_calls import Call, Calls, Unfit, tensors
from .replay_state import Kept, Refused, TooLong, protection, silence
from .replay_trace import Path, following
from .watch import Session, world_size

#: A forward that took longer than this is not repeated; a repeated one is broken off after this much time.
LONGEST_S = 20.0
LIMIT_S = 30.0
#: Further forwards, on a part of the batch, are made when each takes at most this long.
PROBE_S = 4.0
#: Looks at the forward of a loss that was not finite.
EARLY = 2

#: Wrappers around the module that computes.
_INNER = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule", "PipelineStage", "ShardedDataParallel")


class Replayer:
    """Repeats the noted calls of one process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder = session.recorder
        self.calls = Calls(session)
        self.loss: Any = None
        self.early = 0
        self.done = False
        #: A forward is being repeated in this thread.
        self.running = False

    # -- when

    def before_step(self) -> None:
        """An optimizer is about to step: when the loss is not finite, look for what made it so while weights are."""
        loss, self.loss = self.loss, None
        if loss is None or self.early >= EARLY or self.done or self.session.done:
            return
        if bool(loss.isfinite().all()):
            return
        self.early += 1
        with self.recorder.working():
            steps = max(self.session.steps.values(), default=0)
            found = [self._non_finite(call, "before-step", steps) for call in list(self.calls.last.values())]
            value = float(loss.reshape(-1)[0])
            entries = [{**f, "loss": value} for f in found if f is not None]
            if entries:
                self.recorder.emit("replay", {"non_finite": entries})

    def close(self) -> None:
        """The watch is over: repeat what was noted, once."""
        if self.done or self.session.boundary.began is not None or not self.session.backwards:
            return
        self.done = True
        try:
            for call in list(self.calls.last.values()):
                self.recorder.emit("replay", self._replay(call))
            self.recorder.emit("replay", {"distributions": replay_units.of_parameters(self.session)})
        finally:
            self.calls.close()
            self.loss = None

    # -- what

    def _replay(self, call: Call) -> dict[str, Any]:
        """The part of the recording that one call gives."""
        inner = unwrap(call.module)
        samples = samples_of(call)
        about = {
            "name": call.name,
            "class_name": type(inner).__name__,
            "training": bool(inner.training),
            "samples": samples,
        }
        path = Path()
        units = replay_units.Units(path, self.recorder.parameters, samples)
        spread = Spread(samples)
        try:
            why = self.refusal(call, inner)
            if why:
                raise Unfit(why)
            args, kwargs = call.given()
            began = time.monotonic()
            outputs = self._again(
                inner, call, args, kwargs, lambda: _both(following(inner, path, spread.done), units.mode())
            )
            duration = time.monotonic() - began
            finite = replay_non_finite.finite(outputs)
        except Exception as error:
            reason = str(error) if isinstance(error, (Unfit, Refused, TooLong)) else f"it raised {type(error).__name__}"
            return {"forwards": [{**about, "outcome": "left-out", "reason": reason}]}
        out: dict[str, Any] = {
            "forwards": [{**about, "outcome": "replayed", "duration_s": round(duration, 6), "finite": finite}],
            "units": units.report(),
            "distributions": spread.report(),
        }
        held = self._non_finite(call, "replay", max(self.session.steps.values(), default=0), finite)
        if held is not None:
            out["non_finite"] = [held]
        out["mixing"] = [self._mixing(call, inner, samples, duration, finite)]
        return out

    def _non_finite(self, call: Call, when: str, steps: int, finite: bool | None = None) -> dict[str, Any] | None:
        """What is not finite in a call; ``None`` at the end of the watch when all is. ``finite``: its outputs are."""
        inner = unwrap(call.module)
        found = replay_non_finite.holding
        parameters = list(inner.named_parameters())
        # Infinities are put into weights and outputs on purpose (masks); beside finite outputs only NaN is wrong.
        weights, buffers = found(parameters, nan_only=bool(finite)), found(list(inner.named_buffers()), nan_only=True)
        if finite and not weights:
            return None
        named = [(f"input {i}", t) for i, t in enumerate(tensors(call.args))]
        named += [(k, t) for k, v in call.kwargs.items() for t in tensors(v)]
        entry: dict[str, Any] = {
            "when": when,
            "forward": call.name,
            "steps": steps,
            "inputs": replay_non_finite.report_names(found(named, nan_only=True)),
            "weights": replay_non_finite.report_names(weights),
            "buffers": replay_non_finite.report_names(buffers),
            "tensors": len(parameters),
        }
        path = Path()
        search = replay_non_finite.Search(path)
        try:
            why = self.refusal(call, inner)
            if why:
                raise Unfit(why)
            args, kwargs = call.given()
            outputs = self._again(inner, call, args, kwargs, lambda: _both(following(inner, path), search.mode()))
            entry["outputs_finite"] = replay_non_finite.finite(outputs)
        except Exception as error:
            entry["left_out"] = str(error) if isinstance(error, (Unfit, Refused, TooLong)) else type(error).__name__
            return entry
        if not entry["outputs_finite"]:
            entry["producer"] = search.nan or search.inf
            entry["source"] = search.inf if search.nan is not None else None
        return entry

    def _mixing(self, call: Call, inner: Any, samples: int | None, duration: float, finite: bool) -> dict[str, Any]:
        left = {"forward": call.name, "outcome": "left-out"}
        if samples is None:
            return {**left, "reason": "no input's first size is the batch size of a loader"}
        if samples < 3:
            return {**left, "reason": f"the batch has {samples} sample" + ("s" if samples != 1 else "")}
        if duration * min(1.0, replay_mixing.SAMPLES / samples) > PROBE_S:
            return {**left, "reason": f"one forward takes {duration:.0f} s"}
        if not finite:
            return {**left, "reason": "its outputs are not finite"}
        modes = [(m, m.training) for m in inner.modules()]

        def run(args: Any, kwargs: Any, observe: Callable[[], Any]) -> Any:
            try:
                for module, _ in modes:
                    module.__dict__["training"] = False
                return self._again(inner, call, args, kwargs, observe)
            finally:
                for module, training in modes:
                    module.__dict__["training"] = training

        try:
            return replay_mixing.probe(run, inner, call, samples, call.name)
        except Exception as error:
            known = isinstance(error, (Unfit, Refused, TooLong))
            return {**left, "reason": str(error) if known else f"in eval it raised {type(error).__name__}"}

    # -- how

    def refusal(self, call: Call, inner: Any) -> str:
        """Why this call must not be repeated; empty when it may."""
        import torch

        took = call.took if call.took is not None else time.monotonic() - call.began
        if took > LONGEST_S:
            return f"its forward took {took:.0f} s"
        for module in call.module.modules():
            name = type(module).__name__
            if name in _SHARDED or hasattr(type(module), "_get_fsdp_state"):
                return f"its weights are sharded ({name})"
            if "SyncBatchNorm" in name and world_size() > 1:
                return "SyncBatchNorm communicates between ranks"
        for parameter in inner.parameters():
            if getattr(parameter, "_local_tensor", None) is not None or hasattr(parameter, "ds_id"):
                return "its weights are sharded"
            if parameter.device.type == "meta":
                return "its weights are on the meta device"
        cuda: Any = torch.cuda
        if cuda.is_available() and cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        return ""

    def _again(self, inner: Any, call: Call, args: Any, kwargs: Any, observe: Callable[[], Any]) -> Any:
        """Call the module, eagerly and without gradients, and put everything back that it changed."""
        import torch

        kept = Kept([m for root in [inner, *self.session.modules.roots] for m in root.modules()], [args, kwargs])
        guard = protection(time.monotonic() + LIMIT_S)
        self.running = True
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(silence())
                stack.enter_context(torch.no_grad())
                if "torch._dynamo" in sys.modules:
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                for device, dtype, enabled in call.autocast:
                    # Its cache must not fill with casts that no gradient can flow through.
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
                stack.enter_context(guard)
                stack.enter_context(observe())
                return call_again(inner, args, kwargs)
        finally:
            self.running = False
            try:
                guard.restore()
            finally:
                kept.restore()
                kept.restore_versions()


def call_again(module: Any, args: Any, kwargs: Any) -> Any:
    """The frame that tells the repeated forward from the program's own stack."""
    return module(*args, **kwargs)


@contextlib.contextmanager
def _both(one: Any, two: Any) -> Any:
    with one, two:
        yield


class Spread:
    """Distributions of the outputs of modules that hold no others."""

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self.found: list[dict[str, Any]] = []
        self._names: set[str] = set()

    def done(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if name and (next(iter(module.children()), None) is not None or len(self.found) >= 4 * replay_units.TENSORS):
            return
        tensor = next((t for t in tensors(output) if replay_units.measurable(t)), None)
        if tensor is None or name in self._names:
            return
        self._names.add(name)
        self.found.append(replay_units.distribution("activation", name, type(module).__name__, tensor, self.samples))

    def report(self) -> list[dict[str, Any]]:
        return [replay_units.read(d) for d in replay_units.evenly(self.found, replay_units.TENSORS)]


def unwrap(module: Any) -> Any:
    """The module inside DDP and torch.compile."""
    while True:
        attribute = _INNER.get(type(module).__name__)
        inner = module.__dict__.get("_modules", {}).get(attribute) if attribute else None
        if inner is None:
            return module
        module = inner


def samples_of(call: Call) -> int | None:
    """Samples in the batch: the leading size of an input that is that of the loader's batches too."""
    if call.unfit:
        return None
    for tensor in tensors([call.args, call.kwargs]):
        if tensor.ndim and tensor.shape[0] in call.batch_sizes:
            if tensor.ndim > 1 and tensor.shape[1] == tensor.shape[0] and tensor.ndim == 3:
                return None  # it might be the second dimension
            return int(tensor.shape[0])
    return None


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    replayer = Replayer(session)
    calls = replayer.calls
    recorder = session.recorder
    session.closers.append(replayer.close)
    scan = session.modules.scan

    def scan_and_look() -> None:
        scan()
        calls.look(session.modules.roots)

    session.modules.scan = scan_and_look

    @recorder.quiet
    def backward_begins(given: Any) -> None:
        if replayer.done:
            return
        calls.backward()
        if session.backwards <= 3:
            calls.look(session.modules.roots)
        loss = (
            given if isinstance(given, torch.Tensor) else next((t for t in given if isinstance(t, torch.Tensor)), None)
        )
        if isinstance(loss, torch.Tensor) and loss.numel() == 1 and session.loss_scale in (None, 1.0):
            replayer.loss = loss.detach()

    def make(original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(tensors, *args, **kwargs)
            if replayer.running:
                raise Refused("its forward runs a backward")
            if threading.get_ident() == session.training_thread:
                backward_begins(tensors)
            return original(tensors, *args, **kwargs)

        return backward

    wrap(torch.autograd, "backward", make)

    @recorder.quiet
    def fetched(batch: Any, token: Any, iterator: Any) -> None:
        calls.fetched(batch, getattr(getattr(iterator, "_index_sampler", None), "batch_size", None))

    wrap(_BaseDataLoaderIter, "__next__", around(after=fetched))

    before_step = recorder.quiet(replayer.before_step)
    disabled: list[Any] = []

    def untraced() -> Any:
        # Around a step inside torch.compile the compiler would trace what the hook calls.
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is not None and not disabled:
            disabled.append(disable(before_step))
        return disabled[0] if disabled else before_step

    def look() -> None:
        if replayer.loss is not None and not recorder.busy and threading.get_ident() == session.training_thread:
            untraced()()

    def pre_hook(optimizer: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        # A closure runs forward and backward inside of the step (so does all of Lightning's automatic optimization).
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            look()
            return None

        def looking(*a: Any, **k: Any) -> Any:
            result = closure(*a, **k)
            look()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": looking}
        return (args[0], looking, *args[2:]), kwargs

    register_optimizer_step_pre_hook(pre_hook)
