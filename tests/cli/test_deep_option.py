"""``--deep``, alone and narrowed: what stands behind it stays what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainlint.cli.arguments import experiments_of, fill_deep
from trainlint.cli.failure import Failure

ALL = "--deep=all"


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        (["check", "c.yaml", "--deep"], ["check", "c.yaml", ALL]),
        (["check", "--deep", "c.yaml"], ["check", ALL, "c.yaml"]),
        (["check", "c.yaml", "--deep", "lr=1"], ["check", "c.yaml", ALL, "lr=1"]),
        (["check", "c.yaml", "--deep", "overfit=1"], ["check", "c.yaml", ALL, "overfit=1"]),
        (["check", "--deep", "--steps", "5"], ["check", ALL, "--steps", "5"]),
        (["check", "--deep", "conf/overfit"], ["check", ALL, "conf/overfit"]),
        (["check", "--deep", "overfit.yaml"], ["check", ALL, "overfit.yaml"]),
        (["check", "--deep", "train"], ["check", ALL, "train"]),
        (["check", "--deep", "overfit", "c.yaml"], ["check", "--deep=overfit", "c.yaml"]),
        (["check", "--deep", "overfit,lr-range", "lr=1"], ["check", "--deep=overfit,lr-range", "lr=1"]),
        (["check", "--deep", "overfti"], ["check", "--deep=overfti"]),
        (["check", "--deep", "overfit,nonsense"], ["check", "--deep=overfit,nonsense"]),
        (["check", "--deep=influence", "c.yaml"], ["check", "--deep=influence", "c.yaml"]),
        (["check", "--deep", ""], ["check", ALL, ""]),
    ],
)
def test_only_names_of_experiments_are_its_value(words: list[str], filled: list[str]) -> None:
    assert fill_deep(words) == filled


def test_an_existing_file_is_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overfit").write_text("lr: 1")
    assert fill_deep(["--deep", "overfit"]) == [ALL, "overfit"]


def test_what_is_made() -> None:
    assert experiments_of(None) == ((), "")
    names, note = experiments_of("all")
    assert names == ("overfit", "lr-range")
    assert "influence" in note
    assert "not available in this version" in note
    assert experiments_of("lr-range") == (("lr-range",), "")
    assert experiments_of(" lr-range , overfit")[0] == ("overfit", "lr-range")
    assert experiments_of("overfit,influence")[0] == ("overfit",)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("influence", "not available in this version"),
        ("overfti", "mean overfit"),
        ("", "nothing"),
        ("x,overfit", "'x'"),
    ],
)
def test_what_cannot_be_made(value: str, says: str) -> None:
    with pytest.raises(Failure, match=says):
        experiments_of(value)
