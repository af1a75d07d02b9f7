"""TL210: one parameter that is stepped twice with the same gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, place, plural
from trainlint.recording.intervals import Timeline
from trainlint.recording.schema import Backward, Optimizer, OptimizerStep, Parameter, StepMeasurement, ZeroGrad


@check("TL210", Recording, severity="error")
def parameter_held_twice(run: Recording) -> Iterator[Finding]:
    """One parameter that is stepped twice with the same gradient.

    ## What goes wrong
    A parameter stands in two optimizers that both step after the same backward, or twice in the groups of one
    optimizer. Every iteration updates it twice: with double the learning rate and double the weight decay, or with
    two rates where one was meant to replace the other (`AdamW(model.parameters())` beside
    `AdamW(model.head.parameters(), lr=10 * lr)`). Adam's step counter and moments run at double speed as well. torch
    refuses a parameter in two groups, but only warns about one that is twice in the same list, as tied weights are
    when the lists of two modules are joined.

    ## How it is detected
    Two optimizers: both hold the parameter, a step of one follows a step of the other with no backward and no clearing
    of gradients in between, and both steps moved it. Only then do they count. One optimizer: the same tensor appears
    more than once in its groups and a step moved it.

    ## What to do
    Give each parameter to one place. For a rate of its own, use param groups of one optimizer and leave the head's
    parameters out of the rest; for tied weights, collect parameters with `model.parameters()`, which names a shared
    tensor once, or through `dict.fromkeys`.

    ## When it may be wrong
    Optimizers that take turns, each after a backward of its own (GANs, shared embeddings of several tasks), phases
    with different optimizers, and wrappers that call an inner optimizer over the same groups (sharpness-aware steps,
    Lookahead, schedule-free and accelerate wrappers) are not reported. Where an optimizer is not torch's own, it may
    use the gradient in a way of its own, or none (a projection): a warning.

    ## References
    torch.optim.Optimizer.add_param_group; pytorch/pytorch issue 40967.
    """
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built")
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    parameters = {p.id: p for p in run.parameters}
    timeline = Timeline(run)
    for optimizer in run.optimizers:
        yield from _in_one(run, optimizer, parameters, timeline)
    yield from _in_two(run, parameters, timeline)


def _of_torch(optimizer: Optimizer) -> bool:
    return optimizer.defined_in.startswith("torch.optim.")


# ------------------------------------------------------------------------------------------------ one optimizer


def _in_one(
    run: Recording, optimizer: Optimizer, parameters: dict[int, Parameter], timeline: Timeline
) -> Iterator[Finding]:
    count = Counter(i for g in optimizer.groups for i in g.parameters)
    measured = list(timeline.measurements.get(optimizer.id, {}).values())
    moved = {i for m in measured for i, c in zip(m.parameters, m.changed, strict=False) if c}
    twice = [parameters[i] for i, n in count.items() if n > 1 and i in moved and i in parameters]
    if not twice:
        return
    groups = by_module(twice, run.parameters)
    most = max(count[p.id] for p in twice)
    where = [g.index for g in optimizer.groups if any(p.id in g.parameters for p in twice)]
    listed = f"in param groups {', '.join(map(str, where))}" if len(where) > 1 else "in one list of parameters"
    tied = [p for p in twice if p.tied]
    why = f" {tied[0].name} and {tied[0].tied[0]} are one tensor (tied)." if tied else ""
    times = {2: "twice", 3: "three times"}.get(most, f"{most} times")
    yield Finding(
        f"{name_optimizer(optimizer)} holds {lines_of(groups, None)} {times} ({listed}), so every step updates "
        f"{'it' if len(twice) == 1 else 'them'} {times}: the rate and the weight decay there are {most} times what is "
        f"configured.{why}",
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in twice[:50]],
            "tensors": len(twice),
            "times": most,
            "groups": where,
        },
        fix="Collect parameters with model.parameters(), which names a shared tensor once, or drop the repeats with "
        "list(dict.fromkeys(parameters)).",
        severity=None if _of_torch(optimizer) else Severity.WARNING,
        about=f"{optimizer.class_name} {groups[0].pattern}",
    )


# ------------------------------------------------------------------------------------------------ two optimizers


def _in_two(run: Recording, parameters: dict[int, Parameter], timeline: Timeline) -> Iterator[Finding]:
    held = {o.id: {i for g in o.groups for i in g.parameters} for o in run.optimizers}
    count = Counter(i for own in held.values() for i in own)
    held = {o: own for o, own in held.items() if any(count[i] > 1 for i in own)}
    if not held:
        return
    optimizers = {o.id: o for o in run.optimizers}
    doubled: dict[tuple[int, int], dict[int, int]] = {}
    example: dict[tuple[int, int], tuple[StepMeasurement, StepMeasurement]] = {}
    for first, second in _same_gradients(run, timeline, set(held)):
        a, b = sorted((first.optimizer, second.optimizer))
        shared = held[a] & held[b]
        if not shared:
            continue
        one = timeline.measurements.get(first.optimizer, {}).get(first.index)
        two = timeline.measurements.get(second.optimizer, {}).get(second.index)
        if one is None or two is None:
            continue
        both = shared & _moved(one) & _moved(two)
        counts = doubled.setdefault((a, b), {})
        for i in both:
            counts[i] = counts.get(i, 0) + 1
        if both:
            example.setdefault((a, b), (one, two) if first.optimizer == a else (two, one))
    for pair, counts in doubled.items():
        chosen = [parameters[i] for i in counts if i in parameters]
        if chosen:
            yield _pair(run, optimizers[pair[0]], optimizers[pair[1]], chosen, max(counts.values()), example[pair])


def _same_gradients(run: Recording, timeline: Timeline, of: set[int]) -> Iterator[tuple[OptimizerStep, OptimizerStep]]:
    """Steps of two of these optimizers with no backward and no clearing of gradients from one to the other."""
    steps = sorted((s for o, own in timeline.steps.items() if o in of for s in own), key=lambda s: s.seq)
    # A wrapper's step around that of its inner optimizer is one step of the program.
    outer = [s for s in steps if any(s.began < o.seq < s.seq and o.optimizer != s.optimizer for o in steps)]
    for wrapper in outer:
        steps = [s for s in steps if s is not wrapper and not wrapper.began < s.seq < wrapper.seq]
    renewals = sorted(
        e.seq for e in run.events if isinstance(e, Backward) or (isinstance(e, ZeroGrad) and e.had_gradients != 0)
    )
    since: list[OptimizerStep] = []
    edge = 0
    for step in steps:
        while edge < len(renewals) and renewals[edge] <= step.seq:
            since.clear()
            edge += 1
        yield from ((earlier, step) for earlier in since if earlier.optimizer != step.optimizer)
        since.append(step)


def _moved(measurement: StepMeasurement) -> set[int]:
    """Parameters that a step moved along a gradient."""
    columns = zip(measurement.parameters, measurement.gradient_norm, measurement.changed, strict=False)
    return {i for i, norm, changed in columns if norm and changed}


def _pair(
    run: Recording,
    a: Optimizer,
    b: Optimizer,
    chosen: Sequence[Parameter],
    times: int,
    example: tuple[StepMeasurement, StepMeasurement],
) -> Finding:
    groups = by_module(chosen, [p for p in run.parameters if p.requires_grad])
    largest = max(chosen, key=lambda p: p.numel)
    sizes = [
        dict(zip(m.parameters, m.update_norm, strict=False)).get(largest.id) for m in example
    ]  # of the first iteration that did both
    return Finding(
        f"{name_optimizer(a)} and {name_optimizer(b)} both hold {lines_of(groups, None)}, and both stepped "
        f"{'it' if len(chosen) == 1 else 'them'} with the same gradients in {plural(times, 'iteration')}: no backward "
        f"and no zero_grad lies between the two steps. {largest.name} moved by {number(sizes[0])} in the one and by "
        f"{number(sizes[1])} in the other (L2).",
        at=ParameterName(groups[0].pattern),
        evidence={
            "parameters": [p.name for p in chosen[:50]],
            "tensors": len(chosen),
            "optimizers": [a.class_name, b.class_name],
            "lines": [place(a.at), place(b.at)],
            "iterations": times,
            "update_norms": sizes,
        },
        fix="Leave these parameters out of one of the two, or make them param groups of one optimizer with rates of "
        "their own.",
        severity=None if _of_torch(a) and _of_torch(b) else Severity.WARNING,
        about=f"{a.class_name} {b.class_name} {groups[0].pattern}",
    )
