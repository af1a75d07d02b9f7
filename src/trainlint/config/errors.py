"""What is said when a config cannot be used."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be read as one.

    Attributes:
        message: what is wrong, with the place.
        hint: what to do about it.
        line: 1-based line in the file, when known.
    """

    def __init__(self, message: str, hint: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.line = line
