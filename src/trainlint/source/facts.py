"""What a program's own source says, read with the syntax tree and without importing it."""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Collection, Iterable

from trainlint.config.mentions import SIZE_CAP, is_own_file, package_of
from trainlint.recording.schema import RateAssignment, Recording, SourceFacts, SourceLine
from trainlint.source.project import Project
from trainlint.source.traces import read_traces

#: What the rate of a param group is called where programs write it.
_RATE = "lr"
#: Calls that read a rate.
_RATE_CALLS = frozenset(("get_last_lr", "get_lr", "_get_learning_rate", "get_current_lr"))
#: A class and the last names of its bases: a text search, since every file is needed and parsing all is slow.
_CLASS = re.compile(rb"^[ \t]*class[ \t]+(\w+)[ \t]*\(([^()]*)\)", re.MULTILINE)
_BASE = re.compile(rb"(\w+)[ \t]*(?:\[[^\]]*\])?[ \t]*(?:,|$)", re.MULTILINE)
#: Only files with one of these are parsed.
_TELLING = (b'"lr"', b"'lr'", b"lr=", b"step(", b"get_last_lr", b"get_lr")
#: An installed package that says none of these does not train: its ``step`` is something else.
_ABOUT_TRAINING = (b"optim", b"sched", b"param_groups", b"lightning", b"accelerat")


#: Loaded by torch itself, some five hundred files, and none of them about training.
_BENEATH_TORCH = frozenset("sympy mpmath networkx dill torchgen jinja2 markupsafe _distutils_hack setuptools".split())


def read_source(
    files: Iterable[str], run: Recording | None = None, scripts: Collection[str] | None = None
) -> SourceFacts:
    """Facts from the program's own files among ``files``; files that cannot be read or parsed are left out.

    With ``run``, methods of trainer callbacks that are not attached and of modules that do not exist are left out too:
    a package is often loaded whole, and what its other models and callbacks do says nothing about this run.

    ``scripts``: the files that are run as a program; ``None``: any may be.
    """
    kept: list[str] = []
    assignments: list[RateAssignment] = []
    reads: list[SourceLine] = []
    steps: list[SourceLine] = []
    classes: dict[str, set[str]] = {}
    project = Project()
    for file in dict.fromkeys(files):
        if not file.endswith(".py") or not is_own_file(file) or package_of(file) in _BENEATH_TORCH:
            continue
        module = project.module(file)
        text = module.text if module is not None else _read(file)
        if text is None:
            continue
        if run is not None:
            for name, bases in _CLASS.findall(text):
                classes.setdefault(name.decode(), set()).update(b.decode() for b in _BASE.findall(bases))
        tree = _parse(file, text) if module is None or not _tells(file, text) else module.parsed
        if tree is None:
            continue
        kept.append(file)
        finder = _Rates(file)
        finder.visit(tree)
        assignments += finder.found
        reads += finder.reads
        steps += finder.steps
    traces = read_traces((f for f in kept if not package_of(f)), project, scripts)
    if run is not None:
        idle = _idle_classes(classes, run)
        assignments = [a for a in assignments if a.at.function.partition(".")[0] not in idle]
        reads = [at for at in reads if at.function.partition(".")[0] not in idle]
        steps = [at for at in steps if at.function.partition(".")[0] not in idle]
        traces = tuple(t for t in traces if t.entry.function.partition(".")[0] not in idle)
    assignments.sort(key=lambda a: (a.at.file, a.at.line))
    return SourceFacts(
        files=tuple(kept),
        rate_assignments=tuple(assignments),
        rate_reads=_in_order(reads),
        step_calls=_in_order(steps),
        traces=traces,
    )


def _idle_classes(classes: dict[str, set[str]], run: Recording) -> frozenset[str]:
    """Callback and module classes of which, and of whose subclasses, the run has no instance.

    Classes are told by name, as the syntax tree knows them. Of other kinds of classes it is not known which exist.
    """
    attached = {name.rpartition(".")[2] for f in run.frameworks for name in f.callbacks}
    modules = {r.class_name for r in run.roots} | {s.class_name for r in run.roots for s in r.submodules}
    children: dict[str, set[str]] = {}
    for name, bases in classes.items():
        for base in bases:
            children.setdefault(base, set()).add(name)
    idle = set()
    for name in classes:
        above = _closure(name, classes)
        family = _closure(name, children)
        is_callback = any(b.endswith("Callback") for b in above)
        is_module = any(b.endswith("Module") and not b.endswith("DataModule") for b in above)
        if is_callback == is_module:
            continue
        if is_callback:
            absent = bool(run.frameworks) and not family & attached
        else:
            # Wrappers put a word in front of the name (FSDPNet).
            absent = bool(modules) and not any(m.endswith(tuple(family)) for m in modules)
        if absent:
            idle.add(name)
    return frozenset(idle)


def _closure(name: str, links: dict[str, set[str]]) -> set[str]:
    found = {name}
    queue = [name]
    while queue:
        for other in links.get(queue.pop(), ()):
            if other not in found:
                found.add(other)
                queue.append(other)
    return found


def _in_order(lines: list[SourceLine]) -> tuple[SourceLine, ...]:
    return tuple(sorted(dict.fromkeys(lines), key=lambda at: (at.file, at.line)))


def _read(file: str) -> bytes | None:
    try:
        if os.path.getsize(file) > SIZE_CAP:
            return None
        with open(file, "rb") as f:
            return f.read()
    except OSError:
        return None


def _tells(file: str, text: bytes) -> bool:
    """Whether a file can assign or read a rate or make a step."""
    if not any(word in text for word in _TELLING):
        return False
    return "site-packages" not in file or any(word in text for word in _ABOUT_TRAINING)


def _parse(file: str, text: bytes) -> ast.Module | None:
    try:
        if not _tells(file, text):
            # An empty tree saves the parse.
            return ast.Module(body=[], type_ignores=[])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, filename=file)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Rates(ast.NodeVisitor):
    """Assignments of a param group's rate (``group["lr"] = x``, ``*= x``, ``group.update(lr=x)``), reads, steps."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.function: list[str] = []
        self.groups: list[set[str]] = [set()]
        self.found: list[RateAssignment] = []
        self.reads: list[SourceLine] = []
        self.steps: list[SourceLine] = []

    def _line(self, node: ast.expr) -> SourceLine:
        return SourceLine(self.file, node.lineno, ".".join(self.function))

    def _add(self, node: ast.stmt | ast.expr) -> None:
        self.found.append(RateAssignment(SourceLine(self.file, node.lineno, ".".join(self.function))))

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.function.append(node.name)
        self.groups.append(set())
        self.generic_visit(node)
        self.groups.pop()
        self.function.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope(node)

    def visit_For(self, node: ast.For) -> None:
        if _mentions_groups(node.iter):
            self.groups[-1] |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if _mentions_groups(node.value):
            self.groups[-1] |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        for target in node.targets:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                self._target(part)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._target(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._target(node.target)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "update" and self._is_group(called.value):
            by_name = any(k.arg == _RATE for k in node.keywords)
            by_dict = any(
                isinstance(a, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == _RATE for k in a.keys)
                for a in node.args
            )
            if by_name or by_dict:
                self._add(node)
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name == "step":
            self.steps.append(self._line(node))
        elif name in _RATE_CALLS:
            self.reads.append(self._line(node))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if (
            isinstance(node.ctx, ast.Load)
            and isinstance(node.slice, ast.Constant)
            and node.slice.value == _RATE
            and self._is_group(node.value)
        ):
            self.reads.append(self._line(node))
        self.generic_visit(node)

    def _target(self, target: ast.expr) -> None:
        if (
            isinstance(target, ast.Subscript)
            and isinstance(target.slice, ast.Constant)
            and target.slice.value == _RATE
            and self._is_group(target.value)
        ):
            self._add(target)

    def _is_group(self, owner: ast.expr) -> bool:
        """Whether an expression is a param group: by where it comes from, or by its name."""
        if _mentions_groups(owner):
            return True
        if isinstance(owner, ast.Name):
            name = owner.id.lower()
            known = any(owner.id in scope for scope in self.groups)
            return known or name in ("group", "g", "pg") or "group" in name
        if isinstance(owner, ast.Attribute):
            return "group" in owner.attr.lower()
        return False


def _mentions_groups(node: ast.expr) -> bool:
    return any(
        (isinstance(n, ast.Attribute) and n.attr == "param_groups")
        or (isinstance(n, ast.Name) and n.id == "param_groups")
        or (isinstance(n, ast.Constant) and n.value == "param_groups")
        for n in ast.walk(node)
    )
