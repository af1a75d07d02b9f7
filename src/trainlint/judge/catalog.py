"""The catalog: every check that lies in the package ``trainlint.checks``, found by walking it.

A file with a decorated function *is* a check; nothing is registered anywhere. Files whose name starts with an
underscore are helpers.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

from trainlint.contract import Check, ConfigFacts, Recording, Severity, SourceFacts, declaration
from trainlint.judge.errors import CatalogError, UsageError
from trainlint.report.model import CheckPage

PACKAGE = "trainlint.checks"

#: What a check may ask for, cheapest first, and the word for it.
FACTS: dict[type, str] = {ConfigFacts: "config", SourceFacts: "source", Recording: "run"}
_COST = {facts: cost for cost, facts in enumerate(FACTS)}
_CODE = re.compile(r"TL\d{3}")


@dataclass(frozen=True)
class CatalogEntry:
    """One check: a code, a name, a page, and one detector or several of different cost."""

    code: str
    name: str
    title: str
    page: str
    family: str
    file: str
    catalog: tuple[str, ...]
    #: Cheapest first.
    detectors: tuple[Check, ...]

    @property
    def severity(self) -> Severity:
        """The strongest severity that any of its detectors may give."""
        return min((d.severity for d in self.detectors), key=lambda s: s.rank)

    @property
    def needs(self) -> tuple[str, ...]:
        """What its detectors need, cheapest first: ``config``, ``source``, ``run``."""
        return tuple(dict.fromkeys(FACTS[d.facts] for d in self.detectors))

    def as_page(self) -> CheckPage:
        """The check as ``trainlint explain`` and ``trainlint rules`` show it."""
        return CheckPage(
            code=self.code,
            name=self.name,
            title=self.title,
            severity=self.severity.value,
            family=self.family,
            needs=self.needs,
            catalog=self.catalog,
            page=self.page,
            file=self.file,
        )


@dataclass(frozen=True)
class Catalog:
    """All checks, in order of code."""

    entries: tuple[CatalogEntry, ...]

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, code: str) -> CatalogEntry | None:
        return next((e for e in self.entries if e.code == code), None)

    def find(self, word: str) -> tuple[CatalogEntry, ...]:
        """The checks that ``word`` names: a code, a name, or a name in another catalog (``O17``), in any case.

        Several checks may share a name in another catalog; a code or a name has one.

        Raises:
            UsageError: no check is called so; says which are called nearly so.
        """
        wanted = plain_name(word)
        exact = tuple(e for e in self.entries if wanted in (plain_name(e.code), e.name))
        found = exact or tuple(e for e in self.entries if wanted in map(plain_name, e.catalog))
        if found:
            return found
        raise UsageError(f"no check is called {word!r}.", self.suggest(word))

    def suggest(self, word: str) -> str:
        """A sentence with the names nearest to ``word``."""
        names: dict[str, str] = {}
        for e in self.entries:
            label = f"{e.code} ({e.name})"
            names.update(dict.fromkeys((plain_name(e.code), e.name, *map(plain_name, e.catalog)), label))
        near = difflib.get_close_matches(plain_name(word), names, n=3, cutoff=0.6)
        labels = list(dict.fromkeys(names[n] for n in near))
        return f"Did you mean {' or '.join(labels)}?" if labels else "`trainlint rules` lists all checks."


def plain_name(word: str) -> str:
    """``Frozen_But_Optimized`` -> ``frozen-but-optimized``, ``tl202`` -> ``tl202``."""
    return re.sub(r"[\s_-]+", "-", word.strip()).lower()


@functools.cache
def load_catalog() -> Catalog:
    """Every check of this installation. Loaded once.

    Raises:
        CatalogError: a file does not import, or the checks contradict each other.
    """
    return build_catalog(_modules())


def build_catalog(modules: Iterable[ModuleType]) -> Catalog:
    """The catalog of these modules.

    Raises:
        CatalogError: two files with one code or name, a file with two codes, a check without a page, a malformed code.
    """
    by_code: dict[str, CatalogEntry] = {}
    by_name: dict[str, CatalogEntry] = {}
    for module in modules:
        entry = _entry(module)
        if entry is None:
            continue
        for known, what in ((by_code.get(entry.code), entry.code), (by_name.get(entry.name), entry.name)):
            if known is not None:
                raise CatalogError(f"{known.file} and {entry.file} are both called {what}")
        by_code[entry.code] = by_name[entry.name] = entry
    return Catalog(tuple(by_code[code] for code in sorted(by_code)))


def _modules() -> Iterator[ModuleType]:
    package = importlib.import_module(PACKAGE)

    def failed(name: str) -> None:
        raise CatalogError(f"{name} does not import")

    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.", onerror=failed):
        if found.ispkg or found.name.rpartition(".")[2].startswith("_"):
            continue
        try:
            yield importlib.import_module(found.name)
        except Exception as error:
            raise CatalogError(f"{found.name} does not import: {type(error).__name__}: {error}") from error


def _entry(module: ModuleType) -> CatalogEntry | None:
    file = getattr(module, "__file__", None) or module.__name__
    parts = module.__name__.split(".")
    name = parts[-1].replace("_", "-")
    family = parts[-2] if len(parts) > 1 else ""
    declared = [
        (function, found)
        for function in vars(module).values()
        if callable(function) and getattr(function, "__module__", None) == module.__name__
        if (found := declaration(function)) is not None
    ]
    if not declared:
        return None
    codes = sorted({found.code for _, found in declared})
    if len(codes) > 1:
        raise CatalogError(f"{file} declares {' and '.join(codes)}: one check a file")
    if not _CODE.fullmatch(codes[0]):
        raise CatalogError(f"{file}: {codes[0]!r} is not TL and three digits")
    unknown = [found.facts for _, found in declared if found.facts not in FACTS]
    if unknown:
        raise CatalogError(f"{file}: a check cannot ask for {getattr(unknown[0], '__name__', unknown[0])}")
    # The page is the docstring with the sections; a second detector may say in one line what it adds.
    page = max((inspect.cleandoc(function.__doc__ or "") for function, _ in declared), key=len)
    if not page:
        raise CatalogError(f"{file}: {codes[0]} has no docstring, which is its page")
    title = page.splitlines()[0].strip().rstrip(".")
    aliases = tuple(dict.fromkeys(alias for _, found in declared for alias in found.catalog))
    detectors = tuple(
        Check(found.code, name, found.facts, found.severity, function, found.catalog, title, page, file, family)
        for function, found in sorted(declared, key=lambda item: _COST[item[1].facts])
    )
    return CatalogEntry(codes[0], name, title, page, family, file, aliases, detectors)
