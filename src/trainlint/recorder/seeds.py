"""Seed calls: torch, numpy, ``random`` and the frameworks' ``seed_everything`` / ``set_seed``.

Only set-up counts: torch's own calls (one seed handed on to every device, data loader workers) are left out, and a
place that seeds again and again (per sample, per epoch) is written a few times only.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType, ModuleType
from typing import Any

from .core import Recorder, is_user_file, line_of, user_frame
from .patching import ImportHooks, around, wrap
from .values import compiling, outside

#: module -> functions, with the name they are known by
FUNCTIONS: dict[str, dict[str, str]] = {
    "random": {"seed": "random.seed"},
    "numpy.random": {"seed": "numpy.random.seed"},
    # torch.random rather than torch: `torch.manual_seed` is taken from there while torch is being imported.
    "torch.random": {"manual_seed": "torch.manual_seed"},
    "torch.cuda.random": {
        "manual_seed": "torch.cuda.manual_seed",
        "manual_seed_all": "torch.cuda.manual_seed_all",
    },
    "lightning.fabric.utilities.seed": {"seed_everything": "lightning.seed_everything"},
    "lightning_fabric.utilities.seed": {"seed_everything": "lightning.seed_everything"},
    "transformers.trainer_utils": {
        "set_seed": "transformers.set_seed",
        "enable_full_determinism": "transformers.enable_full_determinism",
    },
    "accelerate.utils.random": {"set_seed": "accelerate.set_seed"},
}

PER_PLACE = 4
IN_TOTAL = 200
#: Their calls pass on a seed that was recorded already, or seed a worker.
INNER = ("torch", "multiprocessing", "random", "numpy")


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    seeds = Seeds(recorder)
    for module, functions in FUNCTIONS.items():
        hooks.on_import(module, seeds.installer(functions))


class Seeds:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._places: Counter[tuple[str, str, int]] = Counter()
        self._total = 0

    def installer(self, functions: dict[str, str]) -> Any:
        def install_on(module: ModuleType) -> None:
            for name, known_as in functions.items():
                wrap(module, name, around(before=self._before(known_as)))

        return install_on

    def _before(self, function: str) -> Any:
        def seeded(*args: Any, **kwargs: Any) -> None:
            if self._total >= IN_TOTAL or compiling():
                return
            caller = outside(sys._getframe(1), ("torch._compile", "torch._dynamo"))
            if caller is None or _inner(caller) or _in_worker():
                return
            place = (function, caller.f_code.co_filename, caller.f_lineno)
            self._places[place] += 1
            if self._places[place] > PER_PLACE:
                return
            self._total += 1
            value = args[0] if args else next(iter(kwargs.values()), None)
            self.recorder.event("seed", line_of(user_frame(caller)), function=function, seed=_seed(value))

        return self.recorder.quiet(seeded)


def _inner(frame: FrameType) -> bool:
    if is_user_file(frame.f_code.co_filename):
        return False
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in INNER


def _in_worker() -> bool:
    worker: Any = sys.modules.get("torch.utils.data._utils.worker")
    return worker is not None and getattr(worker, "_worker_info", None) is not None


def _seed(value: Any) -> int | None:
    try:
        return int(value) if not isinstance(value, (str, bytes, bytearray)) and value is not None else None
    except (TypeError, ValueError, OverflowError):
        return None
