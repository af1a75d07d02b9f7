"""Reading config files: every key with its line, nothing executed, every failure explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainlint.config.load import ConfigError, load_config
from trainlint.recording.schema import ConfigKey

SAMPLE = """\
# a comment
training: &base
  lr: 1e-4
  betas: [0.9, 0.95]
  amp: no
  lr: 3e-4
eval:
  <<: *base
  lr: 1
layers:
  - size: 3
  - size: 4
    "a.b": 5
1: one
tag: !mine x
danger: !!python/object/apply:os.system ["touch /tmp/should-never-exist"]
when: 2024-13-45
empty: {}
"""


def load(tmp_path: Path, text: str | bytes, name: str = "config.yaml", *overrides: str) -> dict[str, ConfigKey]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {k.path: k for k in load_config(path, overrides).facts.keys}


def lines(keys: dict[str, ConfigKey]) -> dict[str, int | None]:
    return {path: key.at.line if key.at else None for path, key in keys.items()}


def test_yaml_values_and_lines(tmp_path: Path) -> None:
    keys = load(tmp_path, SAMPLE)
    assert keys["training.lr"].value == "3e-4", "YAML 1.1 reads it as text, and of two the last counts"
    assert keys["training.lr"].meaning == "learning_rate"
    assert keys["training.betas"].value == (0.9, 0.95)
    assert keys["training.amp"].value is False
    assert keys["eval.lr"].value == 1
    assert keys["eval.betas"].value == (0.9, 0.95)
    assert keys["1"].value == "one"
    assert keys["tag"].value == "!mine x"
    assert keys["danger[0]" if "danger[0]" in keys else "danger"].value
    assert not Path("/tmp/should-never-exist").exists()
    assert keys["when"].value == "2024-13-45"
    assert lines(keys) == {
        "training.lr": 6, "training.betas": 4, "training.amp": 5, "eval.lr": 9, "eval.betas": 4, "eval.amp": 5,
        "layers[0].size": 11, "layers[1].size": 12, 'layers[1]["a.b"]': 13, "1": 14, "tag": 15, "danger": 16,
        "when": 17, "empty": 18,
    }  # fmt: skip


def test_a_long_or_nested_list_has_a_leaf_for_each_element(tmp_path: Path) -> None:
    keys = load(tmp_path, f"short: [1, 2]\nlong: {list(range(40))}\nnested: [[1, 2], [3]]\n")
    assert keys["short"].value == (1, 2)
    assert keys["long[39]"].value == 39
    assert keys["nested[1]"].value == (3,)


def test_json_lines(tmp_path: Path) -> None:
    text = '{\n "a": {"lr": 1e-4,\n  "rows": [{"x": 2},\n {"y":\n 3}]},\n "b": "t: {\\"n\\": [1,"\n}'
    keys = load(tmp_path, text, "config.json")
    assert lines(keys) == {"a.lr": 2, "a.rows[0].x": 3, "a.rows[1].y": 4, "b": 6}
    assert keys["a.lr"].value == 1e-4


def test_toml_lines(tmp_path: Path) -> None:
    text = "x = 1\n[train]\nlr = 1e-4\nopt.betas = [0.9, 0.95]\n[[layer]]\nsize = 1\n[[layer]]\nsize = 2\n"
    keys = load(tmp_path, text, "config.toml")
    assert lines(keys) == {
        "x": 1, "train.lr": 3, "train.opt.betas": 4, "layer[0].size": 6, "layer[1].size": 8
    }  # fmt: skip


def test_overrides(tmp_path: Path) -> None:
    text = "a: {b: 1, c: 2}\nxs: [{v: 1}, {v: 2}]\n"
    keys = load(tmp_path, text, "c.yaml", "a.b=1e-4", "+a.new=true", "xs[1].v=[0.9, 1e-3]", "++d.e=null", "~a.c")
    assert keys["a.b"].value == 1e-4
    assert keys["a.b"].origin == "override"
    assert keys["a.b"].at is None
    assert keys["a.new"].value is True
    assert keys["xs[1].v"].value == (0.9, 1e-3)
    assert keys["d.e"].value is None
    assert "a.c" not in keys
    assert keys["xs[0].v"].origin == "file"


@pytest.mark.parametrize("override", ["nothing", "=3", "a=5", "a.b.c=1", "xs[7]=1"])
def test_an_override_that_does_not_fit(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "a: {b: 1}\nxs: [1]\n", "c.yaml", override)
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("", "is empty", None),
        ("- 1\n- 2\n", "a list at the top", 1),
        ("just text", "a single str", 1),
        ("a: [1\nb: 2\n", "at line 2: b: 2", 2),
        ("\ta: 1\n", "not valid YAML", 1),
        ("a: b: c\n", "mapping values", 1),
        ("a: *nowhere\n", "undefined alias", 1),
        ("a: &x\n  b: *x\n", "contains itself", 1),
        ("a: 1\n---\nb: 2\n", "several YAML documents", 2),
        ("{{a}}: 1\n", "a section is used as a key", 1),
        ("a: 1\nb: \x07\n", "U+0007", 2),
        (b"a: 1\nb: \xff\n", "offset 8", 2),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply", None),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path: Path, text: str | bytes, said: str, line: int | None) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert said in error.value.message
    assert error.value.line == line
    assert error.value.hint


@pytest.mark.parametrize(("name", "text"), [("c.json", '{"a": 1,}'), ("c.toml", "a = \n")])
def test_broken_json_and_toml(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, name)
    assert error.value.line == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="does not exist") as missing:
        load_config(tmp_path / "trian.yaml")
    assert "train.yaml" in missing.value.hint
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


def test_secrets_are_never_kept(tmp_path: Path) -> None:
    text = """\
wandb: {api_key: abcdefgh, project: mine}
hub_token: hf_abcdefghijklmnopqrstuvwx
db: postgres://bob:hunter2@db.example/x
AWS_SECRET_ACCESS_KEY: zzzz
password: hunter2
db_pwd: hunter2
pad_token: "<pad>"
max_tokens: 100
tokenizer: gpt2
key: value
"""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    loaded = load_config(path)
    secret = {k.path for k in loaded.facts.keys if k.secret}
    assert secret == {"wandb.api_key", "hub_token", "db", "AWS_SECRET_ACCESS_KEY", "password", "db_pwd"}
    for word in ("abcdefgh", "hunter2", "zzzz"):
        assert word not in repr(loaded.facts)
    assert loaded.data["password"] == "hunter2", "the program must still get the real value"


def test_a_file_full_of_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than 20,000 values") as error:
        load(tmp_path, "\n".join(f"k{i}: {{a: 1, b: some text here, c: [1, 2, 3]}}" for i in range(250_000)))
    assert "name the file" in error.value.hint


def test_ten_megabytes_of_settings_are_read(tmp_path: Path) -> None:
    keys = load(tmp_path, "\n".join(f"k{i}: '{'x' * 10_000}'" for i in range(1000)))
    assert len(keys) == 1000


def test_aliases_of_aliases_do_not_explode(tmp_path: Path) -> None:
    text = "a: &a [l, l, l, l, l, l, l, l, l]\n"
    for i in range(9):
        text += f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n"
    with pytest.raises(ConfigError, match="more than"):
        load(tmp_path, text)


keys = st.text(min_size=1, max_size=8) | st.integers(-5, 5) | st.booleans()
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
trees = st.dictionaries(
    keys, st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_mapping_is_a_config(tmp_path_factory: pytest.TempPathFactory, tree: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "c.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        loaded = load_config(path)
    except ConfigError as error:
        # A text that holds a character which YAML forbids is written escaped, so only that may be refused.
        raise AssertionError(error.message) from error
    assert loaded.data == yaml.safe_load(path.read_text(encoding="utf-8"))
    paths = [k.path for k in loaded.facts.keys]
    assert len(paths) == len(set(paths)) or any(not isinstance(k, str) for k in _all_keys(tree))
    rows = len(re.split("[\n\x85\u2028\u2029]", path.read_text(encoding="utf-8")))  # what YAML takes for a line's end
    assert all(k.at is not None and 1 <= k.at.line <= rows for k in loaded.facts.keys)
    json.dumps([k.value for k in loaded.facts.keys])


def _all_keys(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [*tree, *(k for v in tree.values() for k in _all_keys(v))]
    return [k for v in tree for k in _all_keys(v)] if isinstance(tree, list) else []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    for name in ("c.yaml", "c.json", "c.toml"):
        path = tmp_path_factory.mktemp("text") / name
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            load_config(path)
        except ConfigError:
            pass


def test_a_group_choice_of_hydra_is_no_key(tmp_path: Path) -> None:
    text = "defaults: [_self_, {trainer: default}, {optional local: x}, {override /model@net: big}]\nmodel: {size: 1}\n"
    (tmp_path / "train.yaml").write_text(text)
    overrides = ["trainer=cpu", "+trainer.accumulate=4", "model=small", "local=mine", "model.size=2", "~trainer"]
    keys = {k.path: k.value for k in load_config(tmp_path / "train.yaml", overrides).facts.keys}
    assert keys["trainer.accumulate"] == 4
    assert keys["model.size"] == 2
    assert not {"trainer", "model", "local"} & set(keys)


def test_ten_megabytes_of_text_are_a_config(tmp_path: Path) -> None:
    text = "prompt: " + "x" * 10_000_000 + "\nlr: 0.1\n"
    assert load(tmp_path, text)["lr"].value == 0.1
