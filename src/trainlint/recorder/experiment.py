"""Experiments: the program trains on in a child of its own, with some things held still or changed.

Installed in place of the ordinary instruments when the settings name an experiment. At every optimizer step the loss
is written, the rates are set to what the experiment wants, and it is decided whether enough was seen; then the
process is parked as after an ordinary watch. Reading the loss makes the program wait for its device once per step.

The settings hold one JSON object: ``name`` (``overfit``, ``lr-range``), ``steps``, ``rate`` or ``low`` and ``high``,
``peaks`` (optimizer number -> configured rate of each group), ``loaders`` (whether loaders feed the training).
The stream gets ``experiment`` lines: lists grow, other fields are replaced.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from typing import Any

from . import experiment_held
from .core import Recorder, scalar
from .experiment_data import Data
from .experiment_losses import Losses
from .experiment_lr import Sweep
from .experiment_overfit import Overfit
from .patching import ImportHooks, around, wrap
from .watch import alive, rank, sleep_until_killed

#: Backwards without an optimizer step after which there will be no more steps.
SILENT_BACKWARDS = 400


class Experiment:
    """What the instruments of an experiment share in one process."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.plan: dict[str, Any] = json.loads(recorder.settings.experiment)
        self.name = str(self.plan["name"])
        self.policy: Overfit | Sweep = Overfit(self.plan) if self.name == "overfit" else Sweep(self.plan)
        peaks = {int(number): rates for number, rates in self.plan.get("peaks", {}).items()}
        top = max((r for rates in peaks.values() for r in rates), default=0.0)
        #: Optimizer number -> rate of each group as a share of the highest of all.
        self.ratios = {n: [r / top if top else 1.0 for r in rates] for n, rates in peaks.items()}
        #: The optimizer whose steps are counted: the first that steps.
        self.counted: int | None = None
        self.steps = 0
        self.backwards = 0
        self.since_step = 0
        #: What the backwards since the last counted step were given.
        self.given: list[float] = []
        self.scale: float | None = None
        self.losses = Losses(recorder)
        self.data = Data(self)
        #: Optimizer number -> rates that were last set.
        self._set: dict[int, list[float]] = {}
        self._program_rate = 0.0
        self.done = False

    @property
    def repeats(self) -> bool:
        """The same batch is given again and again."""
        return self.name == "overfit"

    # -- around a backward

    def backward(self, tensors: Any) -> None:
        import torch

        given = [tensors] if isinstance(tensors, torch.Tensor) else [t for t in tensors if isinstance(t, torch.Tensor)]
        self.backwards += 1
        self.since_step += 1
        if self.backwards == 1:
            self.recorder.mark("backward")
        self.data.backward(given[0] if given else None)
        if given and given[0].numel() == 1:
            self.given.append(float(given[0].detach().float()) / (self.scale or 1.0))

    def backward_ended(self) -> None:
        if self.since_step >= SILENT_BACKWARDS:
            self.finish("plateau" if self.steps else "steps", "no optimizer stepped any more")

    # -- around a step

    def before_step(self, optimizer: Any) -> None:
        """Set the rates: whatever the program or a scheduler wrote there, the step uses these."""
        number = self.recorder.optimizers.of(optimizer)
        if self.counted is None:
            self.counted = number
        self._see_program_rates(number, optimizer)
        rate = self.policy.rate(self.steps)
        ratios = self.ratios.get(number, [])
        written = []
        for index, group in enumerate(optimizer.param_groups):
            if "lr" in group:
                written.append(_write(group, "lr", rate * (ratios[index] if index < len(ratios) else 1.0)))
            if self.repeats and group.get("weight_decay"):
                _write(group, "weight_decay", 0.0)
        self._set[number] = written

    def _see_program_rates(self, number: int, optimizer: Any) -> None:
        """The rates that the program meant to use: what stands in the groups, when it is not what was put there."""
        found = [float(r) for g in optimizer.param_groups if isinstance(r := scalar(g.get("lr")), (int, float))]
        before = self._set.get(number)
        own = [r for i, r in enumerate(found) if before is None or i >= len(before) or r != before[i]]
        if before is None:
            default = scalar(getattr(optimizer, "defaults", {}).get("lr"))
            own += [float(default)] if isinstance(default, (int, float)) else []
        highest = max((r for r in own if math.isfinite(r)), default=0.0)
        if highest > self._program_rate:
            self._program_rate = highest
            self.recorder.emit("experiment", {"program_rate": highest})

    def after_step(self, optimizer: Any) -> None:
        supervisor = self.recorder.settings.supervisor
        if supervisor and not alive(supervisor):
            os._exit(1)
        number = self.recorder.optimizers.of(optimizer)
        if number != self.counted:
            return
        loss = self._loss()
        rate = self.policy.rate(self.steps)
        self.recorder.emit(
            "experiment",
            {
                "points": [
                    {"step": self.steps, "loss": loss, "rate": rate, "gradient_norm": _gradient_norm(optimizer)}
                ],
            },
        )
        self.data.step_ended(self.steps)
        self.losses.step_ended(loss)
        self.steps += 1
        self.since_step = 0
        self.given = []
        ended = self.policy.seen(loss, self.losses.floor_of_objective)
        self.recorder.mark(
            "step", optimizer=number, index=self.steps - 1, done=bool(ended), pid=os.getpid(), rank=rank(), loss=loss
        )
        if ended:
            self.finish(ended)

    def _loss(self) -> float | None:
        if self.given:
            return sum(self.given)
        # The gradients came from torch.autograd.grad.
        return self.losses.mean_of_step

    # -- the end

    def close(self) -> None:
        """Write what was gathered over the steps. The last state wins."""
        self.recorder.emit(
            "experiment",
            {
                "loss": self.losses.payload(),
                "different_batches": self.data.different_batches(),
                "repeated_by": self.data.repeated_by,
                "optimizer": self.counted,
            },
        )
        self.recorder.mark("closed", pid=os.getpid(), rank=rank())

    def finish(self, ended: str, reason: str = "") -> None:
        """Enough was seen: the process sleeps from here on."""
        self.done = True
        self.recorder.emit("experiment", {"ended": ended, "reason": reason})
        self.close()
        sleep_until_killed(self.recorder, "steps")


def _write(group: Any, name: str, value: float) -> float:
    """Set a hyperparameter, in place where it is a tensor (a captured graph reads it from there)."""
    now = group[name]
    if hasattr(now, "fill_"):
        now.fill_(value)
        return float(now)
    group[name] = value
    return value


def _gradient_norm(optimizer: Any) -> float | None:
    import torch

    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    dense = [g.detach() for g in grads if g.layout == torch.strided]
    if not dense:
        return 0.0 if not grads else None
    norms = torch._foreach_norm(dense)
    device = norms[0].device
    total = float(torch.linalg.vector_norm(torch.stack([n.float().to(device) for n in norms])))
    return total if math.isfinite(total) else None


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Called right after ``import torch`` in a process of an experiment."""
    import atexit

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    experiment = Experiment(recorder)
    inside = threading.local()

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        """Like ``Recorder.quiet``, for what may park the process: not inside of anything of the recorder's."""

        def call(*args: Any) -> None:
            if torch.compiler.is_compiling() or experiment.done or recorder.busy:
                return
            try:
                function(*args)
            except Exception as error:
                recorder.problem(f"experiment: {function.__name__}", error)

        return call

    numbered = recorder.quiet(lambda result, token, self, *a, **k: recorder.optimizers.of(self))
    wrap(torch.optim.Optimizer, "__init__", around(after=numbered))
    before, after = guarded(experiment.before_step), guarded(experiment.after_step)
    begins, ended = guarded(experiment.backward), guarded(experiment.backward_ended)

    def pre_hook(self: Any, args: Any, kwargs: Any) -> None:
        before(self)

    def post_hook(self: Any, args: Any, kwargs: Any) -> None:
        after(self)

    register_optimizer_step_pre_hook(pre_hook)
    register_optimizer_step_post_hook(post_hook)

    def make(original: Any) -> Any:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            # Reentrant checkpointing calls backward inside backward.
            if torch.compiler.is_compiling() or getattr(inside, "backward", False):
                return original(tensors, *args, **kwargs)
            begins(tensors)
            inside.backward = True
            try:
                result = original(tensors, *args, **kwargs)
            finally:
                inside.backward = False
            ended()
            return result

        return backward

    wrap(torch.autograd, "backward", make)

    def scaled(scaler: Any, *args: Any, **kwargs: Any) -> None:
        experiment.scale = float(scaler.get_scale()) if scaler.is_enabled() else None

    def updated(result: Any, token: Any, *args: Any, **kwargs: Any) -> None:
        experiment.scale = None

    wrap(torch.amp.GradScaler, "scale", around(before=recorder.quiet(scaled)))
    wrap(torch.amp.GradScaler, "update", around(after=recorder.quiet(updated)))
    for part in (experiment.losses, experiment.data):
        try:
            part.install(hooks)
        except Exception as error:
            recorder.problem(f"experiment: {type(part).__name__}", error)
    held = experiment_held.install(recorder, everything=experiment.repeats)
    recorder.emit("experiment", {"name": experiment.name, "held_still": held})
    atexit.register(recorder.quiet(experiment.close))
    recorder.mark("torch", version=str(torch.__version__), pid=os.getpid())
