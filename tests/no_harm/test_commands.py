"""Commands that the program starts: ``rm`` and the like are undone, uploads do not happen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_acts import furnish
from watching import World, snapshot

COMMANDS = {
    "rm -rf out a.txt": "rm -rf out a.txt && test ! -e out && test ! -e a.txt",
    "rm then make": "rm -r out; mkdir -p out/x; cp a.txt out/x/; rm -r out",
    "mv file over": "mv a.txt b && test ! -e a.txt",
    "mv into directory": "mv a.txt b out/ && test -e out/a.txt",
    "mv -t": "mv -t out a.txt",
    "mv directory": "mv out moved && rm -r moved/sub",
    "cp over": "cp a.txt b && cmp a.txt b",
    "cp -n leaves": "cp -n a.txt b && grep -q other b",
    "cp -r": "cp -r out copy && cp -r package/. out && test -e out/module.py",
    "cp through a link": "cp b link && cmp a.txt b",
    "truncate": "truncate -s 0 out/ckpt.pt && test ! -s out/ckpt.pt",
    "tee": "echo x | tee a.txt > /dev/null; echo y | tee -a b > /dev/null; grep -q other b",
    "touch and mkdir": "touch a.txt new.txt; mkdir -p q/r/s; touch q/r/s/t",
    "ln": "ln -s a.txt soft; ln a.txt hard; ln -sf b link",
    "rmdir and unlink": "rmdir out/sub/deep; unlink a.txt",
    "sed -i": "sed -i s/original/changed/ a.txt && grep -q changed a.txt",
    "chmod -R": "chmod -R 700 out",
    "find -exec": "find out -type f -exec rm {} +",
    "xargs": "ls out/ckpt.pt | xargs rm",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_shell(world: World, name: str) -> None:
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(f"import subprocess; subprocess.run({COMMANDS[name]!r}, shell=True, check=True)")
    assert outcome.code == 0, outcome.err
    result = world.close()
    assert result.problems == ()
    assert snapshot(world.project) == before


@pytest.mark.parametrize(
    "call",
    [
        "subprocess.run(['/bin/rm', '-rf', 'out'], check=True)",
        "subprocess.run(['rm', '-rf', 'out'], check=True, env={'PATH': '/usr/bin:/bin'})",
        "subprocess.run(['rm', '-rf', 'sub'], cwd='out', check=True)",
        "os.system('rm -rf out')",
        "os.spawnv(os.P_WAIT, '/bin/rm', ['rm', '-rf', 'out'])",
        "os.waitpid(os.posix_spawn('/bin/rm', ['rm', '-rf', 'out'], os.environ), 0)",
        "subprocess.run([pathlib.Path('/bin/mv'), 'a.txt', 'out'], check=True)",
    ],
)
def test_from_python(world: World, call: str) -> None:
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(
        f"import os, pathlib, subprocess\n{call}\nassert not (os.path.exists('out/sub') and os.path.exists('a.txt'))"
    )
    assert outcome.code == 0, outcome.err
    assert world.prevented()
    assert world.close().problems == ()
    assert snapshot(world.project) == before


def fake(folder: Path, name: str) -> None:
    """A command that leaves a trace when it is really run."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/ran-{name}\n')
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("aws s3 cp a.txt s3://bucket/a", False),
        ("aws s3 sync s3://bucket/a .", True),
        ("aws s3 rm s3://bucket/a", False),
        ("gsutil -m cp -r out gs://bucket", False),
        ("gsutil cp gs://bucket/a .", True),
        ("scp a.txt host:/b", False),
        ("scp host:/b .", True),
        ("rclone copy out remote:out", False),
        ("hf upload me/model out", False),
        ("hf download me/model", True),
        ("huggingface-cli upload me/model out", False),
        ("wandb sync wandb/run", False),
        ("git push origin main", False),
        ("git -C . commit -am x", False),
        ("git rev-parse HEAD", True),
        ("git stash list", True),
        ("git stash", False),
        ("dvc push", False),
        ("rsync -a out/ host:/out", False),
        ("rsync -a host:/out/ out", True),
    ],
)
def test_uploads(world: World, tmp_path: Path, command: str, runs: bool) -> None:
    furnish(world)
    name = command.split()[0]
    fake(tmp_path / "bin", name)
    path = os.pathsep.join([str(world.run.shims), str(tmp_path / "bin"), os.environ["PATH"]])
    outcome = world.watch(f"import subprocess; subprocess.run({command.split()!r}, check=True)", PATH=path)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "bin" / f"ran-{name}").exists() == runs
    assert (("upload", command) in world.prevented()) == (not runs)


def test_upload_by_absolute_path_is_refused(world: World, tmp_path: Path) -> None:
    fake(tmp_path / "bin", "aws")
    outcome = world.watch(
        f"""
        import subprocess
        try:
            subprocess.run([{str(tmp_path / "bin/aws")!r}, "s3", "cp", "x", "s3://bucket"])
        except PermissionError:
            print("refused")
        """
    )
    assert outcome.out == "refused\n", outcome.err
    assert not (tmp_path / "bin/ran-aws").exists()
