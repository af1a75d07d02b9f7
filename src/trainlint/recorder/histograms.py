"""Distributions that a program hands to its trackers: logged, without a number of their own."""

from __future__ import annotations

from typing import Any

from .patching import ImportHooks, around, wrap
from .values import compiling, log_value
from .watch import Session

#: Events kept for each way of logging.
MOST = 50

_WRITERS = (("torch.utils.tensorboard.writer", "tensorboard"), ("tensorboardX.writer", "tensorboardX"))


def install(session: Session, hooks: ImportHooks) -> None:
    recorder = session.recorder
    seen: dict[str, int] = {}

    def told(by: str, name: Any) -> None:
        seen[by] = seen.get(by, 0) + 1
        if seen[by] <= MOST and not compiling():
            log_value(recorder, str(name), None, by, None, recorder.user_line())

    def on_writer(package: str) -> Any:
        @recorder.quiet
        def histogram(self: Any, tag: Any = "", *args: Any, **kwargs: Any) -> None:
            told(f"{package}.add_histogram", tag)

        return lambda module: wrap(module.SummaryWriter, "add_histogram", around(before=histogram))

    for module, package in _WRITERS:
        hooks.on_import(module, on_writer(package))

    @recorder.quiet
    def watched(*args: Any, **kwargs: Any) -> None:
        told("wandb.watch", "gradients")

    def on_run(module: Any) -> None:
        wrap(module.Run, "watch", around(before=watched))

    hooks.on_import("wandb.sdk.wandb_run", on_run)
