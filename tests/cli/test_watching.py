"""``trainlint check`` on small programs, from the command line to the exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

TRAIN = """
import argparse, atexit, sys, torch, yaml
parser = argparse.ArgumentParser()
parser.add_argument("--config", default="config.yaml")
with open(parser.parse_args().config) as file:
    config = yaml.safe_load(file)
atexit.register(lambda: open("after.txt", "w").write("shutdown code ran"))
print("hello from the program, key", config.get("api_key"), flush=True)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
for step in range(1000):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    open("log.txt", "a").write(f"{loss.item()}\\n")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "config.yaml").write_text("lr: 0.1\napi_key: hf_verysecretvalue123456\n")
    (folder / "log.txt").write_text("an earlier run\n")
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    return folder


def environment(project: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRAINLINT_DEBUG", "FORCE_COLOR", "COLUMNS")}
    return {
        **env,
        "TRAINLINT_STATE_DIR": str(project.parent / "state"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def check(project: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainlint", "check", *map(str, arguments)],
        cwd=project,
        env=environment(project),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_nothing_happened(project: Path) -> None:
    """No shutdown code, nothing written, no run folder left."""
    assert sorted(p.name for p in project.iterdir() if p.suffix != ".json") == sorted(
        [
            "train.py",
            "config.yaml",
            "log.txt",
            "pyproject.toml",
            *(["crash.py"] if (project / "crash.py").exists() else []),
        ]
    )
    assert (project / "log.txt").read_text() == "an earlier run\n"
    assert list((project.parent / "state" / "runs").iterdir()) == []


def test_a_command_from_start_to_report(project: Path) -> None:
    done = check(project, "config.yaml", "--format", "json", "--", sys.executable, "train.py", "--config", "{config}")
    data = json.loads(done.stdout)
    assert done.returncode == data["exit_code"] != 2, done.stdout
    assert data["run"]["command"][1:] == ["train.py", "--config", "config.yaml"]
    assert [v for v in data["verdicts"] if v["verdict"] == "crashed"] == []
    assert any(v["verdict"] == "passed" for v in data["verdicts"])
    assert "optimizer step 3 of 3" in done.stderr
    assert "hello from the program" not in done.stdout + done.stderr
    assert_nothing_happened(project)


def test_verbose_passes_the_output_on_to_stderr_and_hides_secrets(project: Path) -> None:
    done = check(project, "config.yaml", "--verbose", "--save-recording", "run.json", "--", sys.executable, "train.py")
    assert "hello from the program" in done.stderr
    assert "hello from the program" not in done.stdout
    everything = done.stdout + done.stderr + (project / "run.json").read_text()
    assert "verysecretvalue" not in everything


def test_quiet_is_quiet(project: Path) -> None:
    assert check(project, "--quiet", "--", sys.executable, "train.py").stderr == ""


def test_a_saved_recording_gives_the_same_verdicts_and_findings(project: Path) -> None:
    fresh = check(
        project, "config.yaml", "--format", "json", "--save-recording", "run.json", "--", sys.executable, "train.py"
    )
    again = check(project, "--recording", "run.json", "--format", "json")
    assert again.returncode == fresh.returncode
    for part in ("verdicts", "findings", "prevented", "exit_code"):
        assert json.loads(again.stdout)[part] == json.loads(fresh.stdout)[part]


def test_settings_reach_the_program_through_a_copy_of_the_config(project: Path) -> None:
    (project / "pyproject.toml").write_text(
        f'[tool.trainlint]\ncommand = "{sys.executable} train.py --config {{config}}"\nsteps = 2\n'
    )
    done = check(project, "config.yaml", "lr=0.625", "--format", "json")
    data = json.loads(done.stdout)
    assert done.returncode != 2, done.stdout
    assert "0.625" in json.dumps(data["run"]["card"]["optimizers"])
    assert "optimizer step 2 of 2" in done.stderr
    assert (project / "config.yaml").read_text().startswith("lr: 0.1\n")
    assert_nothing_happened(project)


def test_a_program_that_dies_is_reported_with_its_last_words(project: Path) -> None:
    (project / "crash.py").write_text("import torch\nprint('loading data')\nraise ValueError('no data at all')\n")
    done = check(project, "--", sys.executable, "crash.py")
    assert done.returncode == 2
    assert done.stdout.startswith("✗ ")
    assert "ValueError: no data at all" in done.stdout
    assert "│ loading data" in done.stdout
    assert "not observed" in done.stdout
    assert_nothing_happened(project)


def test_a_program_that_is_not_there(project: Path) -> None:
    done = check(project, "--", "no-such-program", "--lr", "3")
    assert done.returncode == 2
    assert "no-such-program" in done.stdout
    assert "not observed" in done.stdout


def test_a_program_that_hangs_is_ended(project: Path) -> None:
    (project / "crash.py").write_text("import time\nwhile True: time.sleep(0.1)\n")
    done = check(project, "--timeout", "5", "--", sys.executable, "crash.py")
    assert done.returncode == 2
    assert "--timeout" in done.stdout
    assert "crash.py:2" in done.stdout


def test_nothing_says_which_program_reads_the_config(project: Path) -> None:
    (project / "train.py").rename(project / "other.txt")
    done = check(project, "config.yaml")
    assert done.returncode in (0, 1)
    assert "the program was not started" in done.stdout
    assert "To watch the run as well" in done.stdout


def test_a_command_that_was_found_is_not_run_unasked(project: Path) -> None:
    (project / "train.py").write_text(
        "import hydra\n@hydra.main(config_path='.', config_name='config')\ndef main(c):\n    open('ran', 'w')\nmain()\n"
    )
    done = check(project, "config.yaml")
    assert done.returncode in (0, 1)
    assert "--yes" in done.stdout
    assert not (project / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_watch_still_reports_and_leaves_nothing(project: Path, number: int) -> None:
    (project / "crash.py").write_text(
        "import os, time, torch\nopen('log.txt', 'w').write('gone')\n"
        "print('PID', os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "trainlint", "check", "--verbose", "--", sys.executable, "crash.py"],
        cwd=project,
        env=environment(project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    pid = 0
    for line in process.stderr:
        if line.startswith("PID"):
            pid = int(line.split()[1])
            break
    assert pid
    time.sleep(0.2)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Interrupted" in stdout
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert_nothing_happened(project)
