"""The settings that the config asks for, by meaning, to be set beside what was observed.

Only keys that the config layer recognised for certain (``ConfigKey.meaning``) count. Where several keys name one
setting with different values, none is taken: which of them rules is a check's question, not the card's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from trainlint.config.meanings import PRECISIONS, number
from trainlint.recording.describe import number as rate_text
from trainlint.recording.schema import ConfigFacts, ConfigKey, Value


class Configured:
    """Config keys by what they mean."""

    def __init__(self, config: ConfigFacts | None) -> None:
        self._keys: dict[str, list[ConfigKey]] = {}
        for key in config.keys if config is not None else ():
            if key.meaning and not key.secret and key.origin != "default":
                self._keys.setdefault(key.meaning, []).append(key)

    def key(self, meaning: str) -> ConfigKey | None:
        """The key that names a setting; ``None`` when there is none, or several that differ."""
        keys = self._keys.get(meaning, [])
        return keys[-1] if keys and len({repr(k.value) for k in keys}) == 1 else None

    def number(self, meaning: str) -> float | None:
        key = self.key(meaning)
        return number(key.value) if key is not None else None

    def pair(self, meaning: str) -> tuple[float, float] | None:
        key = self.key(meaning)
        if key is None or not isinstance(key.value, (tuple, list)) or len(key.value) != 2:
            return None
        first, second = number(key.value[0]), number(key.value[1])
        return (first, second) if first is not None and second is not None else None

    def betas(self) -> tuple[float | None, float | None] | None:
        """Adam's betas, given as a pair or one by one."""
        pair = self.pair("betas")
        if pair is not None:
            return pair
        one = (self.number("beta1"), self.number("beta2"))
        return one if one != (None, None) else None

    def precision(self) -> tuple[str, bool] | None:
        """(dtype, mixed) that the config asks for."""
        key = self.key("precision")
        if key is not None:
            return PRECISIONS.get(str(key.value).strip().lower())
        for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            key = self.key(flag)
            if key is not None and key.value is True:
                return dtype, True
        return None

    def text(self, *meanings: str) -> str:
        """``0.0005`` for one setting; ``warmup_steps 100, min_lr 1e-6`` for several. Empty when none is configured."""
        found = [(m, k) for m in meanings if (k := self.key(m)) is not None]
        if len(meanings) == 1:
            return value_text(found[0][1].value) if found else ""
        return ", ".join(f"{k.path.rpartition('.')[2]} {value_text(k.value)}" for _, k in found)

    def place(self, *meanings: str) -> str:
        """The paths of the keys: ``training.lr``."""
        return ", ".join(k.path for m in meanings if (k := self.key(m)) is not None)


def value_text(value: Value) -> str:
    """A setting as people write it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return rate_text(value)
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(value_text(v) for v in value) + ")"
    return value


def close(a: float, b: float, share: float = 1e-6) -> bool:
    """Equal but for rounding: configs hold decimals, tensors hold binary fractions of less precision."""
    return math.isclose(a, b, rel_tol=share, abs_tol=1e-15)


def any_close(wanted: float | None, seen: Iterable[float]) -> bool | None:
    """Whether one of the observed numbers is the wanted one; ``None`` when one side is unknown."""
    values = list(seen)
    if wanted is None or not values:
        return None
    return any(close(wanted, v) for v in values)
