"""Random programs: the guarded one sees exactly what the unguarded one sees, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from watching import World, snapshot

#: Does random things to files and prints the outcome of each, and the whole tree again and again.
PROGRAM = """
import errno, json, os, random, shutil, sys
rng = random.Random(int(sys.argv[1]))
names = ["a", "b", "c", "n", "d", "n/a", "d/a", "d/b", "d/e/a", "d/e", "d", "n", "n/a", "n/m", "n/m/a",
         "l", "l/a", "x/y", "x"]

def write(p): open(p, "w").write(f"w{rng.random()}")
def append(p): open(p, "a").write(f"a{rng.random()}")
def update(p):
    with open(p, "r+") as f:
        f.seek(2); f.write("U")
def appcut(p):
    with open(p, "a+") as f:
        f.truncate(1)
def exclusive(p): open(p, "x").write("x")
def read(p): return open(p).read()
def remove(p): os.remove(p)
def rmdir(p): os.rmdir(p)
def rmtree(p): shutil.rmtree(p)
def mkdir(p): os.mkdir(p)
def makedirs(p): os.makedirs(p, exist_ok=True)
def rename(p): os.rename(p, rng.choice(names))
def replace(p): os.replace(p, rng.choice(names))
def inside(q, p):  # then what is seen depends on the order of directory entries
    return os.path.realpath(q).startswith(os.path.realpath(p) + "/")
def move(p):
    q = rng.choice(names)
    if not inside(q, p): shutil.move(p, q)
def copy(p): shutil.copy(p, rng.choice(names))
def copytree(p):
    q = rng.choice(names)
    if not inside(q, p): shutil.copytree(p, q, symlinks=True)
def truncate(p): os.truncate(p, rng.choice([0, 3]))
def chmod(p): os.chmod(p, rng.choice([0o700, 0o755]) if os.path.isdir(p) else rng.choice([0o600, 0o644]))
def symlink(p): os.symlink(rng.choice(["a", "d", "nowhere"]), p)
def utime(p): os.utime(p, (5, 5))
def touch(p): open(p, "ab").close()
def creat(p): os.close(os.open(p, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
def dirfd(p):
    d = os.open(os.path.dirname(p) or ".", os.O_RDONLY)
    try:
        os.unlink(os.path.basename(p), dir_fd=d)
    finally:
        os.close(d)
def shell(p): return os.system(f"rm -rf {p} 2>/dev/null")
def shellmv(p): return os.system(f"mv -f {p} {rng.choice(names)} 2>/dev/null")

acts = [write, append, update, appcut, exclusive, read, remove, rmdir, rmtree, mkdir, makedirs, rename, replace, move,
        copy, copytree, truncate, chmod, symlink, utime, touch, creat, dirfd]
if len(sys.argv) > 3:
    acts += [shell, shellmv]

def tree():
    found = []
    for folder, directories, files in os.walk("."):
        directories.sort()
        for name in sorted(directories + files):
            p = os.path.join(folder, name)
            st = os.lstat(p)
            if os.path.islink(p): what = os.readlink(p)
            elif os.path.isfile(p): what = open(p).read()
            else: what = "dir"
            found.append([p, oct(st.st_mode), what])
    return sorted(found)

for step in range(int(sys.argv[2])):
    act, path = rng.choice(acts), rng.choice(names)
    try:
        result = act(path)
    except OSError as error:
        result = errno.errorcode.get(error.errno, type(error).__name__)
    except (shutil.Error, RecursionError) as error:
        result = type(error).__name__
    print(json.dumps([act.__name__, path, result, tree()]))
"""


def furnish(root: Path) -> None:
    (root / "d/e").mkdir(parents=True)
    for name in ("a", "b", "d/a", "d/b", "d/e/a"):
        (root / name).write_text(f"original {name}")
        (root / name).chmod(0o644)
    (root / "c").write_text("")
    (root / "l").symlink_to("d")


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRAINLINT_RANDOM_PROGRAMS", "12"))))
def test_random_program(world: World, tmp_path: Path, seed: int) -> None:
    steps, extra = ("60", []) if seed % 3 else ("25", ["shell"])
    furnish(world.project)
    free = tmp_path / "free"
    free.mkdir()
    furnish(free)
    source = tmp_path / "program.py"
    source.write_text(PROGRAM)
    plain = subprocess.run(
        [sys.executable, str(source), str(seed), steps, *extra], cwd=free, capture_output=True, text=True, timeout=120
    )
    assert plain.returncode == 0, plain.stderr
    before = snapshot(world.project)
    watched = world.watch(
        f"import sys; sys.argv[1:] = {[str(seed), steps, *extra]!r}\n"
        f"exec(compile(open({str(source)!r}).read(), 'p', 'exec'))"
    )
    assert watched.code == 0, watched.err
    assert world.problems() == []
    for ours, theirs in zip(watched.out.splitlines(), plain.stdout.splitlines(), strict=True):
        assert json.loads(ours) == json.loads(theirs)
    if random.Random(seed).random() < 0.5:
        shutil.copytree(world.run.path, tmp_path / "copy", symlinks=True)  # looking at the folder changes nothing
    assert world.close().problems == ()
    assert snapshot(world.project) == before
