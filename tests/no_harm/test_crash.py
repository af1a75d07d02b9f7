"""Killed programs, dead supervisors, several processes, interrupted undoing: still nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_acts import furnish
from watching import World, snapshot

from trainlint.launch import undo
from trainlint.launch.journal import recover_abandoned

HARM = """
import os, shutil
open('a.txt', 'w').write('x')
open('b', 'a').write('x')
shutil.rmtree('out')
os.makedirs('out')
open('out/ckpt.pt', 'w').write('new')
os.rename('package', 'renamed')
os.remove('renamed/module.py')
"""


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def test_killed_in_the_middle(world: World) -> None:
    furnish(world)
    before = snapshot(world.project)
    child = world.start(HARM + "open('ready', 'w').close()\nimport time; time.sleep(60)")
    wait_for(world.project / "ready")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert world.close().problems == ()
    assert snapshot(world.project) == before


@pytest.mark.parametrize("point", ["write", "link", "rename", "mkdir"])
def test_killed_inside_the_guard(world: World, point: str) -> None:
    """The process dies just before or after any single step of the guard, and another goes on harming."""
    furnish(world)
    before = snapshot(world.project)
    for when in ("before", "after"):
        for nth in range(1, 5):
            world.watch(
                f"""
                import os, signal, sys
                name = {point!r}
                files = sys.modules['_trainlint_recorder.files']
                real = getattr(os, name)
                left = [{nth}]
                def dying(*args, **kwargs):
                    import _thread
                    inside = _thread.get_ident() in files._busy
                    if inside:
                        left[0] -= 1
                    if inside and left[0] == 0 and {when!r} == 'before':
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = real(*args, **kwargs)
                    if inside and left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result
                setattr(os, name, dying)
                import shutil
                if not os.path.exists('out'): os.makedirs('out')
                for path in ('a.txt', 'b', 'out/ckpt.pt'):
                    open(path, 'w').write('x')
                    os.remove(path)
                shutil.rmtree('out')
                """
            )
    outcome = world.watch("import shutil, os\nopen('a.txt', 'w').write('z'); shutil.rmtree('out', ignore_errors=True)")
    assert outcome.code == 0, outcome.err
    assert world.close().problems == ()
    assert snapshot(world.project) == before


def test_supervisor_dies(world: World, tmp_path: Path) -> None:
    """The next start restores what a dead supervisor left, and ends a program that still runs."""
    furnish(world)
    before = snapshot(world.project)
    script = tmp_path / "supervisor.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, subprocess, sys
            from pathlib import Path
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            from watching import environment
            from trainlint.launch.journal import RunFolder
            run = RunFolder(Path({str(world.state)!r}))
            program = Path({str(tmp_path / "program.py")!r})
            program.write_text({HARM!r} + "open('ready', 'w').close()\\nimport time; time.sleep(60)")
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            subprocess.Popen([sys.executable, str(program)], cwd={str(world.project)!r}, env=environment(run), **quiet)
            while not os.path.exists({str(world.project / "ready")!r}): pass
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert snapshot(world.project) != before
    results = recover_abandoned(world.state)
    assert [r.problems for r in results] == [()]
    assert results[0].restored > 0
    assert snapshot(world.project) == before
    assert recover_abandoned(world.state) == []
    assert os.listdir(world.state / "runs") == [world.run.run_id]  # a run with a living supervisor is left alone


def test_restoring_twice_and_interrupted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The undoing dies at every one of its steps in turn and is run again from the start."""
    furnish(world)
    before = snapshot(world.project)
    assert world.watch(HARM).code == 0

    class Dies(BaseException):
        pass

    def dying(real, left, after):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Dies
            result = real(*args, **kwargs)
            if left[0] == 0:
                raise Dies
            return result

        return call

    interrupted = 0
    for name in ("rename", "unlink", "rmdir", "utime", "fsync"):
        for nth in (1, 2, 1):
            with monkeypatch.context() as patch:
                patch.setattr(undo.os, name, dying(getattr(os, name), [nth], nth == 2))
                try:
                    undo.Undoing(str(world.run.path), world.run.started_ns).run()
                except Dies:
                    interrupted += 1
    assert interrupted >= 5
    assert world.close().problems == ()
    assert snapshot(world.project) == before
    assert world.run.restore().problems == ()


def test_torn_journal_line(world: World) -> None:
    furnish(world)
    before = snapshot(world.project)
    assert world.watch("open('a.txt', 'w').write('x')").code == 0
    with open(world.run.path / "journal.jsonl", "ab") as journal:
        journal.write(b'{"op":"keep","path":"/no')
    assert world.close().problems == ()
    assert snapshot(world.project) == before


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_cooperate(world: World, method: str) -> None:
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(
        f"""
        import multiprocessing as mp, os, shutil, sys

        def worker(rank, barrier):
            open(f"worker-{{rank}}", "w").write("x")
            with open("a.txt", "w") as f:
                f.write("y")
            barrier.wait(60)
            try:
                os.remove("b")
            except FileNotFoundError:
                pass
            if rank == 0:
                shutil.rmtree("out")
                os.makedirs("out")
            barrier.wait(60)
            open(f"out/rank-{{rank}}.pt", "w").write("w")
            open("out/ckpt.pt", "w").write("w")
            barrier.wait(60)
            os.remove(f"out/rank-{{rank}}.pt")

        if __name__ == "__main__":
            context = mp.get_context({method!r})
            barrier = context.Barrier(4)
            open("a.txt", "a").write("before the fork")
            children = [context.Process(target=worker, args=(r, barrier)) for r in range(4)]
            for c in children: c.start()
            for c in children: c.join()
            assert [c.exitcode for c in children] == [0] * 4
            assert os.listdir("out") == ["ckpt.pt"]
            shutil.rmtree("out")
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.problems() == []
    assert world.close().problems == ()
    assert snapshot(world.project) == before


def test_nothing_older_than_the_run_is_removed(world: World) -> None:
    """A journal that claims an old file as made by the run is not believed."""
    furnish(world)
    time.sleep(0.1)
    late = World.__new__(World)
    late.__dict__.update(world.__dict__)
    from trainlint.launch.journal import RunFolder

    late.run = RunFolder(world.state)
    before = snapshot(world.project)
    with open(late.run.path / "journal.jsonl", "a") as journal:
        for path in ("a.txt", "out"):
            journal.write(json.dumps({"op": "create", "path": str(world.project / path), "kind": "f"}) + "\n")
    result = late.close()
    assert len(result.problems) >= 2
    assert snapshot(world.project) == before


def test_original_moved_by_an_unguarded_program_survives(world: World) -> None:
    """A tree of the run is removed, but not the old file that something unseen moved into it."""
    furnish(world)
    time.sleep(0.1)
    from trainlint.launch.journal import RunFolder

    world.run.close()
    world.run = RunFolder(world.state)
    outcome = world.watch(
        """
        import ctypes, os
        os.makedirs("new/deep")
        open("new/deep/x", "w").close()
        assert ctypes.CDLL(None).rename(b"a.txt", b"new/deep/a.txt") == 0
        """
    )
    assert outcome.code == 0, outcome.err
    result = world.close()
    assert (world.project / "new/deep/a.txt").read_text() == "original"
    assert not (world.project / "new/deep/x").exists()
    assert any("new/deep/a.txt" in p for p in result.problems)


def test_an_escaped_process_is_refused_after_the_end(world: World) -> None:
    furnish(world)
    before = snapshot(world.project)
    child = world.start(
        """
        import os, sys, time
        open('a.txt', 'a').write('x')
        open('ready', 'w').close()
        while os.path.exists('ready'): time.sleep(0.01)
        try:
            os.remove('b')
        except PermissionError as error:
            print(error)
        """
    )
    wait_for(world.project / "ready")
    assert world.close().problems == ()
    out, err = child.communicate(timeout=60)
    assert "the watch is over" in out, err
    assert snapshot(world.project) == before
