"""What calls do: the project's own functions and classes are followed, torch's are known by name."""

from __future__ import annotations

import ast

from trainlint.recording.schema import SourceLine
from trainlint.source import vocabulary as words
from trainlint.source.events import FORWARD_DEPTH, attachment, cut
from trainlint.source.libraries import Libraries
from trainlint.source.methods import Arguments, owners_of
from trainlint.source.values import (
    Const,
    Items,
    Library,
    Parameters,
    ProjectClass,
    Routine,
    Scope,
    Super,
    Tensor,
    Thing,
    Unknown,
    Value,
)

#: Decorators that turn gradients off.
_NO_GRAD = ("no_grad", "inference_mode")


class Calls(Libraries):
    """Calls of functions and classes."""

    def value(self, node: ast.expr) -> Value:
        raise NotImplementedError

    def run_body(self, routine: Routine, scope: Scope) -> Value:
        raise NotImplementedError

    def attribute(self, owner: Value, name: str, node: ast.expr) -> Value:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- the call

    def call(self, node: ast.Call) -> Value:
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            if isinstance(owner, Thing) and owner.kind == "module" and owner.made is None:
                # Of a model whose code is not read, a name that was never a part is a method.
                if node.func.attr not in owner.attributes:
                    return self.method_of_thing(owner, node.func.attr, self.arguments(node))
            found = self.attribute(owner, node.func.attr, node.func)
            given = self.arguments(node)
            if isinstance(found, (Routine, ProjectClass, Library)):
                return self.call_value(found, given)
            if isinstance(found, Thing) and found is not owner:
                return self.call_value(found, given)
            return self.call_method(owner, node.func.value, node.func.attr, given)
        function = self.value(node.func)
        return self.call_value(function, self.arguments(node))

    def arguments(self, node: ast.Call) -> Arguments:
        positional: list[Value] = []
        more = False
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                inner = self.value(arg.value)
                if isinstance(inner, Items) and not inner.many:
                    positional += inner.elements
                else:
                    more = True
                    positional.append(inner)
            else:
                positional.append(self.value(arg))
        named: dict[str, Value] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value)
            if keyword.arg is None:
                more = True
                if isinstance(value, Items):
                    named.update({k: v for k, v in zip(value.keys, value.elements, strict=False) if k})
            else:
                named[keyword.arg] = value
        return Arguments(node, positional, named, more)

    def call_method(self, owner: Value, base: ast.expr, name: str, given: Arguments) -> Value:
        if isinstance(owner, Thing):
            return self.method_of_thing(owner, name, given)
        if isinstance(owner, Tensor):
            return self.method_of_tensor(owner, name, given)
        if isinstance(owner, Const):
            return Unknown()
        if isinstance(owner, Items):
            return self._of_items(owner, name, given)
        if isinstance(owner, Super):
            return self._of_super(owner, name, given)
        if isinstance(owner, Parameters):
            if name == "requires_grad_":
                self.emit("freeze", given.node, owner.of)
            elif name.endswith("_"):
                self.emit("grads", given.node, owner.of)
            return owner
        return self.method_of_unknown(owner if isinstance(owner, Unknown) else Unknown(), base, name, given)

    def call_value(self, function: Value, given: Arguments) -> Value:
        if isinstance(function, Routine):
            return self.call_routine(function, given)
        if isinstance(function, ProjectClass):
            return self.construct(function, given)
        if isinstance(function, Library):
            return self.call_library(function.name, given)
        if isinstance(function, Thing):
            if function.kind == "module":
                return self.call_module(function, given)
            if function.kind == "loss":
                named = dict(function.attributes)
                named.update(given.named)
                merged = Arguments(given.node, given.positional, named, given.more)
                return self.loss(function.class_name, merged)
            if function.made is not None:
                method = self.attribute(function, "__call__", given.node.func)
                if isinstance(method, Routine):
                    return self.call_routine(method, given)
            if function.kind == "accelerator":
                return Unknown()
            self.opaque([function, *given.all], given.node, function.name)
            return Unknown(holds=tuple(given.all))
        name = function.name if isinstance(function, Unknown) else ""
        func = given.node.func
        if words.MODEL_NAME.match(name.rpartition(".")[2]) and isinstance(func, (ast.Name, ast.Attribute)):
            if isinstance(function, Unknown) and not function.holds:
                return self.call_module(self.assume("module", func), given)
        holds = function.holds if isinstance(function, Unknown) else ()
        self.opaque([*given.all, *(v for v in holds if not isinstance(v, Tensor))], given.node, name)
        return Unknown(f"{name}()", tuple(given.all))

    # ------------------------------------------------------------------------------------------- the project's own

    def call_routine(self, routine: Routine, given: Arguments) -> Value:
        """Follow a function of the project."""
        node = routine.node
        deep = self.inside and len(self.active) >= self.floor + FORWARD_DEPTH
        if node in self.active or len(self.active) >= self.depth or deep:
            self.opaque(given.all, given.node, routine.name)
            return Unknown(f"{routine.name}()", tuple(given.all))
        scope = Scope(routine.scope.module, parent=routine.scope, function=self.qualified(routine))
        self.bind(routine, given, scope)
        before, grad, off, path = self.here, self.grad, self.grad_off, self.path
        self.active.append(node)
        self.visited.add(node)
        if not isinstance(node, ast.Lambda) and any(self.turns_grad_off(d) for d in node.decorator_list):
            self.grad, self.grad_off = False, SourceLine(scope.module.file, node.lineno, scope.function)
        self.here = scope
        try:
            return self.run_body(routine, scope)
        finally:
            self.here, self.grad, self.grad_off, self.path = before, grad, off, path
            self.active.pop()

    def turns_grad_off(self, node: ast.expr) -> bool:
        name = self.value(node.func if isinstance(node, ast.Call) else node)
        return isinstance(name, Library) and name.name.rpartition(".")[2] in _NO_GRAD

    @staticmethod
    def qualified(routine: Routine) -> str:
        return f"{routine.holder.node.name}.{routine.name}" if routine.holder is not None else routine.name

    def bind(self, routine: Routine, given: Arguments, scope: Scope) -> None:
        arguments = routine.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        if routine.owner is not None and names:
            scope.names[names.pop(0)] = routine.owner
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        defaults.update({a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=False) if d})
        for name, value in zip(names, given.positional, strict=False):
            scope.names[name] = value
        if arguments.vararg is not None:
            scope.names[arguments.vararg.arg] = Items(list(given.positional[len(names) :]), many=given.more)
        known = {*names, *(a.arg for a in arguments.kwonlyargs)}
        rest = {k: v for k, v in given.named.items() if k not in known}
        scope.names.update({k: v for k, v in given.named.items() if k in known})
        if arguments.kwarg is not None:
            scope.names[arguments.kwarg.arg] = Items(list(rest.values()), list(rest), many=True)
        for name in known:
            if name in scope.names:
                continue
            default = defaults.get(name)
            # What may come through *args or **kwargs is not known to be the default.
            constant = isinstance(default, ast.Constant) and not given.more
            scope.names[name] = (
                Const(default.value) if constant and isinstance(default, ast.Constant) else Unknown(name)
            )

    def construct(self, cls: ProjectClass, given: Arguments) -> Value:
        """An object of a class of the project: its constructor is followed."""
        kind = kind_of(cls)
        made = self.thing(kind, cls.node.name, given.node)
        made.made = cls
        if kind == "optimizer":
            made.of, made.details["understood"] = owners_of(given.get(0, "params"))
            self.emit("built", given.node, (made.number,))
        elif kind == "scheduler":
            first = given.get(0, "optimizer")
            made.of = (first.number,) if isinstance(first, Thing) else ()
        self.spend(given.all, given.node, cls.node.name)
        found = cls.method("__init__")
        if found is not None:
            holder, node = found
            # Building a module computes at most: like a forward, it neither steps nor clears.
            if not self.inside:
                self.floor = len(self.active)
            self.inside += kind == "module"
            try:
                self.call_routine(Routine(node, self.class_scope(holder), made, holder), given)
            finally:
                self.inside -= kind == "module"
        elif kind == "instance":
            made.attributes.update(given.named)
            for field, value in zip(annotated_fields(cls.node), given.positional, strict=False):
                made.attributes[field] = value
        return made

    def class_scope(self, cls: ProjectClass) -> Scope:
        file = cls.module.file
        return self.scopes.get(file) or self.lasting.get(file) or Scope(cls.module)

    def call_module(self, thing: Thing, given: Arguments) -> Value:
        thing.details["used"] = True
        if self.grad is not False:
            thing.details["trained"] = True
        if not self.inside:
            self.floor = len(self.active)
            self.emit("forward", given.node, (thing.number,), grad=self.grad)
        self.inside += 1
        try:
            out = self._forward(thing, given)
        finally:
            self.inside -= 1
        if self.grad is False:
            return self._without_grad(out)
        if isinstance(out, Unknown):
            return Tensor(attached=None if thing.details.get("frozen") or self.grad is None else True)
        return out

    def _without_grad(self, out: Value) -> Value:
        if isinstance(out, Items):
            return Items([self._without_grad(e) for e in out.elements], list(out.keys), out.many)
        if isinstance(out, Tensor):
            return cut(out, "no_grad", self.grad_off)
        return Tensor(attached=False, cut_by="no_grad", cut_at=self.grad_off)

    def _forward(self, thing: Thing, given: Arguments) -> Value:
        if thing.made is not None:
            found = thing.made.method("forward")
            if found is not None:
                holder, node = found
                return self.call_routine(Routine(node, self.class_scope(holder), thing, holder), given)
            return Unknown()
        name = thing.class_name
        first = given.positional[0] if given.positional else Unknown()
        if name == "Sequential":
            for part in thing.parts:
                if not isinstance(part, Thing):
                    return Unknown()
                first = self._chained(part, first, given)
            return first if thing.parts else Unknown()
        return self._of_torch_module(thing, first, given)

    def _chained(self, part: Thing, first: Value, given: Arguments) -> Value:
        if part.kind != "module":
            return Unknown()
        return self.call_module(part, Arguments(given.node, [first]))

    def _of_torch_module(self, thing: Thing, first: Value, given: Arguments) -> Value:
        name = thing.class_name
        attached = attachment(given.all)
        if name in words.ACTIVATIONS:
            return Tensor(words.ACTIVATIONS[name], thing.at, attached)
        if name in words.TRANSPARENT_MODULES:
            return first
        if name in words.PARAMETRIC:
            attached = None if thing.details.get("frozen") else True
            out = Tensor(name if name in words.LINEAR else "", self.line(given.node), attached)
            return Items([out, Unknown()]) if name in ("LSTM", "GRU", "RNN", "MultiheadAttention") else out
        return Unknown()

    # ------------------------------------------------------------------------------------------- Python

    def _of_super(self, owner: Super, name: str, given: Arguments) -> Value:
        for above in owner.above.lineage()[1:]:
            if isinstance(above, ProjectClass) and name in above.methods:
                routine = Routine(above.methods[name], self.class_scope(above), owner.owner, above)
                return self.call_routine(routine, given)
        if isinstance(owner.owner, Thing) and name not in ("__init__", "__setattr__"):
            return self.method_of_thing(owner.owner, name, given)
        return Unknown()

    def _of_items(self, items: Items, name: str, given: Arguments) -> Value:
        first = given.get(0)
        if name in ("append", "add", "extend", "insert") and given.positional:
            last = given.positional[-1]
            added = last.elements if name == "extend" and isinstance(last, Items) else [last]
            items.elements += added
            for part in added:
                self.listed(items, part)
            items.many = items.many or bool(self.path) or not isinstance(last, (Thing, Items, Parameters))
            return Unknown()
        if name == "get" and isinstance(first, Const) and first.value in items.keys:
            return items.elements[items.keys.index(first.value)]
        if name in ("items", "values"):
            if name == "items":
                return Items([Items([Unknown(), e]) for e in items.elements], many=items.many)
            return Items(list(items.elements), many=items.many)
        if name == "step" or name == "zero_grad":
            self.opaque([items], given.node, name)
        return Unknown(holds=(items,))


def kind_of(cls: ProjectClass) -> str:
    """What an object of the class is for training."""
    if cls.is_a("Module", "PreTrainedModel") and not cls.is_a("DataModule"):
        return "module"
    if cls.is_a("Optimizer", *(f".{o}" for o in words.OPTIMIZERS)):
        return "optimizer"
    if cls.is_a("LRScheduler", "_LRScheduler", "LambdaLR"):
        return "scheduler"
    return "instance"


def annotated_fields(node: ast.ClassDef) -> list[str]:
    return [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
