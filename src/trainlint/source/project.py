"""The files of a project as modules: which file an import means, what each file defines at its top level."""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterable
from functools import cached_property

from trainlint.config.mentions import SIZE_CAP, package_of

#: What marks the top folder of a project.
_ROOT_MARKS = (".git", "pyproject.toml", "setup.py", "setup.cfg")
#: How far above a file its project may begin.
_LEVELS = 6


class Module:
    """One source file, parsed when it is first needed."""

    def __init__(self, file: str, text: bytes) -> None:
        self.file = file
        self.text = text

    @cached_property
    def parsed(self) -> ast.Module | None:
        """The syntax tree; ``None`` when the file cannot be parsed."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.text, filename=self.file)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    @property
    def tree(self) -> ast.Module:
        """The syntax tree; an empty one when the file cannot be parsed."""
        return self.parsed or ast.Module(body=[], type_ignores=[])

    def has(self, *words: bytes) -> bool:
        return any(word in self.text for word in words)


class Project:
    """Finds and keeps the modules that a program's files import from their own project."""

    def __init__(self, search: Iterable[str] = ()) -> None:
        """``search``: further folders in which imports are looked for (the script's own)."""
        self._modules: dict[str, Module | None] = {}
        self._search = [os.path.abspath(s) for s in search]
        self._roots: dict[str, str] = {}
        self._found: dict[tuple[str, str, int], str | None] = {}

    def module(self, file: str) -> Module | None:
        """The module of a file; ``None`` when it cannot be read."""
        file = os.path.abspath(file)
        if file not in self._modules:
            self._modules[file] = _read(file)
        return self._modules[file]

    def resolve(self, dotted: str, importer: str, level: int = 0) -> str | None:
        """The project's file that ``import dotted`` in ``importer`` means; ``None`` for one from outside."""
        key = (dotted, os.path.dirname(importer), level)
        if key not in self._found:
            self._found[key] = self._resolve(*key)
        return self._found[key]

    def _resolve(self, dotted: str, folder: str, level: int) -> str | None:
        relative = dotted.split(".") if dotted else []
        if level:
            for _ in range(level - 1):
                folder = os.path.dirname(folder)
            return _file_of(folder, relative)
        if not relative:
            return None
        for base in self._bases(folder):
            found = _file_of(base, relative)
            if found is not None:
                return found
        return None

    def _bases(self, folder: str) -> list[str]:
        root = self._root(folder)
        out = [folder]
        while folder != root and os.path.dirname(folder) != folder:
            folder = os.path.dirname(folder)
            out.append(folder)
        return list(dict.fromkeys((*out, os.path.join(root, "src"), *self._search)))

    def _root(self, folder: str) -> str:
        if folder not in self._roots:
            self._roots[folder] = project_root(folder)
        return self._roots[folder]


def project_root(folder: str | os.PathLike[str]) -> str:
    """The top folder of the project that a folder belongs to; the folder itself when nothing marks one."""
    at = package = os.path.abspath(folder)
    while os.path.exists(os.path.join(package, "__init__.py")) and os.path.dirname(package) != package:
        package = os.path.dirname(package)
    for _ in range(_LEVELS):
        if any(os.path.exists(os.path.join(at, mark)) for mark in _ROOT_MARKS):
            return at
        at = os.path.dirname(at)
    return package


def _file_of(base: str, parts: list[str]) -> str | None:
    path = os.path.join(base, *parts)
    for file in (f"{path}.py", os.path.join(path, "__init__.py")) if parts else (os.path.join(base, "__init__.py"),):
        if os.path.isfile(file):
            file = os.path.abspath(file)
            return None if package_of(file) else file
    return None


def _read(file: str) -> Module | None:
    if package_of(file):
        return None
    try:
        if os.path.getsize(file) > SIZE_CAP:
            return None
        with open(file, "rb") as f:
            return Module(file, f.read())
    except OSError:
        return None
