"""The last gate before a report goes out: no credentials, no terminal control sequences, in any string of it.

Secrets of the config are withheld where they are read. What passes here may still hold them by other ways: a command
line, the program's own output, the text of an exception.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
MASK = "***"

#: Escape sequences: CSI, OSC and other strings up to their terminator, then two-character ones.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)"
    r"|\x1b[ -/]*[0-~]?"
)
#: What else moves the cursor or hides text; tab and newline stay. Bidirectional overrides can disguise a command.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_URL = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@\"'<>]+@")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)
_NAME = (
    r"(?:[\w.-]*(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|auth[_-]?key|password|passwd|passphrase"
    r"|secret|credentials?|(?:hf|hub|api|auth|access|bearer|refresh|wandb|github|gitlab|huggingface|session|id)[_-]?token))"
)
_NOTHING = r"(?:None|null|true|false|True|False|''|\"\"|<secret>|\*\*\*)(?![\w.])"
#: ``api_key=X``, ``HF_TOKEN: X``, ``--hub-token X``, ``--token X``, ``token=X`` (not ``max_tokens=512``).
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![\w])(?:-{{0,2}}\+{{0,2}}{_NAME}|(?<![\w.-])(?:--?)?token))"
    rf"(?P<by>[\"']?\s*[=:]\s*|(?<=[\w])\s+(?=[^\s=:]))(?!{_NOTHING})(?P<quote>[\"']?)(?P<value>[^\s\"',;&)}}\]]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9+/_.=-]{12,}")


def clean_text(text: str) -> str:
    """``text`` without terminal control sequences and with everything that looks like a credential masked."""
    if "\x1b" in text or not text.isprintable():
        text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    if "@" in text and "://" in text:
        text = _URL.sub(rf"\1{MASK}@", text)
    text = _SHAPES.sub(MASK, text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _ASSIGNED.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    spaced = not match["by"].strip(" \t\"'")
    if spaced and not match["name"].startswith("-"):
        # Prose: "the secret is out", "password authentication failed".
        return match[0]
    return f"{match['name']}{match['by']}{match['quote']}{MASK}"


def clean_command(command: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a command; the value that follows a flag such as ``--api-key`` is masked too."""
    out: list[str] = []
    hide = False
    for argument in command:
        if hide and not argument.startswith("-"):
            out.append(MASK)
        else:
            out.append(clean_text(argument))
        hide = argument.startswith("-") and re.fullmatch(rf"--?(?:{_NAME}|token)", argument, re.IGNORECASE) is not None
    return tuple(out)


def clean(value: T) -> T:
    """Any value of a report, cleaned all through: strings, mappings (keys too), sequences, dataclasses."""
    return _clean(value)  # type: ignore[no-any-return]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        # An enumeration of strings keeps its type.
        return clean_text(value) if type(value) is str else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_clean(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        cleaned = [_clean(v) for v in value]
        return cleaned if isinstance(value, list) else tuple(cleaned)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _clean(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value
