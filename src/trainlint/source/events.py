"""The state of following code: where it is, what was done so far, and how values of two branches become one."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from trainlint.recording.schema import SourceBlock, SourceCall, SourceLine
from trainlint.recording.schema import Value as Plain
from trainlint.source.project import Module, Project
from trainlint.source.values import (
    Const,
    Items,
    Parameters,
    ProjectClass,
    Routine,
    Scope,
    Tensor,
    Thing,
    Unknown,
    Value,
    objects_in,
)

#: Ways to follow one entry, the second where the first is too much: how deep calls of the project's functions are
#: followed into each other, and the expressions looked at. What lies deeper is a call that cannot be read.
EFFORTS = ((8, 25_000), (3, 15_000))
#: ... for the definitions at the top level of an imported file.
MODULE_BUDGET = 10_000
#: Values looked through for what they are put together from.
_LOOKED_AT = 200


#: Of a forward only what its result is made by matters: calls in it are not followed deeper than this.
FORWARD_DEPTH = 4


#: Attributes by which code gets at gradients.
_ACTS = frozenset(("backward", "zero_grad", "grad", "step", "manual_backward", "autograd"))


class Exhausted(Exception):
    """The code is too large to be followed."""


class Events:
    """What every part of following code shares."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.scopes: dict[str, Scope] = {}
        #: Scopes of imported files that make no objects, kept from trace to trace.
        self.lasting: dict[str, Scope] = {}
        #: Expressions looked at outside the trace's own budget.
        self.spent = 0
        #: Functions that were followed in any trace, and in this one.
        self.followed: set[ast.AST] = set()
        self.begin(*EFFORTS[0])

    def begin(self, depth: int, budget: int) -> None:
        """Forget everything but the project: a new trace."""
        self.depth, self.budget = depth, budget
        self.visited: set[ast.AST] = set()
        self.scopes = {}
        self.blocks: list[SourceBlock] = []
        self.path: tuple[int, ...] = ()
        self.things: list[Thing] = []
        self.calls: list[SourceCall] = []
        self.active: list[ast.AST] = []
        #: Gradients are recorded (``None``: depends on a condition), and what turned them off.
        self.grad: bool | None = True
        self.grad_off: SourceLine | None = None
        #: Not above 0 while only definitions are of interest.
        self.quiet = 0
        #: Above 0 inside a module's forward, and how deep the calls were where it began.
        self.inside = self.floor = 0
        self.here: Scope = Scope(Module("<none>", b""))

    # ------------------------------------------------------------------------------------------------ events

    def line(self, node: ast.AST) -> SourceLine:
        return SourceLine(self.here.module.file, getattr(node, "lineno", 0), self.here.function)

    def emit(self, what: str, node: ast.AST, on: Iterable[int] = (), **details: Plain) -> None:
        if self.quiet:
            return
        self.calls.append(SourceCall(what, self.line(node), tuple(dict.fromkeys(on)), self.path, details))

    @contextmanager
    def block(self, kind: str, node: ast.AST, text: str = "", counts: bool = False) -> Iterator[None]:
        before = self.path
        self.push(kind, node, text, counts)
        try:
            yield
        finally:
            self.path = before

    def push(self, kind: str, node: ast.AST, text: str = "", counts: bool = False) -> None:
        """Everything from here on, until the path is put back, stands under this block."""
        self.path = (*self.path, len(self.blocks))
        self.blocks.append(SourceBlock(kind, getattr(node, "lineno", 0), text, counts))

    def thing(self, kind: str, class_name: str, node: ast.AST, *, known: bool = True, name: str = "") -> Thing:
        made = Thing(len(self.things), kind, class_name, name, self.line(node), known=known, path=self.path)
        self.things.append(made)
        return made

    def opaque(self, values: Iterable[Value], node: ast.AST, name: str = "") -> None:
        """Something that cannot be read got these; it may do anything with what is reachable from them.

        Inside a forward it computes, and neither steps nor clears.
        """
        if self.inside:
            return
        on: list[int] = []
        loss = routine = False
        for value in values:
            for found in objects_in(value):
                if isinstance(found, Thing):
                    on += self.reachable(found)
                elif isinstance(found, Tensor):
                    loss = loss or (found.loss and found.attached is not False)
                elif isinstance(found, Parameters):
                    on += found.of
                elif isinstance(found, Routine):
                    routine = routine or acts(found.node)
        if on or loss or routine:
            self.emit("opaque", node, on, name=name, loss=loss, routine=routine)

    def reachable(self, thing: Thing) -> list[int]:
        """Numbers of the objects that someone with ``thing`` can get at."""
        out, queue, seen = [], [thing], {thing.number}
        while queue and len(seen) < 100:
            at = queue.pop()
            if at.kind in ("optimizer", "module", "scheduler", "scaler"):
                out.append(at.number)
            if at.kind not in ("instance", "accelerator"):
                continue
            for value in at.attributes.values():
                for found in objects_in(value):
                    if isinstance(found, Thing) and found.number not in seen:
                        seen.add(found.number)
                        queue.append(found)
        return out

    # ------------------------------------------------------------------------------------------------ joining

    def join(self, values: list[Value], node: ast.AST) -> Value:
        """One value for what is one of several."""
        distinct: list[Value] = []
        for value in values:
            if value not in distinct:
                distinct.append(value)
        rest = [v for v in distinct if not (isinstance(v, Const) and v.value is None)] or distinct[:1]
        if not rest:
            return Unknown()
        if len(rest) == 1:
            return rest[0]
        things = [v for v in rest if isinstance(v, Thing)]
        if things and len({t.kind for t in things}) == 1 and all(isinstance(v, (Thing, Unknown)) for v in rest):
            return self._joined_things(things, len(things) == len(rest), node)
        tensors = [v for v in rest if isinstance(v, Tensor)]
        if tensors and all(isinstance(v, (Tensor, Unknown, Const)) for v in rest):
            return joined_tensors(tensors, len(tensors) == len(rest))
        if all(isinstance(v, Items) for v in rest):
            items = [v for v in rest if isinstance(v, Items)]
            if len({len(i.elements) for i in items}) == 1 and not any(i.many for i in items):
                columns = zip(*(i.elements for i in items), strict=True)
                return Items([self.join(list(c), node) for c in columns], keys=list(items[0].keys))
        return Unknown(holds=tuple(rest))

    def _joined_things(self, things: list[Thing], all_known: bool, node: ast.AST) -> Thing:
        first = things[0]
        names = list(dict.fromkeys(t.class_name for t in things))
        made = self.thing(first.kind, " or ".join(names), node, known=all_known and all(t.known for t in things))
        made.name, made.at = first.name, first.at
        made.of = tuple(dict.fromkeys(n for t in things for n in t.of))
        made.details = {
            k: v for k, v in first.details.items() if all(t.details.get(k, _NOTHING) == v for t in things[1:])
        }
        made.details["alternatives"] = tuple(t.number for t in things)
        made.details["foreign"] = any(t.made is not None or t.details.get("foreign") for t in things)
        if len({id(t.made) for t in things}) == 1:
            made.made, made.attributes, made.parts = first.made, first.attributes, first.parts
        return made


_NOTHING = object()


@functools.cache
def acts(function: ast.AST) -> bool:
    """Whether a function mentions what could make, use or clear gradients."""
    return any(
        (isinstance(n, ast.Attribute) and (n.attr in _ACTS or "optim" in n.attr))
        or (isinstance(n, ast.Name) and "optim" in n.id.lower())
        for n in ast.walk(function)
    )


def joined_tensors(tensors: list[Tensor], all_tensors: bool) -> Tensor:
    """What is true of each of them."""
    first = tensors[0]

    def same(values: list[object]) -> bool:
        return all_tensors and all(v == values[0] for v in values)

    return Tensor(
        made_by=first.made_by if same([t.made_by for t in tensors]) else "",
        made_at=first.made_at,
        attached=first.attached if same([t.attached for t in tensors]) else None,
        role=first.role if same([t.role for t in tensors]) else "",
        cut_by=first.cut_by if same([t.cut_by for t in tensors]) else "",
        cut_at=first.cut_at,
        patched_at=first.patched_at if same([t.patched_at for t in tensors]) else None,
        loss=any(t.loss for t in tensors),
        losses=losses_in(tensors),
    )


def attachment(values: Iterable[Value], depth: int = 3) -> bool | None:
    """Whether what is computed from these has a gradient; ``None`` when it is not known."""
    unsure = False
    for value in values:
        if isinstance(value, Tensor):
            if value.attached:
                return True
            unsure = unsure or value.attached is None
        elif isinstance(value, Items):
            inner = attachment(value.elements, depth - 1) if depth else None
            if inner:
                return True
            unsure = unsure or inner is None
        elif isinstance(value, Parameters):
            return True
        elif not isinstance(value, (Const, ProjectClass)):
            unsure = True
    return None if unsure else False


def losses_in(values: Iterable[Value]) -> frozenset[int]:
    """The loss calls that these were put together from."""
    out: set[int] = set()
    queue = list(values)
    seen: set[int] = set()
    while queue and len(seen) < _LOOKED_AT:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            out |= value.losses
        elif isinstance(value, Items):
            queue += value.elements
        elif isinstance(value, Unknown):
            queue += value.holds
    return frozenset(out)


def cut(tensor: Tensor, by: str, at: SourceLine | None) -> Tensor:
    return replace(tensor, attached=False, cut_by=by, cut_at=at)
