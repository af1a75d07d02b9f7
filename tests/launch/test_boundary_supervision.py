"""Once a program passes the end of its epoch, nothing that it does changes how its watch ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from launch.programs import Run

from trainlint.recording.assemble import assemble

pytestmark = pytest.mark.timeout(120)

BEGUN = """
steps(3, park=False)
mark("closed")
mark("boundary", budget_s=%s)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_it_is_waited_for(run: Run) -> None:
    """Longer than a program that does nothing new is given otherwise."""
    began = time.monotonic()
    seen = run(
        BEGUN % 30 + "time.sleep(4)\nopen('through', 'w').close()\nmark('parked', reason='steps')\ntime.sleep(60)"
    )
    assert seen.ending.how == "steps"
    assert (run.folder / "through").exists()
    assert 4 < time.monotonic() - began < 20
    assert "passing the end of the epoch" in run.progress.phases


def test_it_is_ended_after_its_budget(run: Run) -> None:
    seen = run(BEGUN % 0.5 + "time.sleep(60)\nopen('through', 'w').close()")
    assert seen.ending.how == "steps"
    assert seen.returncode is None
    assert not (run.folder / "through").exists()


def test_the_time_limit_of_the_steps_is_not_its_own(run: Run) -> None:
    seen = run(BEGUN % 30 + "time.sleep(2)\nmark('parked', reason='steps')\ntime.sleep(60)", timeout_s=1.0)
    assert seen.ending.how == "steps"


@pytest.mark.parametrize(
    ("how", "status"),
    [("raise ValueError('too few')", 1), ("sys.exit(4)", 4), ("os._exit(5)", 5), ("os.kill(os.getpid(), 9)", -9)],
)
def test_a_program_that_dies_in_it(run: Run, how: str, status: int) -> None:
    seen = run(BEGUN % 30 + how)
    assert (seen.ending.how, seen.ending.exit_code, seen.ending.signal, seen.ending.error) == (
        "steps",
        None,
        None,
        None,
    )
    assert seen.returncode == status
    assert not seen.hint


def test_all_ranks_are_waited_for(run: Run) -> None:
    seen = run(
        """
        children = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                os.environ["RANK"] = str(rank)
                steps(3, park=False, rank=rank)
                mark("boundary", budget_s=30)
                time.sleep(2 * rank)
                open("through-%d" % rank, "w").close()
                mark("parked", reason="steps", rank=rank)
                time.sleep(60)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        """
    )
    assert seen.ending.how == "steps"
    assert (run.folder / "through-1").exists()


def test_one_rank_waits_in_vain_for_another(run: Run) -> None:
    """A rank that parks leaves the others in a collective call: they are ended when their time is over."""
    began = time.monotonic()
    seen = run(
        """
        if os.fork() == 0:
            steps(3, park=False, rank=1)
            mark("boundary", budget_s=1)
            time.sleep(60)
        steps(3, park=False, rank=0)
        mark("boundary", budget_s=1)
        mark("parked", reason="steps", rank=0)
        time.sleep(60)
        """
    )
    assert seen.ending.how == "steps"
    assert time.monotonic() - began < 20


def test_ctrl_c_in_it_is_still_an_interruption(run: Run) -> None:
    """Whoever starts the training after the check must not be told that all is well."""
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert run(BEGUN % 30 + "time.sleep(60)").ending.how == "interrupted"


def test_a_boundary_without_an_end_of_its_own(run: Run) -> None:
    code = BEGUN % 0.5 + (
        "with open(os.path.join(_stream, '%d.jsonl' % os.getpid()), 'a') as f:\n"
        "    f.write(json.dumps(['boundary', {'began': True, 'time': time.time(), 'loader': 0}]) + '\\n')\n"
        "time.sleep(60)"
    )
    found = []
    folder = run.run_folder.path
    original = run.run_folder.close
    run.run_folder.close = lambda: (found.append(assemble(folder)), original())[1]  # type: ignore[method-assign]
    run(code)
    boundary = found[0].boundary
    assert boundary is not None
    assert boundary.outcome == "timeout"
