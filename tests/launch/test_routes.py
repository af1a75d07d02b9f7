"""Which program a config or a command leads to, and how overrides reach it. Nothing is started here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch.programs import write

from trainlint.launch.model import AmbiguousLaunch, Launch, LaunchError, NoLaunch
from trainlint.launch.pyproject import read_tool_table
from trainlint.launch.routes import find_launch

ARGPARSE = """
import argparse, torch, yaml
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--lr", type=float)
args = parser.parse_args()
"""
HYDRA = """
import hydra
@hydra.main(version_base=None, config_path="{path}", config_name="{name}")
def main(cfg): ...
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    write(tmp_path / "pyproject.toml", "[project]\nname = 'p'\n")
    write(tmp_path / "config.yaml", "lr: 1e-3\nmodel:\n  width: 8\n")
    return tmp_path


def launch(project: Path, config: str | None = "config.yaml", *args: object, **kwargs: object) -> Launch:
    found = find_launch(Path(config) if config else None, *args, cwd=project, **kwargs)  # type: ignore[arg-type]
    assert isinstance(found, Launch), found
    return found


# -- route 1


def test_told_on_the_command_line(project: Path) -> None:
    found = launch(project, "config.yaml", (), [sys.executable, "train.py", "--config={config}", "{config}.bak"])
    assert found.route == 1
    assert found.command == (sys.executable, "train.py", "--config=config.yaml", "config.yaml.bak")
    assert found.interpreter == sys.executable
    assert not found.needs_confirmation


def test_command_wins_over_everything(project: Path) -> None:
    write(project / "pyproject.toml", "[tool.trainlint]\ncommand = 'python other.py'\nentry = 'a:b'\n")
    assert launch(project, None, (), [sys.executable, "x.py"]).route == 1


def test_environment_words_before_the_command(project: Path) -> None:
    found = launch(project, None, (), ["OMP_NUM_THREADS=1", sys.executable, "train.py"])
    assert found.env == {"OMP_NUM_THREADS": "1"}
    assert found.command[0] == sys.executable


def test_placeholder_without_config(project: Path) -> None:
    with pytest.raises(LaunchError, match="needs a config"):
        find_launch(None, (), ["python", "train.py", "{config}"], cwd=project)


def test_missing_config(project: Path) -> None:
    with pytest.raises(LaunchError, match=r"no config .*nope\.yaml"):
        find_launch(Path("nope.yaml"), (), cwd=project)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("no-such-program-here", "Command not found"),
        ("./train.py", "not executable"),
        ("./model", "is a folder"),
        ("./nothing", "Command not found"),
    ],
)
def test_command_not_found(project: Path, word: str, message: str) -> None:
    write(project / "train.py", "")
    (project / "model").mkdir()
    with pytest.raises(LaunchError, match=message):
        find_launch(None, (), [word], cwd=project)


def test_python_of_the_project_when_path_has_none(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    write(project / ".venv/pyvenv.cfg", "")
    python = write(project / ".venv/bin/python", "#!/bin/sh\n")
    python.chmod(0o755)
    found = launch(project, None, (), ["python", "train.py"])
    assert found.command[0] == str(python)
    assert ".venv" in found.notes[0]


def test_python_option_replaces_the_interpreter_and_acts_like_activating_it(project: Path) -> None:
    python = write(project / "env/bin/python3", "#!/bin/sh\n")
    tool = write(project / "env/bin/state", f"#!{python}\n")
    for file in (python, tool):
        file.chmod(0o755)
    assert launch(project, None, (), ["python", "t.py"], python="env").command[0] == str(python)
    found = launch(project, None, (), ["state", "train"], python=str(python))
    assert found.command[0] == str(tool)
    assert found.env["PATH"] == str(python.parent)
    assert found.interpreter == str(python)


def test_python_option_that_is_none(project: Path) -> None:
    with pytest.raises(LaunchError, match="No Python interpreter"):
        find_launch(None, (), ["python", "t.py"], python="/no/python", cwd=project)


# -- overrides


def test_override_goes_into_a_copy_for_the_placeholder(project: Path) -> None:
    found = launch(project, "config.yaml", ["model.width=4", "new.key=1e-4"], [sys.executable, "t.py", "{config}"])
    assert found.overrides_by == "copy"
    assert found.template[-1] == "{config}"
    assert found.command[-1] == "config.yaml"
    assert found.files[0].beside == project
    assert found.files[0].text == "lr: 1e-3\nmodel:\n  width: 4\nnew:\n  key: 1e-4\n"


def test_override_reaches_a_command_that_names_the_config(project: Path) -> None:
    found = launch(project, "config.yaml", ["lr=1"], [sys.executable, "t.py", "--config=./config.yaml"])
    assert found.template[-1] == "--config={config}"


def test_override_is_appended_for_a_hydra_app(project: Path) -> None:
    write(project / "train.py", HYDRA.format(path="conf", name="config"))
    found = launch(project, "config.yaml", ["lr=1", "+a.b=2", "~c"], [sys.executable, "train.py"])
    assert found.command[-3:] == ("lr=1", "+a.b=2", "~c")


def test_override_that_cannot_reach_the_program(project: Path) -> None:
    write(project / "train.py", "print(1)")
    with pytest.raises(LaunchError, match="cannot reach the program") as raised:
        find_launch(Path("config.yaml"), ["hub.token=abcdefgh"], [sys.executable, "train.py"], cwd=project)
    assert "abcdefgh" not in str(raised.value)


# -- route 2


def test_entry(project: Path) -> None:
    found = launch(project, "config.yaml", (), entry="pkg.train:main", python=sys.executable)
    assert found.route == 2
    assert found.shown == "pkg.train:main(config.yaml)"
    assert str(project / "config.yaml") in found.command
    assert not found.needs_confirmation


@pytest.mark.parametrize("entry", ["train", "train.py", ":main", "a b:c", "train:", "train:1"])
def test_entry_of_another_form(project: Path, entry: str) -> None:
    with pytest.raises(LaunchError, match="is not module:function"):
        find_launch(Path("config.yaml"), (), entry=entry, cwd=project)


def test_entry_of_the_project_comes_before_its_command(project: Path) -> None:
    write(project / "pyproject.toml", "[tool.trainlint]\ncommand = 'python x.py'\nentry = 'a:b'\n")
    assert launch(project).route == 2


# -- route 3


def test_command_of_the_project(project: Path) -> None:
    write(
        project / "pyproject.toml", f"[tool.trainlint]\ncommand = \"{sys.executable} 'my train.py' --c {{config}}\"\n"
    )
    found = find_launch(Path("../config.yaml"), cwd=project / "sub" if (project / "sub").mkdir() is None else project)
    assert isinstance(found, Launch)
    assert found.route == 3
    assert found.command == (sys.executable, "my train.py", "--c", "config.yaml")
    assert found.cwd == project


@pytest.mark.parametrize(
    ("command", "message"),
    [("cd src && python train.py", "&&"), ("python 'train.py", "split"), ("", "empty")],
)
def test_command_of_the_project_that_needs_a_shell(project: Path, command: str, message: str) -> None:
    write(project / "pyproject.toml", f'[tool.trainlint]\ncommand = "{command}"\n')
    with pytest.raises(LaunchError, match=message):
        find_launch(Path("config.yaml"), cwd=project)


# -- route 4


def test_hydra_run_folder(project: Path) -> None:
    write(project / "src/train.py", HYDRA.format(path="../conf", name="config"))
    write(project / "conf/config.yaml", "lr: 1\n")
    run = project / "outputs/2024-01-01/12-00-00"
    write(run / ".hydra/config.yaml", "lr: 5\n")
    write(run / ".hydra/overrides.yaml", "- lr=5\n- +x=1\n")
    write(
        run / ".hydra/hydra.yaml",
        f"""\
        hydra:
          job: {{name: train, config_name: other}}
          runtime:
            cwd: {project}
            config_sources: [{{path: {project}/conf, provider: main}}]
        """,
    )
    for given in (run, run / ".hydra/config.yaml"):
        found = launch(project, str(given), ["lr=6"])
        assert found.route == 4
        assert found.command[1:] == ("src/train.py", "--config-name=other", "lr=5", "+x=1", "lr=6")
        assert found.cwd == project


# -- route 5


def test_script_with_a_config_option(project: Path) -> None:
    write(project / "train.py", ARGPARSE)
    write(project / "evaluate.py", ARGPARSE)
    found = launch(project)
    assert found.route == 5
    assert found.needs_confirmation
    assert found.command[1:] == ("train.py", "--config", "config.yaml")


def test_several_programs_are_listed(project: Path) -> None:
    write(project / "train_small.py", ARGPARSE)
    write(project / "train_big.py", ARGPARSE)
    with pytest.raises(AmbiguousLaunch) as raised:
        find_launch(Path("config.yaml"), cwd=project)
    assert len(raised.value.candidates) == 2
    assert "train_big.py --config config.yaml" in str(raised.value)


TRL_SCRIPT = """
from trl import TrlParser, ModelConfig
parser = TrlParser((ModelConfig,))
args, = parser.parse_args_and_config()
"""


def test_the_program_that_the_configs_place_names(project: Path) -> None:
    for name in ("sft", "dpo", "orpo"):
        write(project / f"scripts/{name}.py", TRL_SCRIPT)
    settings = "model_name_or_path: m\nlearning_rate: 1.0e-4\nnum_train_epochs: 1\nper_device_train_batch_size: 2\n"
    for place, script in (("recipes/zephyr/dpo/config_full.yaml", "dpo"), ("recipes/config_sft.yaml", "sft")):
        write(project / place, settings)
        found = find_launch(Path(place), cwd=project)
        assert isinstance(found, Launch)
        assert found.command[1] == f"scripts/{script}.py"
        assert found.needs_confirmation
    write(project / "recipes/sft-dpo.yaml", settings)
    with pytest.raises(AmbiguousLaunch):
        find_launch(Path("recipes/sft-dpo.yaml"), cwd=project)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("base_model: m\ndatasets: []\nmicro_batch_size: 2\nlearning_rate: 1e-4\n", "axolotl train {config}"),
        ("stage: sft\ntemplate: llama3\nlearning_rate: 1e-4\nnum_train_epochs: 1\n", "llamafactory-cli train {config}"),
    ],
)
def test_a_config_for_a_tool_that_is_not_installed(project: Path, text: str, command: str) -> None:
    """TRL's scripts take a YAML of that form too, and would drop nearly every key of it."""
    write(project / "sft.py", TRL_SCRIPT)
    write(project / "other.yaml", text)
    found = find_launch(Path("other.yaml"), cwd=project)
    assert isinstance(found, NoLaunch)
    assert command in found.add


def test_a_long_list_of_programs_is_cut(project: Path) -> None:
    for number in range(12):
        write(project / f"train_{number}.py", ARGPARSE)
    with pytest.raises(AmbiguousLaunch, match="and 4 more") as raised:
        find_launch(Path("config.yaml"), cwd=project)
    assert len(raised.value.candidates) == 12


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("conf/config.yaml", ()),
        ("conf/other.yaml", ("--config-name=other",)),
        ("conf/model/big.yaml", ("model=big",)),
        ("conf/model/small.yaml", ()),
        ("conf/experiment/fast.yaml", ("+experiment=fast",)),
        ("conf/data/nested/a.yaml", ("data/nested=a",)),
    ],
)
def test_hydra_config_groups(project: Path, config: str, arguments: tuple[str, ...]) -> None:
    write(project / "app/train.py", HYDRA.format(path="../conf", name="config"))
    write(project / "conf/config.yaml", "defaults:\n  - model: small\n  - data/nested: b\n  - _self_\n")
    write(project / "conf/other.yaml", "defaults:\n  - model: big\n  - _self_\n")
    write(project / "conf/model/small.yaml", "width: 1\n")
    write(project / "conf/model/big.yaml", "width: 2\n")
    write(project / "conf/data/nested/a.yaml", "n: 2\n")
    write(project / "conf/experiment/fast.yaml", "# @package _global_\ndefaults:\n  - override /model: big\n")
    found = launch(project, config)
    assert found.command[1:] == ("app/train.py", *arguments)


def test_hydra_config_from_elsewhere(project: Path) -> None:
    write(project / "train.py", HYDRA.format(path="conf", name="config"))
    write(project / "conf/config.yaml", "lr: 1\n")
    config = write(project / "runs/mine.yaml", "defaults:\n  - _self_\nmodel:\n  _target_: torch.nn.Linear\n")
    assert launch(project, "runs/mine.yaml").command[2:] == (f"--config-path={config.parent}", "--config-name=mine")


@pytest.mark.parametrize(
    ("call", "text", "arguments"),
    [
        (
            "LightningCLI(M)",
            "trainer: {max_epochs: 1}\nmodel: {class_path: m.M}\n",
            ("fit", "--config", "c.yaml", "--a.b=1"),
        ),
        (
            "LightningCLI(M)",
            "fit:\n  trainer: {}\n  model: {class_path: m.M}\n",
            ("--config", "c.yaml", "fit", "--a.b=1"),
        ),
        ("LightningCLI(M, run=False)", "trainer: {}\nmodel: {class_path: m.M}\n", ("--config", "c.yaml", "--a.b=1")),
    ],
)
def test_lightning_cli(project: Path, call: str, text: str, arguments: tuple[str, ...]) -> None:
    code = (
        "from lightning.pytorch.cli import LightningCLI\ndef cli():\n    CALL\nif __name__ == '__main__':\n    cli()\n"
    )
    write(project / "main.py", code.replace("CALL", call))
    write(project / "c.yaml", text)
    assert launch(project, "c.yaml", ["a.b=1"]).command[2:] == arguments


HF = """
import sys
from transformers import HfArgumentParser, TrainingArguments
def main():
    parser = HfArgumentParser(TrainingArguments)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        args, = parser.parse_json_file(sys.argv[1])
    else:
        args, = parser.parse_args_into_dataclasses()
if __name__ == "__main__":
    main()
"""
TRL = """
from trl import TrlParser, SFTConfig
if __name__ == "__main__":
    args, = TrlParser((SFTConfig,)).parse_args_and_config()
"""
ARGUMENTS = "learning_rate: 1.0e-4\noutput_dir: out\nmax_steps: 5\n"


def test_trl_script(project: Path) -> None:
    write(project / "sft.py", TRL)
    write(project / "run_clm.py", HF)
    write(project / "c.yaml", ARGUMENTS)
    assert launch(project, "c.yaml").command[1:] == ("sft.py", "--config", "c.yaml")


def test_transformers_script_takes_json_only(project: Path) -> None:
    write(project / "run_clm.py", HF)
    write(project / "c.json", '{"learning_rate": 1e-4, "output_dir": "out", "max_steps": 5}')
    write(project / "c.yaml", ARGUMENTS)
    found = launch(project, "c.json", ["max_steps=7"])
    assert found.command[1:] == ("run_clm.py", "c.json")
    assert '"max_steps": 7' in found.files[0].text
    assert isinstance(find_launch(Path("c.yaml"), cwd=project), NoLaunch)


def test_shell_script_that_names_the_config(project: Path) -> None:
    write(project / "train.py", ARGPARSE)
    write(
        project / "scripts/run.sh",
        """\
        #!/bin/bash
        CONFIG=config.yaml   # which
        GPUS=${GPUS:-2}
        python eval.py --config config.yaml
        OMP_NUM_THREADS=4 python train.py \\
            --config "$CONFIG" --lr 0.1 "$@" > log.txt 2>&1 &
        """,
    )
    found = launch(project)
    assert found.command[1:] == ("train.py", "--config", "config.yaml", "--lr", "0.1")
    assert found.env == {"OMP_NUM_THREADS": "4"}
    assert "run.sh:5" in found.why


def test_console_script_of_a_package(project: Path) -> None:
    write(project / "pyproject.toml", "[project]\nname = 'p'\n[project.scripts]\nno-such-tool = 'pkg.cli:main'\n")
    write(project / "src/pkg/__init__.py", "")
    write(project / "src/pkg/cli.py", "from . import x\n" + HYDRA.format(path="conf", name="c").split("if __name__")[0])
    write(project / "src/pkg/conf/c.yaml", "lr: 1\n")
    found = launch(project, "src/pkg/conf/c.yaml")
    assert found.command[1:] == ("-c", "from pkg.cli import main; main()")
    assert found.env == {"PYTHONPATH": str(project / "src")}


def test_module_with_relative_imports(project: Path) -> None:
    write(project / "pkg/__init__.py", "")
    write(
        project / "pkg/train.py", "from . import model\n" + ARGPARSE + "if __name__ == '__main__':\n    print(args)\n"
    )
    found = launch(project)
    assert found.command[1:] == ("-m", "pkg.train", "--config", "config.yaml")


def test_environments_and_broken_files_are_passed_over(project: Path) -> None:
    write(project / "train.py", ARGPARSE)
    write(project / "myenv/pyvenv.cfg", "")
    for place in ("myenv/lib/train2.py", "node_modules/train3.py", ".hidden/train4.py"):
        write(project / place, ARGPARSE)
    write(project / "train5.py", ARGPARSE + "def (:\n")
    assert launch(project).command[1] == "train.py"


# -- route 6


def test_nothing_fits(project: Path) -> None:
    write(project / "train.py", "print('reads no config')")
    found = find_launch(Path("config.yaml"), cwd=project)
    assert isinstance(found, NoLaunch)
    assert "train.py --config {config}" in found.add


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: NO\nnum_processes: 1\n", "accelerate"),
        ("model:\n  _component_: torchtune.models.llama2\n", "recipe"),
    ],
)
def test_configs_that_name_no_program(project: Path, text: str, word: str) -> None:
    write(project / "config.yaml", text)
    found = find_launch(Path("config.yaml"), cwd=project)
    assert isinstance(found, NoLaunch)
    assert word in found.reason


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "a: [1, 2", "\x00\x01", "a: !custom 1\n", "? [a, b]\n: 1\n"])
def test_any_config_is_survived(project: Path, text: str) -> None:
    (project / "config.yaml").write_text(text)
    write(project / "train.py", ARGPARSE)
    assert launch(project).command[1] == "train.py"


# -- pyproject.toml


def test_tool_table(project: Path) -> None:
    file = write(
        project / "pyproject.toml",
        """\
        [tool.trainlint]
        steps = 5
        timeout = 30
        fail-on = "warning"
        select = ["TL1"]
        stepz = 4

        [[tool.trainlint.suppress]]
        code = "TL206"
        reason = "meant"
        """,
    )
    (project / "deep/er").mkdir(parents=True)
    table = read_tool_table(project / "deep/er")
    assert (table.steps, table.timeout, table.fail_on, table.select) == (5, 30.0, "warning", ("TL1",))
    assert table.suppress == ({"code": "TL206", "reason": "meant"},)
    assert table.file == file
    assert table.warnings == (
        f"{file}:6: [tool.trainlint] has no setting 'stepz'; it is not used. Did you mean steps?",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.trainlint]\nsteps = \n", "line 2"),
        ("[tool.trainlint]\nsteps = 'three'\n", "pyproject.toml:2: steps must be a whole number"),
        ("[tool.trainlint]\nsteps = true\n", "whole number"),
        ("[tool.trainlint]\nsteps = 0\n", "above zero"),
        ("[tool.trainlint]\nfail-on = 'never'\n", "must be one of error, warning, info"),
        ("[tool.trainlint]\nselect = [1]\n", "list of codes"),
        ("[tool]\ntrainlint = 3\n", "must be a table"),
    ],
)
def test_tool_table_with_faults(project: Path, text: str, message: str) -> None:
    write(project / "pyproject.toml", text)
    with pytest.raises(LaunchError, match=message):
        read_tool_table(project)


def test_broken_pyproject_of_others_is_theirs(project: Path) -> None:
    write(project / "pyproject.toml", "[tool.black\n")
    table = read_tool_table(project)
    assert table.file is None
    assert "not valid TOML" in table.warnings[0]
