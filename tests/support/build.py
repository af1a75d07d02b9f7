"""Recordings built by hand: a timeline written the way a program runs.

run = Run()
net = run.module("Net", {"body.weight": (8, 8), "head.weight": (2, 8)})
adam = run.optimizer("AdamW", net, lr=1e-3)
for _ in range(3):
    run.batch().backward().step(adam).zero(adam)
recording = run.recording()
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    Clip,
    ConfigFacts,
    ConfigKey,
    CurvePoint,
    Event,
    Forward,
    Framework,
    Loader,
    Logged,
    LossCall,
    Optimizer,
    OptimizerStep,
    Outsiders,
    Parameter,
    ParamGroup,
    Plan,
    Program,
    Recording,
    RootModule,
    ScalerEvent,
    Scheduler,
    SchedulerStep,
    SourceLine,
    StateLoaded,
    StepMeasurement,
    Submodule,
    ZeroGrad,
)

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SGD = {"momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": 0.0}


def at(line: int, function: str = "main", file: str = "/home/user/train.py") -> SourceLine:
    return SourceLine(file, line, function)


class Run:
    """A program as it runs: build modules, optimizers and schedulers, then call what the loop calls."""

    def __init__(self) -> None:
        self.parameters: dict[int, Parameter] = {}
        self.roots: list[RootModule] = []
        self.optimizers: dict[int, Optimizer] = {}
        self.schedulers: dict[int, Scheduler] = {}
        self.rates: dict[int, list[float]] = {}
        self.curves: dict[int, Callable[[int], float]] = {}
        self.events: list[Event] = []
        self.measured: list[StepMeasurement] = []
        self.outsider: dict[int, tuple[float | None, bool | None]] = {}
        self.fields: dict[str, Any] = {}
        self.loaders: dict[int, Loader] = {}
        self._fetched = 0
        self.after_backward: float | None = None

    # -- what there is

    def module(
        self,
        class_name: str,
        tensors: Mapping[str, tuple[int, ...]],
        *,
        frozen: Iterable[str] = (),
        origin: Mapping[str, str] | str = "fresh",
        training: bool = True,
        dtype: str = "float32",
        classes: Mapping[str, str] | None = None,
        **root: Any,
    ) -> list[int]:
        """A root module; returns the ids of its parameters. ``frozen``: prefixes of names without requires_grad."""
        number = len(self.roots)
        ids = []
        for name, shape in tensors.items():
            ident = len(self.parameters)
            came = (
                origin
                if isinstance(origin, str)
                else next((v for k, v in origin.items() if name.startswith(k)), "fresh")
            )
            self.parameters[ident] = Parameter(
                ident,
                name,
                shape,
                dtype,
                "cpu",
                not name.startswith(tuple(frozen) or ("\0",)),
                root=number,
                origin=came,
            )
            ids.append(ident)
        submodules = tuple(Submodule(n, c, True) for n, c in (classes or {}).items())
        self.roots.append(RootModule(number, class_name, training=training, submodules=submodules, **root))
        return ids

    def tensor(self, shape: tuple[int, ...], **fields: Any) -> int:
        """A tensor of no module."""
        ident = len(self.parameters)
        self.parameters[ident] = Parameter(ident, f"optimizer.{ident}", shape, "float32", "cpu", True, **fields)
        return ident

    def optimizer(
        self,
        class_name: str,
        *groups: Sequence[int],
        lr: float | Sequence[float] = 1e-3,
        compute_dtype: str = "float32",
        line: int = 5,
        hyper: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> int:
        number = len(self.optimizers)
        rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(groups)
        own = hyper if hyper is not None else SGD if class_name == "SGD" else ADAM
        made = tuple(
            ParamGroup(i, tuple(ids), {"lr": rate, **own}, compute_dtype)
            for i, (ids, rate) in enumerate(zip(groups, rates, strict=True))
        )
        self.optimizers[number] = Optimizer(number, class_name, at=at(line), groups=made, **fields)
        self.rates[number] = rates
        return number

    def scheduler(
        self,
        optimizer: int,
        factor: Callable[[int], float],
        horizon: int | None,
        *,
        class_name: str = "CosineAnnealingLR",
        reach: int | None = None,
        line: int = 6,
        **fields: Any,
    ) -> int:
        """A scheduler whose rate is ``base * factor(calls)``."""
        number = len(self.schedulers)
        base = list(self.rates[optimizer])
        last = reach or (horizon or 1000) + 50
        marks = sorted({*range(min(last, 400) + 1), *(round(last * i / 300) for i in range(301)), last, horizon or 0})
        curve = tuple(CurvePoint(n, tuple(b * factor(n) for b in base)) for n in marks)
        self.schedulers[number] = Scheduler(
            number,
            class_name,
            optimizer,
            at(line),
            base_rates=tuple(base),
            curve=curve,
            horizon_calls=horizon,
            **fields,
        )
        self.curves[number] = lambda n: factor(n)
        self._emit(
            SchedulerStep, scheduler=number, rates_before=tuple(base), rates_after=self._set(number, 0), initial=True
        )
        return number

    def _set(self, scheduler: int, calls: int) -> tuple[float, ...]:
        s = self.schedulers[scheduler]
        assert s.optimizer is not None
        self.rates[s.optimizer] = [b * self.curves[scheduler](calls) for b in s.base_rates]
        return tuple(self.rates[s.optimizer])

    def loader(self, batches: int | None = 100, **fields: Any) -> int:
        number = len(self.loaders)
        self.loaders[number] = Loader(number, batches=batches, training=True, **fields)
        return number

    def config(self, **values: Any) -> Run:
        """Keys by the setting that they name: ``epochs=3``, ``accumulation=4``, ``log_lr=True``."""
        keys = tuple(ConfigKey(f"training.{k}", v, type(v).__name__, meaning=k) for k, v in values.items())
        self.fields["config"] = ConfigFacts(("config.yaml",), "yaml", keys)
        return self

    def framework(
        self, name: str, *, callbacks: Sequence[str] = (), loggers: Sequence[str] = (), **settings: Any
    ) -> Run:
        made = Framework(name, settings=settings, callbacks=tuple(callbacks), loggers=tuple(loggers))
        self.fields["frameworks"] = (*self.fields.get("frameworks", ()), made)
        return self

    def plan(self, **fields: Any) -> Run:
        self.fields["plan"] = Plan(**fields)
        return self

    def unheld(self, ids: Iterable[int], gradient: float | None = 0.5, moved: bool | None = False) -> Run:
        """What was seen of parameters that no optimizer holds."""
        for i in ids:
            self.outsider[i] = (gradient, moved)
        return self

    def change(self, ids: Iterable[int], **fields: Any) -> Run:
        for i in ids:
            self.parameters[i] = dataclasses.replace(self.parameters[i], **fields)
        return self

    # -- what happens

    def _emit(self, kind: Any, **fields: Any) -> Any:
        event = kind(seq=len(self.events) + 1, time_s=0.0, **fields)
        self.events.append(event)
        return event

    def batch(self, fingerprint: str | None = "new", loader: int = 0) -> Run:
        self._fetched += 1
        known = f"batch{self._fetched}" if fingerprint == "new" else fingerprint
        self._emit(BatchFetched, loader=loader, size=8, fingerprint=known)
        return self

    def forward(self, fingerprint: str | None = None, root: int = 0) -> Run:
        self._emit(Forward, root=root, training=True, grad_enabled=True, fingerprint=fingerprint)
        return self

    def loss(self, value: float = 1.0, reduction: str = "mean") -> Run:
        self._emit(LossCall, function="cross_entropy", reduction=reduction, value=value)
        return self

    def backward(
        self,
        line: int = 10,
        *,
        value: float = 1.0,
        divided_by: float | None = 1.0,
        reduction: str | None = "mean",
        **fields: Any,
    ) -> Run:
        self._emit(Backward, value=value, divided_by=divided_by, micro_loss_reduction=reduction, at=at(line), **fields)
        return self

    def zero(self, optimizer: int | None = None, *, had: int = 1, line: int = 9, root: int | None = None) -> Run:
        self._emit(ZeroGrad, optimizer=optimizer, had_gradients=had, at=at(line), root=root)
        return self

    def clip(self, threshold: float = 1.0, norm: float | None = 3.0, method: str = "norm", **fields: Any) -> Run:
        self._emit(Clip, method=method, threshold=threshold, total_norm=norm, at=at(11), **fields)
        return self

    def scaler(
        self, call: str = "step", *, optimizer: int | None = 0, skipped: bool | None = None, scale: float = 65536.0
    ) -> Run:
        self._emit(ScalerEvent, call=call, optimizer=optimizer, skipped=skipped, scale=scale)
        return self

    def loaded(self, what: str, target: int = 0, *, empty: bool = False) -> Run:
        self._emit(StateLoaded, what=what, target=target, empty=empty)
        return self

    def log(self, name: str, value: float, by: str = "tensorboard.add_scalar") -> Run:
        self._emit(Logged, name=name, value=value, by=by, at=at(20))
        return self

    def sched(self, scheduler: int = 0, line: int = 13) -> Run:
        s = self.schedulers[scheduler]
        assert s.optimizer is not None
        before = tuple(self.rates[s.optimizer])
        after = self._set(scheduler, s.calls + 1)
        self.schedulers[scheduler] = dataclasses.replace(s, calls=s.calls + 1)
        self._emit(SchedulerStep, scheduler=scheduler, rates_before=before, rates_after=after, at=at(line))
        return self

    def begin(self) -> int:
        """The ``began`` of a step whose closure runs what follows."""
        self._emit(Forward, root=0, training=True, grad_enabled=True)
        return len(self.events)

    def step(
        self,
        optimizer: int = 0,
        *,
        gradient: float | None | Mapping[int, float | None] = 1.0,
        moved: bool | Iterable[int] = True,
        line: int = 12,
        began: int | None = None,
        weight: float = 1.0,
        update: float = 1e-3,
        frozen: Iterable[int] = (),
        total: float | None = None,
        after: float | None = None,
        **measured: Any,
    ) -> Run:
        """One optimizer step with its measurement.

        ``gradient``: norm of every held parameter's gradient, or per parameter. ``weight``: root mean square.
        ``measured``: further fields of the measurement.
        """
        held = [i for g in self.optimizers[optimizer].groups for i in g.parameters]
        index = sum(1 for e in self.events if isinstance(e, OptimizerStep) and e.optimizer == optimizer)
        norms = {i: gradient.get(i) if isinstance(gradient, Mapping) else gradient for i in held}
        moving = set(held if moved is True else () if moved is False else moved)
        moving = {i for i in moving if norms[i] is not None} if moved is True else moving
        self._emit(
            OptimizerStep,
            optimizer=optimizer,
            index=index,
            rates=tuple(self.rates[optimizer]),
            closure=began is not None,
            began=began or len(self.events) + 1,
            at=at(line),
        )
        known = [n for n in norms.values() if n is not None]
        norm = total if total is not None else math.sqrt(sum(n * n for n in known)) if known else None
        self.measured.append(
            StepMeasurement(
                optimizer,
                index,
                parameters=tuple(held),
                gradient_norm=tuple(norms[i] for i in held),
                weight_norm=tuple(weight * math.sqrt(self.parameters[i].numel) for i in held),
                update_norm=tuple(update if i in moving else 0.0 for i in held),
                changed=tuple(1.0 if i in moving else 0.0 for i in held),
                sampled=tuple(self.parameters[i].numel for i in held),
                unchanged_exact=tuple(i for i in held if i not in moving),
                frozen=tuple(frozen),
                gradient_norm_total=norm,
                gradient_norm_after_backward=after if after is not None else norm,
                **measured,
            )
        )
        for i in held:
            if norms[i] is not None:
                self.parameters[i] = dataclasses.replace(self.parameters[i], gradient_seen=True)
        o = self.optimizers[optimizer]
        self.optimizers[optimizer] = dataclasses.replace(o, steps=o.steps + 1)
        return self

    def recording(self, **fields: Any) -> Recording:
        outsiders = None
        if self.outsider:
            outsiders = Outsiders(
                tuple(self.outsider),
                tuple(g for g, _ in self.outsider.values()),
                tuple(m for _, m in self.outsider.values()),
            )
        return Recording(
            **{
                "program": Program(),
                "roots": tuple(self.roots),
                "parameters": tuple(self.parameters.values()),
                "optimizers": tuple(self.optimizers.values()),
                "schedulers": tuple(self.schedulers.values()),
                "loaders": tuple(self.loaders.values()),
                "events": tuple(self.events),
                "steps": tuple(self.measured),
                "outsiders": outsiders,
                **self.fields,
                **fields,
            }
        )


def cosine(calls: int) -> Callable[[int], float]:
    """The factor of CosineAnnealingLR: down over ``calls``, and up again after."""
    return lambda n: 0.5 * (1 + math.cos(math.pi * n / calls))


def linear(warmup: int, calls: int) -> Callable[[int], float]:
    """The factor of the usual LambdaLR: linear warm-up, then linearly to 0, and 0 after."""
    return lambda n: n / warmup if n < warmup else max(0.0, (calls - n) / max(1, calls - warmup))
