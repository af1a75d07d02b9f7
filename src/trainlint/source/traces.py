"""What a program's own code does to models, optimizers and losses, in the order in which it does it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from trainlint.recording.schema import SourceLine, SourceObject, SourceTrace
from trainlint.recording.schema import Value as Plain
from trainlint.source import vocabulary as words
from trainlint.source.events import EFFORTS, Exhausted, losses_in
from trainlint.source.methods import Arguments
from trainlint.source.project import Module, Project
from trainlint.source.statements import Statements
from trainlint.source.values import Const, Items, ProjectClass, Routine, Thing, Unknown, Value

#: Code without any of these neither trains nor computes a loss.
_TELLING = (
    b"backward(", b"training_step", b"cross_entropy", b"CrossEntropyLoss", b"nll_loss", b"NLLLoss", b"BCE",
    b"zero_grad", b"optim.", b"scheduler.step", b"torch.optim",
)  # fmt: skip
#: Expressions looked at in all traces of one reading: about two seconds.
_BUDGET = 400_000
#: Hooks of a Lightning module that are called without gradients, and all that its trainer calls.
_WITHOUT_GRAD = ("validation_step", "test_step", "predict_step")
_HOOKS = ("training_step", "configure_optimizers", *_WITHOUT_GRAD)
#: Details that are data.
_PLAIN = (bool, int, float, str, tuple)
#: Parts of modules that are listed with them, at most this deep.
_DEPTH = 3


def read_traces(
    files: Iterable[str], project: Project | None = None, scripts: Collection[str] | None = None
) -> tuple[SourceTrace, ...]:
    """A trace of each script among ``files``, and of each function in them that none of these calls.

    ``scripts``: the files that are run as a program; ``None``: any may be.
    """
    tracer = Statements(project or Project())
    modules = [m for f in dict.fromkeys(files) if (m := tracer.project.module(f)) is not None and m.has(*_TELLING)]
    out: list[SourceTrace] = []
    left = _BUDGET

    def follow(entry: SourceLine, run: Callable[[], None]) -> None:
        nonlocal left
        for depth, budget in EFFORTS:
            if left <= 0:
                return
            tracer.begin(depth, budget)
            before = tracer.spent
            try:
                run()
            except (Exhausted, RecursionError):
                continue
            finally:
                left -= budget - tracer.budget + tracer.spent - before
            tracer.followed |= tracer.visited
            trace = _trace(tracer, entry)
            if trace.calls or any(o.kind == "optimizer" for o in trace.objects):
                out.append(trace)
            return

    for module in sorted(modules, key=_scripts_first):
        if scripts is None or module.file in scripts:
            follow(SourceLine(module.file, 1), partial(tracer.run_script, module.file))
    for module in modules:
        for entry, run in _functions(tracer, module):
            follow(entry, run)
    return tuple(out)


def _scripts_first(module: Module) -> tuple[bool, str]:
    return not module.has(b"__main__"), module.file


# --------------------------------------------------------------------------------------------- entries


def _functions(tracer: Statements, module: Module) -> Iterator[tuple[SourceLine, Callable[[], None]]]:
    """Functions and classes of a file that no trace has gone through so far."""
    lines = module.text.split(b"\n")
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node not in tracer.followed and _telling(lines, node):
                yield SourceLine(module.file, node.lineno, node.name), partial(_function, tracer, module, node)
        elif isinstance(node, ast.ClassDef) and _telling(lines, node):
            methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
            left = [m for m in methods if m not in tracer.followed and _telling(lines, m)]
            lightning = any(m.name == "training_step" for m in methods) and _is_lightning(tracer, module, node)
            if lightning:
                yield SourceLine(module.file, node.lineno, node.name), partial(_lightning, tracer, module, node)
            for method in left:
                if method.name == "__init__" or (lightning and method.name in _HOOKS):
                    continue
                if method in tracer.followed:
                    continue
                name = f"{node.name}.{method.name}"
                yield SourceLine(module.file, method.lineno, name), partial(_method, tracer, module, node, method.name)


def _telling(lines: Sequence[bytes], node: ast.AST) -> bool:
    text = b"\n".join(lines[getattr(node, "lineno", 1) - 1 : getattr(node, "end_lineno", 1)])
    return any(word in text for word in _TELLING)


def _function(tracer: Statements, module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    scope = tracer.module_scope(module.file)
    if scope is not None:
        tracer.here = scope
        _returned(tracer, tracer.call_routine(Routine(node, scope), _unknown(node)), node)


def _unknown(node: ast.AST) -> Arguments:
    """A call of which nothing is known, not even which defaults hold."""
    call = ast.Call(func=ast.Name("<caller>", ast.Load()), args=[], keywords=[])
    return Arguments(ast.copy_location(call, node), more=True)


def _instance(tracer: Statements, module: Module, node: ast.ClassDef) -> tuple[ProjectClass, Thing] | None:
    scope = tracer.module_scope(module.file)
    cls = scope.names.get(node.name) if scope is not None else None
    if scope is None or not isinstance(cls, ProjectClass):
        return None
    tracer.here = scope
    made = tracer.construct(cls, _unknown(node))
    if not isinstance(made, Thing):
        return None
    made.name, made.path = "self", ()
    return cls, made


def _is_lightning(tracer: Statements, module: Module, node: ast.ClassDef) -> bool:
    tracer.begin(*EFFORTS[0])
    scope = tracer.module_scope(module.file)
    cls = scope.names.get(node.name) if scope is not None else None
    return isinstance(cls, ProjectClass) and cls.is_a("LightningModule")


def _method(tracer: Statements, module: Module, node: ast.ClassDef, name: str) -> None:
    both = _instance(tracer, module, node)
    found = both[0].method(name) if both is not None else None
    if both is not None and found is not None:
        holder, method = found
        tracer.inside = int(name == "forward")
        returned = tracer.call_routine(Routine(method, tracer.class_scope(holder), both[1], holder), _unknown(method))
        tracer.inside = 0
        if name == "compute_loss" and both[0].is_a("Trainer"):
            _objective(tracer, returned, method)
        else:
            _returned(tracer, returned, method)


def _returned(tracer: Statements, value: Value, node: ast.AST) -> None:
    """Losses that whoever calls the function gets."""
    numbers = losses_in([value])
    if numbers:
        tracer.emit("returned", node, (), losses=tuple(sorted(numbers)))


def _lightning(tracer: Statements, module: Module, node: ast.ClassDef) -> None:
    """A Lightning module as its trainer uses it: built, asked for its optimizers, then stepped."""
    both = _instance(tracer, module, node)
    if both is None:
        return
    cls, made = both
    made.details["lightning"] = cls.is_a("LightningModule")
    automatic = made.attributes.get("automatic_optimization")
    made.details["automatic"] = not (isinstance(automatic, Const) and automatic.value is False)

    def hook(name: str) -> Value | None:
        found = cls.method(name)
        if found is None:
            return None
        holder, method = found
        return tracer.call_routine(Routine(method, tracer.class_scope(holder), made, holder), _unknown(method))

    hook("setup")
    hook("configure_model")
    made_by_it = hook("configure_optimizers")
    if made_by_it is not None:
        _keep_optimizers(made, made_by_it)
    hook("on_fit_start")
    hook("on_train_start")
    with tracer.block("step", node, "training_step"):
        hook("on_train_epoch_start")
        loss = hook("training_step")
        if made.details["automatic"] and loss is not None:
            _objective(tracer, loss, node)
    before, off = tracer.grad, tracer.grad_off
    tracer.grad, tracer.grad_off = False, SourceLine(module.file, node.lineno, node.name)
    for name in _WITHOUT_GRAD:
        with tracer.block("step", node, name):
            hook(name)
    tracer.grad, tracer.grad_off = before, off


def _objective(tracer: Statements, returned: Value, node: ast.AST) -> None:
    """What a trainer will call backward on."""
    loss = returned
    if isinstance(returned, Items) and returned.elements:
        keyed = "loss" in returned.keys
        loss = returned.elements[returned.keys.index("loss")] if keyed else returned.elements[0]
    tracer.backward(loss, _unknown(node), via="trainer", what="objective")


def _keep_optimizers(module: Thing, value: Value) -> None:
    """What ``self.optimizers()`` and ``self.lr_schedulers()`` will give, from what configure_optimizers returned."""
    optimizers: list[Value] = []
    schedulers: list[Value] = []

    def gather(part: Value) -> None:
        if isinstance(part, Thing) and part.kind in ("optimizer", "scheduler"):
            (optimizers if part.kind == "optimizer" else schedulers).append(part)
        elif isinstance(part, Items):
            for element in part.elements:
                gather(element)

    gather(value)
    for key, found in (("<optimizers>", optimizers), ("<schedulers>", schedulers)):
        if len(found) == 1:
            module.attributes[key] = found[0]
        elif found:
            module.attributes[key] = Items(found)
    if isinstance(value, Unknown):
        module.details["optimizers_unknown"] = True


# --------------------------------------------------------------------------------------------- facts


def _trace(tracer: Statements, entry: SourceLine) -> SourceTrace:
    """What was gathered, as plain data: the objects that calls speak of, and the parts of those."""
    wanted = {n for call in tracer.calls for n in call.on}
    wanted |= {t.number for t in tracer.things if t.kind == "optimizer"}
    wanted |= {by for call in tracer.calls if isinstance(by := call.details.get("by"), int)}
    for thing in tracer.things:
        if thing.number in wanted:
            wanted |= set(thing.of) | set(thing.details.get("alternatives", ()))
    parts: dict[int, list[Thing]] = {}
    for thing in tracer.things:
        for name, part in thing.attributes.items():
            if thing.kind == "module" and isinstance(part, Thing) and part.kind == "module":
                part.details.setdefault("part", name)
        if thing.kind == "module":
            for owner in thing.of:
                parts.setdefault(owner, []).append(thing)
    queue = [(n, 0) for n in sorted(wanted)]
    while queue:
        number, depth = queue.pop()
        wanted.add(number)
        if depth < _DEPTH and tracer.things[number].kind == "module":
            queue += [(p.number, depth + 1) for p in parts.get(number, ())]
    objects = tuple(
        SourceObject(
            t.number, t.kind, t.class_name, t.details.get("part") or t.name, t.at, t.of, t.known, _details(t, parts)
        )
        for t in tracer.things
        if t.number in wanted and t.kind in ("optimizer", "scheduler", "module", "scaler", "accelerator")
    )
    return SourceTrace(entry, tuple(tracer.blocks), objects, tuple(tracer.calls))


def _details(thing: Thing, parts: dict[int, list[Thing]]) -> dict[str, Plain]:
    out: dict[str, Plain] = {
        k: v for k, v in thing.details.items() if k != "part" and (v is None or isinstance(v, _PLAIN))
    }
    if thing.kind == "module":
        below = list(_below(thing, parts))
        out["parametric"] = any(t.class_name in words.PARAMETRIC for t in below)
        out["modal"] = any(t.class_name in words.MODAL for t in below)
        out["read"] = all(t.made is not None or _of_torch(t) for t in below)
        out["lightning"] = bool(thing.made is not None and thing.made.is_a("LightningModule"))
    if thing.kind in ("optimizer", "scheduler"):
        # Of a class of the project: what its step does is its own.
        out["foreign"] = thing.made is not None or bool(thing.details.get("foreign"))
    return out


def _of_torch(thing: Thing) -> bool:
    return bool(thing.class_name) and thing.details.get("from") is None and not thing.details.get("guessed")


def _below(thing: Thing, parts: dict[int, list[Thing]]) -> Iterator[Thing]:
    queue, seen = [thing], {thing.number}
    while queue:
        at = queue.pop()
        yield at
        for part in (*parts.get(at.number, ()), *(p for p in at.parts if isinstance(p, Thing))):
            if part.number not in seen:
                seen.add(part.number)
                queue.append(part)
