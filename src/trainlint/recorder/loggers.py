"""What the program hands to its trackers: TensorBoard, W&B, MLflow, others, and metric files it writes itself.

Every number becomes a ``logged`` event named after the stage that saw it (``by``): a value that goes through a
framework's logger into a tracker is seen once at each.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .core import Recorder, is_user_file
from .patching import ImportHooks, around, wrap
from .values import NAMES_PER_CALL, compiling, log_value, log_values, outside


@dataclass(frozen=True)
class Call:
    """A logging function: where it is, and which of its arguments are what (position after ``self``, keyword).

    ``values`` is a mapping of names to numbers, unless ``name`` is given: then it is one number. ``prefix`` is put
    before the names of a mapping.
    """

    module: str
    owner: str | None
    function: str
    by: str
    values: tuple[int, str]
    step: tuple[int, str] | None
    name: tuple[int, str] | None = None
    prefix: tuple[int, str] | None = None


def _summary_writer(module: str, package: str) -> tuple[Call, Call]:
    step = (2, "global_step")
    number = {"name": (0, "tag"), "values": (1, "scalar_value"), "step": step}
    several = {"prefix": (0, "main_tag"), "values": (1, "tag_scalar_dict"), "step": step}
    return (
        Call(module, "SummaryWriter", "add_scalar", f"{package}.add_scalar", **number),
        Call(module, "SummaryWriter", "add_scalars", f"{package}.add_scalars", **several),
    )


#: Positions and keywords as in the releases of 2026; a function that is missing is skipped.
CALLS = (
    *_summary_writer("torch.utils.tensorboard.writer", "tensorboard"),
    *_summary_writer("tensorboardX.writer", "tensorboardX"),
    Call("wandb.sdk.wandb_run", "Run", "log", "wandb.log", (0, "data"), (1, "step")),
    # A disabled run has a `log` of its own.
    Call("wandb.sdk.lib.noop_run", "NoopRun", "log", "wandb.log", (0, "data"), (1, "step")),
    Call("mlflow.tracking.fluent", None, "log_metric", "mlflow.log_metric", (1, "value"), (2, "step"), name=(0, "key")),
    Call("mlflow.tracking.fluent", None, "log_metrics", "mlflow.log_metrics", (0, "metrics"), (1, "step")),
    Call("swanlab.sdk.internal.run", "Run", "log", "swanlab.log", (0, "data"), (1, "step")),
    Call("trackio.run", "Run", "log", "trackio.log", (0, "metrics"), (1, "step")),
    Call("dvclive.live", "Live", "log_metric", "dvclive.log_metric", (1, "val"), None, name=(0, "name")),
    Call("aim.sdk.run", "Run", "track", "aim.track", (0, "value"), (2, "step"), name=(1, "name")),
)

#: Rows of one call site of a metrics file that are written; what comes after is not needed.
ROWS_PER_PLACE = 100


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    loggers = Loggers(recorder)
    for call in CALLS:
        hooks.on_import(call.module, loggers.installer(call))
    hooks.on_import("wandb.sdk.wandb_init", loggers.on_wandb_init)
    hooks.on_import("csv", loggers.on_csv)
    hooks.on_import("json", loggers.on_json)


class Loggers:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._places: Counter[tuple[str, int]] = Counter()

    # -- trackers

    def installer(self, call: Call) -> Any:
        def install_on(module: ModuleType) -> None:
            owner: Any = module if call.owner is None else getattr(module, call.owner, None)
            if owner is not None and (call.owner is None or call.function in vars(owner)):
                wrap(owner, call.function, around(before=self._seen(call)))

        return install_on

    def _seen(self, call: Call) -> Any:
        """Looks before the call: trackers change the mapping they are given."""
        start = 0 if call.owner is None else 1

        def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], where: tuple[int, str] | None) -> Any:
            if where is None:
                return None
            position, keyword = where
            if keyword in kwargs:
                return kwargs[keyword]
            return args[start + position] if start + position < len(args) else None

        def seen(*args: Any, **kwargs: Any) -> None:
            if compiling():
                return
            values = argument(args, kwargs, call.values)
            if call.name is not None:
                name = argument(args, kwargs, call.name)
                values = {name if name is not None else "": values}
            elif call.prefix is not None and isinstance(values, Mapping):
                prefix = argument(args, kwargs, call.prefix)
                values = {f"{prefix}/{name}": value for name, value in values.items()}
            log_values(self.recorder, values, call.by, argument(args, kwargs, call.step))

        return self.recorder.quiet(seen)

    def on_wandb_init(self, module: ModuleType) -> None:
        wrap(module, "init", around(after=self.recorder.quiet(self.wandb_opened)))

    def wandb_opened(self, run: Any, token: Any, *args: Any, **kwargs: Any) -> None:
        """Disabled runs of older releases carry a ``log`` of their own in the instance, and in ``wandb.log``."""
        own = getattr(run, "__dict__", {}).get("log")
        if own is None:
            return
        data = Call("wandb", None, "log", "wandb.log", (0, "data"), (1, "step"))
        wrap(run, "log", around(before=self._seen(data)))
        wandb: Any = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "log", None) is own:
            wandb.log = run.log

    # -- metric files

    def on_csv(self, module: ModuleType) -> None:
        def row(writer: Any, values: Any = None, *args: Any, **kwargs: Any) -> None:
            if not self._is_metrics_call(values):
                return
            log_values(self.recorder, values, "csv", values.get("step"))
            for name, value in values.items():
                if isinstance(value, str) and _is_number(value):
                    # Rounded by formatting: that it was written is known, its value is not.
                    log_value(self.recorder, name, None, "csv", values.get("step"), self.recorder.user_line())

        wrap(module.DictWriter, "writerow", around(before=self.recorder.quiet(row)))

    def on_json(self, module: ModuleType) -> None:
        def line(values: Any = None, *args: Any, **kwargs: Any) -> None:
            if type(values) is dict and self._is_metrics_call(values):
                log_values(self.recorder, values, "json", values.get("step"))

        wrap(module, "dumps", around(before=self.recorder.quiet(line)))

    def _is_metrics_call(self, values: Any) -> bool:
        """A user's own line hands over a small mapping, after training began: before, it is data or a config."""
        if not any(self.recorder._counts.get(kind) for kind in ("backward", "step")):
            return False
        if not isinstance(values, Mapping) or not 0 < len(values) <= NAMES_PER_CALL:
            return False
        caller = outside(sys._getframe(1))
        if caller is None or not is_user_file(caller.f_code.co_filename):
            return False
        place = (caller.f_code.co_filename, caller.f_lineno)
        self._places[place] += 1
        return self._places[place] <= ROWS_PER_PLACE


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
