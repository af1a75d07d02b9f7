"""Where ``**section`` goes: whether what takes it is the program's own code that hands it to no library.

Then a library that happens to know a key's name does not use the key. Whatever cannot be followed by name through the
program's own source counts as handed to a library.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterable

from trainlint.recorder.config_paths import words

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
#: Bases whose constructors take any keyword and use none, or none at all.
_PLAIN_BASES = words("LightningModule LightningDataModule Module Dataset IterableDataset object ABC")
_READS = frozenset(("get", "pop"))
_DEEPEST = 6
SIZE_CAP = 1024 * 1024


class OwnCode:
    """Definitions of the program's own files, by name."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = {f for f in files if f.endswith(".py")}
        self._trees: dict[str, ast.Module | None] = {}
        self._defined: dict[str, list[tuple[str, _Definition]]] | None = None

    def keeps(self, file: str, line: int) -> bool:
        """Whether every call at this line that takes a ``**section`` keeps it in the program's own code."""
        tree = self._tree(file) if file in self._files else None
        if tree is None:
            return False
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and node.lineno <= line <= (node.end_lineno or node.lineno)
            and any(k.arg is None for k in node.keywords)
        ]
        merged = any(isinstance(n, ast.Dict) and n.lineno == line and None in n.keys for n in ast.walk(tree))
        return bool(calls) and not merged and all(self._call_keeps(file, call, 0) for call in calls)

    def _call_keeps(self, file: str, call: ast.Call, depth: int) -> bool:
        found = self._resolve(file, call.func.id) if isinstance(call.func, ast.Name) else None
        return found is not None and self._takes(*found, depth)

    def _takes(self, file: str, node: _Definition, depth: int) -> bool:
        """Whether a function or constructor keeps the keywords that it is given."""
        if depth > _DEEPEST or node.decorator_list and not isinstance(node, ast.ClassDef):
            return False
        if not isinstance(node, ast.ClassDef):
            return self._function_keeps(file, node, None, depth)
        if any(k.arg == "metaclass" for k in node.keywords) or node.decorator_list:
            return False
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return not part.decorator_list and self._function_keeps(file, part, node, depth)
        return self._bases_keep(file, node, depth)

    def _bases_keep(self, file: str, node: ast.ClassDef, depth: int) -> bool:
        for base in node.bases:
            name = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
            found = self._resolve(file, name) if isinstance(base, ast.Name) else None
            if found is not None:
                if not self._takes(*found, depth + 1):
                    return False
            elif name not in _PLAIN_BASES:
                return False
        return True

    def _function_keeps(
        self, file: str, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.ClassDef | None, depth: int
    ) -> bool:
        if node.args.kwarg is None:
            return True  # every keyword is a parameter, whose name stands in this file
        name = node.args.kwarg.arg
        allowed: set[int] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                called = part.func
                if isinstance(called, ast.Name) and called.id in ("locals", "vars", "exec", "eval"):
                    return False
                if isinstance(called, ast.Attribute) and called.attr in _READS and _is_constant(part.args[:1]):
                    allowed.add(id(called.value))
                passed = [k.value for k in part.keywords if k.arg is None and _is_name(k.value, name)]
                if passed:
                    if not self._passed_on(file, part, owner, depth):
                        return False
                    allowed.update(id(value) for value in passed)
            elif isinstance(part, ast.Subscript) and _is_constant([part.slice]):
                allowed.add(id(part.value))
            elif isinstance(part, ast.Compare) and _is_constant([part.left]) and len(part.comparators) == 1:
                allowed.add(id(part.comparators[0]))
        return all(id(part) in allowed for part in ast.walk(node) if _is_name(part, name))

    def _passed_on(self, file: str, call: ast.Call, owner: ast.ClassDef | None, depth: int) -> bool:
        called = call.func
        if isinstance(called, ast.Attribute) and called.attr == "__init__" and owner is not None:
            above = called.value
            if isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id == "super":
                return self._bases_keep(file, owner, depth + 1)
            return False
        return self._call_keeps(file, call, depth + 1)

    # -- what is where

    def _resolve(self, file: str, name: str) -> tuple[str, _Definition] | None:
        """The only definition of a name that this file can mean: its own, or one of the module it is imported from."""
        if self._defined is None:
            self._defined = {}
            for other in sorted(self._files):
                tree = self._tree(other)
                for node in tree.body if tree is not None else ():
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                        self._defined.setdefault(node.name, []).append((other, node))
        found = self._defined.get(name, [])
        if len(found) != 1:
            return None
        where = found[0][0]
        return found[0] if where == file or _stem(where) in self._imported_from(file, name) else None

    def _imported_from(self, file: str, name: str) -> set[str]:
        tree = self._tree(file)
        return {
            (node.module or "").rpartition(".")[2]
            for node in (ast.walk(tree) if tree is not None else ())
            if isinstance(node, ast.ImportFrom) and any(a.name == name and a.asname in (None, name) for a in node.names)
        }

    def _tree(self, file: str) -> ast.Module | None:
        if file not in self._trees:
            try:
                with open(file, "rb") as f, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    text = f.read(SIZE_CAP + 1)
                    self._trees[file] = ast.parse(text) if len(text) <= SIZE_CAP else None
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                self._trees[file] = None
        return self._trees[file]


def _stem(file: str) -> str:
    stem = os.path.basename(file).removesuffix(".py")
    return os.path.basename(os.path.dirname(file)) if stem == "__init__" else stem


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_constant(nodes: list[ast.expr]) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], ast.Constant) and isinstance(nodes[0].value, str)
