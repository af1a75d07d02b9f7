"""The loss functions that an experiment's training calls: which one, how low it can get, and on which targets."""

from __future__ import annotations

import inspect
import math
import zlib
from typing import Any

from .core import Recorder
from .loss_inputs import readable
from .losses import LOSSES, argument_names
from .patching import ImportHooks, wrap

#: Losses whose lowest value is 0, whatever their targets.
FLOOR_ZERO = frozenset(
    "mse_loss l1_loss smooth_l1_loss huber_loss kl_div hinge_embedding_loss margin_ranking_loss triplet_margin_loss "
    "multi_margin_loss multilabel_margin_loss ctc_loss".split()
)
#: Steps over which the loss function's value is compared with what backward is given.
COMPARED = 3


class Losses:
    """Calls with gradients since the last optimizer step, and the first of all in full."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._values: list[float] = []
        #: What backward was given over the mean of the calls, for the first steps.
        self._ratios: list[float] = []
        self._first: dict[str, Any] = {}
        self._calls = 0
        self._steps = 0
        #: Fingerprints of the targets since the last step.
        self.targets: list[int] = []

    @property
    def mean_of_step(self) -> float | None:
        return sum(self._values) / len(self._values) if self._values else None

    @property
    def alone(self) -> bool:
        """What backward is given is the loss function's value, up to one constant factor."""
        ratios = self._ratios
        return len(ratios) >= 2 and max(ratios) - min(ratios) <= 1e-3 * abs(ratios[0])

    @property
    def floor_of_objective(self) -> float | None:
        """The floor in the numbers that backward is given."""
        floor = self._first.get("floor")
        if floor is None or not self.alone:
            return None
        return float(floor) * self._ratios[0]

    def payload(self) -> dict[str, Any]:
        return {**self._first, "alone": self.alone, "calls": self._calls, "floor": self.floor_of_objective}

    def step_ended(self, given: float | None) -> None:
        mean = self.mean_of_step
        if not self._steps:
            self._calls = len(self._values)
        if self._steps < COMPARED and given is not None and mean:
            self._ratios.append(given / mean)
        self._steps += 1
        self._values = []
        self.targets = []

    def install(self, hooks: ImportHooks) -> None:
        import torch

        functional = torch.nn.functional

        def make_for(name: str) -> Any:
            names = argument_names(getattr(functional, name, None))

            @self.recorder.quiet
            def called(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
                if isinstance(result, torch.Tensor) and result.requires_grad and result.numel() == 1:
                    self._called(name, {**dict(zip(names, args, strict=False)), **kwargs}, args, result)

            def make(original: Any) -> Any:
                def loss(*args: Any, **kwargs: Any) -> Any:
                    result = original(*args, **kwargs)
                    if not torch.compiler.is_compiling():
                        called(args, kwargs, result)
                    return result

                return loss

            return make

        for name in LOSSES:
            if callable(getattr(functional, name, None)) and inspect.isroutine(getattr(functional, name)):
                wrap(functional, name, make_for(name))

    def _called(self, name: str, arguments: dict[str, Any], args: tuple[Any, ...], result: Any) -> None:
        import torch

        if not readable(result.detach()):
            return
        value = float(result.detach().float())
        self._values.append(value)
        target = arguments.get("target", args[1] if len(args) > 1 else None)
        target = target.detach() if isinstance(target, torch.Tensor) and readable(target.detach()) else None
        if target is not None:
            self.targets.append(print_of(target))
        if not self._first:
            self._first = {"function": name, "value": value}
            smoothing = arguments.get("label_smoothing")
            self._first["label_smoothing"] = float(smoothing) if isinstance(smoothing, (int, float)) else 0.0
            if target is not None:
                floor, positions = floor_of(name, arguments, target)
                self._first.update(floor=floor, positions=positions)


def print_of(tensor: Any) -> int:
    """A number that is the same for the same values: of a sample of them, on whatever device they are."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 256)][:512]
    return zlib.crc32(f"{tuple(tensor.shape)}{sample.tolist()}".encode())


def floor_of(name: str, arguments: dict[str, Any], target: Any) -> tuple[float | None, int]:
    """The lowest value of a loss on these targets, and the positions of the target that count.

    ``None``: without a bound, or not known.
    """
    import torch

    reduction = arguments.get("reduction", "mean")
    positions = int(target.numel())
    if name in FLOOR_ZERO:
        return 0.0, positions
    if name in ("cross_entropy", "nll_loss"):
        given = arguments["input"]
        classes = int(given.shape[1] if given.ndim > 1 else given.shape[0])
        smoothing = float(arguments.get("label_smoothing", 0.0) or 0.0)
        plain = arguments.get("weight") is None
        if target.is_floating_point():
            positions = max(1, positions // classes)
            mixed = target.double() * (1 - smoothing) + smoothing / classes
            floor = float(torch.special.entr(mixed.clamp(min=0)).sum()) if plain else None
            return _reduced(floor, positions, reduction), positions
        counted = int((target != arguments.get("ignore_index", -100)).sum())
        if name == "nll_loss":
            made = float(given.detach().max())  # above 0 they are no log-probabilities, and there is no bound
            return (0.0 if made <= 1e-4 else None), counted
        if not smoothing:
            return 0.0, counted
        low, high = smoothing / classes, 1 - smoothing + smoothing / classes
        entropy = -(high * math.log(high) + (classes - 1) * low * math.log(low)) if classes > 1 else 0.0
        return (_reduced(entropy * counted, counted, reduction) if plain else None), counted
    if name in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
        if arguments.get("weight") is not None or arguments.get("pos_weight") is not None:
            return (0.0 if bool(((target == 0) | (target == 1)).all()) else None), positions
        if float(target.min()) < 0 or float(target.max()) > 1:
            return None, positions
        entropy = float((torch.special.entr(target.double()) + torch.special.entr(1 - target.double())).sum())
        return _reduced(entropy, positions, reduction), positions
    return None, positions


def _reduced(total: float | None, positions: int, reduction: Any) -> float | None:
    if total is None or reduction == "sum":
        return total
    return total / max(1, positions)
