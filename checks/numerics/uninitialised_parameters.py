"""TL809: weights that are whatever the memory held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import place, plural
from trainlint.recording.schema import Backward, UnwrittenTensors


@check("TL809", Recording, severity="error")
def uninitialised_parameters(run: Recording) -> Iterator[Finding]:
    """Weights that are whatever the memory held.

    ## What goes wrong
    `to_empty()` and `torch.empty()` hand out memory as it is. A model that is built on the meta device, moved with
    `to_empty`, and then loaded from a checkpoint that lacks some of its tensors (buffers that are not saved, a new
    head, tied names) trains with garbage in them; so does a layer whose `reset_parameters()` forgets one parameter.
    On a fresh process the memory is often zero, and everything looks right until the day it is not.

    ## How it is detected
    A sample of every tensor is kept when `Module.to_empty` hands it out, and when a source line makes a
    `Parameter(torch.empty(...))` (`empty_like`, `new_empty`, `torch.Tensor(3, 4)` too). After the first backward it is
    compared: torch counted no write, the bits are the same, and the tensor belongs to a model that got gradients.
    Anything but zeros is an error. Zeros that nothing wrote are an error when no matrix of a `to_empty` was written at
    all, and a warning for `torch.empty` in a file that writes nothing through `.data`.

    ## What to do
    After `to_empty` initialise every module (`reset_parameters()`, the model's `init_weights`), recompute buffers that
    are not saved (rotary frequencies, masks), and load with `strict=True`. For own layers: `torch.nn.init` on every
    parameter, or `torch.zeros` where zeros are meant.

    ## When it may be wrong
    Writes through `.data`, numpy, or collectives are seen by their values, except zeros over zeros: those are left out
    for `to_empty` unless nothing was written. Trainable parameters without a gradient count as unused. Memory that is
    moved to another dtype before the first backward is not followed.

    ## References
    torch.nn.Module.to_empty; torch.nn.utils.skip_init; torch.utils.deterministic.fill_uninitialized_memory.
    """
    if not any(isinstance(e, Backward) for e in run.events):
        raise NotObserved("no backward was seen; raise --timeout")
    for record in run.numerics.unwritten if run.numerics is not None else ():
        untouched = record.matrices > 0 and record.matrices_unwritten == record.matrices
        if record.garbage:
            yield _finding(record, record.garbage, Severity.ERROR)
        elif record.how == "to_empty" and untouched:
            yield _finding(record, record.unwritten, Severity.ERROR)
        elif record.how != "to_empty" and record.unwritten:
            yield _finding(record, record.unwritten, Severity.WARNING)


def _finding(record: UnwrittenTensors, names: Sequence[str], severity: Severity) -> Finding:
    where = place(record.at)
    what = f"{record.module}.to_empty()" if record.how == "to_empty" else f"Parameter({record.how}(...))"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    buffers = set(record.buffers)
    kind = "buffer" if all(n in buffers for n in names) else "tensor" if buffers & set(names) else "parameter"
    one = len(names) == 1
    these = f"this {kind}" if one else f"these {plural(len(names), kind)}"
    first = (
        f"{shown} {'was' if one else 'were'} never initialised: {what}{f' ({where})' if where else ''} handed out "
        f"{plural(record.tensors, 'tensor')}, and nothing wrote to {these} before the first backward"
    )
    if record.non_finite:
        holds = f"; {record.non_finite[0]} holds NaN or infinities"
    elif record.garbage:
        holds = "; what the memory held is what they hold" if len(names) > 1 else "; it holds what the memory held"
    else:
        holds = "; the memory happened to be zero"
    if record.how == "to_empty":
        fix = (
            "Initialise after to_empty: reset_parameters() of each module or the model's own init_weights(), recompute "
            "buffers that are not saved, and load the checkpoint with strict=True."
        )
    else:
        fix = "Initialise it with torch.nn.init in the constructor, or make it with torch.zeros if zeros are meant."
    return Finding(
        f"{first}{holds}.",
        at=record.at or ParameterName(names[0]),
        evidence={
            "how": record.how,
            "tensors": record.tensors,
            "unwritten": list(record.unwritten[:50]),
            "garbage": list(record.garbage[:50]),
            "non_finite": list(record.non_finite),
            "buffers": list(record.buffers),
        },
        fix=fix,
        severity=severity,
        about=names[0],
    )
