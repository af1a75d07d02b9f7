"""Watching ends when it should, says how, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch.programs import Run, gone, survivors, write

from trainlint.launch.model import LaunchError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# -- made its steps


def test_parked_program_is_ended_without_running_its_shutdown_code(run: Run) -> None:
    seen = run(
        """
        import atexit
        atexit.register(lambda: open("atexit-ran", "w").close())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            steps(3)
        finally:
            open("finally-ran", "w").close()
        """
    )
    assert seen.ending.how == "steps"
    assert (seen.steps, seen.ranks) == (3, 1)
    assert seen.first_step_s is not None
    assert run.progress.steps == [(0, 0, 3), (0, 1, 3), (0, 2, 3)]
    assert not (run.folder / "atexit-ran").exists()
    assert not (run.folder / "finally-ran").exists()


def test_program_that_does_not_park_is_ended_after_a_grace(run: Run) -> None:
    seen = run("steps(3, park=False); mark('closed'); time.sleep(600)")
    assert seen.ending.how == "steps"


def test_program_that_ends_itself_after_its_steps(run: Run) -> None:
    seen = run("steps(3, park=False); mark('finished')")
    assert (seen.ending.how, seen.ending.exit_code) == ("steps", 0)


def test_backward_cap(run: Run) -> None:
    seen = run("mark('armed'); mark('torch'); mark('backward'); mark('parked', reason='backward-cap'); time.sleep(600)")
    assert seen.ending.how == "backward-cap"
    assert "no torch.optim optimizer stepped" in seen.hint


def test_late_rank_is_waited_for(run: Run) -> None:
    seen = run(
        """
        if os.fork() == 0:
            mark("armed"); mark("torch"); mark("backward")
            time.sleep(1)
            steps(3, rank=1)
        while not os.listdir(_stream):
            time.sleep(0.01)
        time.sleep(0.2)
        steps(3)
        """
    )
    assert seen.ending.how == "steps"
    assert seen.ranks == 2
    assert set(run.progress.steps) == {(0, 0, 3), (0, 1, 3), (0, 2, 3)}


def test_rank_that_has_not_begun_is_waited_for(run: Run) -> None:
    """Its environment says that it is a rank, as torchrun's does."""
    seen = run(
        """
        #--
        import subprocess
        mark("armed")
        subprocess.Popen([sys.executable, "-S", "-c",
            "exec(open('program.py').read().split('#--')[0]); mark('armed'); mark('torch');"
            "time.sleep(1.5); steps(3, rank=1)"], env={**os.environ, "RANK": "1"})
        time.sleep(0.7)
        steps(3)
        """
    )
    assert seen.ending.how == "steps"
    assert seen.ranks == 2


# -- ended by itself


def test_exit_before_a_step_shows_output_and_traceback(run: Run) -> None:
    seen = run(
        """
        mark("armed")
        print("loading data")
        raise FileNotFoundError(2, "No such file or directory", "data.bin")
        """
    )
    assert (seen.ending.how, seen.ending.exit_code) == ("exit", 1)
    assert seen.ending.error is not None
    assert seen.ending.error.startswith("FileNotFoundError")
    assert "data.bin" in seen.ending.error
    assert seen.ending.traceback[0].startswith("Traceback")
    assert "loading data" in seen.ending.last_output


def test_the_first_failure_of_several_ranks_is_the_one_that_counts(run: Run) -> None:
    seen = run(
        """
        mark("armed"); mark("torch")
        with open(os.path.join(_stream, "999999.jsonl"), "w") as f:
            f.write(json.dumps(["mark", {"name": "error", "time": time.time() + 5, "type": "ConnectionError",
                                         "text": "peer gone", "traceback": []}]) + "\\n")
        mark("error", type="ValueError", text="bad batch", traceback=["Traceback", "ValueError: bad batch"])
        sys.exit(1)
        """
    )
    assert seen.ending.error == "ValueError: bad batch"


def test_exit_zero_before_a_step(run: Run) -> None:
    seen = run("mark('armed'); mark('torch'); mark('finished')")
    assert (seen.ending.how, seen.ending.exit_code) == ("exit", 0)
    assert "before any optimizer step" in seen.hint


def test_os_exit_is_told_apart(run: Run) -> None:
    seen = run("mark('armed'); mark('torch'); os._exit(0)")
    assert seen.ending.how == "exit"
    assert "os._exit(0)" in seen.hint


def test_missing_module_names_the_interpreter(run: Run) -> None:
    seen = run("mark('armed'); import no_such_module_anywhere")
    assert "has no module no_such_module_anywhere" in seen.hint
    assert sys.executable in seen.hint
    assert "--python" in seen.hint


def test_program_without_recorder_says_so(run: Run) -> None:
    assert "recorder" in run("print('hello')").hint


def test_killed_by_a_signal(run: Run) -> None:
    seen = run("mark('armed'); mark('torch'); os.kill(os.getpid(), signal.SIGKILL)")
    assert (seen.ending.how, seen.ending.signal) == ("killed", "SIGKILL")
    assert "memory" in seen.hint


def test_killed_inside_a_shell(run: Run) -> None:
    seen = run(run.command("/bin/bash", "-c", "(kill -9 $BASHPID); exit $?"))
    assert (seen.ending.how, seen.ending.signal) == ("killed", "SIGKILL")


def test_out_of_memory(run: Run) -> None:
    seen = run(
        """
        import resource
        mark("armed"); mark("torch")
        limit = 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        held = []
        while True:
            held.append(bytearray(2**24))
        """
    )
    assert seen.ending.error is not None
    assert seen.ending.error.startswith("MemoryError")
    assert "out of memory" in seen.hint


# -- never steps


def test_timeout_before_torch(run: Run) -> None:
    seen = run("mark('armed'); time.sleep(600)", timeout_s=1.0)
    assert seen.ending.how == "timeout"
    assert "did not import torch" in seen.hint
    assert "--timeout" in seen.hint


def test_timeout_starts_again_at_the_first_step(run: Run) -> None:
    seen = run(
        """
        mark("armed"); mark("torch"); mark("backward")
        time.sleep(1.2)
        mark("step", optimizer=0, index=0, done=False)
        time.sleep(1.2)
        steps(3)
        """,
        timeout_s=2.0,
    )
    assert seen.ending.how == "steps"


def test_bare_except_around_everything(run: Run) -> None:
    seen = run(
        """
        mark("armed")
        while True:
            try:
                time.sleep(600)
            except:
                pass
        """,
        timeout_s=1.0,
    )
    assert seen.ending.how == "timeout"


# -- nothing survives


def test_daemon_is_ended(run: Run) -> None:
    """Double fork, own session, closed descriptors, environment dropped by exec after it was seen."""
    seen = run(
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                open("daemon.pid", "w").write(str(os.getpid()))
                while True:
                    time.sleep(1)
            os._exit(0)
        time.sleep(0.5)
        steps(3)
        """
    )
    assert seen.ending.how == "steps"
    assert gone([int((run.folder / "daemon.pid").read_text())])


def test_workers_that_ignore_signals_and_restart_each_other(run: Run) -> None:
    seen = run(
        """
        def supervise():
            while True:
                child = os.fork()
                if child == 0:
                    for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                        signal.signal(n, signal.SIG_IGN)
                    open("restarts", "a").write("x")
                    while True:
                        time.sleep(1)
                os.waitpid(child, 0)
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                supervise()
        time.sleep(0.5)
        steps(3)
        """
    )
    assert seen.ending.how == "steps"
    assert len((run.folder / "restarts").read_text()) == 3


def test_program_in_the_background_of_a_script_is_followed(run: Run) -> None:
    write(run.folder / "run.sh", f"{sys.executable} -S program.py &\nsleep 0.2\n")
    run.launch("mark('armed'); mark('torch'); time.sleep(0.8); steps(3)")
    seen = run(run.command("/bin/bash", "run.sh"))
    assert seen.ending.how == "steps"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_trainlint_ends_the_program(run: Run, number: signal.Signals) -> None:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    timer.start()
    try:
        seen = run("mark('armed'); mark('torch'); time.sleep(600)")
    finally:
        timer.cancel()
    assert (seen.ending.how, seen.ending.signal) == ("interrupted", number.name)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_trainlint_takes_the_program_along(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from launch.programs import Run\n"
        "run = Run(Path(sys.argv[1])); print(run.run_id, flush=True)\n"
        'run(\'mark("armed"); open("pid", "w").write(str(os.getpid())); time.sleep(600)\')\n'
    )
    tests = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), tests], stdout=subprocess.PIPE, text=True
    ) as trainlint:
        assert trainlint.stdout is not None
        run_id = trainlint.stdout.readline().strip()
        end = time.monotonic() + 30
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        trainlint.kill()
    assert gone([int((tmp_path / "pid").read_text())])
    assert survivors(run_id) == []


# -- starting


def test_file_that_cannot_be_executed(run: Run) -> None:
    program = write(run.folder / "train", "print('no first line')\n")
    program.chmod(0o755)
    with pytest.raises(LaunchError, match="could not be started"):
        run(run.command(str(program)))


def test_environment_of_the_program(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    seen = run(
        run.launch("json.dump(dict(os.environ), open('env.json', 'w')); print(sys.stdin.read() == '')"),
        device="cpu",
        steps=5,
    )
    env = json.loads((run.folder / "env.json").read_text())
    first, second = env["PYTHONPATH"].split(os.pathsep)[:2]
    assert Path(first, "sitecustomize.py").is_file()
    assert second == "/users/own"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["TRAINLINT_STEPS"] == "5"
    assert env["TRAINLINT_SUPERVISOR"] == str(os.getpid())
    assert seen.ending.last_output == ("True",)
    assert any("GPU" in note for note in seen.notes)
