"""Keeping keys, tokens and passwords out of everything that is shown or stored."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = frozenset(
    ["password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey"]
)
_KEYS = frozenset(["api", "access", "private", "secret", "auth", "account", "encryption", "signing", "subscription"])
#: ``hf_token``, ``auth_token`` are secrets; ``pad_token``, ``max_tokens``, ``eos_token_id`` are not.
_BEFORE_TOKEN = frozenset(
    [
        "api",
        "hf",
        "hub",
        "huggingface",
        "auth",
        "access",
        "bearer",
        "refresh",
        "wandb",
        "github",
        "gitlab",
        "git",
        "hugging",
        "user",
        "login",
        "session",
        "aws",
        "oauth",
        "comet",
        "neptune",
        "slack",
        "bot",
        "secret",
        "my",
        "personal",
        "read",
        "write",
    ]
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
_URL = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)([^/\s@:]*):([^/\s@]+)@")
_ASSIGNED = re.compile(r"^(\+{0,2}-{0,2}[\w./-]+)=(.*)$", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether a key, flag or environment variable of this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name.rpartition(".")[2])]
    if _ALWAYS & set(words):
        return True
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word == "key" and before in _KEYS:
            return True
        if word == "token" and i == len(words) - 1 and (before in _BEFORE_TOKEN or len(words) == 1):
            return True
    return False


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with known secret values, token-shaped words and credentials in URLs masked."""
    for value in secrets:
        if value in text:
            text = text.replace(value, MASK)
    if "://" in text:
        text = _URL.sub(rf"\1{MASK}@", text)
    return _SHAPES.sub(MASK, text)


def masked_arguments(command: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a command with secret values masked (``--token X``, ``wandb.api_key=X``, URLs)."""
    shown: list[str] = []
    hide_next = False
    for argument in command:
        if hide_next and not argument.startswith("-"):
            shown.append(MASK)
            hide_next = False
            continue
        hide_next = argument.startswith("-") and "=" not in argument and is_secret_name(argument)
        assigned = _ASSIGNED.match(argument)
        if assigned and assigned[2] and is_secret_name(assigned[1].lstrip("+-")):
            shown.append(f"{assigned[1]}={MASK}")
        else:
            shown.append(redact(argument))
    return tuple(shown)


def masked_command(command: Sequence[str]) -> str:
    """One line of shell, secrets masked."""
    return " ".join(word if MASK in word else shlex.quote(word) for word in masked_arguments(command))


def secret_values(tree: Any, _name: str = "", _depth: int = 0) -> set[str]:
    """The secret values in a parsed config: text of at least six characters under a secret's name."""
    found: set[str] = set()
    if _depth > 50:
        return found
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            found |= secret_values(value, str(key), _depth + 1)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            found |= secret_values(value, _name, _depth + 1)
    elif isinstance(tree, str) and len(tree) >= 6 and not tree.startswith("${") and is_secret_name(_name):
        found.add(tree)
    return found


def secrets_in_arguments(command: Sequence[str]) -> set[str]:
    """The values that :func:`masked_arguments` hides."""
    found: set[str] = set()
    for argument, following in zip(command, [*command[1:], ""]):
        assigned = _ASSIGNED.match(argument)
        if assigned and len(assigned[2]) >= 6 and is_secret_name(assigned[1].lstrip("+-")):
            found.add(assigned[2])
        elif argument.startswith("-") and is_secret_name(argument) and len(following) >= 6:
            if not following.startswith("-"):
                found.add(following)
    return found


def secrets_in_environment(env: Mapping[str, str]) -> set[str]:
    """Values of environment variables whose name says that they are secret."""
    folders = ("PWD", "OLDPWD")  # here, and only here, pwd is no password
    return {value for name, value in env.items() if len(value) >= 8 and name not in folders and is_secret_name(name)}
