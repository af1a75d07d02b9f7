"""TL202: frozen parameters that an optimizer moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.boundary import across_the_epoch
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.schema import Optimizer, Parameter, StepMeasurement


@check("TL202", Recording, severity="error", catalog="O17")
def frozen_but_optimized(run: Recording) -> Iterator[Finding]:
    """Frozen parameters that an optimizer still moves.

    ## What goes wrong
    `requires_grad=False` stops gradients from being computed; it does not take a tensor out of the optimizer. When a
    parameter was frozen after a backward and the old gradient was zeroed in place instead of set to `None`, the
    optimizer goes on stepping it: weight decay shrinks it, and momentum carries it along. A backbone that is
    believed fixed drifts, and the features that everything else was tuned on with it.

    ## How it is detected
    For every tensor that has `requires_grad=False` while its optimizer steps, the value is compared before and after
    the step. It moved: an error, with the distance. It did not move in the watched steps, but has a gradient tensor
    left and the optimizer has weight decay or momentum that will move it once the learning rate leaves 0: a warning.
    The first steps of the next epoch are looked at in the same way, so that freezing at the end of an epoch is seen.

    A frozen tensor without a gradient is skipped by every torch optimizer: exactly no drift, neither by decay nor by
    momentum. `AdamW(model.parameters())` over a model with frozen parts is therefore common, right, and not
    reported.

    ## What to do
    Freeze before the first backward, and hand the optimizer only what should train: `AdamW([p for p in
    model.parameters() if p.requires_grad])`. Where freezing happens in the middle of a run, clear the gradients with
    `zero_grad(set_to_none=True)` (the default) or set `p.grad = None` when freezing.

    ## When it may be wrong
    Programs that fill `.grad` by hand for parameters without autograd (evolution strategies, zeroth-order methods)
    do move them on purpose: a gradient that is not zero and differs from step to step is taken for that. Parameters
    that are frozen only while another optimizer steps, as GAN code does, are not touched by that step and not
    reported.

    ## References
    torch.Tensor.requires_grad_; torch.optim.Optimizer.zero_grad (set_to_none).
    """
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    found = list(_judge(run, ""))
    later = across_the_epoch(run)
    if not found and later is not None:
        found = list(_judge(later, " at the end of the epoch"))
    yield from found


def _judge(run: Recording, when: str) -> Iterator[Finding]:
    timeline = Timeline(run)
    parameters = {p.id: p for p in run.parameters}
    for optimizer in run.optimizers:
        steps_made = sorted(timeline.measurements.get(optimizer.id, {}).items())
        measured = [(m, {p: c for c, p in enumerate(m.parameters)}, frozenset(m.frozen)) for _, m in steps_made]
        drifting: dict[int, float] = {}
        waiting: list[Parameter] = []
        for group in optimizer.groups:
            for i in group.parameters:
                p = parameters.get(i)
                if p is None:
                    continue
                steps = _frozen_steps(p, measured)
                moved = [s for s in steps if s[2] > 0]
                if moved and not _driven([s[1] for s in steps]):
                    drifting[i] = math.sqrt(sum(s[3] ** 2 for s in moved))
                elif (
                    steps and not moved and all(s[1] is not None for s in steps) and _would_move(group.hyperparameters)
                ):
                    at_rest = timeline.rate_of_parameters(optimizer.id, {i: group.index}, steps[-1][0])[i]
                    if at_rest == 0:
                        waiting.append(p)
        if drifting:
            frozen = [parameters[i] for i in drifting]
            made = max(len(_frozen_steps(p, measured)) for p in frozen) if when else len(measured)
            yield _moved(run, optimizer, frozen, drifting, made, when)
        elif waiting:
            yield _waiting(run, optimizer, waiting)


#: A measurement, the column of each parameter in it, and those that were frozen.
_Columns = tuple[StepMeasurement, dict[int, int], frozenset[int]]
#: (step index, gradient norm, share of elements that changed, norm of the change)
_Step = tuple[int, "float | None", float, float]


def _frozen_steps(p: Parameter, measured: list[_Columns]) -> list[_Step]:
    """What the steps did to a parameter while it was frozen, from the moment on that it stayed so."""
    out: list[_Step] = []
    if p.requires_grad_later is True:
        return []
    always = not p.requires_grad and p.requires_grad_later is None
    for m, columns, frozen in measured:
        column = columns.get(p.id)
        if column is None:
            continue
        if not always and p.id not in frozen:
            out.clear()
            continue
        changed = m.changed[column] if column < len(m.changed) else None
        norm = m.gradient_norm[column] if column < len(m.gradient_norm) else None
        update = m.update_norm[column] if column < len(m.update_norm) else None
        out.append((m.index, norm, changed or 0.0, update or 0.0))
    return out


def _driven(norms: list[float | None]) -> bool:
    """Whether a live gradient moves it: not zero, and another one at every step (filled by hand, on purpose)."""
    if any(not n for n in norms):
        return False
    known = [n for n in norms if n]
    # One step alone does not tell an old gradient from a new one.
    return len(known) == 1 or all(abs(a - b) > 1e-6 * max(a, b) for a, b in pairwise(known))


def _would_move(hyper: object) -> bool:
    get = hyper.get if hasattr(hyper, "get") else (lambda _: None)
    return any(isinstance(v, (int, float)) and v != 0 for v in (get("weight_decay"), get("momentum")))


def _moved(
    run: Recording, optimizer: Optimizer, frozen: list[Parameter], drift: dict[int, float], steps: int, when: str
) -> Finding:
    groups = by_module(frozen, [p for p in run.parameters if p.root is not None])
    total = sum(p.numel for p in run.parameters if p.root == frozen[0].root)
    worst = max(frozen, key=lambda p: drift[p.id])
    hyper = next(g.hyperparameters for g in optimizer.groups if worst.id in g.parameters)
    decay, momentum = hyper.get("weight_decay"), hyper.get("momentum")
    moments = f"betas={hyper['betas']}" if "betas" in hyper else f"momentum={momentum}" if momentum else ""
    why = " and ".join(t for t in (f"weight_decay={decay}" if decay else "", moments) if t)
    what = f"parameters that were frozen{when}" if when else "frozen parameters"
    return Finding(
        f"{name_optimizer(optimizer)} moves {what} (requires_grad=False): "
        f"{lines_of(groups, None)} ({100 * sum(p.numel for p in frozen) / max(total, 1):.0f}% of the model's weights). "
        f"{worst.name} moved by {number(drift[worst.id])} (L2) in {plural(steps, 'step')}, driven by "
        f"{why or 'the state of the optimizer'} over a gradient left from before it was frozen.",
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in frozen[:50]],
            "tensors": len(frozen),
            "drift": {p.name: drift[p.id] for p in frozen[:10]},
            "steps": steps,
        },
        fix=_fix(run),
        about=groups[0].pattern,
    )


def _waiting(run: Recording, optimizer: Optimizer, frozen: list[Parameter]) -> Finding:
    groups = by_module(frozen, [p for p in run.parameters if p.root is not None])
    return Finding(
        f"{name_optimizer(optimizer)} holds frozen parameters (requires_grad=False) that still have a gradient tensor: "
        f"{lines_of(groups, None)}. They did not move in the watched steps, at learning rate 0; with "
        "the optimizer's weight "
        "decay or momentum they will once the rate rises.",
        at=ParameterName(groups[0].pattern),
        evidence={"parameters": [p.name for p in frozen[:50]], "tensors": len(frozen)},
        fix=_fix(run),
        severity=Severity.WARNING,
        about=groups[0].pattern,
    )


def _fix(run: Recording) -> str:
    where = "in configure_optimizers, " if uses(run, "lightning") else ""
    return (
        f"Set p.grad = None when freezing (zero_grad(set_to_none=True) does), and {where}pass only what trains: "
        "[p for p in model.parameters() if p.requires_grad]."
    )
