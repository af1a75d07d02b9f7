"""Whether one sample of the batch changes what the model makes of another.

With the model in eval (no dropout, batch norm by its running statistics) the forward is repeated on a few samples, then
with one of them replaced by another. Where the output of a third changes, the modules' outputs are compared in order.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from .core import is_user_file
from .replay_calls import Unfit, tensors
from .replay_trace import Path, following, replayed_line

#: Samples that the forward is repeated with.
SAMPLES = 8
#: Elements kept of one module's output per sample, and modules.
ELEMENTS = 1024
MODULES = 1500
FUNCTIONS = 3000
#: A change of another sample counts when it is this much of the change of the replaced sample's own output, and of the
#: output's size; what repeating the very same forward changes is taken off.
RATIO = 1e-3
SIZE = 1e-5
#: Other random states in which mixed samples are looked at, and the part of the largest change that counts as strong.
STATES = 2
STRONG = 0.1
#: Layers that take sequences; ``batch_first`` says where their samples are.
SEQUENCE = ("MultiheadAttention", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer",
            "TransformerDecoderLayer", "Transformer", "LSTM", "GRU", "RNN")  # fmt: skip


def cut(value: Any, samples: int, keep: int, replaced: tuple[int, int] | None) -> Any:
    """Nested arguments with the first ``keep`` samples; sample ``replaced[0]`` is a copy of ``replaced[1]``.

    Raises:
        Unfit: something has one entry per sample and is not a tensor.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != samples:
            return value
        part = value[:keep]
        if replaced is not None:
            part = part.clone()
            part[replaced[0]] = part[replaced[1]]
        return part
    if isinstance(value, dict):
        return type(value)((k, cut(v, samples, keep, replaced)) for k, v in value.items())
    if type(value) in (list, tuple):
        if len(value) == samples and samples > 4 and not isinstance(value, torch.Size):
            raise Unfit("an input is a list with one entry per sample")
        return type(value)(cut(v, samples, keep, replaced) for v in value)
    if hasattr(value, "data") and isinstance(getattr(value, "data", None), dict):
        value.data = cut(value.data, samples, keep, replaced)
    return value


class Rows:
    """What every module made of the samples in one forward, in the order in which the modules returned."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.calls: list[tuple[str, Any, Any, Any, tuple[int, ...]]] = []

    def mode(self, functions: list[tuple[str, Any, list[Any], list[Any]]]) -> Any:
        """A function mode that notes what every function of torch made of the samples."""
        from torch.overrides import TorchFunctionMode

        of = self.of

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given = of([args, kwargs or {}]) if len(functions) < FUNCTIONS else []
                result = func(*args, **(kwargs or {}))
                if len(functions) < FUNCTIONS:
                    name = str(getattr(func, "__name__", func))
                    functions.append((name, replayed_line(sys._getframe(1)), given, of(result)))
                return result

        return Mode()

    def done(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if len(self.calls) < MODULES:
            first = next((t for t in tensors([args, kwargs])), None)
            shape = tuple(int(n) for n in first.shape) if first is not None else ()
            self.calls.append((name, module, self.of([args, kwargs]), self.of(output), shape))

    def of(self, values: Any) -> list[Any]:
        """A sample of each floating tensor that has one row per sample."""
        out = []
        for tensor in tensors(values):
            if tensor.is_floating_point() and tensor.ndim and tensor.shape[0] == self.samples and tensor.numel():
                rows = tensor.detach().reshape(self.samples, -1)
                stride = max(1, rows.shape[1] // ELEMENTS)
                stride -= stride > 1 and stride % 2 == 0
                out.append(rows[:, ::stride].float().clone())
        return out


def difference(one: list[Any], two: list[Any], replaced: int) -> tuple[float, float, int] | None:
    """Largest change of another sample, of the replaced sample, and how many others changed; ``None``: not the same."""
    if [t.shape for t in one] != [t.shape for t in two]:
        return None
    others, own, count = 0.0, 0.0, 0
    for a, b in zip(one, two, strict=True):
        change = (a - b).abs().amax(dim=1)
        size = float(a.abs().amax())
        here = float(change[replaced])
        change[replaced] = 0
        largest = float(change.max())
        if largest > SIZE * size and largest > RATIO * here and largest > others:
            count = int((change > max(SIZE * size, RATIO * here)).sum())
            others = largest
        own = max(own, here)
    return others, own, count


def partners(one: list[Any], two: list[Any], replaced: int) -> tuple[set[int], set[int]]:
    """Samples that changed strongly with the replaced one, and all that changed."""
    strong: set[int] = set()
    changed: set[int] = set()
    for a, b in zip(one, two, strict=True):
        change = (a - b).abs().amax(dim=1)
        floor = max(SIZE * float(a.abs().amax()), RATIO * float(change[replaced]))
        change[replaced] = 0
        largest = float(change.max())
        changed.update(i for i, c in enumerate(change.tolist()) if c > floor)
        strong.update(i for i, c in enumerate(change.tolist()) if c > max(floor, STRONG * largest))
    return strong, changed


def probe(run: Any, module: Any, call: Any, samples: int, name: str) -> dict[str, Any]:
    """One ``Mixing``. ``run(args, kwargs, observe)`` calls the module again and puts everything back."""
    # A number of samples that is no other size of the inputs, so that dimensions are not taken for one another.
    sizes = {n for t in tensors([call.args, call.kwargs]) for n in t.shape[1:]}
    keep = next((n for n in range(min(SAMPLES, samples), 2, -1) if n not in sizes), min(SAMPLES, samples))
    try:
        return {"forward": name, **_probe(run, module, call, samples, keep)}
    except Unfit:
        raise
    except Exception:
        if keep == samples:
            raise
    # The model may know its batch size.
    return {"forward": name, **_probe(run, module, call, samples, samples)}


def _probe(run: Any, module: Any, call: Any, samples: int, keep: int) -> dict[str, Any]:
    import torch

    replaced = keep // 2
    source = next((i for i in range(keep) if i != replaced and _differs(call, samples, i, replaced)), None)
    if source is None:
        raise Unfit("all samples of the batch are the same")

    def forward(change: tuple[int, int] | None, state: int = 0) -> tuple[Any, Rows]:
        args, kwargs = call.given()
        rows = Rows(keep)
        path = Path()

        @contextlib.contextmanager
        def observe() -> Iterator[None]:
            _draw(state, [*tensors([args, kwargs])])
            with following(module, path, rows.done):
                yield

        output = run(cut(args, samples, keep, change), cut(kwargs, samples, keep, change), observe)
        return list(tensors(output)), rows

    first, one = forward(None)
    if not any(t.ndim and t.shape[0] == keep and t.is_floating_point() for t in first):
        raise Unfit("no output has one row per sample")
    again, _ = forward(None)
    second, two = forward((replaced, source))
    outputs = [t for t in first if not (t.ndim == 2 and t.shape[0] == t.shape[1] == keep)]  # scores between samples
    kept = [i for i, t in enumerate(first) if any(t is o for o in outputs)]
    if len({len(first), len(again), len(second)}) != 1:
        raise Unfit("the outputs are not the same when it is repeated")
    a, b, c = (one.of([x[i] for i in kept]) for x in (first, again, second))
    noise, found = difference(a, b, replaced), difference(a, c, replaced)
    if noise is None or found is None:
        raise Unfit("its outputs change their shapes with the samples")
    if noise[0] > 0 or noise[1] > 0:
        raise Unfit("its outputs differ when it is repeated with the same random state")
    if found[1] == 0 and found[0] == 0:
        raise Unfit("its outputs do not depend on the samples" if a else "its outputs are scores between samples")
    if found[0] == 0:
        return {"outcome": "apart", "samples": keep}
    before = partners(a, c, replaced)
    for state in range(1, STATES + 1):
        other = one.of([forward(None, state)[0][i] for i in kept])
        if all(torch.equal(x, y) for x, y in zip(a, other, strict=True)):
            break  # it draws no random numbers
        after = partners(other, one.of([forward((replaced, source), state)[0][i] for i in kept]), replaced)
        if before[0] - after[1] or after[0] - before[1]:
            raise Unfit("the forward draws at random which samples it mixes, as mixup does")
    changed = {"outcome": "mixed", "samples": keep, "changed": found[2],
               "ratio": found[0] / found[1] if found[1] else None,
               "output": next(tuple(first[i].shape) for i in kept)}  # fmt: skip
    changed.update(_culprit(one, two, replaced))
    functions: list[list[tuple[str, Any, list[Any], list[Any]]]] = []
    for change in (None, (replaced, source)):
        args, kwargs = call.given()
        functions.append([])
        observe = partial(Rows(keep).mode, functions[-1])
        run(cut(args, samples, keep, change), cut(kwargs, samples, keep, change), observe)
    changed.update(_function(functions[0], functions[1], replaced))
    return changed


def _draw(times: int, given: list[Any]) -> None:
    """Another random state; the caller puts the old one back."""
    import torch

    numpy = sys.modules.get("numpy")
    for _ in range(times):
        random.random()
        if numpy is not None:
            numpy.random.random()
        for device in {"cpu", *(str(t.device) for t in given)}:
            torch.rand(1, device=device)


def _differs(call: Any, samples: int, i: int, j: int) -> bool:
    """Whether two samples differ in some input."""
    for tensor in tensors([call.args, call.kwargs]):
        if tensor.ndim and tensor.shape[0] == samples and not bool((tensor[i] == tensor[j]).all()):
            return True
    return False


def _culprit(one: Rows, two: Rows, replaced: int) -> dict[str, Any]:
    """The first module to return whose output mixes what was apart in its inputs; sequence layers that did not."""
    culprit: dict[str, Any] = {}
    apart: list[str] = []
    if [c[0] for c in one.calls] != [c[0] for c in two.calls]:
        return culprit
    for (name, module, given, output, shape), (_, _, given2, output2, _) in zip(one.calls, two.calls, strict=True):
        before, after = difference(given, given2, replaced), difference(output, output2, replaced)
        if before is None or after is None:
            continue
        batch_first = getattr(module, "batch_first", None)
        mixes = after[0] > 0 and before[0] == 0 and given
        if mixes and not culprit:
            culprit = {
                "module": name,
                "class_name": type(module).__name__,
                "batch_first": batch_first if isinstance(batch_first, bool) else None,
                "given": list(shape),
                "at": _class_line(module),
            }
        elif after[0] == 0 and after[1] > 0 and isinstance(batch_first, bool) and type(module).__name__ in SEQUENCE:
            apart.append(f"{name} ({type(module).__name__})")
    return {**culprit, "apart": apart[:8]}


def _function(one: list[Any], two: list[Any], replaced: int) -> dict[str, Any]:
    """The first function whose output mixes what was apart in its arguments."""
    for (name, at, given, output), (name2, _, given2, output2) in zip(one, two, strict=False):
        if name != name2:
            break
        before, after = difference(given, given2, replaced), difference(output, output2, replaced)
        if before is not None and after is not None and before[0] == 0 and after[0] > 0:
            return {"function": name, **({"at": at} if at is not None else {})}
    return {}


def _class_line(module: Any) -> dict[str, Any] | None:
    """Where the program's own class defines its forward."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return None
    return {"file": code.co_filename, "line": code.co_firstlineno, "function": getattr(code, "co_qualname", "forward")}
