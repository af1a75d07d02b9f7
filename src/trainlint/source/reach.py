"""Which files a program consists of, found without running it: its script, and what that imports of its own project."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainlint.source.project import Project

#: Files followed from a script, and files of a project looked at when no script is known.
_MOST_FILES = 1500
#: Folders looked into when no script is known.
_MOST_FOLDERS = 2000
#: Folders that hold no code of the project's own.
_NOT_OWN = frozenset(
    ("node_modules", "site-packages", "dist-packages", "venv", "env", "build", "dist", "outputs", "wandb", "mlruns",
     "lightning_logs", "tests", "test", "docs")
)  # fmt: skip


def scripts_of(words: Sequence[str], cwd: str | os.PathLike[str]) -> tuple[str, ...]:
    """The Python file that a command runs (``python a.py``, ``torchrun a.py``, ``python -m a.b``), when it names one.

    An entry function (``module:function``) counts as its module.
    """
    base = os.path.abspath(cwd)
    for i, word in enumerate(words):
        if i and words[i - 1] == "-m":
            found = _module_file(word, base)
            if found is not None:
                return (found,)
        module, colon, function = word.partition(":")
        if colon and function.isidentifier():
            found = os.path.join(base, module) if module.endswith(".py") else _module_file(module, base)
            if found is not None and os.path.isfile(found):
                return (os.path.abspath(found),)
        if word.endswith(".py") and os.path.isfile(os.path.join(base, word)) and "trainlint" not in Path(word).parts:
            return (os.path.abspath(os.path.join(base, word)),)
    return ()


def _module_file(dotted: str, base: str) -> str | None:
    parts = dotted.split(".")
    for folder in (base, os.path.join(base, "src")):
        path = os.path.join(folder, *parts)
        for file in (f"{path}.py", os.path.join(path, "__main__.py")):
            if os.path.isfile(file):
                return os.path.abspath(file)
    return None


def imported_files(scripts: Iterable[str], project: Project) -> tuple[str, ...]:
    """The scripts and every file of their project that they import, directly or not, in the order they are met."""
    found: dict[str, None] = {}
    queue = [os.path.abspath(s) for s in scripts]
    while queue and len(found) < _MOST_FILES:
        file = queue.pop(0)
        module = project.module(file) if file not in found else None
        if module is None:
            continue
        found[file] = None
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                names = [(alias.name, 0) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                stem = node.module or ""
                names = [(stem, node.level)] if stem or node.level else []
                names += [(f"{stem}.{a.name}" if stem else a.name, node.level) for a in node.names if a.name != "*"]
            else:
                continue
            for dotted, level in names:
                target = project.resolve(dotted, file, level)
                if target is not None and target not in found:
                    queue.append(target)
    return tuple(found)


def project_files(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The project's own Python files below a folder; hidden folders, environments, tests and outputs are left out."""
    out: list[str] = []
    for seen, (here, folders, files) in enumerate(os.walk(os.path.abspath(folder))):
        folders[:] = sorted(
            f
            for f in folders
            if f not in _NOT_OWN
            and not f.startswith((".", "__"))
            and not os.path.exists(os.path.join(here, f, "pyvenv.cfg"))
        )
        out += [os.path.join(here, f) for f in sorted(files) if f.endswith(".py")]
        if len(out) >= _MOST_FILES or seen >= _MOST_FOLDERS:
            break
    return tuple(out[:_MOST_FILES])
