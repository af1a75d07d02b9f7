"""The catalog is what lies on disk; its words select what runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from catalogs import module, yields
from hypothesis import given
from hypothesis import strategies as st

from trainlint.contract import ConfigFacts, Recording, SourceFacts, declaration
from trainlint.judge import CatalogError, UsageError, load_catalog
from trainlint.judge.catalog import build_catalog
from trainlint.judge.selection import select

SILENT = yields()


def catalog():
    return build_catalog(
        [
            module("frozen_but_optimized", ("TL202", Recording, SILENT), aliases="O17", family="optimizer"),
            module("params_unmoved", ("TL205", Recording, SILENT), aliases="O2 O4", family="optimizer"),
            module("wrong_step_order", ("TL303", Recording, SILENT), ("TL303", SourceFacts, SILENT), aliases="O4"),
            module("unused_config_key", ("TL101", ConfigFacts, SILENT), family="config"),
        ]
    )


def test_every_file_on_disk_is_a_check_with_a_page() -> None:
    package = importlib.import_module("trainlint.checks")
    on_disk = {
        path.stem.replace("_", "-")
        for root in package.__path__
        for path in Path(root).rglob("*.py")
        if not path.stem.startswith("_")
    }
    loaded = load_catalog()
    assert on_disk == {entry.name for entry in loaded}
    for entry in loaded:
        assert "## What goes wrong" in entry.page
        assert entry.code[2] == {"config": "1", "optimizer": "2", "loop": "3", "schedule": "4"}.get(
            entry.family, entry.code[2]
        )


def test_loading_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from trainlint.judge import load_catalog; load_catalog(); "
        "print([m for m in ('torch', 'rich', 'typer', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_entry_knows_its_file_name_title_and_needs() -> None:
    entry = catalog().get("TL303")
    assert entry is not None
    assert (entry.name, entry.family, entry.title) == ("wrong-step-order", "loop", "A title")
    assert entry.needs == ("source", "run")
    assert entry.page.splitlines()[2] == "## What goes wrong"
    assert entry.as_page().needs == ("source", "run")
    assert declaration(entry.detectors[0].detector) is not None


@pytest.mark.parametrize(
    "word", ["TL202", "tl202", "frozen-but-optimized", "Frozen_But_Optimized", "O17", "o17", " TL202 "]
)
def test_a_check_is_found_by_code_name_and_alias(word: str) -> None:
    assert [e.code for e in catalog().find(word)] == ["TL202"]


def test_an_alias_may_name_several() -> None:
    assert [e.code for e in catalog().find("O4")] == ["TL205", "TL303"]


@pytest.mark.parametrize(("word", "near"), [("frozen-but-optimised", "TL202"), ("TL2O2", "TL202"), ("zzz", "rules")])
def test_a_near_miss_is_suggested(word: str, near: str) -> None:
    with pytest.raises(UsageError, match=near):
        catalog().find(word)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([module("a", ("TL201", Recording, SILENT)), module("b", ("TL201", Recording, SILENT))], "both called TL201"),
        (
            [module("a", ("TL201", Recording, SILENT)), module("a", ("TL301", Recording, SILENT), family="x")],
            "both called a",
        ),
        ([module("a", ("TL201", Recording, SILENT), page=None)], "no docstring"),
        ([module("a", ("TL201", Recording, SILENT), ("TL202", Recording, SILENT))], "one check a file"),
        ([module("a", ("TL2", Recording, SILENT))], "three digits"),
        ([module("a", ("TL201", dict, SILENT))], "cannot ask for dict"),
    ],
)
def test_a_catalog_that_contradicts_itself(modules: list, text: str) -> None:
    with pytest.raises(CatalogError, match=text):
        build_catalog(modules)


def codes(**words: list[str]) -> list[str]:
    return [e.code for e in select(catalog(), **words)]


def test_selection() -> None:
    assert codes() == ["TL101", "TL202", "TL205", "TL303"]
    assert codes(select=["TL2"]) == ["TL202", "TL205"]
    assert codes(select=["TL2,TL303"]) == ["TL202", "TL205", "TL303"]
    assert codes(ignore=["TL2"]) == ["TL101", "TL303"]
    assert codes(select=["ALL"], ignore=["tl202"]) == ["TL101", "TL205", "TL303"]
    assert codes(select=["frozen_but_optimized"]) == ["TL202"]


def test_the_most_specific_word_wins() -> None:
    assert codes(ignore=["TL2"], extend_select=["TL202"]) == ["TL101", "TL202", "TL303"]
    assert codes(select=["TL2"], ignore=["TL20"]) == []
    assert codes(select=["TL202"], ignore=["TL2", "ALL"]) == ["TL202"]
    assert codes(select=["TL202"], ignore=["frozen-but-optimized"]) == []
    assert codes(select=["ALL"], ignore=["ALL"]) == []


@pytest.mark.parametrize("word", ["TL9", "TL204", "frozen-but-optimised", "O17", "T"])
def test_an_unknown_word_is_an_error(word: str) -> None:
    with pytest.raises(UsageError):
        codes(select=[word])
    with pytest.raises(UsageError):
        codes(ignore=[word])


WORDS = st.lists(st.sampled_from(["ALL", "TL", "TL1", "TL2", "TL20", "TL202", "TL303", "params-unmoved"]), max_size=4)


@given(WORDS, WORDS, WORDS)
def test_laws_of_selection(chosen: list[str], extend: list[str], ignored: list[str]) -> None:
    got = codes(select=chosen, extend_select=extend, ignore=ignored)
    assert got == sorted(set(got))
    # Order and repetition of the words do not matter.
    assert got == codes(select=chosen[::-1] * 2, extend_select=extend[::-1], ignore=ignored * 2)
    # Extending adds only, ignoring removes only.
    assert set(got) >= set(codes(select=chosen, ignore=ignored))
    assert set(got) <= set(codes(select=chosen, extend_select=extend))
    # Nothing runs that nobody selected.
    assert set(got) <= set(codes(select=chosen)) | (set(codes(select=extend)) if extend else set())
