"""One act at a time: the program sees what it expects, and afterwards nothing has happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from watching import World, snapshot

#: name -> (program, acts reported). The project holds what :func:`furnish` puts there.
ACTS: dict[str, tuple[str, set[tuple[str, str]]]] = {
    "open w": (
        "open('a.txt', 'w').write('new'); assert open('a.txt').read() == 'new'",
        {("overwrite", "a.txt")},
    ),
    "open w twice": (
        "open('a.txt', 'w').write('1'); open('a.txt', 'w').write('2'); assert open('a.txt').read() == '2'",
        {("overwrite", "a.txt")},
    ),
    "open w without writing": (
        "open('a.txt', 'w').close(); assert open('a.txt').read() == ''",
        {("overwrite", "a.txt")},
    ),
    "open O_TRUNC without O_CREAT": (
        "import os; os.close(os.open('a.txt', os.O_WRONLY | os.O_TRUNC)); assert os.path.getsize('a.txt') == 0",
        {("overwrite", "a.txt")},
    ),
    "open w keeps the mode": (
        "import os; open('a.txt', 'w').close(); assert os.stat('a.txt').st_mode & 0o777 == 0o640",
        {("overwrite", "a.txt")},
    ),
    "append": (
        "open('a.txt', 'a').write('+'); assert open('a.txt').read() == 'original+'",
        {("append", "a.txt")},
    ),
    "append then truncate": (
        "f = open('a.txt', 'a+'); f.truncate(0); f.write('x'); f.close(); assert open('a.txt').read() == 'x'",
        {("append", "a.txt")},
    ),
    "r+": (
        "f = open('a.txt', 'r+'); f.write('O'); f.close(); assert open('a.txt').read() == 'Original'",
        {("overwrite", "a.txt")},
    ),
    "lock an empty file": (
        "import fcntl, os; s = os.stat('empty'); f = open('empty', 'r+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "assert os.stat('empty').st_ino == s.st_ino; f.write('pid')",
        set(),
    ),
    "truncate and lock an empty file": (
        "import fcntl, os; s = os.stat('empty'); f = os.open('empty', os.O_RDWR | os.O_CREAT | os.O_TRUNC);"
        "assert os.stat('empty').st_ino == s.st_ino; os.write(f, b'pid')",
        set(),
    ),
    "create": ("open('new.txt', 'w').write('x'); assert open('new.txt').read() == 'x'", set()),
    "exclusive create": ("open('new.txt', 'x').write('x')", set()),
    "exclusive create of what exists": (
        "try: open('a.txt', 'x')\nexcept FileExistsError: pass\nelse: raise SystemExit(3)",
        set(),
    ),
    "remove": (
        "import os; os.remove('a.txt'); assert not os.path.exists('a.txt')",
        {("delete", "a.txt")},
    ),
    "remove and make again": (
        "import os; os.remove('a.txt'); open('a.txt', 'x').write('new'); os.remove('a.txt'); open('a.txt', 'w')",
        {("delete", "a.txt")},
    ),
    "remove by bytes and Path": (
        "import os, pathlib; os.remove(b'a.txt'); pathlib.Path('out/ckpt.pt').unlink()",
        {("delete", "a.txt"), ("delete", "out/ckpt.pt")},
    ),
    "remove by dir_fd": (
        "import os; d = os.open('out', os.O_RDONLY); os.unlink('ckpt.pt', dir_fd=d); os.chdir('/');"
        "assert 'ckpt.pt' not in os.listdir(d)",
        {("delete", "out/ckpt.pt")},
    ),
    "open w by dir_fd": (
        "import os; d = os.open('out', os.O_RDONLY); os.chdir('/');"
        "os.write(os.open('ckpt.pt', os.O_WRONLY | os.O_TRUNC, dir_fd=d), b'x'); assert os.open in os.supports_dir_fd",
        {("overwrite", "out/ckpt.pt")},
    ),
    "open w through links": (
        "open('link', 'w').write('x'); open('dirlink/ckpt.pt', 'w').write('y');"
        "import os; assert os.path.islink('link'); assert open('a.txt').read() == 'x'",
        {("overwrite", "a.txt"), ("overwrite", "out/ckpt.pt")},
    ),
    "remove a link": ("import os; os.remove('link'); os.symlink('nowhere', 'link')", {("delete", "link")}),
    "rmtree": (
        "import shutil, os; shutil.rmtree('out'); assert not os.path.exists('out')",
        {("delete", "out")},
    ),
    "rmtree and fill again": (
        "import shutil, os; shutil.rmtree('out'); os.makedirs('out/deep'); open('out/ckpt.pt', 'w').write('new');"
        "shutil.rmtree('out'); os.makedirs('out'); open('out/ckpt.pt', 'w').write('newer');"
        "assert os.listdir('out') == ['ckpt.pt']",
        {("delete", "out")},
    ),
    "rmtree after adding": (
        "import shutil; open('out/new', 'w').close(); open('out/ckpt.pt', 'a').write('x'); shutil.rmtree('out')",
        {("delete", "out"), ("append", "out/ckpt.pt")},
    ),
    "delete a tree by hand": (
        "import os\nfor d, ds, fs in os.walk('out', topdown=False):\n"
        "    [os.remove(os.path.join(d, f)) for f in fs]; os.rmdir(d)\nassert not os.path.exists('out')",
        {("delete", p) for p in ("out", "out/sub", "out/sub/deep", "out/ckpt.pt", "out/sub/log.txt")},
    ),
    "rmdir": ("import os; os.rmdir('out/sub/deep')", {("delete", "out/sub/deep")}),
    "rmdir of a full one": (
        "import os\ntry: os.rmdir('out')\nexcept OSError: pass\nelse: raise SystemExit(3)",
        set(),
    ),
    "rename": (
        "import os; os.rename('a.txt', 'b.txt'); assert not os.path.exists('a.txt'); open('a.txt', 'w').write('x')",
        {("move", "a.txt")},
    ),
    "rename over": (
        "import os; os.replace('a.txt', 'out/ckpt.pt'); assert open('out/ckpt.pt').read() == 'original'",
        {("move", "a.txt"), ("overwrite", "out/ckpt.pt")},
    ),
    "write then replace": (
        "import os; open('t', 'w').write('new'); os.replace('t', 'a.txt'); assert open('a.txt').read() == 'new'",
        {("overwrite", "a.txt")},
    ),
    "rename a directory and work in it": (
        "import os, shutil; os.rename('out', 'old'); open('old/ckpt.pt', 'w').write('x'); os.makedirs('out');"
        "open('out/ckpt.pt', 'w').write('y'); os.remove('old/sub/log.txt'); shutil.rmtree('old')",
        {("move", "out"), ("overwrite", "old/ckpt.pt"), ("delete", "old/sub/log.txt"), ("delete", "old")},
    ),
    "move an original into something new": (
        "import os, shutil; os.makedirs('backup/x'); shutil.move('out', 'backup/x/out');"
        "os.rename('backup', 'backup2'); open('backup2/x/out/ckpt.pt', 'w').write('z'); shutil.rmtree('backup2')",
        {("move", "out"), ("move", "backup"), ("overwrite", "backup2/x/out/ckpt.pt"), ("delete", "backup2")},
    ),
    "move into the temporary folder": (
        "import shutil, tempfile; d = tempfile.mkdtemp(); shutil.move('out', d); shutil.rmtree(d)",
        {("move", "out")},
    ),
    "swap two files": (
        "import os; os.rename('a.txt', 't'); os.rename('b', 'a.txt'); os.rename('t', 'b');"
        "assert open('b').read() == 'original'",
        set(),
    ),
    "truncate": (
        "import os; os.truncate('a.txt', 3); assert open('a.txt').read() == 'ori'",
        {("overwrite", "a.txt")},
    ),
    "mkdir": ("import os; os.makedirs('n/e/w'); open('n/e/w/f', 'w').close(); os.mkdir('out/new')", set()),
    "symlink and link": (
        "import os; os.symlink('a.txt', 's'); os.link('a.txt', 'h'); open('h', 'w').write('x');"
        "open('s', 'a').write('y')",
        {("append", "a.txt")},
    ),
    "chmod and utime": (
        "import os; os.chmod('a.txt', 0o400); os.utime('a.txt'); os.chmod('out', 0o700); os.utime('out', (1, 1))",
        set(),
    ),
    "chmod away and remove": (
        "import os; os.chmod('a.txt', 0o200); os.remove('a.txt'); open('a.txt', 'w').close(); os.chmod('a.txt', 0o777)",
        {("delete", "a.txt")},
    ),
    "fifo and socket": (
        "import os, socket; os.mkfifo('fifo'); s = socket.socket(socket.AF_UNIX); s.bind('sock')",
        set(),
    ),
    "sqlite": (
        "import sqlite3; c = sqlite3.connect('db.sqlite'); c.execute('create table t (x)'); c.commit();"
        "c = sqlite3.connect('new.sqlite'); c.execute('create table t (x)'); c.commit()",
        {("overwrite", "db.sqlite")},
    ),
    "import leaves no pyc": ("import sys; sys.path.insert(0, '.'); import package.module", set()),
    "os.write to a path in a thread": (
        "import threading, os\ndef f(): open('a.txt', 'w').write('x'); os.remove('out/ckpt.pt')\n"
        "t = threading.Thread(target=f); t.start(); t.join()",
        {("overwrite", "a.txt"), ("delete", "out/ckpt.pt")},
    ),
    "tempfile": (
        "import tempfile; f = tempfile.NamedTemporaryFile(); g = tempfile.NamedTemporaryFile(dir='.', delete=False);"
        "d = tempfile.TemporaryDirectory()",
        set(),
    ),
    "devices": ("open('/dev/null', 'w').write('x'); open('/proc/self/comm', 'w').write('x')", set()),
    "missing things": (
        "import os, shutil\n"
        "for f in (os.remove, os.rmdir, shutil.rmtree, lambda p: os.rename(p, 'x'), lambda p: open(p, 'r+')):\n"
        "    try: f('nothing/here')\n    except FileNotFoundError: continue\n    raise SystemExit(3)",
        set(),
    ),
}


def furnish(world: World) -> None:
    world.file("a.txt")
    world.file("b", "other", 0o755)
    world.file("empty", "")
    world.file("out/ckpt.pt", b"\0weights" * 1000)
    world.file("out/sub/log.txt", "log\n")
    (world.project / "out/sub/deep").mkdir()
    (world.project / "link").symlink_to("a.txt")
    (world.project / "dirlink").symlink_to(world.project / "out")
    world.file("package/__init__.py", "")
    world.file("package/module.py", "x = 1\n")
    import sqlite3

    made = sqlite3.connect(world.project / "db.sqlite")
    made.execute("create table old (x)")
    made.commit()
    made.close()


@pytest.mark.parametrize("name", ACTS)
def test_undone(world: World, name: str) -> None:
    program, acts = ACTS[name]
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(program)
    assert outcome.code == 0, outcome.err
    assert world.problems() == []
    prevented = world.prevented()
    result = world.close()
    assert snapshot(world.project) == before
    assert result.problems == ()
    assert not world.run.path.exists()
    if acts:
        assert prevented == acts
    elif name != "swap two files":
        assert prevented == set()


def test_reports_the_line(world: World) -> None:
    import json

    furnish(world)
    world.watch("import os\n\ndef tidy():\n    os.remove('a.txt')\n\ntidy()\n")
    lines = [
        json.loads(line)
        for stream in (world.run.path / "stream").glob("*.jsonl")
        for line in stream.read_text().splitlines()
    ]
    at = [payload["at"] for tag, payload in lines if tag == "prevented"]
    assert [(Path(a["file"]).name.startswith("program-"), a["line"], a["function"]) for a in at] == [(True, 4, "tidy")]


def test_refused_when_it_cannot_be_kept(world: World) -> None:
    """The journal itself is never given up; the program gets an error it can handle."""
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(
        f"""
        import shutil
        try:
            shutil.rmtree({str(world.run.path)!r})
        except PermissionError as error:
            assert "trainlint" in str(error)
        """
    )
    assert outcome.code == 0, outcome.err
    world.close()
    assert snapshot(world.project) == before


def test_caches_keep_what_is_new_and_lose_nothing(world: World) -> None:
    cache = world.project.parent / "cache"
    cache.mkdir()
    (cache / "old").write_text("old")
    (cache / "refs").write_text("1")
    outcome = world.watch(
        f"""
        import os
        os.chdir({str(cache)!r})
        os.makedirs("models/x")
        open("models/x/weights.incomplete", "w").write("w")
        os.replace("models/x/weights.incomplete", "models/x/weights")
        open("new.tmp", "w").write("n")
        os.replace("new.tmp", "new")
        os.remove("old")
        open("refs", "w").write("2")
        """,
        HF_HOME=str(cache),
    )
    assert outcome.code == 0, outcome.err
    world.close()
    assert sorted(os.listdir(cache)) == ["models", "new", "old", "refs"]
    assert os.listdir(cache / "models/x") == ["weights"]
    assert (cache / "old").read_text() == "old"
    assert (cache / "refs").read_text() == "1"


def test_other_file_system(world: World) -> None:
    """What cannot be renamed into the run folder is kept on its own file system."""
    import shutil
    import tempfile

    if os.stat("/dev/shm").st_dev == os.stat(world.project).st_dev:
        pytest.fail("this machine has no second file system to test with")
    there = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (there / "out").mkdir()
        (there / "out/ckpt").write_text("weights")
        (there / "f").write_text("f")
        before, outside = snapshot(there), sorted(os.listdir("/dev/shm"))
        outcome = world.watch(
            f"""
            import os, shutil
            os.chdir({str(there)!r})
            shutil.rmtree("out"); os.makedirs("out"); open("out/ckpt", "w").write("x"); open("f", "w").write("y")
            shutil.move("f", {str(world.project / "f")!r})
            assert sorted(os.listdir(".")) == ["out"]
            """
        )
        assert outcome.code == 0, outcome.err
        assert world.close().problems == ()
        assert snapshot(there) == before
        assert sorted(os.listdir("/dev/shm")) == outside
        assert os.listdir(world.project) == []
    finally:
        shutil.rmtree(there)
