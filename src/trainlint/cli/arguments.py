"""Reads the positional part of ``trainlint check [CONFIG] [KEY=VALUE …] [-- COMMAND …]``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainlint.cli.failure import Failure

#: What ``--deep`` may be narrowed to, as the command line fixes it; and what this version has of it.
DEEP = ("overfit", "lr-range", "influence")
DEEP_AVAILABLE = ("overfit", "lr-range")
_DEEP_ALL = "all"

#: ``a.b=c``, ``+a.b=c``, ``++a=b``, ``~a.b`` (Hydra); the key never looks like a path with a suffix and a blank.
_OVERRIDE = re.compile(r"(?:\+{0,2}|~)[A-Za-z_][\w.\-/@\[\]:]*=.*|~[A-Za-z_][\w.\-/@\[\]]*", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """What to check: a config, overrides of it, and the command that reads it; each may be missing."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None


def split_command(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """The arguments before the first ``--`` and the command after it; ``None`` when there is no ``--``.

    Done before the options are parsed: the command's own options are not ours.
    """
    words = list(argv)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], tuple(words[at + 1 :])


def fill_deep(words: Sequence[str]) -> list[str]:
    """Give a bare ``--deep`` its value, which the parser of options cannot leave out.

    The word behind it is its value only when it names experiments (``--deep overfit,lr-range``); a KEY=VALUE, a config
    or another option stays what it is. A file of that name is a config all the same: ``--deep=overfit`` tells.
    """
    out: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word != "--deep":
            out.append(word)
        elif left and _names_experiments(left[0]):
            out.append(f"--deep={left.pop(0)}")
        else:
            out.append(f"--deep={_DEEP_ALL}")
    return out


def _names_experiments(word: str) -> bool:
    if word.startswith("-") or "=" in word or not word.strip() or _exists(word):
        return False
    parts = [part.strip() for part in word.split(",") if part.strip()]
    if any(part in DEEP for part in parts):
        return True
    # A misspelled name is told as such; nothing with a suffix or a folder is taken for one.
    plain = all(re.fullmatch(r"[a-z_-]+", part) for part in parts)
    return bool(parts) and plain and all(difflib.get_close_matches(part, DEEP, cutoff=0.75) for part in parts)


def experiments_of(value: str | None) -> tuple[tuple[str, ...], str]:
    """The experiments that ``--deep`` asks for, and a note about what this version does not have.

    Raises:
        Failure: an unknown name, or nothing that this version has.
    """
    if value is None:
        return (), ""
    names = list(DEEP) if value == _DEEP_ALL else [part.strip() for part in value.split(",") if part.strip()]
    for name in names:
        if name not in DEEP:
            near = difflib.get_close_matches(name, DEEP, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise Failure(f"There is no experiment {name!r}.{meant}", f"--deep takes any of: {', '.join(DEEP)}.")
    wanted = tuple(name for name in DEEP_AVAILABLE if name in names)
    missing = [name for name in DEEP if name in names and name not in DEEP_AVAILABLE]
    if not wanted:
        what = ", ".join(missing) if missing else "nothing"
        raise Failure(f"--deep {what} is not available in this version.", f"It has: --deep {','.join(DEEP_AVAILABLE)}.")
    note = f"--deep: {', '.join(missing)} (change a key and look) is not available in this version." if missing else ""
    return wanted, note


def read_target(words: Sequence[str], command: tuple[str, ...] | None) -> Target:
    """Tell CONFIG from KEY=VALUE: a word is an override when it has the form of one and is no existing file.

    Raises:
        Failure: more than one config, a word that is neither, or an empty command.
    """
    config: Path | None = None
    overrides: list[str] = []
    for word in words:
        is_file = _exists(word)
        if _OVERRIDE.fullmatch(word) and not is_file:
            overrides.append(word)
        elif config is None and word.strip():
            config = Path(word)
        elif not word.strip():
            raise Failure("An argument is empty.", "Is a shell variable unset? Quote it to see.")
        else:
            raise Failure(
                f"Two configs: {config} and {word}.",
                "Name one config; settings are KEY=VALUE; the program's own arguments go behind `--`.",
            )
    if command is not None and not command:
        raise Failure(
            "Nothing stands behind `--`.", "Give the command that starts training: trainlint check -- python train.py"
        )
    return Target(config, tuple(overrides), command)


def _exists(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):
        return False


def codes_of(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """``["TL2,TL401", "TL1"]`` as ``("TL2", "TL401", "TL1")``; ``None`` when the option was not given."""
    if not values:
        return None
    return tuple(code.strip() for value in values for code in value.split(",") if code.strip())
