"""Shell scripts that name a config: the command they would run, as a list of words."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainlint.launch.repository import walk

SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch")
NAMES = ("Makefile", "makefile", "Justfile", "justfile")
_LITERAL = re.compile(r"^\s*(?:export\s+|local\s+|readonly\s+)?([A-Za-z_]\w*)=(\S.*|)$")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_OPERATORS = frozenset(["&&", "||", "|", ";", "&", ">", ">>", "2>", "2>&1", "<", "&>", "|&", ";;"])
_PREFIXES = frozenset(["srun", "nohup", "exec", "time", "env", "sudo", "@", "-"])
_LAUNCHERS = re.compile(
    r"^(?:python[\d.]*|torchrun|accelerate|deepspeed|uv|poetry|pdm|pipenv|hatch|conda|mpirun|horovodrun|fabric|lightning)$"
)
#: Words that say that a command evaluates or exports and does not train.
NOT_TRAINING = re.compile(
    r"(?:^|[/_.\-\s])(?:eval|evaluate|evaluation|test|tests|infer|inference|predict|export|convert|demo|sample|serve|"
    r"generate|preprocess|prepare|download|plot|visuali[sz]e|benchmark|upload)(?:[/_.\-\s]|$)"
)


@dataclass(frozen=True)
class ShellCommand:
    """A command of a script that names the config. Words hold the config as written there."""

    file: Path
    line: int
    words: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    #: Index of the word that names the config, and that word's part before it (``--config=``).
    at: int = 0
    before: str = ""
    #: Folder that the script's relative paths start from.
    cwd: Path = Path()


def commands_naming(config: Path, root: Path, cwd: Path) -> list[ShellCommand]:
    """All training commands in shell scripts and makefiles of the repository that name ``config``."""
    found: list[ShellCommand] = []
    for file in walk(root, SUFFIXES, NAMES):
        try:
            if file.stat().st_size > 200_000:
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if config.stem in text:
            found.extend(_commands(text, file, config, (cwd, root, file.parent)))
    return found


def _commands(text: str, file: Path, config: Path, bases: tuple[Path, ...]) -> Iterator[ShellCommand]:
    variables: dict[str, str] = {}
    pending, started = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not pending:
            started = number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        logical, pending = pending, ""
        literal = _LITERAL.match(logical)
        try:
            words = shlex.split(logical, comments=True)
        except ValueError:
            continue
        if literal and len(words) == 1:
            variables[literal[1]] = _expand(words[0].partition("=")[2], variables)
            continue
        for part in _split(words):
            command = _command([_expand(word, variables) for word in part], file, started, config, bases)
            if command is not None:
                yield command


def _split(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in _OPERATORS:
            yield part
            part = []
            if word.startswith((">", "<", "2>", "&>")):
                part = ["#"]  # the redirect's target follows: no command
        elif word.endswith(";"):
            yield [*part, word[:-1]]
            part = []
        else:
            part.append(word)
    yield part


def _expand(word: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        if name in variables:
            return variables[name]
        return match[2] if match[2] is not None else match[0]

    return _VARIABLE.sub(value, word)


def _command(words: list[str], file: Path, line: int, config: Path, bases: tuple[Path, ...]) -> ShellCommand | None:
    env: list[tuple[str, str]] = []
    words = [word for word in words if word not in ("$@", "${@}", "$*")]
    while words and (words[0] in _PREFIXES or re.match(r"^[A-Za-z_]\w*=", words[0]) or words[0].startswith("--")):
        word = words.pop(0).lstrip("@-")
        if re.match(r"^[A-Za-z_]\w*=", word) and not word.startswith("-"):
            name, _, value = word.partition("=")
            env.append((name, value))
    if not words or words[0] == "#" or any("$" in word or "`" in word for word in words):
        return None
    if not (_LAUNCHERS.match(os.path.basename(words[0])) or words[0].endswith(".py")):
        return None
    if NOT_TRAINING.search(" ".join(words)):
        return None
    for i, word in enumerate(words[1:], 1):
        before, name = "", word
        if word.startswith("-") and "=" in word:
            before, _, name = word.partition("=")
            before += "="
        for base in bases:
            if _same(base / name, config):
                return ShellCommand(file, line, tuple(words), tuple(env), i, before, base)
    return None


def _same(path: Path, config: Path) -> bool:
    try:
        return path.is_file() and path.samefile(config)
    except OSError:
        return False
