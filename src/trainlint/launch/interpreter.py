"""Which Python runs the program: the one a shell would have taken, never trainlint's own by accident."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainlint.launch.model import LaunchError

_PYTHON = re.compile(r"^python(\d+(\.\d+)*)?$")
_SHEBANG = re.compile(rb"^#!\s*(\S+)(?:[ \t]+(\S+))?")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)


@dataclass(frozen=True)
class Resolved:
    """A command whose first word is an existing executable."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    interpreter: str | None = None
    notes: tuple[str, ...] = ()


def is_python(word: str) -> bool:
    """Whether a command's first word is a Python interpreter."""
    return _PYTHON.match(os.path.basename(word)) is not None


def resolve_command(
    words: Sequence[str], cwd: Path, python: str | None, env: Mapping[str, str] | None = None
) -> Resolved:
    """Find the executable of a command as a shell in ``cwd`` would.

    ``python`` (``--python``) acts like an activated environment: it replaces ``python`` in the command, and the scripts
    beside it are found first. Without it, an environment of the project (``$VIRTUAL_ENV``, ``.venv``) is used only for
    what PATH does not have. Leading ``NAME=value`` words are environment variables.

    Raises:
        LaunchError: there is no such executable.
    """
    env = os.environ if env is None else env
    words = list(words)
    added: dict[str, str] = {}
    while words and (assignment := _ASSIGNMENT.match(words[0])):
        added[assignment[1]] = assignment[2]
        words.pop(0)
    if not words:
        raise LaunchError("The command to start is empty.", "Give it behind --, e.g. `-- python train.py`.")
    path = added.get("PATH", env.get("PATH", os.defpath))
    notes: list[str] = []
    first = words[0]
    if python is not None:
        chosen = find_python(python, cwd, env)
        folder = os.path.dirname(chosen)
        added["PATH"] = folder
        if is_python(first):
            words[0] = chosen
            return Resolved(tuple(words), added, chosen, ())
        path = folder + os.pathsep + path
    found = _which(first, cwd, path)
    if found is None:
        for place in project_environments(cwd, env):
            found = _which(first, cwd, str(place)) if os.sep not in first else None
            if found is not None:
                # The rest of the command (a launcher that calls `python`) must find the same environment.
                added.setdefault("PATH", str(place))
                notes.append(f"{first} is not on PATH; taken from {place}.")
                break
    if found is None:
        raise _not_found(first, cwd, path)
    words[0] = first if os.sep in first and not os.path.isabs(first) else found
    return Resolved(tuple(words), added, interpreter_of(found, path), tuple(notes))


def _which(name: str, cwd: Path, path: str) -> str | None:
    if os.sep in name:
        candidate = os.path.join(cwd, name)
        return os.path.abspath(candidate) if os.path.isfile(candidate) and os.access(candidate, os.X_OK) else None
    found = shutil.which(name, path=path)
    return os.path.abspath(found) if found else None


def _not_found(name: str, cwd: Path, path: str) -> LaunchError:
    target = cwd / name
    if target.is_dir():
        return LaunchError(f"{name} is a folder, not a program.", "Give the command that starts training behind --.")
    if target.is_file():
        if target.suffix == ".py":
            return LaunchError(f"{name} is not executable.", f"Put the interpreter before it: -- python {name} …")
        if os.sep in name or not shutil.which(name, path=path):
            return LaunchError(f"{name} is not executable.", f"Start it with its interpreter, e.g. -- bash {name} …")
    names: set[str] = set()
    for folder in path.split(os.pathsep):
        try:
            names.update(entry for entry in os.listdir(folder or ".") if entry[:1] == name[:1])
        except OSError:
            continue
    if is_python(name) and (others := sorted(n for n in names if is_python(n))):
        return LaunchError(f"There is no {name} on PATH.", f"Use {others[0]}, or give the interpreter with --python.")
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.8)
    meant = f" Did you mean {near[0]}?" if near else ""
    return LaunchError(
        f"Command not found: {name}.{meant}",
        "Is its environment active? `--python /path/to/venv/bin/python` uses an environment without activating it.",
    )


def find_python(python: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """The interpreter that ``--python`` names: a file, an environment's folder, or a name on PATH.

    Raises:
        LaunchError: there is none.
    """
    env = os.environ if env is None else env
    expanded = os.path.expanduser(python)
    as_path = os.path.join(cwd, expanded)
    if os.path.isdir(as_path):
        for name in ("bin/python", "bin/python3"):
            if os.access(os.path.join(as_path, name), os.X_OK):
                return os.path.abspath(os.path.join(as_path, name))
    found = _which(expanded, cwd, env.get("PATH", os.defpath))
    if found is None and os.path.isfile(as_path) and os.access(as_path, os.X_OK):
        found = os.path.abspath(as_path)
    if found is None:
        raise LaunchError(
            f"No Python interpreter at {python}.", "--python takes an interpreter or the folder of an environment."
        )
    return found


def project_environments(start: Path, env: Mapping[str, str] | None = None) -> list[Path]:
    """The ``bin`` folders of environments that belong to the project: the active one, then ``.venv`` upwards.

    conda comes last: its base environment is active in every shell, whatever the project.
    """
    env = os.environ if env is None else env
    folders = [Path(env["VIRTUAL_ENV"]) / "bin"] if env.get("VIRTUAL_ENV") else []
    for folder in (start, *start.parents):
        for name in (".venv", "venv"):
            if (folder / name / "pyvenv.cfg").is_file():
                folders.append(folder / name / "bin")
        if (folder / ".git").exists() or (folder / "pyproject.toml").is_file():
            break
    if env.get("CONDA_PREFIX"):
        folders.append(Path(env["CONDA_PREFIX"]) / "bin")
    return [folder for folder in folders if folder.is_dir()]


def default_python(start: Path, python: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """The interpreter for a program that trainlint itself puts together (routes 2 and 5).

    ``--python``, the active environment, the project's ``.venv``, trainlint's own when torch is in it, ``python3``.
    """
    env = os.environ if env is None else env
    if python is not None:
        return find_python(python, start, env)
    for folder in project_environments(start, env):
        for name in ("python", "python3"):
            if os.access(folder / name, os.X_OK):
                return str(folder / name)
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    path = env.get("PATH")
    return shutil.which("python3", path=path) or shutil.which("python", path=path) or sys.executable


def interpreter_of(executable: str, path: str) -> str | None:
    """The Python behind an executable: itself, or what a script's first line names; ``None`` when it is no Python."""
    if is_python(executable):
        return executable
    try:
        with open(executable, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    match = _SHEBANG.match(head)
    if match is None:
        return None
    named = os.fsdecode(match[1])
    if os.path.basename(named) == "env" and match[2]:
        named = os.fsdecode(match[2])
        found = shutil.which(named, path=path) if is_python(named) else None
        return os.path.abspath(found) if found else None
    if is_python(named):
        return named
    if os.path.basename(named) == "sh":
        # Long paths: `#!/bin/sh` and then `'''exec' /path/to/python "$0" "$@"`.
        second = re.search(rb"exec'?\s+\"?([^\s\"]*python[\d.]*)\"?", head)
        return os.fsdecode(second[1]) if second else None
    return None
