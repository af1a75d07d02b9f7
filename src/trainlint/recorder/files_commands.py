"""Commands that a watched program starts: what they would do to files is made undoable, what would upload is not done.

``DESTRUCTIVE`` commands are read as their manual pages say and then run for real. Uploads, and git commands that change
a repository that existed before, cannot be undone and are prevented.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from .files_guard import Guard
from .files_keep import Refused, canonical, lstat

#: Files of one copied tree that are looked at one by one; beyond that the command is refused.
TREE_CAP = 50_000

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_UPDATE = os.O_RDWR | os.O_CREAT

At = Callable[[str], "str | None"]


def before(guard: Guard, executable: Any, argv: Sequence[Any] | None, cwd: Any, env: Any) -> None:
    """Called before a command starts (``subprocess``, ``os.exec``, ``os.posix_spawn``).

    Raises:
        Refused: it would upload, and no stand-in on ``PATH`` will be found instead of it.
    """
    words = [os.fsdecode(a) for a in (argv or [executable]) if isinstance(a, (str, bytes, os.PathLike))]
    program = os.fsdecode(executable) if isinstance(executable, (str, bytes, os.PathLike)) else ""
    if not words:
        return
    name = os.path.basename(program or words[0])
    words[0] = name
    if name not in COMMANDS:
        return
    folder = os.getcwd() if cwd is None else os.fsdecode(cwd)
    upload = prevents(guard, words, folder)
    if upload and not _stands_in(guard, program or name, env):
        guard.report_upload(words)
        raise Refused(upload)
    if not upload:
        protect(guard, words, folder)


def _stands_in(guard: Guard, program: str, env: Any) -> bool:
    """Whether the command will be found in the supervisor's folder of stand-ins."""
    shims = os.path.join(guard.run_dir, "shims")
    if os.path.dirname(program):
        return os.path.realpath(os.path.dirname(program)) == shims
    environment: Any = os.environ if env is None else env
    path = environment.get("PATH") or (environment.get(b"PATH") if env is not None else "") or ""
    first = os.fsdecode(path).split(os.pathsep)[0]
    return bool(first) and os.path.realpath(first) == shims and os.path.exists(os.path.join(shims, program))


# --------------------------------------------------------------------------------------------- uploads

_REMOTE = ("s3://", "gs://", "az://", "hf://", "gcs://", "rsync://", "hdfs://")
_GIT_CHANGES = frozenset(
    """push commit add stash reset checkout switch restore clean merge rebase pull am apply cherry-pick revert rm mv
    gc""".split()
)


def prevents(guard: Guard, words: Sequence[str], cwd: str) -> str:
    """Why the command must not run at all; empty when it may."""
    name = words[0]
    plain = [w for w in words[1:] if not w.startswith("-")]
    if name == "git":
        return _git(guard, words, cwd)
    if name in ("aws", "gsutil", "gcloud", "s5cmd", "azcopy"):
        verbs = plain[:4]
        if {"rm", "mb", "rb", "delete", "remove", "put-object", "delete-object", "rsync-delete"} & set(verbs):
            return "it changes a remote store"
        moves = {"cp", "sync", "mv", "rsync", "copy", "mirror", "put"} & set(verbs)
        if moves and plain and (plain[-1].startswith(_REMOTE) or "put" in moves or "mv" in moves or _is_url(plain[-1])):
            return "it uploads to a remote store"
        return ""
    if name == "rclone":
        changes = {"copy", "sync", "move", "copyto", "moveto", "bisync"}
        if plain and plain[0] in changes and ":" in plain[-1]:
            return "it uploads to a remote store"
        gone = {"delete", "purge", "deletefile", "rmdir", "rmdirs", "mkdir", "rcat", "cleanup"}
        return "it changes a remote store" if plain and plain[0] in gone else ""
    if name in ("scp", "rsync"):
        return "it uploads to another machine" if plain and _is_remote(plain[-1]) else ""
    if name in ("hf", "huggingface-cli"):
        changes = {"upload", "upload-large-folder", "repo", "repos", "repo-files", "delete-cache", "discussions"}
        return "it changes a repository on the hub" if plain and plain[0] in changes else ""
    if name == "wandb":
        changes = {"sync", "artifact", "launch", "agent", "sweep", "job", "beta"}
        return "it writes to a tracking service" if plain and plain[0] in changes else ""
    if name == "dvc":
        changes = {"push", "commit", "add", "gc", "remove", "checkout", "move"}
        return "it changes the data store" if plain and plain[0] in changes else ""
    return ""


def _is_url(word: str) -> bool:
    return "://" in word


def _is_remote(word: str) -> bool:
    host, colon, _ = word.partition(":")
    return word.startswith("rsync://") or bool(colon) and "/" not in host


def _git(guard: Guard, words: Sequence[str], cwd: str) -> str:
    rest = list(words[1:])
    where = cwd
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in ("-C", "-c", "--git-dir", "--work-tree", "--namespace") and rest:
            value = rest.pop(0)
            where = os.path.join(where, value) if option == "-C" else where
    if not rest or rest[0] not in _GIT_CHANGES and rest[:2] != ["lfs", "push"]:
        return ""
    if rest[0] == "stash" and rest[1:2] and rest[1] in ("list", "show", "create"):
        return ""
    if rest[0] == "push" or rest[0] == "lfs":
        return "it uploads to a git remote"
    with guard.journal as state:
        if state.ours(os.path.realpath(where)):
            return ""
    return "it changes a git repository"


# --------------------------------------------------------------------------------------------- files


def protect(guard: Guard, words: Sequence[str], cwd: str) -> None:
    """Make undoable what the command is about to do to files."""
    reader = DESTRUCTIVE.get(words[0])
    if reader is None:
        return

    def at(path: str) -> str | None:
        return canonical(path if path.startswith("/") else os.path.join(cwd, path))

    reader(guard, words[1:], at)


def _split(words: Sequence[str], with_value: str = "") -> tuple[str, list[str], dict[str, str]]:
    """Short option letters, operands, and values of options. ``with_value``: letters and ``--long`` that take one."""
    short, operands, values = "", [], {}
    takes = with_value.split()
    todo = list(words)
    while todo:
        word = todo.pop(0)
        if word == "--":
            operands += todo
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values[name] = value if equals else (todo.pop(0) if name in takes and todo else "")
        elif word.startswith("-") and len(word) > 1:
            for i, letter in enumerate(word[1:], 2):
                short += letter
                if letter in takes:
                    values[letter] = word[i:] or (todo.pop(0) if todo else "")
                    break
        else:
            operands.append(word)
    return short, operands, values


def _rm(guard: Guard, words: Sequence[str], at: At) -> None:
    short, operands, values = _split(words)
    recursive = "r" in short or "R" in short or "--recursive" in values
    for operand in operands:
        path = at(operand)
        if path is None:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            if recursive:
                guard.rmtree(path)
                st = lstat(path)
                if st is not None:
                    _remove_each(guard, path)
            elif "d" in short or "--dir" in values:
                guard.rmdir(path)
        else:
            guard.remove(path)


def _remove_each(guard: Guard, path: str) -> None:
    """For a tree that could not be renamed away."""
    with guard.journal as state:
        if state.ours(path) and not state.holds_moved(path):
            return
    for folder, directories, names in os.walk(path, topdown=False):
        for name in names:
            guard.remove(os.path.join(folder, name))
        for name in directories:
            if os.path.islink(os.path.join(folder, name)):
                guard.remove(os.path.join(folder, name))
    for folder, _directories, _names in os.walk(path, topdown=False):
        guard.directory_goes(folder)


def _rmdir(guard: Guard, words: Sequence[str], at: At) -> None:
    for operand in _split(words)[1]:
        path = at(operand)
        if path is not None:
            guard.rmdir(path)


def _unlink(guard: Guard, words: Sequence[str], at: At) -> None:
    for operand in _split(words)[1]:
        path = at(operand)
        if path is not None:
            guard.remove(path)


def _pairs(operands: list[str], values: dict[str, str], short: str, at: At) -> list[tuple[str, str]]:
    """Source and final destination of each operand of ``mv``, ``cp``, ``ln``, ``install``."""
    target = values.get("t") or values.get("--target-directory")
    if target is None:
        if len(operands) < 2:
            return []
        target = operands.pop()
    into = os.path.isdir(at(target) or "") and "T" not in short and "--no-target-directory" not in values
    pairs = []
    for operand in operands:
        src, dst = at(operand), at(target)
        if src is not None and dst is not None:
            if into:
                dst = at(os.path.join(dst, os.path.basename(operand.rstrip("/"))))
            if dst is not None:
                pairs.append((src, dst))
    return pairs


def _mv(guard: Guard, words: Sequence[str], at: At) -> None:
    short, operands, values = _split(words, "t S --target-directory --suffix")
    for src, dst in _pairs(operands, values, short, at):
        st, parent = lstat(src), lstat(os.path.dirname(dst))
        if st is not None and parent is not None and st.st_dev != parent.st_dev:
            _copy_into(guard, src, dst)  # across file systems mv copies and deletes
            if os.path.isdir(src) and not os.path.islink(src):
                _remove_each(guard, src)
            else:
                guard.remove(src)
        else:
            guard.rename(src, dst)


def _cp(guard: Guard, words: Sequence[str], at: At) -> None:
    short, operands, values = _split(words, "t S --target-directory --suffix")
    links = "l" in short or "--link" in values
    for src, dst in _pairs(operands, values, short, at):
        _copy_into(guard, src, dst, links)


def _copy_into(guard: Guard, src: str, dst: str, links: bool = False) -> None:
    if not os.path.isdir(src):
        _overwrite(guard, src, dst, links)
        return
    guard.make(dst, "d")
    seen = 0
    for folder, directories, names in os.walk(src):
        there = os.path.normpath(os.path.join(dst, os.path.relpath(folder, src)))
        guard.note_directory(there)
        for name in names:
            seen += 1
            if seen > TREE_CAP:
                raise Refused(f"it copies more than {TREE_CAP} files")
            _overwrite(guard, os.path.join(folder, name), os.path.join(there, name), links)
        for name in directories:
            guard.make(os.path.join(there, name), "d")


def _overwrite(guard: Guard, src: str, dst: str, links: bool = False) -> None:
    if links:
        guard.link(os.path.realpath(src), dst)
    target = os.path.realpath(dst)
    st = lstat(dst)
    if st is not None and not stat.S_ISDIR(st.st_mode):
        guard.remove(dst)  # with --remove-destination or --force the name itself goes
    guard.open_write(target, _UPDATE)  # a copy, not an empty file: with --no-clobber or --update nothing is written


def _rsync(guard: Guard, words: Sequence[str], at: At) -> None:
    takes = "e f B T M --rsh --exclude --include --filter --files-from --exclude-from --include-from --temp-dir"
    _short, operands, values = _split(words, takes)
    if len(operands) < 2:
        return
    target = at(operands[-1])
    if target is None:
        return
    if os.path.isdir(target):
        for folder, _directories, names in os.walk(target):
            guard.note_directory(folder)
            for name in names:
                if len(names) > TREE_CAP:
                    raise Refused(f"it changes a folder of more than {TREE_CAP} files")
                guard.remove(os.path.join(folder, name))
    elif not os.path.lexists(target):
        guard.make(target, "d")
    for operand in operands[:-1]:
        src = None if _is_remote(operand) else at(operand)
        if src is not None:
            within = operand.endswith("/") or not os.path.isdir(target)
            _copy_into(guard, src, target if within else os.path.join(target, os.path.basename(src)))
    if "--remove-source-files" in values:
        raise Refused("it deletes its source files")


def _ln(guard: Guard, words: Sequence[str], at: At) -> None:
    short, operands, values = _split(words, "t S --target-directory --suffix")
    if len(operands) == 1 and "t" not in values:
        operands.append(".")
    symbolic = "s" in short or "--symbolic" in values
    for src, dst in _pairs(operands, values, short, at):
        if "f" in short or "--force" in values:
            guard.remove(dst)
        if symbolic:
            guard.make(dst)
        else:
            guard.link(os.path.realpath(src), dst)


def _opens(flags: int, with_value: str = "", append: str = "") -> Callable[[Guard, Sequence[str], At], None]:
    def reader(guard: Guard, words: Sequence[str], at: At) -> None:
        short, operands, values = _split(words, with_value)
        appends = bool(append) and (append in short or "--append" in values)
        for operand in operands:
            path = at(operand)
            if path is not None:
                guard.open_write(os.path.realpath(path), _APPEND if appends else flags)

    return reader


def _touch(guard: Guard, words: Sequence[str], at: At) -> None:
    for operand in _split(words, "d r t --date --reference")[1]:
        path = at(operand)
        if path is not None:
            guard.meta(os.path.realpath(path))
            guard.make(os.path.realpath(path))


def _mkdir(guard: Guard, words: Sequence[str], at: At) -> None:
    for operand in _split(words, "m --mode")[1]:
        path = at(operand)
        if path is not None:
            while not os.path.isdir(os.path.dirname(path)):
                path = os.path.dirname(path)
            guard.make(path, "d")


def _sed(guard: Guard, words: Sequence[str], at: At) -> None:
    if not any(w == "--in-place" or w.startswith("--in-place=") or _is_short(w, "i") for w in words):
        return
    for word in words:
        path = at(word)
        if path is not None and os.path.isfile(path):
            guard.remove(path)


def _is_short(word: str, letter: str) -> bool:
    return word.startswith("-") and not word.startswith("--") and letter in word


def _chmod(guard: Guard, words: Sequence[str], at: At) -> None:
    recursive = any(_is_short(w, "R") or w == "--recursive" for w in words)
    for operand in [w for w in words if not w.startswith("-")][1:]:
        path = at(operand)
        if path is None:
            continue
        path = os.path.realpath(path)
        guard.meta(path)
        if recursive and os.path.isdir(path):
            for folder, directories, names in os.walk(path):
                for name in directories + names:
                    guard.meta(os.path.join(folder, name))


DESTRUCTIVE: dict[str, Callable[[Guard, Sequence[str], At], None]] = {
    "rm": _rm,
    "rmdir": _rmdir,
    "unlink": _unlink,
    "mv": _mv,
    "cp": _cp,
    "install": _cp,
    "rsync": _rsync,
    "ln": _ln,
    "truncate": _opens(_UPDATE, "s r --size --reference"),
    "shred": _opens(_UPDATE, "n s --iterations --size"),
    "tee": _opens(_WRITE, "", "a"),
    "touch": _touch,
    "mkdir": _mkdir,
    "sed": _sed,
    "chmod": _chmod,
    "chown": _chmod,
}

UPLOADING = tuple("aws gsutil gcloud s5cmd azcopy rclone scp hf huggingface-cli wandb dvc git".split())

#: Every command that needs a stand-in on ``PATH``.
COMMANDS = frozenset(DESTRUCTIVE) | frozenset(UPLOADING)
