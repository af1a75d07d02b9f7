"""CONFIG, KEY=VALUE and the command behind ``--``."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainlint.cli.arguments import codes_of, read_target, split_command
from trainlint.cli.failure import Failure


def test_everything_behind_the_first_dashes_is_the_command() -> None:
    words, command = split_command(["check", "c.yaml", "--steps", "2", "--", "python", "t.py", "--", "--steps", "9"])
    assert words == ["check", "c.yaml", "--steps", "2"]
    assert command == ("python", "t.py", "--", "--steps", "9")
    assert split_command(["check", "c.yaml"]) == (["check", "c.yaml"], None)


@pytest.mark.parametrize(
    "word",
    [
        "lr=1",
        "a.b=c",
        "+a.b=c",
        "++a=b=c",
        "~a.b",
        "~a",
        "a[0].b=1",
        "model/size@x=big",
        "trainer.x=",
        "a-b=1",
        "a.0=1",
    ],
)
def test_settings(word: str) -> None:
    target = read_target([word], None)
    assert target.overrides == (word,)
    assert target.config is None


@pytest.mark.parametrize("word", ["config.yaml", "conf/base", "../x.toml", "weird name.yaml", "/abs/run=3/config.yaml"])
def test_configs(word: str) -> None:
    assert read_target([word, "lr=1"], None).config == Path(word)


def test_an_existing_file_with_an_equals_sign_is_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3.yaml").write_text("a: 1")
    target = read_target(["lr=3.yaml", "a=2"], None)
    assert target.config == Path("lr=3.yaml")
    assert target.overrides == ("a=2",)


def test_settings_may_come_first() -> None:
    assert read_target(["lr=1", "c.yaml"], ("python", "t.py")).config == Path("c.yaml")


@pytest.mark.parametrize(
    ("words", "command", "says"),
    [(["a.yaml", "b.yaml"], None, "Two configs"), ([""], None, "empty"), ([], (), "Nothing stands behind")],
)
def test_what_makes_no_sense(words: list[str], command: tuple[str, ...] | None, says: str) -> None:
    with pytest.raises(Failure, match=says):
        read_target(words, command)


def test_very_long_and_odd_words_do_not_raise_anything_else() -> None:
    for word in ("x" * 10_000, "a\0b", "\udce9.yaml", "a=" + "b" * 100_000):
        read_target([word], None)


def test_codes() -> None:
    assert codes_of(["TL2,TL401", " TL1 "]) == ("TL2", "TL401", "TL1")
    assert codes_of([","]) == ()
    assert codes_of(None) is None
