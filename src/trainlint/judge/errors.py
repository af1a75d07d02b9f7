"""What the judge cannot go on with."""

from __future__ import annotations


class CatalogError(Exception):
    """The catalog itself is broken: two checks with one code or name, a check without a page, a file that fails."""


class UsageError(Exception):
    """The user asked for something that does not exist or is incomplete: exit status 2.

    ``message`` says what, ``hint`` what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message
