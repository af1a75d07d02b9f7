"""TL602: one learning rate for loaded and fresh weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import by_module, lines_of, name_optimizer, number, percent, plural, uses
from trainlint.recording.length import planned_length
from trainlint.recording.projection import projection
from trainlint.recording.schema import Optimizer, OptimizerStep, Parameter
from trainlint.recording.weight_loads import file_name, loaded_and_fresh

#: Share of its own norm that one step at the peak rate moves a loaded weight by, from which what it knows is lost
#: within a few hundred steps.
_WRECKS = 0.005
#: Share of the trained weights from which the fresh part is more than a head; with one matrix only, this share.
_SUBSTANTIAL, _ONE_MATRIX = 0.1, 0.3
#: Share of the trained weights below which a fresh head is not worth a word.
_SMALL = 0.05
#: Share of the loaded weights that must train for them to have a rate at all (not only biases and norms).
_TRAINED = 0.1


@dataclass(frozen=True)
class _Shared:
    """One optimizer that trains loaded and fresh tensors at the same rate."""

    optimizer: Optimizer
    rate: float
    loaded: list[Parameter]
    fresh: list[Parameter]
    #: All that it trains.
    weights: int
    groups: int


@check("TL602", Recording, severity="warning", catalog="O19 S1")
def one_lr_for_pretrained_and_new(run: Recording) -> Iterator[Finding]:
    """One learning rate for loaded and fresh weights.

    ## What goes wrong
    Loaded weights are close to where they should be and need small steps; fresh ones are noise and need large ones. At
    one rate, one side loses: a rate sized for the fresh part undoes the pretraining in the first few hundred steps,
    while the gradients that come through it are still random; a rate sized for the loaded part leaves a fresh decoder
    or a stack of new layers near its initialisation for most of the run.

    ## How it is detected
    Every parameter is known as loaded or fresh by comparing its values with the files that were read. Reported are
    optimizers in which the fresh matrices have the same peak rate as the loaded ones, where at least a tenth of the
    loaded weights trains.

    Warning: one step at the peak rate moves the loaded matrices by 0.5% of their norm or more (measured on the watched
    steps, in the median, and scaled to the peak), or the fresh part is more than a head: a tenth of the trained
    weights in several matrices, or 30% in one. Information: a smaller fresh part at a rate that suits the loaded
    weights. Under 5% of the trained weights is not reported.

    ## What to do
    Give the fresh part a param group with a rate five to ten times that of the loaded part. Layer-wise rates go
    further: the deeper a loaded layer lies, the smaller its rate. Or train the fresh part alone first, with the loaded
    part frozen.

    ## When it may be wrong
    A small head trained with the whole network at 2e-5 is common practice and works: Adam moves every element by the
    rate, and the sum over a wide input changes the logits fast enough. A large fresh part learns in a long enough run
    at a small rate, too. Where fresh and loaded parts were deliberately balanced (a long warm-up, normalised layers,
    muP scaling), ignore the finding. Adapters on a frozen base, resumed runs and layer-wise rates are not reported.

    ## References
    Howard and Ruder 2018, "Universal Language Model Fine-tuning" (discriminative rates); Bao et al. 2021, "BEiT"
    (layer-wise decay); Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features".
    """
    if run.provenance is None or not run.provenance.loads:
        raise NotApplicable("no weights were loaded from a file")
    stepped = [o for o in run.optimizers if o.steps]
    if not stepped:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    resumed = {load.path for load in run.provenance.loads if load.resumed}
    shared = [s for o in stepped if (s := _shared(run, o, resumed)) is not None]
    for one in shared:
        finding = _finding(run, one)
        if finding is not None:
            yield finding


def _shared(run: Recording, optimizer: Optimizer, resumed: set[str]) -> _Shared | None:
    parameters = {p.id: p for p in run.parameters}
    peaks: dict[int, float] = {}
    trained: list[Parameter] = []
    for group in optimizer.groups:
        own = [parameters[i] for i in group.parameters if i in parameters]
        own = [
            p for p in own if p.root is not None and (p.gradient_seen or p.gradient_seen is None and p.requires_grad)
        ]
        rate = _peak(run, optimizer, group.index)
        if rate is not None and own:
            trained += own
            peaks.update((p.id, rate) for p in own)
    # Adapters start from zero beside what they adapt: no part of the network is fresh for them.
    adapters = {i for m in (run.adapters.models if run.adapters is not None else ()) for i in m.parameters}
    matrices = [p for p in trained if len(p.shape) > 1 and p.id not in adapters]
    loaded, fresh = loaded_and_fresh(matrices)
    if not loaded or not fresh or any(p.origin in resumed for p in loaded):
        return None
    # Towers of their own: the loaded and the fresh weights are different models.
    roots = {p.root for p in loaded} & {p.root for p in fresh}
    loaded, fresh = [p for p in loaded if p.root in roots], [p for p in fresh if p.root in roots]
    if not loaded or not fresh:
        return None
    held = sum(p.numel for p in run.parameters if p.root in roots and p.origin != "fresh" and len(p.shape) > 1)
    if sum(p.numel for p in loaded) < _TRAINED * held:
        return None
    rate = max(peaks[p.id] for p in loaded)
    at_rate = [p for p in loaded if _same(peaks[p.id], rate)]
    if 2 * sum(p.numel for p in at_rate) < sum(p.numel for p in loaded):
        return None  # layer-wise rates: the top layers' may well be the head's
    together = [p for p in fresh if _same(peaks[p.id], rate)]
    if 2 * sum(p.numel for p in together) < sum(p.numel for p in fresh):
        return None
    weights = sum(p.numel for p in trained if p.root in roots)
    return _Shared(optimizer, rate, at_rate, together, weights, len(optimizer.groups))


def _peak(run: Recording, optimizer: Optimizer, group: int) -> float | None:
    """The highest rate over the planned run; what was set, where that is not known."""
    peak = projection(run, optimizer.id, group, planned=planned_length(run, optimizer.id)).peak_rate
    if peak:
        return peak
    hyper = next(g.hyperparameters for g in optimizer.groups if g.index == group)
    rate = hyper.get("initial_lr", hyper.get("lr"))
    return float(rate) if isinstance(rate, (int, float)) and rate > 0 else None


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * max(a, b)


def _relative_step(run: Recording, shared: _Shared) -> float | None:
    """Median over the loaded matrices of update norm over weight norm, scaled from the watched rate to the peak."""
    wanted = {p.id for p in shared.loaded}
    group_of = {i: g.index for g in shared.optimizer.groups for i in g.parameters}
    rates = {
        e.index: e.rates for e in run.events if isinstance(e, OptimizerStep) and e.optimizer == shared.optimizer.id
    }
    steps = []
    for m in run.steps:
        if m.optimizer != shared.optimizer.id or m.index not in rates:
            continue
        shares = []
        for i, update, weight in zip(m.parameters, m.update_norm, m.weight_norm, strict=False):
            rate = rates[m.index][group_of[i]] if i in group_of and group_of[i] < len(rates[m.index]) else 0.0
            if i in wanted and update and weight and rate > 0:
                shares.append(update / weight * shared.rate / rate)
        if shares:
            steps.append(statistics.median(shares))
    return statistics.median(steps) if steps else None


def _finding(run: Recording, shared: _Shared) -> Finding | None:
    fresh_weights = sum(p.numel for p in shared.fresh)
    share = fresh_weights / max(1, shared.weights)
    relative = _relative_step(run, shared)
    wrecks = relative is not None and relative >= _WRECKS
    substantial = share >= _SUBSTANTIAL and (len(shared.fresh) >= 2 or share >= _ONE_MATRIX)
    if not wrecks and not substantial and share < _SMALL:
        return None
    candidates = [p for p in run.parameters if p.root in {q.root for q in shared.fresh}]
    adapters = {i for m in (run.adapters.models if run.adapters is not None else ()) for i in m.parameters}
    fresh_too = [p for p in candidates if p.origin == "fresh" and p.requires_grad and p.id not in adapters]
    groups = by_module(fresh_too, candidates)
    pattern = groups[0].pattern
    files = list(dict.fromkeys(file_name(p.origin) for p in shared.loaded))
    loaded_weights = sum(p.numel for p in shared.loaded)
    step = (
        f" One step at that rate moves the loaded matrices by {percent(relative, 1.0)} of their norm (median)"
        if relative is not None
        else ""
    )
    if wrecks:
        step += ", so little of what was loaded outlasts the first few hundred steps"
    elif substantial and step:
        step += ", a pace for loaded weights; the fresh part has to come the whole way at it"
    low, high = (shared.rate / 10, shared.rate) if wrecks else (shared.rate, shared.rate * 10)
    in_groups = f" in {plural(shared.groups, 'group')}" if shared.groups > 1 else ""
    return Finding(
        f"{name_optimizer(shared.optimizer)} gives {plural(len(shared.loaded), 'matrix')} from {', '.join(files[:3])} "
        f"({percent(loaded_weights, shared.weights)} of the trained weights) and the fresh part "
        f"({lines_of(groups, shared.weights, most=2)}) one peak rate, {number(shared.rate)}{in_groups}.{step}.".replace(
            "matrixes", "matrices"
        ).replace("..", "."),
        at=shared.optimizer.at or ParameterName(pattern),
        evidence={
            "optimizer": shared.optimizer.class_name,
            "rate": shared.rate,
            "groups": [_group(run, shared.optimizer, g.index) for g in shared.optimizer.groups[:20]],
            "loaded_matrices": len(shared.loaded),
            "loaded_weights": loaded_weights,
            "fresh_matrices": len(shared.fresh),
            "fresh_weights": fresh_weights,
            "trained_weights": shared.weights,
            "relative_step": relative,
        },
        fix=_fix(run, shared, [g.pattern for g in groups], low, high),
        severity=Severity.WARNING if wrecks or substantial else Severity.INFO,
        about=pattern,
    )


def _group(run: Recording, optimizer: Optimizer, index: int) -> dict[str, object]:
    group = next(g for g in optimizer.groups if g.index == index)
    wanted = set(group.parameters)
    loaded, fresh = loaded_and_fresh([p for p in run.parameters if p.id in wanted])
    return {"group": index, "rate": _peak(run, optimizer, index), "loaded": len(loaded), "fresh": len(fresh)}


def _fix(run: Recording, shared: _Shared, patterns: Sequence[str], low: float, high: float) -> str:
    starts = ", ".join(f'"{p.removesuffix("*")}"' for p in patterns[:4]) + (", ..." if len(patterns) > 4 else "")
    test = f"n.startswith(({starts}))" if len(patterns) > 1 else f"n.startswith({starts})"
    name = shared.optimizer.class_name
    code = (
        f"new = [p for n, p in model.named_parameters() if {test}]; "
        f"old = [p for n, p in model.named_parameters() if not {test}]; "
        f'{name}([{{"params": old, "lr": {number(low)}}}, {{"params": new, "lr": {number(high)}}}])'
    )
    where = "Two groups: "
    if uses(run, "lightning"):
        where = "In configure_optimizers, two groups (self for model): "
    elif uses(run, "transformers"):
        where = "Pass Trainer(optimizers=(optimizer, None)) or override create_optimizer, with two groups: "
    layers = _layers(shared.loaded)
    wise = (
        f' Layer-wise: [{{"params": layer.parameters(), "lr": {number(low)} * 0.9 ** ({layers[1]} - 1 - i)}} for i, '
        f"layer in enumerate(model.{layers[0]})], the rest of the loaded part at the smallest of these, and the new "
        "group."
        if layers
        else ""
    )
    return f"{where}{code}.{wise}"


def _layers(loaded: Sequence[Parameter]) -> tuple[str, int] | None:
    """Where the stack of layers is, and how many there are: ``encoder.layer``, 12."""
    stacks: dict[str, set[int]] = {}
    for p in loaded:
        parts = p.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at:
            stacks.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
    found = max(stacks.items(), key=lambda s: (len(s[1]), s[0]), default=None)
    return (found[0], len(found[1])) if found is not None and len(found[1]) >= 3 else None
