"""Entry functions get the config in the type they ask for; what cannot be called is explained."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import pytest
from launch.programs import Run, write

from trainlint.launch.model import Launch
from trainlint.launch.routes import find_launch
from trainlint.recorder import entry_config
from trainlint.recorder.entry_config import EntryError

RUNNER = Path(entry_config.__file__).parent / "bootstrap" / "run_entry.py"
TEXT = "lr: 1e-3\nmodel:\n  width: 8\n  layers: [1, 2]\n"


class Kind(enum.Enum):
    SMALL = "s"
    BIG = "b"


@dataclasses.dataclass
class Model:
    width: int
    layers: list[float] = dataclasses.field(default_factory=list)
    kind: Kind = Kind.SMALL


@dataclasses.dataclass
class Settings:
    lr: float
    model: Optional[Model] = None
    path: Path | None = None


def given(tmp_path: Path, function: Callable[..., Any], text: str = TEXT) -> Any:
    config = write(tmp_path / "c.yaml", text)
    args, kwargs = entry_config.argument(function, entry_config.Config(str(config), None))
    return function(*args, **kwargs)


def test_dict_for_no_annotation_and_for_mappings(tmp_path: Path) -> None:
    def plain(config):
        return config  # type: ignore[no-untyped-def]

    def mapping(config: Mapping[str, Any]) -> Any:
        return config

    def keywords(**settings: Any) -> Any:
        return settings

    def only(*, config: dict[str, Any]) -> Any:
        return config

    expected = {"lr": "1e-3", "model": {"width": 8, "layers": [1, 2]}}
    for function in (plain, mapping, keywords, only):
        assert given(tmp_path, function) == expected


def test_namespaces(tmp_path: Path) -> None:
    def argument(args: argparse.Namespace) -> Any:
        return args

    def simple(args: types.SimpleNamespace) -> Any:
        return args

    for function, kind in ((argument, argparse.Namespace), (simple, types.SimpleNamespace)):
        found = given(tmp_path, function)
        assert type(found) is kind
        assert found.model.layers == [1, 2]


def test_paths(tmp_path: Path) -> None:
    def text(config: str) -> Any:
        return config

    def path(config: Path) -> Any:
        return config

    assert given(tmp_path, text) == str(tmp_path / "c.yaml")
    assert given(tmp_path, path) == tmp_path / "c.yaml"


def test_dataclass(tmp_path: Path) -> None:
    def train(settings: Settings) -> Any:
        return settings

    text = TEXT + "  kind: b\npath: data\n"
    text = text.replace("  kind: b\npath", "  kind: BIG\npath")
    assert given(tmp_path, train, text) == Settings(1e-3, Model(8, [1, 2], Kind.BIG), Path("data"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlearning_rat: 2\n", "no field for learning_rat"),
        ("lr: 1\nmodel: {widht: 2}\n", "no field for model.widht; did you mean width?"),
        ("model: {width: 1}\n", "needs lr"),
        ("lr: 1\nmodel: {layers: []}\n", "needs width, and model does not give it"),
        ("lr: fast\n", "lr must be a number, not 'fast'"),
        ("lr: 1\nmodel: {width: 1, kind: huge}\n", "must be one of SMALL, BIG"),
        ("- 1\n", "holds a list and no keys"),
    ],
)
def test_dataclass_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    def train(settings: Settings) -> Any: ...

    with pytest.raises(EntryError, match=message):
        given(tmp_path, train, text)


def test_pydantic(tmp_path: Path) -> None:
    pydantic = pytest.importorskip("pydantic")
    made = pydantic.create_model("Made", lr=(float, ...), model=(dict, ...))

    def train(settings: Any) -> Any:
        return settings

    train.__annotations__["settings"] = made
    assert given(tmp_path, train).lr == 1e-3
    with pytest.raises(EntryError, match="does not fit Made"):
        given(tmp_path, train, "lr: x\n")


def test_omegaconf(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")

    def train(cfg: Any) -> Any:
        return cfg

    train.__annotations__["cfg"] = omegaconf.DictConfig
    found = given(tmp_path, train)
    assert isinstance(found, omegaconf.DictConfig)
    assert found.lr == 1e-3  # OmegaConf reads YAML 1.2 numbers


def test_functions_that_take_no_config(tmp_path: Path) -> None:
    assert given(tmp_path, lambda: "called") == "called"
    assert given(tmp_path, lambda argv=None: argv) is None


def test_functions_that_want_more(tmp_path: Path) -> None:
    with pytest.raises(EntryError, match=r"needs 2 arguments \(model, data\)"):
        given(tmp_path, lambda model, data: None)


# -- as a program


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "scratch").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(RUNNER), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_module_is_found_as_python_would(tmp_path: Path) -> None:
    write(tmp_path / "pkg/__init__.py", "")
    write(
        tmp_path / "pkg/train.py",
        "import sys\ndef main(c): print(c['lr'], len(sys.argv), sys.path[0] == '', __name__)\nclass A: run = main\n",
    )
    config = write(tmp_path / "configs/c.json", '{"lr": 0.5}')
    assert call(tmp_path, "pkg.train:main", str(config)).stdout.split() == ["0.5", "1", "True", "pkg.train"]
    assert call(tmp_path, "pkg/train.py:A.run", str(config)).stdout.split()[0] == "0.5"


def test_config_without_a_yaml_reader_comes_from_the_parsed_copy(tmp_path: Path) -> None:
    write(tmp_path / "yaml.py", "raise ImportError('not here')")
    write(tmp_path / "t.py", "def main(c): print(c)")
    config = write(tmp_path / "c.yaml", "lr: 1\n")
    parsed = write(tmp_path / "c.json", json.dumps({"lr": 1}))
    assert call(tmp_path, "t:main", str(config), str(parsed)).stdout.strip() == "{'lr': 1}"


@pytest.mark.parametrize(
    ("entry", "message", "trace"),
    [
        ("nothing:main", "there is no module nothing in", ""),
        ("broken:main", "module broken does not import: ZeroDivisionError", 'broken.py", line 1'),
        ("needs:main", "module needs does not import: No module named 'not_installed_here'", 'needs.py", line 1'),
        ("bad:main", "module bad does not import: SyntaxError", "def (:"),
        ("t:mian", "t has no mian; did you mean main?", ""),
        ("t:number", "number is an int and cannot be called", ""),
        ("none.py:main", "there is no file", ""),
    ],
)
def test_entries_that_cannot_be_called(tmp_path: Path, entry: str, message: str, trace: str) -> None:
    write(tmp_path / "t.py", "number = 3\ndef main(): ...\n")
    write(tmp_path / "broken.py", "1 / 0\n")
    write(tmp_path / "needs.py", "import not_installed_here\n")
    write(tmp_path / "bad.py", "def (:\n")
    run = Run(tmp_path)
    found = find_launch(None, entry=entry, cwd=tmp_path, python=sys.executable)
    assert isinstance(found, Launch)
    seen = run(found)
    assert seen.ending.how == "not-started"
    assert seen.ending.exit_code == 87
    assert message in (seen.ending.error or "")
    assert trace in "\n".join(seen.ending.traceback)
    assert "run_entry" not in "\n".join(seen.ending.traceback)


def test_entry_that_raises_is_the_programs_own_error(tmp_path: Path) -> None:
    write(tmp_path / "t.py", "def main():\n    raise ValueError('no data')\n")
    found = find_launch(None, entry="t:main", cwd=tmp_path, python=sys.executable)
    assert isinstance(found, Launch)
    seen = Run(tmp_path)(found)
    assert (seen.ending.how, seen.ending.exit_code) == ("exit", 1)
    assert seen.ending.error == "ValueError: no data"


def test_import_of_trainlint_stays_cheap() -> None:
    code = "import trainlint, sys; assert 'trainlint.integrations' not in sys.modules; print(trainlint.TrainingRun)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TrainingRun" in done.stdout
