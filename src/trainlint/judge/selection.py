"""Which checks run: ``--select``, ``--extend-select``, ``--ignore``, with the most specific word winning as in ruff."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainlint.judge.catalog import Catalog, CatalogEntry, plain_name
from trainlint.judge.errors import UsageError

ALL = "ALL"
_PREFIX = re.compile(r"TL\d{0,3}", re.IGNORECASE)


def select(
    catalog: Catalog,
    *,
    select: Sequence[str] = (),
    extend_select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> tuple[CatalogEntry, ...]:
    """The checks to run, in order of code.

    A word is ``ALL``, a prefix of codes (``TL2``, ``TL20``, ``TL202``) or a name; several may be joined by commas.
    Nothing selected means all. Where a selecting and an ignoring word both cover a check, the more specific decides;
    of equal ones, the ignoring.

    Raises:
        UsageError: a word covers no check.
    """
    chosen = words(select) or [ALL]
    wanted = [covered(catalog, word) for word in (*chosen, *words(extend_select))]
    unwanted = [covered(catalog, word) for word in words(ignore)]
    out = []
    for entry in catalog:
        for_it = max((rank for rank, codes in wanted if entry.code in codes), default=-1)
        against = max((rank for rank, codes in unwanted if entry.code in codes), default=-1)
        if for_it > against:
            out.append(entry)
    return tuple(out)


def words(given: Iterable[str]) -> list[str]:
    """``["TL2,TL304", "ALL"]`` -> ``["TL2", "TL304", "ALL"]``."""
    return [word for item in given for word in re.split(r"[,\s]+", item) if word]


def covered(catalog: Catalog, word: str) -> tuple[int, frozenset[str]]:
    """How specific a word is (a larger number is more so), and the codes that it covers.

    Raises:
        UsageError: it covers none.
    """
    if word.upper() == ALL:
        return 0, frozenset(e.code for e in catalog)
    if _PREFIX.fullmatch(word):
        codes = frozenset(e.code for e in catalog if e.code.startswith(word.upper()))
        rank = len(word)
    else:
        codes = frozenset(e.code for e in catalog if e.name == plain_name(word))
        rank = len("TL000")
    if not codes:
        raise UsageError(f"no check is called {word!r}, and no code starts so.", catalog.suggest(word))
    return rank, codes
