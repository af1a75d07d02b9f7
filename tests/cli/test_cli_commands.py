"""The commands as a user starts them: exit status, what goes to which stream, and no torch where none is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainlint.recording import codec
from trainlint.recording.schema import Ending, Recording


def trainlint(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if k not in ("TRAINLINT_DEBUG", "FORCE_COLOR", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-m", "trainlint", *map(str, arguments)],
        cwd=cwd,
        env={**base, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("training:\n  lr: 3e-4\n  weight_decay: 0.1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    return tmp_path


@pytest.fixture
def poisoned(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch ends the process."""
    folder = tmp_path / "poison"
    folder.mkdir()
    for name in ("torch", "lightning", "transformers", "numpy"):
        (folder / f"{name}.py").write_text("import os\nos.write(2, b'POISON')\nos._exit(77)\n")
    return {"PYTHONPATH": str(folder)}


def test_nothing_that_needs_no_run_imports_torch(project: Path, poisoned: dict[str, str]) -> None:
    saved = project / "run.json"
    codec.save(Recording(ending=Ending(how="steps")), saved)
    for arguments in (
        ("--version",),
        ("--help",),
        ("rules",),
        ("rules", "--format", "json"),
        ("explain", "TL202"),
        ("check", "--static", "config.yaml"),
        ("check", "--recording", saved),
    ):
        done = trainlint(*arguments, cwd=project, env=poisoned)
        assert "POISON" not in done.stderr, arguments
        assert done.returncode in (0, 1, 2), (arguments, done.stderr)
    # The poison works.
    assert subprocess.run([sys.executable, "-c", "import torch"], env={**os.environ, **poisoned}).returncode == 77


def test_version() -> None:
    from trainlint import __version__

    assert trainlint("--version").stdout == f"trainlint {__version__}\n"


def test_rules_lists_every_check_in_order() -> None:
    rows = json.loads(trainlint("rules", "--format", "json").stdout)
    codes = [row["code"] for row in rows]
    assert codes == sorted(codes)
    assert "TL202" in codes
    text = trainlint("rules").stdout
    assert all(code in text for code in codes)


@pytest.mark.parametrize("word", ["TL202", "tl202", "frozen-but-optimized", "O17", "o17"])
def test_explain_by_code_name_and_other_catalogs(word: str) -> None:
    done = trainlint("explain", word)
    assert done.returncode == 0
    assert done.stdout.startswith("# TL202 frozen-but-optimized")
    assert "## When it may be wrong" in done.stdout


def test_explain_of_something_unknown_suggests() -> None:
    done = trainlint("explain", "frozen-but-optimised")
    assert done.returncode == 2
    assert "TL202" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check"], "neither a config nor a command"),
        (["check", "lr=1"], "no config"),
        (["check", "a.yaml", "b.yaml"], "Two configs"),
        (["check", "--"], "Nothing stands behind"),
        (["check", "config.yaml", "--steps", "0"], "--steps"),
        (["check", "config.yaml", "--steps", "two"], "--steps"),
        (["check", "config.yaml", "--device", "tpu"], "auto or cpu"),
        (["check", "config.yaml", "--format", "xml"], "no format 'xml'"),
        (["check", "config.yaml", "--format", "sarif"], "not available in this version"),
        (["check", "config.yaml", "--deep", "influence"], "not available in this version"),
        (["check", "config.yaml", "--deep", "overfti"], "no experiment 'overfti'"),
        (["check", "config.yaml", "--static", "--deep"], "--deep means nothing"),
        (["check", "config.yaml", "--baseline", "b.json"], "not available in this version"),
        (["check", "config.yaml", "--fail-on", "never"], "not a severity"),
        (["check", "config.yaml", "--static", "--recording", "r.json"], "exclude each other"),
        (["check", "config.yaml", "--static", "--save-recording", "r.json"], "starts no program"),
        (["check", "config.yaml", "--select", "TL999"], "TL999"),
        (["check", "config.yaml", "--static", "--ignore", "nonsense"], "nonsense"),
        (["check", "config.yaml", "--output-file", "no/such/dir.txt"], "no directory"),
        (["check", "config.yaml", "--static", "--output-file", "."], "is a directory"),
        (["check", "--recording", "missing.json"], "missing.json"),
        (["check", "config.yaml", "--no-such-option"], "No such option"),
        (["nonsense"], "No such command"),
        (["init"], "not available in this version"),
        (["rules", "--format", "html"], "not available in this version"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what(project: Path, arguments: list[str], says: str) -> None:
    done = trainlint(*arguments, cwd=project, env={"COLUMNS": "200"})
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_static_reports_what_was_not_observed(project: Path) -> None:
    done = trainlint("check", "--static", "config.yaml", cwd=project)
    assert done.returncode in (0, 1)
    assert "not observed" in done.stdout
    assert "--static: the program was not started" in done.stdout
    assert done.stderr == ""


BROKEN_LOOP = """
import torch
from model import make
model = make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in batches():
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
"""


@pytest.mark.parametrize("told", ["command", "table", "config alone"])
def test_static_reads_the_program_that_would_be_started(project: Path, told: str) -> None:
    (project / "model.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    (project / "loop.py").write_text(BROKEN_LOOP)
    arguments = ["check", "--static", "config.yaml", "--format", "json"]
    if told == "command":
        arguments += ["--", "python", "loop.py"]
    elif told == "table":
        (project / "pyproject.toml").write_text('[tool.trainlint]\ncommand = "python loop.py"\n')
    done = trainlint(*arguments, cwd=project)
    report = json.loads(done.stdout)
    (finding,) = [f for f in report["findings"] if f["code"] == "TL303"]
    assert (finding["location"]["file"], finding["location"]["line"]) == ("loop.py", 9)
    assert done.returncode == 1
    verdicts = {v["code"]: v for v in report["verdicts"]}
    assert verdicts["TL304"]["verdict"] == "not-observed"
    assert "nothing found without a run" in verdicts["TL304"]["reason"]


def test_json_is_the_only_thing_on_stdout(project: Path) -> None:
    done = trainlint("check", "--static", "config.yaml", "--format", "json", cwd=project)
    data = json.loads(done.stdout)
    assert data["schema"] == "trainlint.report/1"
    assert data["exit_code"] == done.returncode
    assert {v["verdict"] for v in data["verdicts"]} <= {
        "passed",
        "failed",
        "not-applicable",
        "not-observed",
        "crashed",
    }


def test_output_file_leaves_stdout_empty(project: Path) -> None:
    for name, starts in (("json", "{"), ("text", "")):
        done = trainlint(
            "check", "--static", "config.yaml", "--format", name, "--output-file", "report.out", cwd=project
        )
        assert done.stdout == ""
        text = (project / "report.out").read_text(encoding="utf-8")
        assert text.startswith(starts)
        assert "\x1b" not in text
        assert "not" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1, 2\nb: 3\n", "line"),
        (b"- 1\n- 2\n", "list"),
        (b"", "empty"),
        (b"\xff\xfe\xfa\x00", ""),
        (b"name: caf\xe9\n", "UTF-8"),
        (b"just words", ""),
    ],
)
def test_an_unreadable_config_is_a_trouble_and_the_rest_is_reported(project: Path, content: bytes, says: str) -> None:
    (project / "bad.yaml").write_bytes(content)
    done = trainlint("check", "bad.yaml", cwd=project)
    assert done.returncode == 2
    assert says in done.stdout
    assert "not observed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_missing_config_suggests_the_neighbour(project: Path) -> None:
    done = trainlint("check", "confg.yaml", cwd=project)
    assert done.returncode == 2
    assert "config.yaml" in done.stdout


def test_a_saved_recording_is_judged_without_a_program(project: Path) -> None:
    saved = project / "run.json"
    codec.save(Recording(ending=Ending(how="exit", exit_code=1, error="ValueError: no data")), saved)
    done = trainlint("check", "--recording", saved, "--format", "json", cwd=project)
    assert done.returncode == 2
    assert "ValueError: no data" in json.loads(done.stdout)["troubles"][0]


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"schema": "trainlint.recording/99"}'])
def test_what_is_no_recording(project: Path, content: str) -> None:
    (project / "run.json").write_text(content)
    done = trainlint("check", "--recording", "run.json", cwd=project)
    assert done.returncode == 2
    assert "run.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_input_gives_the_same_report(project: Path) -> None:
    reports = {trainlint("check", "--static", "config.yaml", "--format", "json", cwd=project).stdout for _ in range(2)}
    assert len(reports) == 1


def test_an_internal_error_is_two_lines_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trainlint.cli as cli
    import trainlint.cli.app as app

    def broken(argv: object) -> int:
        raise ZeroDivisionError("nothing to\ndivide")

    monkeypatch.setattr(app, "dispatch", broken)
    monkeypatch.delenv("TRAINLINT_DEBUG", raising=False)
    assert cli.execute(["check"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "trainlint: internal error: ZeroDivisionError: nothing to divide"
    assert "TRAINLINT_DEBUG=1" in said[1]
    assert len(said) == 2
    monkeypatch.setenv("TRAINLINT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.execute(["check"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m trainlint explain TL202 | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "# TL202 frozen-but-optimized\n"
    assert done.stderr == ""


def test_a_terminal_without_unicode(project: Path) -> None:
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for arguments in (("rules",), ("explain", "TL202"), ("check", "--static", "config.yaml"), ("check", "--help")):
        done = trainlint(*arguments, cwd=project, env=env)
        assert done.returncode in (0, 1), done.stderr
        assert done.stdout.isascii()


def test_settings_of_the_project_are_read(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.trainlint]\nfail-on = "perhaps"\n')
    done = trainlint("check", "--static", "config.yaml", cwd=project)
    assert done.returncode == 2
    assert "fail-on" in done.stderr
    (project / "pyproject.toml").write_text('[tool.trainlint]\nselect = ["TL2"]\nsteps = 0\n')
    assert trainlint("check", "--static", "config.yaml", cwd=project).returncode == 2
    (project / "pyproject.toml").write_text('[tool.trainlint]\nselect = ["TL2"]\n')
    data = json.loads(trainlint("check", "--static", "config.yaml", "--format", "json", cwd=project).stdout)
    assert data["verdicts"]
    assert all(v["code"].startswith("TL2") for v in data["verdicts"])
    wider = trainlint("check", "--static", "--select", "ALL", "config.yaml", "--format", "json", cwd=project)
    assert len(json.loads(wider.stdout)["verdicts"]) > len(data["verdicts"])
