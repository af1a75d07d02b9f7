"""``key=value`` in a copy of the config: only what was asked for changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainlint.launch.model import LaunchError
from trainlint.launch.overrides import resolved_copy, split_path
from trainlint.launch.pyproject import load_toml
from trainlint.launch.secrets import is_secret_name, masked_command, redact


def copy(tmp_path: Path, text: str, *overrides: str, name: str = "c.yaml") -> str:
    config = tmp_path / name
    config.write_text(text, encoding="utf-8")
    return resolved_copy(config, overrides)


@pytest.mark.parametrize(
    ("text", "override", "result"),
    [
        ("lr: 1e-3\n", "lr=1e-4", "lr: 1e-4\n"),  # stays what each reader of YAML makes of it
        ("a: {b: 1}\n", "a.b=2", "a: {b: 2}\n"),
        ("a: 1\n", "b.c.d=x", "a: 1\nb:\n  c:\n    d: x\n"),
        ("a: [1, 2]\n", "a.1=3", "a: [1, 3]\n"),
        ("a: [1, 2]\n", "a[0]=3", "a: [3, 2]\n"),
        ("a:\n- b: 1\n", "a.0.b=2", "a:\n- b: 2\n"),
        ("a: 1\n", "a=[1, 2]", "a: [1, 2]\n"),
        ("a: 1\n", "a={b: 2}", "a: {b: 2}\n"),
        ("a: 1\n", "a=", "a: null\n"),
        ("a: 1\n", "a=null", "a: null\n"),
        ("a: 1\n", "a=${b.c}", "a: ${b.c}\n"),
        ("a: 1\n", "a=x=y", "a: x=y\n"),
        ("a: 1\n", "++a=2", "a: 2\n"),
        ("a: 1\nb: 2\n", "~a", "b: 2\n"),
        ("a.b: 1\n", "a.b=2", "a.b: 2\n"),
        ("a: null\n", "a.b=2", "a:\n  b: 2\n"),
        ("a: 1\na: 2\n", "a=3", "a: 1\na: 3\n"),
        ("a: !env X\nb: 1\n", "b=2", "a: !env 'X'\nb: 2\n"),
        ("", "a=1", "a: 1\n"),
        ("a: '1'\nb: \"no\"\nc: no\n", "d=1", "a: '1'\nb: \"no\"\nc: no\nd: 1\n"),
        ("1: a\n", "1=b", "1: b\n"),
    ],
)
def test_yaml(tmp_path: Path, text: str, override: str, result: str) -> None:
    assert copy(tmp_path, text, override) == result


def test_an_alias_is_not_changed_in_the_other_place(tmp_path: Path) -> None:
    text = "base: &b {lr: 1, wd: 0}\none: *b\ntwo:\n  <<: *b\n  x: 1\n"
    result = yaml.safe_load(copy(tmp_path, text, "one.lr=2", "two.lr=3"))
    assert result == {"base": {"lr": 1, "wd": 0}, "one": {"lr": 2, "wd": 0}, "two": {"lr": 3, "wd": 0, "x": 1}}


def test_merged_section_is_kept_when_one_key_of_it_changes(tmp_path: Path) -> None:
    text = "base: &b\n  opt: {lr: 1, wd: 0}\nrun:\n  <<: *b\n"
    assert yaml.safe_load(copy(tmp_path, text, "run.opt.lr=2"))["run"] == {"opt": {"lr": 2, "wd": 0}}


def test_json_and_toml(tmp_path: Path) -> None:
    assert '"b": 0.0001' in copy(tmp_path, '{"a": {"b": 1}}', "a.b=1e-4", name="c.json")
    text = 'x = "é\\n"\nd = 2020-01-01\n[a]\nb = 1\n[[l]]\nn = 1\n[[l]]\nn = 2.5\n[a.c]\n"k y" = [1, {z = true}]\n'
    assert load_toml(copy(tmp_path, text, "a.b=1e-4", "l.1.n=7", "new.k=text", name="c.toml")) == {
        **load_toml(text),
        "a": {"b": 1e-4, "c": {"k y": [1, {"z": True}]}},
        "l": [{"n": 1}, {"n": 7}],
        "new": {"k": "text"},
    }


@pytest.mark.parametrize(
    ("text", "override", "name", "message"),
    [
        ("a: 1\n", "a.b=1", "c.yaml", "is a value, not a section"),
        ("a: [1]\n", "a.5=1", "c.yaml", "list of 1"),
        ("a: [1]\n", "a.x=1", "c.yaml", "must be an index"),
        ("- 1\n", "a=1", "c.yaml", "holds no keys"),
        ("a: [\n", "a=1", "c.yaml", "not valid YAML"),
        ("a = 1", "a=1", "c.py", "only YAML, JSON and TOML"),
        ("{", "a=1", "c.json", "cannot be parsed"),
        ("[1]", "a=1", "c.json", "holds no keys"),
        ("a: 1\n", "justtext", "c.yaml", "not an override"),
    ],
)
def test_what_cannot_be_applied_is_said(tmp_path: Path, text: str, override: str, name: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        copy(tmp_path, text, override, name=name)


def test_secret_values_are_not_in_messages(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as raised:
        copy(tmp_path, "wandb: 1\n", "wandb.api_key=abcdef123456")
    assert "abcdef123456" not in str(raised.value)


def test_paths() -> None:
    assert split_path("a.b[0].c") == ["a", "b", "0", "c"]


@pytest.mark.parametrize(
    "name", ["api_key", "wandb.api_key", "HF_TOKEN", "hub_token", "db.password", "apiKey", "client_secret"]
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "pad_token",
        "eos_token_id",
        "tokenizer",
        "monkey",
        "key",
        "token_dropout",
        "embed_key",
        "num_tokens",
    ],
)
def test_names_that_hold_no_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_commands_are_shown_without_secrets() -> None:
    shown = masked_command(
        [
            "python",
            "train.py",
            "--hub-token",
            "abc123",
            "wandb.api_key=zzz",
            "url=s3://me:pw@host/x",
            "--lr",
            "1",
            "a b",
        ]
    )
    assert shown == "python train.py --hub-token *** wandb.api_key=*** url=s3://***@host/x --lr 1 'a b'"


def test_redact_token_shapes() -> None:
    assert redact("x sk-abcdefghijklmnopqrst y") == "x *** y"
