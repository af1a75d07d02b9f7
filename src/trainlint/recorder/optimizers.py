"""Optimizers: what they were built with, each step they make, and what the step did to the parameters."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import measure
from .core import Recorder, scalar
from .gradients import GradientTrace
from .modules import dtype_name
from .outsiders import Outsiders
from .patching import ImportHooks, around, wrap
from .rounding import Rounding
from .second_moment import SecondMoments
from .watch import Session, world_size


class OptimizerWatch:
    """One optimizer as it is watched."""

    def __init__(self, number: int, optimizer: Any) -> None:
        self.number = number
        self.optimizer = optimizer
        self.at: dict[str, Any] | None = None
        self.defaults: dict[str, Any] = {}
        self.described = False
        self.payload: dict[str, Any] = {}
        self.steps = 0
        self.skipped = 0
        self.state_loaded = False
        self.loaded_from: str | None = None
        #: Parameters to be read in full at the next step because a sample of them stood still.
        self.suspects: set[int] = set()
        self.trace = GradientTrace()
        #: A GradScaler has taken its scale off these gradients since its last update.
        self.unscaled = False
        self.closure_calls = 0
        self.inside: dict[str, Any] | None = None
        #: What is measured beside it on samples of the weights and the state.
        self.samplers = (SecondMoments(number), Rounding(number))
        #: Samples of its parameters at the first backward, to tell whether something else moves them.
        self.at_first_backward: measure.Samples | None = None


class Optimizers:
    """All optimizers of the process."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        self.watched: dict[int, OptimizerWatch] = {}
        self.outsiders = Outsiders(session)

    # -- knowing

    def of(self, optimizer: Any) -> OptimizerWatch:
        number = self.recorder.optimizers.of(optimizer)
        found = self.watched.get(number)
        if found is None:
            found = self.watched[number] = OptimizerWatch(number, optimizer)
        return found

    def number_of(self, optimizer: Any) -> int | None:
        """The number of a known optimizer, or of the one whose groups a wrapper (Lightning's) shares."""
        number = self.recorder.optimizers.get(optimizer)
        if number is not None:
            return number
        groups = optimizer.param_groups
        return next((w.number for w in self.watched.values() if w.optimizer.param_groups is groups), None)

    def holds(self) -> set[int]:
        """Numbers of all parameters that any known optimizer holds."""
        held: set[int] = set()
        for watched in self.watched.values():
            for group in watched.optimizer.param_groups:
                for tensor in group["params"]:
                    number = self.recorder.parameters.get(tensor)
                    if number is not None:
                        held.add(number)
        return held

    def scaled(self, numbers: list[int]) -> bool:
        """Whether a GradScaler's scale is still on the gradients of these parameters."""
        if self.session.loss_scale in (None, 1.0):
            return False
        holders = [w for w in self.watched.values() if any(n in w.trace.numbers for n in numbers)]
        return any(not w.unscaled for w in holders) if holders else not self.session.unscaled

    def describe(self, watched: OptimizerWatch) -> None:
        """Write the optimizer as it stands now."""
        optimizer = watched.optimizer
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            numbers = [
                self.session.modules.know(p, f"optimizer{watched.number}.group{index}.{i}")
                for i, p in enumerate(group["params"])
            ]
            hyper = {
                str(k): scalar(v)
                for k, v in group.items()
                if k not in ("params", "param_names") and isinstance(k, str) and not _tensor_list(v)
            }
            groups.append(
                {
                    "index": index,
                    "parameters": numbers,
                    "hyperparameters": hyper,
                    "compute_dtype": self._compute_dtype(optimizer, group),
                }
            )
        state = optimizer.state
        watched.payload = {
            "id": watched.number,
            "class_name": type(optimizer).__name__,
            "defined_in": type(optimizer).__module__,
            "at": watched.at,
            "groups": groups,
            "signature_defaults": watched.defaults or signature_defaults(type(optimizer)),
            "state_loaded": watched.state_loaded,
            "state_loaded_from": watched.loaded_from,
            "state_tensors_before": sum(len(s) for s in state.values() if isinstance(s, dict)) if state else 0,
        }
        watched.described = True
        self.recorder.emit("optimizer", watched.payload)

    def _compute_dtype(self, optimizer: Any, group: Any) -> str | None:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if isinstance(state, dict):
                for key in ("exp_avg_sq", "exp_avg", "momentum_buffer"):
                    if hasattr(state.get(key), "dtype"):
                        return dtype_name(state[key].dtype)
            return dtype_name(parameter.dtype)
        return None

    def backward_begins(self) -> None:
        for watched in self.watched.values():
            if not watched.trace.began:
                held = self._held(watched)
                watched.trace.follow(held)
                if not watched.steps:
                    watched.at_first_backward = measure.Samples(held)
            self._tracing(watched.trace.backward_begins)

    def backward_ended(self, seq: int) -> None:
        for watched in self.watched.values():
            self._tracing(watched.trace.backward_ended, seq)

    def _tracing(self, call: Callable[..., Any], *args: Any) -> Any:
        """What cannot be traced costs no other measurement."""
        try:
            return call(*args)
        except Exception as error:
            self.recorder.problem(call.__qualname__, error)
            return None

    def _held(self, watched: OptimizerWatch) -> list[tuple[int, Any]]:
        held = {self.recorder.parameters.of(p): p for g in watched.optimizer.param_groups for p in g["params"]}
        return list(held.items())

    def _moved(self, watched: OptimizerWatch) -> bool | None:
        """Whether anything that an optimizer holds moved since the first backward, although it never stepped."""
        if watched.steps or watched.at_first_backward is None or self.session.backwards < 2:
            return None
        held = self._held(watched)
        _, changed = watched.at_first_backward.compare(
            measure.Samples(held), {n: measure.local(p).numel() for n, p in held}
        )
        return any(share > 0 for share in changed.values())

    # -- around a step

    def before(self, optimizer: Any, closure: bool) -> None:
        watched = self.of(optimizer)
        if not watched.described:
            self.session.modules.scan()
            self.describe(watched)
        self.outsiders.begin(self.holds)
        groups = optimizer.param_groups
        parameters = self._held(watched)
        inside: dict[str, Any] = {
            "parameters": parameters,
            "rates": [scalar(g.get("lr")) for g in groups],
            "began": self.recorder.next_seq(),
            "closure": closure,
            "at": self.recorder.user_line(),
            "gradients": None,
            "frozen": [n for n, p in parameters if not p.requires_grad],
        }
        if not closure:
            self._read_gradients(watched, inside)
        inside["samples"] = measure.Samples(parameters)
        inside["bits"] = measure.bits([(n, p) for n, p in parameters if n in watched.suspects])
        for sampler in watched.samplers:
            self._tracing(sampler.before, optimizer, closure)
        watched.closure_calls = 0
        watched.inside = inside
        inside["time"] = time.perf_counter()

    def closure_returned(self, watched: OptimizerWatch) -> None:
        """Gradients are there once the (first) closure has run: measure them as the step will use them."""
        watched.closure_calls += 1
        inside = watched.inside
        if inside is not None and inside["gradients"] is None:
            # A scheduler may have been stepped in it; all but L-BFGS take their rate from the groups only now.
            if not _reads_rate_first(watched.optimizer):
                inside["rates"] = [scalar(g.get("lr")) for g in watched.optimizer.param_groups]
            self._read_gradients(watched, inside)

    def _read_gradients(self, watched: OptimizerWatch, inside: dict[str, Any]) -> None:
        inside["gradients"] = measure.gradient_norms(inside["parameters"])
        inside["total"] = _total(inside["gradients"].values())
        inside["trace"] = self._tracing(watched.trace.at_step, inside["total"], world_size() > 1) or {}

    def after(self, optimizer: Any) -> None:
        watched = self.of(optimizer)
        inside, watched.inside = watched.inside, None
        if inside is None:
            return
        duration = time.perf_counter() - inside["time"]
        parameters = inside["parameters"]
        if inside["gradients"] is None:
            self._read_gradients(watched, inside)
        gradients = inside["gradients"]
        numels = {n: measure.local(p).numel() for n, p in parameters}
        before: measure.Samples = inside["samples"]
        after = measure.Samples(parameters)
        update, changed = before.compare(after, numels)
        weight = before.norms(numels)
        sizes = before.sizes()
        exact = self._unchanged(watched, inside, parameters, changed, sizes, numels)
        self.recorder.event(
            "step",
            at=inside["at"],
            optimizer=watched.number,
            index=watched.steps,
            rates=[r if isinstance(r, (int, float)) else float("nan") for r in inside["rates"]],
            scheduled_rates=_scheduled(optimizer.param_groups),
            closure=inside["closure"],
            closure_calls=watched.closure_calls,
            began=inside["began"],
            duration_s=duration,
        )
        numbers = [n for n, _ in parameters]
        self.recorder.emit(
            "measure",
            {
                "optimizer": watched.number,
                "index": watched.steps,
                "parameters": numbers,
                "gradient_norm": [gradients.get(n) for n in numbers],
                "weight_norm": [weight.get(n) for n in numbers],
                "update_norm": [update.get(n) for n in numbers],
                "changed": [changed.get(n) for n in numbers],
                "sampled": [sizes.get(n, 0) for n in numbers],
                "unchanged_exact": exact,
                "frozen": inside["frozen"],
                "gradient_norm_total": inside["total"],
                **inside["trace"],
                "duration_s": duration,
                "peak_memory_bytes": measure.peak_memory(),
            },
        )
        for number, norm in gradients.items():
            if norm is not None:
                self.session.modules.gradient_seen.add(number)
        self.outsiders.look()
        if watched.steps == 0:
            self._write_state(watched)
        watched.steps += 1
        self._tracing(watched.trace.step_ended, parameters)
        for sampler in watched.samplers:
            for tag, payload in self._tracing(sampler.after, optimizer) or ():
                self.recorder.emit(tag, payload)
        self.recorder.flush_later()
        self.session.costs.stepped(watched.number, watched.steps - 1)
        self.session.stepped(watched.number)

    def _unchanged(
        self,
        watched: OptimizerWatch,
        inside: dict[str, Any],
        parameters: list[tuple[int, Any]],
        changed: dict[int, float],
        sizes: dict[int, int],
        numels: dict[int, int],
    ) -> list[int]:
        """Parameters that are proven bit-identical, and the suspects to be read in full at the next step."""
        moving = any(isinstance(r, (int, float)) and r > 0 for r in inside["rates"])
        exact: list[int] = []
        suspects: set[int] = set()
        known = {n: total for n, total in inside["bits"].items() if total is not None and not changed.get(n, 1.0) > 0}
        now = measure.bits([(n, p) for n, p in parameters if n in known])
        for number, _ in parameters:
            if changed.get(number, 1.0) > 0:
                continue
            if sizes.get(number) == numels[number]:
                exact.append(number)
                continue
            if number in known and now[number] == known[number]:
                exact.append(number)
            if moving and inside["gradients"] and inside["gradients"].get(number):
                suspects.add(number)
        watched.suspects = suspects
        return exact

    def _write_state(self, watched: OptimizerWatch) -> None:
        dtypes: dict[str, str] = {}
        for state in watched.optimizer.state.values():
            if isinstance(state, dict):
                for key, value in state.items():
                    if hasattr(value, "is_floating_point") and value.is_floating_point() and value.numel() > 1:
                        dtypes.setdefault(str(key), dtype_name(value.dtype))
        if dtypes:
            watched.payload = {**watched.payload, "state_dtypes": dtypes}
            for group, payload in zip(watched.optimizer.param_groups, watched.payload["groups"], strict=False):
                payload["compute_dtype"] = self._compute_dtype(watched.optimizer, group)
            self.recorder.emit("optimizer", watched.payload)

    def close(self) -> None:
        """Write what is known at the end: outsiders, optimizers that never stepped, counts."""
        self.outsiders.close(self.holds())
        for watched in list(self.watched.values()):
            if not watched.described:
                self.describe(watched)
            self.recorder.emit(
                "optimizer",
                {
                    **watched.payload,
                    "steps": watched.steps,
                    "skipped_steps": watched.skipped,
                    "moved_without_steps": self._moved(watched),
                },
            )


def _reads_rate_first(optimizer: Any) -> bool:
    """Whether it takes the rate before it calls the closure."""
    import torch

    return isinstance(optimizer, torch.optim.LBFGS)


def _tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(hasattr(v, "device") for v in value)


def _scheduled(groups: list[dict[str, Any]]) -> list[float]:
    """The rates that the step used, from an optimizer that writes them into its groups for logging."""
    rates = [scalar(g.get("scheduled_lr")) for g in groups]
    return [float(r) for r in rates if isinstance(r, (int, float))] if None not in rates else []


def _total(norms: Any) -> float | None:
    present = [n for n in norms if n is not None]
    return sum(n * n for n in present) ** 0.5 if present else None


def signature_defaults(cls: type) -> dict[str, Any]:
    """Defaults of the constructor's parameters: what holds when nobody passes a value."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: scalar(p.default) for p in parameters if p.default is not inspect.Parameter.empty}


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    optimizers = Optimizers(session)
    session.optimizers = optimizers
    session.closers.append(optimizers.close)
    recorder = session.recorder
    base = torch.optim.Optimizer

    @recorder.quiet
    def constructed(result: Any, token: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        watched = optimizers.of(self)
        if watched.at is None:
            watched.at = recorder.user_line()
            session.constructed.add(watched.number)

    wrap(base, "__init__", around(after=constructed))

    @recorder.quiet
    def step_begins(self: Any, args: Any, kwargs: Any) -> Any:
        costs = session.costs
        costs.pause()
        closure = kwargs.get("closure")
        position = None
        if closure is None and len(args) > 1 and callable(args[1]):
            closure, position = args[1], 1
        optimizers.before(self, closure is not None)
        watched = optimizers.of(self)
        costs.enter("optimizer", watched.number)
        if closure is None:
            return None
        counted: Callable[[], None] = recorder.quiet(lambda: optimizers.closure_returned(watched))

        def counting(*a: Any, **k: Any) -> Any:
            costs.pause()
            costs.enter(None)
            result = closure(*a, **k)
            costs.pause()
            counted()
            costs.leave()
            return result

        if position is None:
            return args, {**kwargs, "closure": counting}
        return (args[0], counting, *args[2:]), kwargs

    @recorder.quiet
    def step_ended(self: Any, args: Any, kwargs: Any) -> None:
        session.costs.pause()
        optimizers.after(self)
        session.costs.leave()

    disabled: dict[Any, Any] = {}

    def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
        # Around a step inside torch.compile the compiler would trace what the hook calls, once it has given up on the
        # frame of the step itself. It is loaded by then.
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is None:
            return function
        if function not in disabled:
            disabled[function] = disable(function)
        found: Callable[..., Any] = disabled[function]
        return found

    def pre_hook(self: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() != session.training_thread or measure.capturing():
            return None
        return untraced(step_begins)(self, args, kwargs)

    def post_hook(self: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != session.training_thread or measure.capturing():
            return
        untraced(step_ended)(self, args, kwargs)

    register_optimizer_step_pre_hook(pre_hook)
    register_optimizer_step_post_hook(post_hook)

    def rates(self: Any) -> list[Any]:
        return [scalar(g.get("lr")) for g in self.param_groups]

    @recorder.quiet
    def load_before(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return rates(self)

    @recorder.quiet
    def load_after(result: Any, token: Any, self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        watched = optimizers.of(self)
        state = state_dict.get("state") if hasattr(state_dict, "get") else None
        empty = not state
        if not empty:
            watched.state_loaded = True
            watched.loaded_from = session.last_loaded
        recorder.event(
            "state_loaded",
            at=recorder.user_line(),
            what="optimizer",
            target=watched.number,
            class_name=type(self).__name__,
            empty=empty,
            tensors=sum(len(s) for s in state.values() if isinstance(s, dict)) if state else 0,
            rates_before=token or [],
            rates_after=rates(self),
            path=session.last_loaded if not empty else None,
        )

    wrap(base, "load_state_dict", around(load_before, load_after))
