"""The ``for`` loops around a program's ``optimizer.step()``, and how often each will run its body.

A plain program says how long it will train in its loops alone: ``for epoch in range(args.epochs)``. At an optimizer's
first step the frames of the user's own code are walked outwards; the syntax tree gives the loops that enclose the line
each frame is at, and the frame's own variables the length of what they go over. Nothing is evaluated but look-ups of
names, items and attributes that run no code of the program's, and arithmetic on whole numbers.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from .core import FRAMEWORKS, Recorder, is_user_file, user_frame
from .loader_facts import batches_in
from .modules import inner_optimizer
from .patching import ImportHooks, around, wrap
from .watch import Session

#: Packages whose frames may lie between those of the program: they call a function of it once.
_CALL_ONCE = frozenset(("torch", "hydra", "accelerate", "jsonargparse"))
#: Calls that hand on what they go over, by the module they come from.
_PASS_ON = {"enumerate": "builtins", "reversed": "builtins", "sorted": "builtins", "iter": "builtins",
            "list": "builtins", "tuple": "builtins", "tqdm": "tqdm", "track": "rich"}  # fmt: skip
_FILE_CAP = 2_000_000

Unknown = None


def install(session: Session, hooks: ImportHooks) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    recorder: Recorder = session.recorder
    #: Optimizer number -> where each frame of the program stood when it was built: id of the frame -> line.
    built: dict[int, dict[int, int]] = {}
    known: dict[int, dict[str, Any]] = {}
    #: The innermost loop around the first backward, (file, line), once there was one.
    backward: list[tuple[str, int] | None] = []

    @recorder.quiet
    def constructed(result: Any, token: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        built.setdefault(recorder.optimizers.of(self), {id(f): f.f_lineno for f in _user_frames(sys._getframe(1))})

    @recorder.quiet
    def differentiated(*args: Any, **kwargs: Any) -> None:
        if not backward:
            enclosing = next(filter(None, map(_around, _user_frames(sys._getframe(1)))), [])
            backward.append((enclosing[-1][0], enclosing[-1][1].lineno) if enclosing else None)

    @recorder.quiet
    def stepping(optimizer: Any, args: Any, kwargs: Any) -> None:
        number = recorder.optimizers.of(optimizer)
        if number in known:
            return
        loops = _loops(sys._getframe(1), built.get(number, {}), optimizer)
        if loops is None:
            known[number] = {}
            return
        same = bool(loops and backward and backward[0] == (loops[-1]["at"]["file"], loops[-1]["at"]["line"]))
        known[number] = {"optimizer": number, "loops": loops, "holds_backward": same}
        recorder.emit("plan", {"training_loops": [k for k in known.values() if k]})

    wrap(torch.optim.Optimizer, "__init__", around(after=constructed))
    wrap(torch.autograd, "backward", around(before=differentiated))
    register_optimizer_step_pre_hook(stepping)


def _user_frames(frame: FrameType | None) -> list[FrameType]:
    """The frames of the program, innermost first."""
    out = []
    while (frame := user_frame(frame)) is not None:
        out.append(frame)
        frame = frame.f_back
    return out


def _loops(frame: FrameType | None, built: Mapping[int, int], optimizer: Any) -> list[dict[str, Any]] | None:
    """The loops around a step, outermost first; ``None`` when a framework's own loop may lie between them.

    A loop in whose body the optimizer itself was built (folds, seeds) is none of this training's, nor is one that goes
    over several optimizers.
    """
    out: list[dict[str, Any]] = []
    frame = user_frame(frame)
    while frame is not None:
        enclosing = _around(frame)
        line = built.get(id(frame))
        own = [(f, n) for f, n in enclosing if line is None or not _in_body(n, line)]
        kept = [(f, n) for f, n in own if not _over_optimizers(n, frame, optimizer)]
        varying = [_varies(node, [outer for _, outer in kept[:i]]) for i, (_, node) in enumerate(kept)]
        out = [_describe(f, n, frame, known=not v) for (f, n), v in zip(kept, varying, strict=True)] + out
        if len(own) < len(enclosing):
            break
        frame = frame.f_back
        while frame is not None and not is_user_file(frame.f_code.co_filename):
            if _package(frame.f_code.co_filename) in FRAMEWORKS - _CALL_ONCE:
                return None
            frame = frame.f_back
    return out


def _package(file: str) -> str:
    for marker in ("site-packages", "dist-packages"):
        _, found, tail = file.rpartition(os.sep + marker + os.sep)
        if found:
            return tail.split(os.sep, 1)[0]
    return ""


# ------------------------------------------------------------------------------------------------ syntax


@functools.lru_cache(maxsize=64)
def _tree(file: str) -> ast.Module | None:
    try:
        if os.path.getsize(file) > _FILE_CAP:
            return None
        with open(file, "rb") as f:
            return ast.parse(f.read(), filename=file)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


Loop = ast.For | ast.While | ast.AsyncFor
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _around(frame: FrameType) -> list[tuple[str, Loop]]:
    """The loops of a frame's own function around the line it is at, outermost first, with its file."""
    code = frame.f_code
    tree = _tree(code.co_filename)
    scope: ast.AST | None = tree
    if tree is not None and code.co_name != "<module>":
        scope = next(
            (n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS) and _starts(n) == code.co_firstlineno), None
        )
    if scope is None:
        return []
    out: list[tuple[str, Loop]] = []
    file = os.path.abspath(code.co_filename)
    body: list[ast.AST] = list(getattr(scope, "body", [])) if not isinstance(scope, ast.Lambda) else []
    while body:
        node = next((n for n in body if _spans(n, frame.f_lineno)), None)
        if node is None or isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            break
        if isinstance(node, (ast.For, ast.While, ast.AsyncFor)) and _in_body(node, frame.f_lineno):
            out.append((file, node))
        body = list(ast.iter_child_nodes(node))
    return out


def _starts(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    return int(min([getattr(node, "lineno", 0), *(d.lineno for d in decorators)]))


def _spans(node: ast.AST, line: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    if first is None:  # a clause of ``with``, ``except``, ``match``: its statements have lines
        return any(_spans(child, line) for child in ast.iter_child_nodes(node))
    return bool(first <= line <= (last or first))


def _in_body(node: Loop, line: int) -> bool:
    return node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0)


def _may_end_early(node: Loop) -> bool:
    """A ``break`` of this loop, or a ``return`` from within it."""
    queue: list[tuple[ast.AST, bool]] = [(n, True) for n in node.body]
    while queue:
        inner, breaks = queue.pop()
        if isinstance(inner, (*_FUNCTIONS, ast.ClassDef)):
            continue
        if isinstance(inner, ast.Return) or (isinstance(inner, ast.Break) and breaks):
            return True
        nested = isinstance(inner, (ast.For, ast.While, ast.AsyncFor))
        for child in ast.iter_child_nodes(inner):
            # A break in the else of an inner loop is one of this loop's.
            own = breaks and not (nested and child in getattr(inner, "body", []))
            queue.append((child, own))
    return False


def _over_optimizers(node: Loop, frame: FrameType, optimizer: Any) -> bool:
    """Whether a loop's variable is the optimizer that steps, or a wrapper around it."""
    if not isinstance(node, ast.For):
        return False
    names = [n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)]
    bound = [frame.f_locals[name] for name in names if name in frame.f_locals]
    return any(value is optimizer or inner_optimizer(value) is optimizer for value in bound)


def _varies(node: Loop, around: list[Loop]) -> bool:
    """Whether what a loop goes over is made from the variable of a loop around it (a curriculum)."""
    if not isinstance(node, ast.For):
        return False
    made_from = _names(node.iter)
    targets: set[str] = set()
    for outer in around:
        targets |= _names(getattr(outer, "target", None))
        for inner in ast.walk(outer):
            assigned = isinstance(inner, ast.Assign) and made_from & {n for t in inner.targets for n in _names(t)}
            if isinstance(inner, ast.Assign) and assigned:
                made_from |= _names(inner.value)
    return bool(made_from & targets)


def _names(node: ast.AST | None) -> set[str]:
    """Variables in an expression; those in formatted text only describe."""
    if node is None or isinstance(node, ast.JoinedStr):
        return set()
    own = {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*(_names(child) for child in ast.iter_child_nodes(node)))


def _describe(file: str, node: Loop, frame: FrameType, *, known: bool) -> dict[str, Any]:
    count: float | None = Unknown
    over = "while"
    if isinstance(node, ast.For):
        count = _length(node.iter, frame) if known else Unknown
        over = ast.unparse(node.iter)
    return {
        "at": {
            "file": file,
            "line": node.lineno,
            "function": getattr(frame.f_code, "co_qualname", frame.f_code.co_name),
        },
        "over": over if len(over) <= 80 else over[:77] + "...",
        "iterations": int(count) if count is not None and math.isfinite(count) else None,
        "may_end_early": _may_end_early(node),
    }


# ------------------------------------------------------------------------------------------------ values


def _length(node: ast.expr, frame: FrameType) -> float | None:
    """How many items an expression gives when it is gone over once; infinity for endless ones."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return None if any(isinstance(e, ast.Starred) for e in node.elts) else len(node.elts)
    if not isinstance(node, ast.Call):
        return _size(_value(node, frame))
    function = _value(node.func, frame)
    name = getattr(function, "__name__", "")
    module = str(getattr(function, "__module__", "")).split(".")[0]
    if function is range or (name == "trange" and module == "tqdm"):
        numbers = [_value(a, frame) for a in node.args]
        if numbers and all(type(n) is int for n in numbers):
            return len(range(*numbers))
        return Unknown
    lengths = [_length(a, frame) for a in node.args]
    if not lengths:
        return Unknown
    if function is zip:
        return Unknown if None in lengths else min(n for n in lengths if n is not None)
    if name in _PASS_ON and module == _PASS_ON[name]:
        return lengths[0]
    if module == "itertools" and name in ("cycle", "count", "repeat"):
        return math.inf
    if module == "itertools" and name == "islice" and len(node.args) == 2:
        stop = _value(node.args[1], frame)
        return min(lengths[0], stop) if lengths[0] is not None and type(stop) is int else Unknown
    return Unknown


def _size(value: Any) -> float | None:
    """Items of an object whose length can be asked without running code of the program's."""
    import torch

    if type(value) in (list, tuple, dict, range, str, set, frozenset):
        return len(value)
    if isinstance(value, torch.Tensor) and value.ndim:
        return int(value.shape[0])
    if isinstance(value, torch.utils.data.DataLoader):
        return batches_in(value)
    if type(value).__module__.split(".")[0] == "tqdm":
        total = vars(value).get("total")
        return total if isinstance(total, (int, float)) else Unknown
    return Unknown


def _value(node: ast.expr, frame: FrameType) -> Any:
    """The object of a plain look-up or a sum of whole numbers; ``None`` for everything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        for scope in (frame.f_locals, frame.f_globals, frame.f_builtins):
            if node.id in scope:
                return scope[node.id]
        return None
    if isinstance(node, ast.Attribute):
        return _attribute(_value(node.value, frame), node.attr)
    if isinstance(node, ast.Subscript):
        holder, key = _value(node.value, frame), _value(node.slice, frame)
        if isinstance(holder, dict) and isinstance(key, (str, int)):
            return dict.get(holder, key)
        if type(holder) in (list, tuple) and type(key) is int and -len(holder) <= key < len(holder):
            return holder[key]
        return _attribute(holder, key) if isinstance(key, str) else None
    if isinstance(node, ast.BinOp):
        return _arithmetic(node.op, _value(node.left, frame), _value(node.right, frame))
    if isinstance(node, ast.Call) and not node.keywords:
        function = _value(node.func, frame)
        if function is len and len(node.args) == 1:
            size = _length(node.args[0], frame)
            return int(size) if size is not None and math.isfinite(size) else None
        numbers = [_value(a, frame) for a in node.args]
        if function in (int, min, max, abs, round, math.ceil, math.floor) and numbers:
            if all(type(n) in (int, float) for n in numbers):
                return function(*numbers)
    return None


def _attribute(holder: Any, name: str) -> Any:
    """An attribute that is stored, not computed: of an instance, a module or a class, or a key of a config node."""
    try:
        own = vars(holder)
    except TypeError:
        return None
    if name in own:
        return own[name]
    content = own.get("_content")  # OmegaConf keeps its nodes there
    if isinstance(content, dict) and name in content:
        node = vars(content[name])
        return node.get("_val", content[name])
    for cls in type(holder).__mro__:
        if name in vars(cls):
            found = vars(cls)[name]
            return found if type(found) in (int, float, str, list, tuple, dict) else None
    return None


def _arithmetic(operator: ast.operator, left: Any, right: Any) -> Any:
    if type(left) not in (int, float) or type(right) not in (int, float):
        return None
    if isinstance(operator, ast.Add):
        return left + right
    if isinstance(operator, ast.Sub):
        return left - right
    if isinstance(operator, ast.Mult):
        return left * right
    if right and isinstance(operator, ast.FloorDiv):
        return left // right
    if right and isinstance(operator, ast.Div):
        return left / right
    return None
