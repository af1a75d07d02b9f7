"""Reads the positional part of ``trainlint check [CONFIG] [KEY=VALUE …] [-- COMMAND …]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainlint.cli.failure import Failure

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
