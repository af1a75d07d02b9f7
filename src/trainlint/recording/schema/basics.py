"""What the rest of the schema is made of: values and places in the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

Scalar = Union[None, bool, int, float, str]
#: A hyperparameter or setting: a scalar or a flat list of scalars (``betas``).
Value = Union[None, bool, int, float, str, tuple[Scalar, ...]]


@dataclass(frozen=True)
class SourceLine:
    """A place in the user's source: absolute file, 1-based line, the function it is in."""

    file: str
    line: int
    function: str = ""
