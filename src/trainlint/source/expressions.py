"""What expressions stand for."""

from __future__ import annotations

import ast
from dataclasses import replace

from trainlint.source import vocabulary as words
from trainlint.source.calls import Calls
from trainlint.source.events import Exhausted, attachment, cut, losses_in
from trainlint.source.libraries import trainable_only
from trainlint.source.methods import Arguments
from trainlint.source.values import (
    Const,
    Deferred,
    Items,
    Library,
    Method,
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


class Expressions(Calls):
    """Values of expressions; what they call is followed on the way."""

    def module_scope(self, file: str) -> Scope | None:
        raise NotImplementedError

    def bind_target(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    def value(self, node: ast.expr) -> Value:
        self.budget -= 1
        if self.budget < 0:
            raise Exhausted
        read = getattr(self, f"_{type(node).__name__.lower()}", None)
        if read is not None:
            result: Value = read(node)
            return result
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return Unknown()

    # ------------------------------------------------------------------------------------------- names

    def _constant(self, node: ast.Constant) -> Value:
        return Const(node.value)

    def _name(self, node: ast.Name) -> Value:
        found = self.here.find(node.id)
        if isinstance(found, Deferred):
            found = self.of_module(found.file, found.name)
            self.here.names[node.id] = found
        if found is not None:
            return found
        return Library(f"builtins.{node.id}") if node.id in _BUILTINS else Unknown(node.id)

    def _attribute(self, node: ast.Attribute) -> Value:
        owner = self.value(node.value)
        found = self.attribute(owner, node.attr, node)
        if isinstance(found, Routine) and isinstance(owner, Thing) and is_property(found.node):
            call = ast.copy_location(ast.Call(func=node, args=[], keywords=[]), node)
            return self.call_routine(found, Arguments(call))
        return found

    def attribute(self, owner: Value, name: str, node: ast.expr) -> Value:
        if isinstance(owner, Library):
            return Library(f"{owner.name}.{name}")
        if isinstance(owner, ProjectModule):
            return self.of_module(owner.file, name)
        if isinstance(owner, Thing):
            return self._of_thing(owner, name)
        if isinstance(owner, ProjectClass):
            found = owner.method(name)
            if found is None:
                return Unknown(name)
            static = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in found[1].decorator_list)
            return Routine(found[1], self.class_scope(found[0]), owner if static else None, found[0])
        if isinstance(owner, Tensor):
            return self._of_tensor(owner, name, node)
        if isinstance(owner, Parameters):
            return Unknown(".grad") if name == "grad" else owner if name == "data" else Unknown(name)
        if isinstance(owner, Items) and name in owner.keys and not isinstance(owner.elements[0], Parameters):
            return owner.elements[owner.keys.index(name)]
        if isinstance(owner, Unknown):
            holds = tuple(v for v in owner.holds if not isinstance(v, (Routine, Library)))
            return Unknown(f"{owner.name}.{name}" if owner.name else name, holds)
        return Method(owner, name)

    def of_module(self, file: str, name: str) -> Value:
        scope = self.module_scope(file)
        found = scope.names.get(name) if scope is not None else None
        for _ in range(_HOPS):
            if scope is None or not isinstance(found, Deferred):
                break
            onward = self.module_scope(found.file)
            found = onward.names.get(found.name) if onward is not None else None
        if found is not None and not isinstance(found, Deferred):
            return found
        inner = self.project.resolve(name, file, 1) if file.endswith("__init__.py") else None
        return ProjectModule(inner) if inner is not None else Unknown(name)

    def _of_thing(self, thing: Thing, name: str) -> Value:
        found = thing.attributes.get(name)
        if found is not None:
            if isinstance(found, Const) and thing.made is not None and thing.made.assigned.get(name, 0) > 1:
                return Unknown(f"{thing.name}.{name}")
            return found
        if thing.made is not None:
            method = thing.made.method(name)
            if method is not None:
                holder, node = method
                if thing.kind in ("optimizer", "scheduler") and name in _UPDATES:
                    return Method(thing, name)
                if name == "forward" and thing.kind == "module" and not self.inside:
                    return Method(thing, name)
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
                return Routine(node, self.class_scope(holder), None if static else thing, holder)
        if thing.kind == "module" and name == "module":
            return thing
        if thing.kind == "module" and thing.made is None and not name.startswith("_") and not is_method(name):
            # A part of a model from elsewhere.
            part = self.thing("module", "", ast.Pass(), name=name)
            part.at, part.of, part.known, part.path = thing.at, (thing.number,), False, thing.path
            part.details["guessed"] = True
            thing.attributes[name] = part
            return part
        return Unknown(f"{thing.name or thing.class_name}.{name}")

    def _of_tensor(self, tensor: Tensor, name: str, node: ast.expr) -> Value:
        if name == "data":
            return cut(tensor, "data", self.line(node))
        if name == "requires_grad" and tensor.attached is not None:
            return Const(tensor.attached)
        if name in ("grad", "shape", "device", "dtype", "size"):
            return Unknown(f".{name}")
        if name in words.SAME:
            return tensor
        if name == "loss":
            return Tensor(attached=tensor.attached, cut_by=tensor.cut_by, cut_at=tensor.cut_at, role="model", loss=True)
        return replace(tensor, made_by="", role="", loss="loss" in name)

    def _subscript(self, node: ast.Subscript) -> Value:
        owner = self.value(node.value)
        key = self.value(node.slice)
        if isinstance(owner, Items):
            index = key.value if isinstance(key, Const) else None
            if isinstance(index, str) and index in owner.keys:
                return owner.elements[owner.keys.index(index)]
            if isinstance(index, int) and not owner.keys and -len(owner.elements) <= index < len(owner.elements):
                return owner.elements[index]
            if owner.many and len(owner.elements) == 1:
                return owner.elements[0]
            return Unknown(ast.unparse(node)[:60] if isinstance(node.slice, ast.Constant) else "", (owner,))
        if isinstance(owner, Tensor):
            return replace(owner, loss=True) if isinstance(key, Const) and key.value == "loss" else owner
        if isinstance(owner, Thing) and isinstance(key, Const) and isinstance(key.value, int):
            if -len(owner.parts) <= key.value < len(owner.parts):
                return owner.parts[key.value]
        if isinstance(owner, Parameters):
            return Unknown()
        named = owner.name if isinstance(owner, Unknown) else ""
        return Unknown(f"{named}[{key.value!r}]" if isinstance(key, Const) else named, (owner,))

    # ------------------------------------------------------------------------------------------- collections

    def _tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        elements: list[Value] = []
        many = False
        for element in node.elts:
            if isinstance(element, ast.Starred):
                inner = self.value(element.value)
                if isinstance(inner, Items):
                    elements += inner.elements
                    many = many or inner.many
                else:
                    elements.append(inner)
                    many = many or not isinstance(inner, Parameters)
            else:
                elements.append(self.value(element))
        return Items(elements, many=many)

    _list = _set = _tuple

    def _dict(self, node: ast.Dict) -> Value:
        elements, keys = [], []
        many = False
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                many = True
                self.value(value)
                continue
            named = self.value(key)
            keys.append(named.value if isinstance(named, Const) and isinstance(named.value, str) else None)
            elements.append(self.value(value))
        return Items(elements, list(keys), many)

    def _listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        before = dict(self.here.names)
        try:
            iterated: Value = Unknown()
            conditions: list[ast.expr] = []
            for generator in node.generators:
                iterated = self.value(generator.iter)
                self.bind_element(generator.target, iterated, generator.iter)
                conditions += generator.ifs
                for condition in generator.ifs:
                    self.value(condition)
            with self.block("for", node):
                element = self.value(node.elt)
        finally:
            self.here.names = before
        if isinstance(element, Parameters) and element.one:
            whole = element.whole and all(trainable_only(c) for c in conditions)
            once = isinstance(node, ast.GeneratorExp)
            return Parameters(element.of, whole, once=once, taken_at=self.line(node))
        if isinstance(element, Parameters) and not conditions:
            return element
        return Items([element], many=True)

    _setcomp = _generatorexp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> Value:
        before = dict(self.here.names)
        try:
            for generator in node.generators:
                self.bind_element(generator.target, self.value(generator.iter), generator.iter)
            return Items([self.value(node.value)], [None], many=True)
        finally:
            self.here.names = before

    def bind_element(self, target: ast.expr, iterated: Value, source: ast.expr) -> None:
        """Give ``target`` what going through ``iterated`` yields."""
        element: Value = Unknown()
        if isinstance(iterated, Parameters):
            one = Parameters(iterated.of, iterated.whole, one=True, taken_at=iterated.taken_at)
            element = Items([Unknown(), one]) if iterated.named else one
            if iterated.once and iterated.spent_at is None:
                iterated.spent_at, iterated.spent_by = self.line(source), "a loop"
        elif isinstance(iterated, Items) and iterated.elements:
            if all(isinstance(e, Parameters) for e in iterated.elements):
                of = tuple(dict.fromkeys(n for e in iterated.elements if isinstance(e, Parameters) for n in e.of))
                element = Parameters(of, one=True)
            else:
                element = iterated.elements[-1]
        elif isinstance(iterated, Thing) and iterated.kind == "module":
            self._use_parts(iterated)
            element = iterated.parts[-1] if iterated.parts else Unknown(holds=(iterated,))
        elif isinstance(iterated, Unknown):
            text = ast.unparse(source).lower()
            if any(word in text for word in ("load", "batch", "data")) and not iterated.holds:
                element = Tensor(attached=False)
            else:
                element = Unknown(holds=iterated.holds)
                if iterated.name == "builtins.enumerate" and iterated.holds:
                    inner = iterated.holds[0]
                    if isinstance(inner, Items) and inner.elements:
                        self.bind_target(target, Items([Unknown(), inner.elements[-1]]))
                        return
                    if isinstance(inner, Thing):
                        self._use_parts(inner)
                    data = "load" in text or "data" in text
                    part = inner.parts[-1] if isinstance(inner, Thing) and inner.parts else None
                    element = Items([Unknown(), part or (Tensor(attached=False) if data else Unknown())])
        self.bind_target(target, element)

    def _use_parts(self, thing: Thing) -> None:
        for part in thing.parts:
            if isinstance(part, Thing):
                part.details["used"] = True

    # ------------------------------------------------------------------------------------------- operators

    def _binop(self, node: ast.BinOp) -> Value:
        return self.combined(self.value(node.left), node.op, self.value(node.right), node)

    def combined(self, left: Value, op: ast.operator, right: Value, node: ast.AST) -> Value:
        if isinstance(op, ast.Add):
            lists = (Items, Parameters)
            if isinstance(left, lists) and isinstance(right, lists):
                parts = [*(left.elements if isinstance(left, Items) else [left]),
                         *(right.elements if isinstance(right, Items) else [right])]  # fmt: skip
                many = any(v.many for v in (left, right) if isinstance(v, Items))
                return Items(parts, many=many)
        if not (isinstance(left, Tensor) or isinstance(right, Tensor)):
            if isinstance(left, Const) and isinstance(right, Const):
                return _arithmetic(left, op, right)
            return Unknown(holds=tuple(v for v in (left, right) if not isinstance(v, Const)))
        tensors = [v for v in (left, right) if isinstance(v, Tensor)]
        attached = attachment([left, right])
        loss = any(t.loss for t in tensors)
        if isinstance(op, (ast.Add, ast.Sub)):
            roles = {t.role for t in tensors}
            others = [v for v in (left, right) if not isinstance(v, Tensor)]
            zero = all(isinstance(v, Const) and v.value == 0 for v in others)
            role = roles.pop() if len(roles) == 1 and (zero or not others) else "scaled" if loss else ""
        else:
            role = "scaled" if loss or any(t.role for t in tensors) else ""
        first = tensors[0]
        by = ""
        if isinstance(op, ast.Div) and isinstance(left, Tensor) and isinstance(right, Tensor):
            by = "softmax" if (left.made_by, right.made_by) == ("exp", "sum of exp") else ""
        out = Tensor(by, self.line(node), attached, role, loss=loss, losses=losses_in([left, right]))
        if self.grad is False:
            return cut(out, "no_grad", self.grad_off)
        return cut(out, first.cut_by, first.cut_at) if attached is False else out

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(value, Tensor):
            return replace(value, made_by="", role=value.role)
        if isinstance(value, Const):
            if isinstance(node.op, ast.Not):
                return Const(not value.value)
            if isinstance(node.op, ast.USub) and isinstance(value.value, (int, float)):
                return Const(-value.value)
        return Unknown()

    def _boolop(self, node: ast.BoolOp) -> Value:
        values = [self.value(v) for v in node.values]
        truths = [truth(v) for v in values]
        if isinstance(node.op, ast.And):
            return Const(False) if False in truths else Const(True) if None not in truths else Unknown()
        if True in truths:
            return values[truths.index(True)] if truths.index(True) == 0 else Unknown()
        return Const(False) if None not in truths else Unknown()

    def _compare(self, node: ast.Compare) -> Value:
        left, right = self.value(node.left), self.value(node.comparators[0])
        for other in node.comparators[1:]:
            self.value(other)
        op = node.ops[0]
        if len(node.ops) == 1 and isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            same: bool | None = None
            if isinstance(left, Const) and isinstance(right, Const):
                same = bool(left.value == right.value)
            elif isinstance(right, Const) and right.value is None and isinstance(left, (Thing, Tensor, Items)):
                same = False
            if same is not None:
                return Const(same if isinstance(op, (ast.Is, ast.Eq)) else not same)
        return Unknown()

    def _ifexp(self, node: ast.IfExp) -> Value:
        decided = truth(self.value(node.test))
        if decided is not None:
            return self.value(node.body if decided else node.orelse)
        return self.join([self.value(node.body), self.value(node.orelse)], node)

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind_target(node.target, value)
        return value

    def _lambda(self, node: ast.Lambda) -> Value:
        return Routine(node, self.here)

    def _await(self, node: ast.Await) -> Value:
        return self.value(node.value)

    def _call(self, node: ast.Call) -> Value:
        return self.call(node)


#: Files that a name may be handed through (``from .a import b`` in ``__init__.py``).
_HOPS = 8
_BUILTINS = frozenset(
    ("print len float int str repr isinstance hasattr range enumerate zip type id sum min max abs round format sorted "
     "list tuple dict set all any bool next iter vars dir getattr setattr issubclass callable open super reversed map "
     "filter hash input divmod pow object property staticmethod classmethod Exception ValueError RuntimeError").split()
)  # fmt: skip

#: Methods whose effect is known whatever their code: an optimizer of the project is one all the same.
_UPDATES = ("step", "zero_grad", "add_param_group", "load_state_dict")
#: Attributes of a foreign module that are methods or plain values, not parts.
_NOT_PARTS = frozenset(
    ("config", "training", "device", "dtype", "module", "parameters", "named_parameters", "state_dict", "train", "eval",
     "forward", "buffers", "children", "modules", "apply", "name", "num_features", "num_classes", "default_cfg",
     "generate", "hparams", "trainer", "current_epoch", "global_step", "logger", "automatic_optimization")
)  # fmt: skip


def is_method(name: str) -> bool:
    """Whether an attribute of a module from elsewhere is rather a method or a setting than a part."""
    return name in _NOT_PARTS or name in words.SAME_THING or "_" in name and name.split("_")[0] in _VERBS


_VERBS = frozenset(
    ("get", "set", "load", "save", "push", "register", "named", "requires", "zero", "add", "remove", "is", "enable",
     "disable", "resize", "freeze", "unfreeze", "print", "num", "gradient", "from", "reset", "prepare", "init", "clip",
     "manual", "log", "lr", "configure", "forward", "active", "merge", "tie", "compute", "no")
)  # fmt: skip


def is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", ())
    return any(
        (isinstance(d, ast.Name) and d.id in ("property", "cached_property"))
        or (isinstance(d, ast.Attribute) and d.attr == "cached_property")
        for d in decorators
    )


def truth(value: Value) -> bool | None:
    """Whether a condition holds, when it is known."""
    if isinstance(value, Const):
        return bool(value.value)
    if isinstance(value, (Thing, Tensor)) and not (isinstance(value, Tensor)):
        return True
    return None


def _arithmetic(left: Const, op: ast.operator, right: Const) -> Value:
    a, b = left.value, right.value
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    try:
        if isinstance(op, ast.Add) and (numbers or (isinstance(a, str) and isinstance(b, str))):
            return Const(a + b)
        if numbers and isinstance(op, ast.Mult):
            return Const(a * b)
        if numbers and isinstance(op, ast.Div):
            return Const(a / b)
        if numbers and isinstance(op, ast.Sub):
            return Const(a - b)
    except (ArithmeticError, ValueError):
        pass
    return Unknown()
