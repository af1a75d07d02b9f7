"""Which source lines could read a config key: ``cfg["lr"]``, ``cfg.get("lr")``, ``args.lr``, ``"lr" in cfg``.

By the syntax tree, so more exact than a word search: an object's own attributes (``self.lr``), names of imported
modules and param groups are no config. Whether a line was ever run is for the reader of these facts to say.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from trainlint.recorder.config_paths import words
from trainlint.recording.schema import NameRead, SourceLine

_GETTERS = frozenset(("get", "pop", "setdefault"))
#: What programs call a config as a whole: such an owner names no section.
_WHOLE = words(
    """cfg config conf configs cfgs args arg opt opts options hparams hp params settings flags kwargs hyperparameters
    hyperparams namespace parsed c p s d raw data_dict yaml_config"""
)
#: Objects of training whose attributes are not the config's.
_OBJECTS = words(
    """trainer optimizer optim optimizers scheduler lr_scheduler strategy accelerator fabric logger loader dataloader
    dataset datamodule scaler defaults state engine"""
)
#: Ways in which a class puts all of a config on ``self``, so that ``self.lr`` reads it.
_COPYING = ("__dict__.update", "vars(self).update", "setattr(self", "SimpleNamespace", "self.__dict__ =", "__getattr__")
#: Places kept per name and file.
_MOST = 20


def read_places(file: str, text: str, tree: ast.AST, names: Iterable[str]) -> dict[str, list[NameRead]]:
    """Lines of one file that could read each of ``names`` from a config, in the order of the file."""
    finder = _Finder(file, frozenset(names), any(word in text for word in _COPYING))
    finder.imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    finder.sections = dict(_sections(tree))
    finder.visit(tree)
    return finder.found


def _sections(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Variables that always stand for one section: ``train_cfg = cfg["training"]``."""
    held: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        held.setdefault(part.id, set()).add(_last(node.value) if part is target else "")
        elif isinstance(node, ast.arg):
            held.setdefault(node.arg, set()).add("")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            held.setdefault(node.id, set())
    for name, sections in held.items():
        if len(sections) == 1:
            (section,) = sections
            if section:
                yield name, section


def _last(node: ast.expr) -> str:
    """The last constant name of an access: ``training`` of ``cfg["training"]``, ``cfg.training``."""
    if isinstance(node, ast.Subscript):
        return node.slice.value if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str) else ""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GETTERS and node.args:
        first = node.args[0]
        return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    return ""


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, names: frozenset[str], copying: bool) -> None:
        self.file = file
        self.names = names
        self.copying = copying
        self.imported: set[str] = set()
        self.sections: dict[str, str] = {}
        self.found: dict[str, list[NameRead]] = {}
        self.function: list[str] = []
        self.conditions: list[int] = []

    # -- where it stands

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        outside, self.conditions = self.conditions, []
        self.function.append(node.name)
        self.generic_visit(node)
        self.function.pop()
        self.conditions = outside

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope(node)

    def _under(self, test: ast.expr, parts: Iterable[ast.AST]) -> None:
        lines = list(range(test.lineno, (test.end_lineno or test.lineno) + 1))
        self.conditions += lines
        for part in parts:
            self.visit(part)
        del self.conditions[len(self.conditions) - len(lines) :]

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._under(node.test, [*node.body, *node.orelse])

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._under(node.test, [*node.body, *node.orelse])

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._under(node.test, [node.body, node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._under(node.values[0], node.values[1:])

    # -- reads

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant):
            self._note(node.slice.value, node.value, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own or self.copying:
                self._note(node.attr, node.value, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called, first = node.func, node.args[0] if node.args else None
        if isinstance(called, ast.Attribute) and called.attr in _GETTERS and isinstance(first, ast.Constant):
            self._note(first.value, called.value, node)
        elif isinstance(called, ast.Name) and called.id == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and first is not None:
                self._note(name.value, first, node)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.left, ast.Constant) and any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops):
            self._note(node.left.value, node.comparators[0], node)
        self.generic_visit(node)

    def _note(self, name: object, owner: ast.expr, node: ast.expr) -> None:
        if not isinstance(name, str) or name not in self.names or len(self.found.get(name, ())) >= _MOST:
            return
        section = self._section(owner)
        if section is None:
            return
        at = SourceLine(self.file, node.lineno, ".".join(self.function))
        self.found.setdefault(name, []).append(NameRead(at, section, tuple(dict.fromkeys(self.conditions))))

    def _section(self, owner: ast.expr) -> str | None:
        """The section that an owner names, empty when it names none, ``None`` when it is no config at all."""
        if isinstance(owner, ast.Name):
            if owner.id in self.imported or "group" in owner.id.lower() or owner.id in ("g", "pg"):
                return None
            if owner.id in self.sections:
                return _named(self.sections[owner.id])
            return None if owner.id.lower() in _OBJECTS else ""
        if any(isinstance(n, ast.Attribute) and n.attr == "param_groups" for n in ast.walk(owner)):
            return None
        root: ast.AST = owner
        while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name) and root.id in self.imported and isinstance(owner, ast.Attribute):
            return None
        last = _last(owner)
        return None if isinstance(owner, ast.Attribute) and last.lower() in _OBJECTS else _named(last)


def _named(section: str) -> str:
    return "" if section.lower().lstrip("_") in _WHOLE else section
