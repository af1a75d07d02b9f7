"""The checks as their pages, for ``explain`` and ``rules``."""

from __future__ import annotations

from trainlint.cli.failure import Failure
from trainlint.judge.catalog import load_catalog
from trainlint.judge.errors import UsageError
from trainlint.report.model import CheckPage


def all_pages() -> list[CheckPage]:
    """Every check, in order of code."""
    return [entry.as_page() for entry in load_catalog()]


def find_pages(word: str) -> list[CheckPage]:
    """The checks called ``word``: a code, a name, or a name in another catalog (``O17``).

    Raises:
        Failure: there is none.
    """
    try:
        return [entry.as_page() for entry in load_catalog().find(word)]
    except UsageError as error:
        raise Failure(_sentence(error.message), error.hint) from None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
