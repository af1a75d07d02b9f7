"""What an expression stands for while code is followed: known only as far as training is concerned."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainlint.recording.schema import SourceLine

if TYPE_CHECKING:
    from trainlint.source.project import Module


class Value:
    """Anything an expression may stand for."""


@dataclass(eq=False)
class Unknown(Value):
    """Nothing is known but how it is written, and which objects may be inside."""

    name: str = ""
    holds: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Const(Value):
    value: Any


@dataclass(frozen=True)
class Library(Value):
    """Something imported from outside the project, by its full dotted name."""

    name: str


@dataclass(eq=False)
class Scope:
    """Names of one function call, class body or module."""

    module: Module
    names: dict[str, Value] = field(default_factory=dict)
    parent: Scope | None = None
    function: str = ""
    #: Names declared ``global``.
    outer: set[str] = field(default_factory=set)

    def find(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


@dataclass(eq=False)
class ProjectClass(Value):
    """A class of the project."""

    node: ast.ClassDef
    module: Module
    #: Base classes as far as they could be resolved.
    bases: tuple[Value, ...] = ()
    methods: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    #: How often each attribute of ``self`` is assigned in the class.
    assigned: dict[str, int] = field(default_factory=dict)

    def lineage(self) -> list[Value]:
        """The class itself and everything above it, nearest first."""
        out: list[Value] = []
        queue: list[Value] = [self]
        while queue and len(out) < 50:
            value = queue.pop(0)
            if value in out:
                continue
            out.append(value)
            if isinstance(value, ProjectClass):
                queue += value.bases
        return out

    def method(self, name: str) -> tuple[ProjectClass, ast.FunctionDef | ast.AsyncFunctionDef] | None:
        for value in self.lineage():
            if isinstance(value, ProjectClass) and name in value.methods:
                return value, value.methods[name]
        return None

    @property
    def whole(self) -> bool:
        """Whether every base is known: a class of the project, or one of torch's own."""
        return all(
            isinstance(v, ProjectClass) or (isinstance(v, Library) and v.name.split(".")[0] in _KNOWN_BASES)
            for v in self.lineage()
        )

    def is_a(self, *endings: str) -> bool:
        """Whether a base from outside has a name that ends so."""
        return any(isinstance(v, Library) and v.name.endswith(endings) for v in self.lineage())


_KNOWN_BASES = frozenset(("torch", "lightning", "pytorch_lightning", "builtins", "abc", "typing", "object"))


@dataclass(eq=False)
class Routine(Value):
    """A function of the project, bound to ``owner`` when it is a method."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope
    owner: Value | None = None
    holder: ProjectClass | None = None

    @property
    def name(self) -> str:
        return "<lambda>" if isinstance(self.node, ast.Lambda) else self.node.name


@dataclass(frozen=True)
class ProjectModule(Value):
    """A file of the project, as a module."""

    file: str


@dataclass(frozen=True)
class Deferred(Value):
    """A name imported from a file of the project, looked up when it is first used."""

    file: str
    name: str


@dataclass(eq=False)
class Method(Value):
    """A method of an object that is not the project's own code."""

    owner: Value
    name: str


@dataclass(eq=False)
class Super(Value):
    """``super()`` of an object, seen from the class ``above`` which methods are looked up."""

    owner: Value
    above: ProjectClass


@dataclass(eq=False)
class Items(Value):
    """A list, tuple, set or dict; ``many``: one element stands for any number."""

    elements: list[Value] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    many: bool = False
    #: The module that keeps it as an attribute, and under which name.
    kept_by: Thing | None = None
    kept_as: str = ""


@dataclass(eq=False)
class Thing(Value):
    """An object with an identity. ``kind`` as in :class:`SourceObject`, and ``loss``, ``accelerator``, ``instance``."""

    number: int
    kind: str
    class_name: str = ""
    name: str = ""
    at: SourceLine | None = None
    made: ProjectClass | None = None
    attributes: dict[str, Value] = field(default_factory=dict)
    of: tuple[int, ...] = ()
    known: bool = True
    details: dict[str, Any] = field(default_factory=dict)
    #: Positional parts of a Sequential and the like.
    parts: list[Value] = field(default_factory=list)
    #: Blocks that the object was made under.
    path: tuple[int, ...] = ()


@dataclass(eq=False)
class Parameters(Value):
    """Parameters of modules: ``model.parameters()``, a list of them, one of them (``one``)."""

    of: tuple[int, ...]
    #: All that train; ``False`` when chosen by a condition.
    whole: bool = True
    #: An iterator, which yields once.
    once: bool = False
    named: bool = False
    one: bool = False
    taken_at: SourceLine | None = None
    spent_at: SourceLine | None = None
    spent_by: str = ""


@dataclass(frozen=True)
class Tensor(Value):
    """A tensor by what made it.

    ``made_by``: the operation (``softmax``, ``log_softmax``, ``sigmoid``, ``Linear`` ...), empty when it is not known.
    ``attached``: whether gradients flow to something that trains; ``None`` when it is not known.
    ``role``: ``mean`` for a loss that is a full mean, ``scaled`` for one that was multiplied or divided, else empty.
    """

    made_by: str = ""
    made_at: SourceLine | None = None
    attached: bool | None = None
    role: str = ""
    #: How it lost its gradient: ``no_grad``, ``detach``, ``item`` ...
    cut_by: str = ""
    cut_at: SourceLine | None = None
    #: ``requires_grad`` was set on it by hand.
    patched_at: SourceLine | None = None
    #: It is a loss, or put together from losses: the numbers of their calls.
    loss: bool = False
    losses: frozenset[int] = frozenset()


def objects_in(value: Value, depth: int = 3) -> list[Value]:
    """Things, tensors, parameters and functions that someone who holds ``value`` can get at."""
    found: list[Value] = []
    seen: set[int] = set()
    level = [value]
    for _ in range(depth + 1):
        below: list[Value] = []
        for one in level:
            if id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, (Thing, Tensor, Parameters, Routine)):
                found.append(one)
            elif isinstance(one, Items):
                below += one.elements
            elif isinstance(one, Unknown):
                below += one.holds
        level = below
    return found
