"""Following statements: branches, loops, definitions, and what is left unmade by an early end."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trainlint.source.events import MODULE_BUDGET, Exhausted
from trainlint.source.expressions import Expressions, truth
from trainlint.source.values import (
    Const,
    Deferred,
    Items,
    Library,
    Parameters,
    ProjectClass,
    ProjectModule,
    Routine,
    Scope,
    Tensor,
    Thing,
    Unknown,
    Value,
)

_GRAD_SWITCHES = {"no_grad": False, "inference_mode": False, "enable_grad": True}


@dataclass
class Flow:
    """How a block of statements ends."""

    #: It never gets past its end.
    stops: bool = False
    #: It may leave by ``continue`` or ``break``, by ``return``.
    leaves_loop: bool = False
    leaves_function: bool = False
    returned: list[Value] = field(default_factory=list)
    test: str = ""
    counts: bool = False

    def add(self, other: Flow) -> None:
        self.leaves_loop = self.leaves_loop or other.leaves_loop
        self.leaves_function = self.leaves_function or other.leaves_function
        self.returned += other.returned
        self.test = self.test or other.test
        self.counts = self.counts or other.counts


class Statements(Expressions):
    """Follows the code of a script or a function."""

    # ------------------------------------------------------------------------------------------- files

    def module_scope(self, file: str) -> Scope | None:
        """Names that a file defines at its top level; it is gone through once, for its definitions only."""
        known = self.scopes.get(file) or self.lasting.get(file)
        if known is not None:
            return known
        module = self.project.module(file)
        if module is None:
            return None
        scope = self.scopes[file] = Scope(module)
        before, path, grad, budget, objects = self.here, self.path, self.grad, self.budget, len(self.things)
        self.here, self.grad, self.budget = scope, True, MODULE_BUDGET
        self.quiet += 1
        try:
            self._define(module.tree.body)
            for statement in module.tree.body:
                if not isinstance(statement, (ast.For, ast.While, ast.With, ast.Expr)) and not is_main(statement):
                    self.statement(statement)
        except Exhausted:
            pass
        finally:
            self.spent += MODULE_BUDGET - self.budget
            self.here, self.path, self.grad, self.budget = before, path, grad, budget
            self.quiet -= 1
        if len(self.things) == objects:
            # Nothing in it belongs to this trace alone.
            self.lasting[file] = scope
        return scope

    def run_script(self, file: str) -> None:
        """Follow a file the way ``python file`` runs it."""
        module = self.project.module(file)
        if module is None:
            return
        scope = self.scopes[file] = Scope(module, names={"__name__": Const("__main__")})
        self.here = scope
        self._define(module.tree.body)
        self.block_of(module.tree.body)

    def _define(self, body: Sequence[ast.stmt]) -> None:
        """Functions are known to each other wherever they stand."""
        for statement in body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.here.names[statement.name] = Routine(statement, self.here)

    # ------------------------------------------------------------------------------------------- blocks

    def run_body(self, routine: Routine, scope: Scope) -> Value:
        node = routine.node
        if routine.holder is not None:
            scope.names["__class__"] = routine.holder
        if isinstance(node, ast.Lambda):
            return self.value(node.body)
        flow = self.block_of(node.body)
        returned = flow.returned if flow.stops else [*flow.returned, Const(None)]
        return self.join(returned, node) if flow.returned else Const(None)

    def block_of(self, body: Sequence[ast.stmt]) -> Flow:
        whole = Flow()
        path = self.path
        for statement in body:
            flow = self.statement(statement)
            whole.add(flow)
            if flow.stops:
                whole.stops = True
                break
            if (flow.leaves_loop or flow.leaves_function) and not isinstance(statement, (ast.For, ast.While)):
                self.push("unless", statement, flow.test, flow.counts)
            elif flow.leaves_function:
                self.push("unless", statement, flow.test)
        self.path = path
        return whole

    def statement(self, node: ast.stmt) -> Flow:
        follow = getattr(self, f"_do_{type(node).__name__.lower()}", None)
        if follow is None:
            return Flow()
        flow = follow(node)
        return flow if isinstance(flow, Flow) else Flow()

    def _do_expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def _do_return(self, node: ast.Return) -> Flow:
        value = self.value(node.value) if node.value is not None else Const(None)
        return Flow(stops=True, leaves_function=True, returned=[value])

    def _do_continue(self, node: ast.stmt) -> Flow:
        return Flow(stops=True, leaves_loop=True)

    _do_break = _do_continue

    def _do_raise(self, node: ast.Raise) -> Flow:
        return Flow(stops=True)

    # ------------------------------------------------------------------------------------------- conditions

    def _do_if(self, node: ast.If) -> Flow:
        decided = truth(self.value(node.test))
        if decided is not None:
            return self.block_of(node.body if decided else node.orelse)
        text = ast.unparse(node.test)[:80]
        counts = any(isinstance(n, ast.Mod) for n in ast.walk(node.test))
        before, grad = dict(self.here.names), self.grad
        with self.block("if", node, text, counts):
            then = self.block_of(node.body)
        after, grad_then = self.here.names, self.grad
        self.here.names, self.grad = dict(before), grad
        with self.block("else", node, text, counts):
            other = self.block_of(node.orelse)
        self.grad = self.grad if self.grad == grad_then else None
        if then.stops:
            pass
        elif other.stops:
            self.here.names = after
        else:
            self._merge(after, node)
        flow = Flow(stops=then.stops and other.stops, test=text, counts=counts)
        flow.add(then)
        flow.add(other)
        flow.test, flow.counts = (text, counts) if then.stops or other.stops else (flow.test, flow.counts)
        return flow

    def _merge(self, other: dict[str, Value], node: ast.AST) -> None:
        here = self.here.names
        for name in {*here, *other}:
            a, b = here.get(name), other.get(name)
            if a is b:
                continue
            known = [v for v in (b, a) if v is not None]
            constants = [v for v in known if isinstance(v, Const)]
            if len(known) == 2 and len(constants) == 2:
                here[name] = Unknown(name)
            else:
                here[name] = known[0] if len(known) == 1 else self.join(known, node)

    # ------------------------------------------------------------------------------------------- loops

    def _do_for(self, node: ast.For | ast.AsyncFor) -> Flow:
        iterated = self.value(node.iter)
        if isinstance(iterated, Items) and not iterated.many and 0 < len(iterated.elements) <= 6:
            if all(isinstance(e, Thing) for e in iterated.elements):
                return self._unrolled(node, iterated)
        self._forget(node)
        text = ast.unparse(node.iter)[:80]
        with self.block("for", node, text):
            self.bind_element(node.target, iterated, node.iter)
            flow = self.block_of(node.body)
        self.block_of(node.orelse)
        return Flow(leaves_function=flow.leaves_function, returned=flow.returned)

    _do_asyncfor = _do_for

    def _unrolled(self, node: ast.For | ast.AsyncFor, items: Items) -> Flow:
        """``for opt in (opt_g, opt_d)``: each in turn, for certain."""
        out = Flow()
        for element in items.elements:
            self.bind_target(node.target, element)
            flow = self.block_of(node.body)
            out.returned += flow.returned
            out.leaves_function = out.leaves_function or flow.leaves_function
        return out

    def _do_while(self, node: ast.While) -> Flow:
        self._forget(node)
        self.value(node.test)
        with self.block("while", node, ast.unparse(node.test)[:80]):
            flow = self.block_of(node.body)
        self.block_of(node.orelse)
        return Flow(leaves_function=flow.leaves_function, returned=flow.returned)

    def _forget(self, loop: ast.For | ast.AsyncFor | ast.While) -> None:
        """Plain values that the loop changes are not known inside it."""
        for node in ast.walk(loop):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if isinstance(self.here.names.get(node.id), Const):
                    self.here.names[node.id] = Unknown(node.id)

    def _do_with(self, node: ast.With | ast.AsyncWith) -> Flow:
        grad, off, path = self.grad, self.grad_off, self.path
        for item in node.items:
            self._enter(item, node)
        flow = self.block_of(node.body)
        self.grad, self.grad_off, self.path = grad, off, path
        return flow

    _do_asyncwith = _do_with

    def _enter(self, item: ast.withitem, node: ast.With | ast.AsyncWith) -> None:
        expr = item.context_expr
        called = self.value(expr.func) if isinstance(expr, ast.Call) else None
        name = called.name.rpartition(".")[2] if isinstance(called, Library) else ""
        if name in _GRAD_SWITCHES:
            self.grad, self.grad_off = _GRAD_SWITCHES[name], self.line(expr)
            return
        if name == "set_grad_enabled" and isinstance(expr, ast.Call) and expr.args:
            asked = self.value(expr.args[0])
            self.grad = bool(asked.value) if isinstance(asked, Const) else None
            self.grad_off = self.line(expr)
            return
        if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Attribute) and expr.func.attr == "accumulate":
            owner = self.value(expr.func.value)
            self.push("accumulate", expr, ast.unparse(expr.func)[:60], bool(
                isinstance(owner, Thing) and owner.details.get("accumulates")
            ))  # fmt: skip
            return
        value = self.value(expr)
        if isinstance(value, Unknown) and isinstance(called, Unknown) and isinstance(expr, ast.Call):
            # ``with self.no_grad_context():`` may be anything.
            if "grad" in called.name:
                self.grad = None
        if item.optional_vars is not None:
            bound = value if isinstance(value, Thing) else Unknown(holds=(value,))
            self.bind_target(item.optional_vars, bound)

    def _do_try(self, node: ast.Try) -> Flow:
        flow = self.block_of(node.body)
        for handler in node.handlers:
            before = dict(self.here.names)
            with self.block("except", handler):
                caught = self.block_of(handler.body)
            flow.add(caught)
            flow.stops = flow.stops and caught.stops
            self.here.names = before
        for part in (node.orelse, node.finalbody):
            flow.add(self.block_of(part))
        return flow

    _do_trystar = _do_try

    def _do_match(self, node: ast.Match) -> Flow:
        flow = Flow()
        self.value(node.subject)
        before = dict(self.here.names)
        ends: list[dict[str, Value]] = []
        for case in node.cases:
            self.here.names = dict(before)
            with self.block("if", case.body[0], ast.unparse(case.pattern)[:80]):
                inner = self.block_of(case.body)
            flow.add(inner)
            if not inner.stops:
                ends.append(self.here.names)
        self.here.names = ends[0] if ends else before
        for other in ends[1:]:
            self._merge(other, node)
        return flow

    # ------------------------------------------------------------------------------------------- names

    def _do_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.here.names[node.name] = Routine(node, self.here)

    _do_asyncfunctiondef = _do_functiondef

    def _do_classdef(self, node: ast.ClassDef) -> None:
        bases = tuple(self.value(b) for b in node.bases if not isinstance(b, ast.Starred))
        made = ProjectClass(node, self.here.module, bases)
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                made.methods[part.name] = part
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                made.assigned[inner.attr] = made.assigned.get(inner.attr, 0) + 1
        self.here.names[node.name] = made

    def _do_import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.split(".")[0]
            file = self.project.resolve(name, self.here.module.file)
            value: Value = ProjectModule(file) if file is not None else Library(name)
            self.here.names[alias.asname or name] = value

    def _do_importfrom(self, node: ast.ImportFrom) -> None:
        file = self.project.resolve(node.module or "", self.here.module.file, node.level)
        for alias in node.names:
            if alias.name == "*":
                scope = self.module_scope(file) if file is not None else None
                if scope is not None:
                    self.here.names.update(scope.names)
                continue
            if file is not None:
                value: Value = Deferred(file, alias.name)
            elif node.level and not node.module:
                inner = self.project.resolve(alias.name, self.here.module.file, node.level)
                value = ProjectModule(inner) if inner is not None else Unknown(alias.name)
            else:
                inner = self.project.resolve(f"{node.module}.{alias.name}", self.here.module.file, node.level)
                value = ProjectModule(inner) if inner is not None else Library(f"{node.module or ''}.{alias.name}")
            self.here.names[alias.asname or alias.name] = value

    def _do_global(self, node: ast.Global) -> None:
        self.here.outer |= set(node.names)

    def _do_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.here.names.pop(target.id, None)

    def _do_assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.bind_target(target, value)

    def _do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.bind_target(node.target, self.value(node.value))

    def _do_augassign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Attribute) and ".grad" in ast.unparse(node.target):
            self.emit("grads", node, ())
        old = self.value(_loaded(node.target))
        self.bind_target(node.target, self.combined(old, node.op, self.value(node.value), node))

    def bind_target(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Starred):
            self.bind_target(target.value, Unknown(holds=(value,)))
        elif isinstance(target, (ast.Tuple, ast.List)):
            exact = isinstance(value, Items) and not value.many and len(value.elements) == len(target.elts)
            for i, element in enumerate(target.elts):
                if exact and isinstance(value, Items):
                    part = value.elements[i]
                elif isinstance(value, Tensor):
                    part = replace(value, made_by="", role="", loss=False)
                elif isinstance(value, Thing) and value.name == "self.optimizers()":
                    part = self._another_optimizer(value, element)
                else:
                    part = Unknown(holds=(value,))
                self.bind_target(element, part)
        else:
            self.store(target, value)

    def _another_optimizer(self, value: Thing, node: ast.expr) -> Value:
        made = self.thing("optimizer", "", node, known=False, name=ast.unparse(node))
        made.path = ()
        return made

    def store(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            scope = self.here
            if target.id in scope.outer:
                scope = self.scopes.get(scope.module.file, scope)
            scope.names[target.id] = value
            if isinstance(value, Thing) and not value.name:
                value.name = target.id
        elif isinstance(target, ast.Attribute):
            self._store_attribute(target, value)
        elif isinstance(target, ast.Subscript):
            self._store_item(target, value)

    def _store_attribute(self, target: ast.Attribute, value: Value) -> None:
        owner = self.value(target.value)
        name = target.attr
        if name in ("grad", "data") and ("grad" in ast.unparse(target)):
            cleared = isinstance(value, Const) and value.value is None
            self.emit("grads", target, owner.of if isinstance(owner, Parameters) else (), cleared=cleared)
        if name == "requires_grad":
            self._set_requires_grad(target, owner, value)
        if not isinstance(owner, Thing):
            return
        if isinstance(value, Thing) and not value.name:
            inside = isinstance(target.value, ast.Name) and target.value.id == "self"
            value.name = f"self.{name}" if inside and owner.kind != "module" else name
        if owner.kind == "module":
            if isinstance(value, Thing) and value.kind == "module":
                self._part(owner, name, value, target)
            elif isinstance(value, Items):
                value.kept_by, value.kept_as = owner, name
                for part in value.elements:
                    self.listed(value, part)
        old = owner.attributes.get(name)
        if old is not None and len(self.path) > len(owner.path) and type(old) is type(value):
            value = self.join([value, old], target)
        owner.attributes[name] = value

    def _part(self, owner: Thing, name: str, value: Thing, target: ast.Attribute) -> None:
        own = isinstance(target.value, ast.Name) and target.value.id == "self"
        if name in owner.attributes or (not own and owner.made is None):
            self.emit("replaced", target, (owner.number,), part=f"{owner.name or 'model'}.{name}", how="assigned")
        if not value.of:
            value.of = (owner.number,)
        value.details["part"] = name

    def _set_requires_grad(self, target: ast.Attribute, owner: Value, value: Value) -> None:
        if isinstance(owner, Tensor):
            if isinstance(value, Const) and value.value:
                lost = owner.loss or bool(owner.cut_by) or owner.attached
                changed = replace(owner, patched_at=self.line(target)) if lost else replace(owner, attached=True)
                self.store(target.value, changed)
            return
        on = owner.of if isinstance(owner, Parameters) else (owner.number,) if isinstance(owner, Thing) else ()
        self.emit("freeze", target, on)
        if isinstance(owner, Thing):
            owner.details["frozen"] = True
        for thing in self.things:
            if thing.number in on:
                thing.details["frozen"] = True

    def _store_item(self, target: ast.Subscript, value: Value) -> None:
        owner, key = self.value(target.value), self.value(target.slice)
        if isinstance(owner, Items) and isinstance(key, Const) and isinstance(key.value, str):
            if key.value in owner.keys:
                owner.elements[owner.keys.index(key.value)] = value
            elif len(owner.keys) == len(owner.elements):
                owner.keys.append(key.value)
                owner.elements.append(value)
        elif isinstance(owner, Items):
            owner.many = True
            owner.elements.append(value)
        elif (
            isinstance(owner, Thing) and owner.kind == "module" and isinstance(value, Thing) and value.kind == "module"
        ):
            self.emit("replaced", target, (owner.number,), part=ast.unparse(target)[:60], how="assigned")
            if (
                isinstance(key, Const)
                and isinstance(key.value, int)
                and -len(owner.parts) <= key.value < len(owner.parts)
            ):
                owner.parts[key.value] = value
            value.of = value.of or (owner.number,)


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _loaded(target: ast.expr) -> ast.expr:
    """An assignment's target as an expression to read."""
    if isinstance(target, ast.Name):
        return ast.copy_location(ast.Name(target.id, ast.Load()), target)
    if isinstance(target, ast.Attribute):
        return ast.copy_location(ast.Attribute(target.value, target.attr, ast.Load()), target)
    if isinstance(target, ast.Subscript):
        return ast.copy_location(ast.Subscript(target.value, target.slice, ast.Load()), target)
    return target
