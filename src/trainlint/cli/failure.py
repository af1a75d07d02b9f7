"""What is said when trainlint cannot do what it was asked."""

from __future__ import annotations


class Failure(Exception):
    """The job cannot be done: exit status 2, with a sentence about what is wrong and one about what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def not_available(what: str) -> Failure:
    """For options that the command line fixes and a later version will bring."""
    return Failure(f"{what} is not available in this version.", "`trainlint check --help` shows what is.")
