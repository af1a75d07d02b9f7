"""Settings given on a launch command: Hydra overrides and flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainlint.config.load import scalar_of
from trainlint.config.meanings import meaning_of
from trainlint.recorder.config_paths import kept, leaves
from trainlint.recording.schema import ConfigKey

_HYDRA = re.compile(r"(\+{0,2})([A-Za-z_][\w.\-/@\[\]]*)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--?([A-Za-z][\w.\-]*)(?:=(.*))?", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_MODULE_LAUNCHERS = ("torch.distributed", "accelerate", "deepspeed", "trainlint")


def command_line_keys(argv: Sequence[str]) -> tuple[ConfigKey, ...]:
    """The settings that a launch command gives its program, with origin ``override`` and no file.

    ``a.b=c``, ``+a.b=c``, ``++a=b`` (Hydra) and ``--learning-rate 3e-4``, ``--lr=3e-4``, ``--betas 0.9 0.95``,
    ``--flag``. Flags of a launcher in front of the script (``torchrun --nproc_per_node 2 train.py``) are not settings
    of the program. Of a setting given twice the last one counts, as for the program.
    """
    found: dict[str, Any] = {}
    for path, value in _settings(_arguments(argv)):
        found.pop(path, None)
        found[path] = value
    return tuple(
        _key(leaf, value)
        for path, raw in found.items()
        for leaf, value in (leaves(raw, path) if isinstance(raw, (dict, list)) else [(path, raw)])
    )


def _key(path: str, raw: Any) -> ConfigKey:
    value, kind, secret = kept(path, raw)
    return ConfigKey(path=path, value=value, type=kind, origin="override", secret=secret, meaning=meaning_of(path, raw))


def _arguments(argv: Sequence[str]) -> list[str]:
    """What comes after the program: after the script, the module of ``-m``, or the first word."""
    words = list(argv)
    if words and words[0].rsplit("/", 1)[-1] == "env":
        words = words[1:]
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
            words = words[1:]
    for position, word in enumerate(words):
        if word == "-m" and position + 1 < len(words):
            module = words[position + 1]
            if module.startswith(_MODULE_LAUNCHERS):
                continue
            return words[position + 2 :]
        if word.endswith(".py") and not word.startswith("-") and "=" not in word:
            return words[position + 1 :]
    return words[1:]


def _settings(words: list[str]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            continue
        hydra = _HYDRA.fullmatch(word)
        if hydra is not None:
            path = hydra.group(2).split("@", 1)[0]
            if not path.startswith("hydra.") and path != "hydra" and "/" not in path:
                out.append((path, scalar_of(hydra.group(3))))
            continue
        flag = _FLAG.fullmatch(word)
        if flag is None:
            continue
        name, attached = flag.groups()
        path = name.replace("-", "_")
        if attached is not None:
            out.append((path, scalar_of(attached)))
            continue
        values: list[str] = []
        while position < len(words) and _is_value(words[position], values):
            values.append(words[position])
            position += 1
        if not values:
            negated = re.fullmatch(r"no_(\w+)", path)
            out.append((negated.group(1), False) if negated else (path, True))
        elif len(values) == 1:
            out.append((path, scalar_of(values[0])))
        else:
            out.append((path, [scalar_of(v) for v in values]))
    return out


def _is_value(word: str, before: list[str]) -> bool:
    """Whether a word belongs to the flag before it: one word, or several when all are numbers."""
    number = _NUMBER.fullmatch(word) is not None
    if word.startswith("-") and not number:
        return False
    if not before:
        return _HYDRA.fullmatch(word) is None
    return number and all(_NUMBER.fullmatch(v) for v in before)
