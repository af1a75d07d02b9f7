"""From facts to a finished report: picks checks, runs them, gathers verdicts, applies suppressions."""

from trainlint.judge.catalog import Catalog, CatalogEntry, load_catalog
from trainlint.judge.errors import CatalogError, UsageError
from trainlint.judge.judging import JudgeOptions, judge
from trainlint.judge.suppression import Suppression, suppressions_from

__all__ = [
    "Catalog",
    "CatalogEntry",
    "CatalogError",
    "JudgeOptions",
    "Suppression",
    "UsageError",
    "judge",
    "load_catalog",
    "suppressions_from",
]
