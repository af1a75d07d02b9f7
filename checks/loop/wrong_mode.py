"""TL305: training in eval mode, or evaluation in train mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import number, place, plural, uses
from trainlint.recording.evaluations import Evaluation, evaluations, whole_timeline
from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    DropoutCall,
    Loader,
    LossCall,
    ModeCall,
    ModeChanged,
    ModeSensitive,
    ModeState,
    Parameter,
    RootModule,
    SourceLine,
)
from trainlint.recording.source_models import ModelFault, always_drops, evaluated_in_train_mode, stays_in_eval
from trainlint.recording.source_order import NOT_RUN, traces_of

#: Share of a module's weights that must be trained for it to count as trained and not as frozen.
_TRAINED = 0.5


@check("TL305", Recording, severity="error", catalog="O5")
def wrong_mode(run: Recording) -> Iterator[Finding]:
    """Training in eval mode, or evaluation in train mode.

    ## What goes wrong
    Dropout and batch norm do different things in train and eval mode. A model that trains in eval mode has no
    dropout, and its batch norms use statistics that are never updated; with a fresh batch norm nothing is normalised
    at all. It happens when `model.eval()` of the evaluation is never taken back, so that only the first epoch trains
    as meant, or when `from_pretrained`, which returns eval mode, is followed by a loop without `model.train()`
    (Lightning 2.2 and later keeps the mode it finds). An evaluation in train mode measures a model with dropout, its
    numbers depend on the batch and on chance, and its batches leak into the running statistics. So does
    `F.dropout(x, 0.5)` without `training=self.training`: it drops in evaluation too.

    ## How it is detected
    At every backward of the watch, and of the steps after the epoch boundary, the mode of each dropout (of any kind,
    with p > 0) and each norm with running statistics is read, with the call that set it last. It counts only where
    the weights around it are trained: held by an optimizer that steps, trainable, and reached by a gradient.
    Evaluations are runs of batches of a loader that no backward follows. In them it is measured whether a dropout
    dropped (at `torch.nn.functional.dropout`, which the modules call), how many batches the running statistics took
    in, and whether losses were computed with gradients on.

    Without a run, from the source: `eval()` in a loop that trains the same module and holds no `train()`; `eval()`
    before it and no `train()` anywhere; a module with dropout or batch norm that is called without gradients and never
    put in eval (the latter two as warnings).

    ## What to do
    Call `model.train()` at the start of every epoch, or after every evaluation; `model.eval()` and
    `torch.no_grad()` before each evaluation. In Lightning call `self.train()` (or `self.backbone.train()`) in
    `on_train_start`/`on_train_epoch_start`. Pass `training=self.training` to functional dropout, or use
    `nn.Dropout`. Freeze what is meant to stay fixed with `requires_grad_(False)`.

    ## When it may be wrong
    Eval mode is right for frozen parts, and batch norms alone in eval while the rest trains are a common way of
    fine-tuning: neither is reported. A class whose own `train` keeps a part in eval means it; so do `eval()` calls on
    single dropout modules. A whole trained model that the program itself put in eval before it trained may be meant
    (a warning). Evaluation with dropout on may be Monte Carlo dropout: single modules in train mode under a model in
    eval and `training=True` written out are not reported; `train()` called right before the evaluation makes it a
    warning. Recalibration of batch norms (`update_bn`) has no loss and is not reported. Gradients that are left on in
    an evaluation cost memory only (information). Functional dropout in training, and compiled models in evaluation,
    are not seen.

    ## References
    torch.nn.Module.train; transformers PreTrainedModel.from_pretrained ("set in evaluation mode by default");
    Lightning 2.2 changelog (the Trainer keeps the modes of sub-modules).
    """
    backwards = [e for e in whole_timeline(run) if isinstance(e, Backward)]
    if not backwards:
        raise NotObserved("no backward was seen, so no training forward either; raise --timeout")
    seen = evaluations(run)
    trained = _Trained(run)
    found = False
    for root in run.roots:
        for finding in _training(run, root, trained, backwards, seen):
            found = True
            yield finding
    for finding in _evaluating(run, seen):
        found = True
        yield finding
    if found:
        return
    if not any(r.mode_sensitive for r in run.roots) and not any(
        isinstance(e, DropoutCall) for e in whole_timeline(run)
    ):
        raise NotApplicable("no dropout and no norm with running statistics was found: both modes do the same")
    crossed = run.boundary is not None and run.boundary.outcome in ("crossed", "ended")
    if not seen and not crossed:
        why = f" ({run.boundary.reason})" if run.boundary is not None and run.boundary.reason else ""
        raise NotObserved(f"training ran in train mode; no evaluation and no end of an epoch was seen{why}")


# ---------------------------------------------------------------------------------------------------- training


class _Trained:
    """Which weights are trained: trainable, in an optimizer that steps, and reached by a gradient."""

    def __init__(self, run: Recording) -> None:
        # What is unfrozen at the end of the epoch is trained as well.
        parts = (run, run.boundary) if run.boundary is not None else (run,)
        held = {i for part in parts for o in part.optimizers if o.steps for g in o.groups for i in g.parameters}
        live = {
            p.id
            for part in parts
            for p in part.parameters
            if p.id in held and p.gradient_seen and (p.requires_grad or p.requires_grad_later)
        }
        self._below: dict[tuple[int | None, str], list[int]] = {}
        for p in run.parameters:
            for prefix in _prefixes(p):
                both = self._below.setdefault((p.root, prefix), [0, 0])
                both[0] += p.numel if p.id in live else 0
                both[1] += p.numel

    def around(self, root: int, module: str) -> bool:
        """Whether the weights of a module, or of the nearest one around it that has any, are mostly trained."""
        while (root, module) not in self._below and module:
            module = module.rpartition(".")[0]
        live, total = self._below.get((root, module), (0, 0))
        return total > 0 and live >= _TRAINED * total


def _prefixes(parameter: Parameter) -> list[str]:
    parts = parameter.name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


@dataclass(frozen=True)
class _Asleep:
    """What trains in eval mode at one backward."""

    backward: Backward
    state: ModeState
    modules: tuple[ModeSensitive, ...]

    def call(self) -> ModeCall | None:
        """The call that set most of them."""
        names = {m.name for m in self.modules}
        calls = [(len(names & set(c.modules)), c) for c in self.state.calls]
        count, call = max(calls, key=lambda pair: (pair[0], pair[1].seq), default=(0, None))
        return call if count else None


def _training(
    run: Recording,
    root: RootModule,
    trained: _Trained,
    backwards: Sequence[Backward],
    seen: Sequence[Evaluation],
) -> Iterator[Finding]:
    """Modules of one root that train in eval mode: from the first backward on, or from a later one."""
    sensitive = {m.name: m for m in root.mode_sensitive if trained.around(root.id, m.name)}
    states = [e for e in whole_timeline(run) if isinstance(e, ModeState) and e.root == root.id and e.when == "backward"]
    at_each = [
        _Asleep(backward, state, _unintended(state, sensitive))
        for state in states
        if (backward := next((b for b in backwards if b.seq > state.seq), None)) is not None
    ]
    if not sensitive or not at_each:
        return
    # What alternates between the modes does so on purpose: only what is so to the end counts.
    first, last = at_each[0], at_each[-1]
    always = tuple(m for m in first.modules if all(m in one.modules for one in at_each))
    if _matters(replace(first, modules=always)):
        yield from _from_the_start(run, root, replace(first, modules=always), sensitive, seen)
        return
    new = tuple(m for m in last.modules if m not in first.modules)
    since = next(i for i in range(len(at_each)) if all(m in one.modules for one in at_each[i:] for m in new))
    later = replace(at_each[since], modules=new)
    if since and _matters(later) and not any(m in one.modules for one in at_each[:since] for m in new):
        yield from _left_behind(run, root, later, backwards, seen)


def _unintended(state: ModeState, sensitive: Mapping[str, ModeSensitive]) -> tuple[ModeSensitive, ...]:
    """Modules in eval, but for those that a class's own ``train`` keeps there or that were called one by one."""
    meant = {
        n
        for c in state.calls
        for n in c.modules
        if c.how == "override" or c.on == getattr(sensitive.get(n), "class_name", None)
    }
    return tuple(sensitive[n] for n in state.in_eval if n in sensitive and n not in meant)


def _matters(asleep: _Asleep) -> bool:
    """Norms alone in eval, while the model around them trains, is how many fine-tune."""
    return any(m.effect == "dropout" for m in asleep.modules) or (bool(asleep.modules) and not asleep.state.training)


def _from_the_start(
    run: Recording,
    root: RootModule,
    asleep: _Asleep,
    sensitive: Mapping[str, ModeSensitive],
    seen: Sequence[Evaluation],
) -> Iterator[Finding]:
    state, call = asleep.state, asleep.call()
    fresh = all(p.origin == "fresh" for p in run.parameters if p.root == root.id)
    by = f" ({call.on}, {_line(call.at)})" if call is not None else ""
    severity: Severity | None = None
    if call is not None and call.how == "library":
        why = f"A library's call set it so{by}, as from_pretrained does, and nothing called train() on it since."
    elif call is not None and _evaluated(run, call.seq, asleep.backward.seq, seen):
        why = f"eval(){by} was called for an evaluation before that and not taken back."
    elif not any(m.effect == "dropout" for m in asleep.modules) and not (fresh and not state.batches_tracked):
        return  # running statistics of a checkpoint, kept on purpose
    else:
        why = f"The program's own eval(){by} was the last word." if call is not None else "No call set it so."
        severity = Severity.WARNING
    whole = not state.training and len(asleep.modules) == len(sensitive)
    what = f"{root.class_name} trains" if whole else f"Parts of {root.class_name} train"
    yield _finding(
        run,
        f"{what} in eval mode, at every watched backward: {_effect(asleep.modules, state)}. {why}",
        asleep,
        root,
        severity,
        "trained-in-eval",
    )


def _left_behind(
    run: Recording,
    root: RootModule,
    later: _Asleep,
    backwards: Sequence[Backward],
    seen: Sequence[Evaluation],
) -> Iterator[Finding]:
    """In train mode at first, in eval mode after something that happened in between."""
    state, call = later.state, later.call()
    before = [b for b in backwards if b.seq < state.seq]
    evaluated = bool(before) and _evaluated(run, before[-1].seq, later.backward.seq, seen)
    after = "After the evaluation" if evaluated else f"After {plural(len(before), 'backward')}"
    by = f"eval() was called ({_line(call.at)}) and train() was not called again" if call else "the mode changed"
    yield _finding(
        run,
        f"{after} {root.class_name} goes on training in eval mode: {_effect(later.modules, state)}. "
        f"{plural(len(before), 'backward')} ran in train mode, then {by}, so all that follows trains like this.",
        later,
        root,
        None if evaluated and call is not None else Severity.WARNING,
        "left-in-eval",
    )


def _evaluated(run: Recording, low: int, high: int, seen: Sequence[Evaluation]) -> bool:
    """Whether an evaluation lies between two points: batches that nothing trained on, a loss without gradients."""
    if any(low < e.ended and e.began < high for e in seen):
        return True
    # A loss written by hand is not seen: then a pass over other data has to do.
    loaders = (*run.loaders, *(run.boundary.loaders if run.boundary is not None else ()))
    training = {loader.id for loader in loaders if loader.training}
    other = [e for e in whole_timeline(run) if isinstance(e, BatchFetched) and e.loader not in training]
    if sum(1 for e in other if low < e.seq < high) > 1:
        return True
    return any(isinstance(e, LossCall) and low < e.seq < high and not e.grad_enabled for e in whole_timeline(run))


def _effect(modules: Sequence[ModeSensitive], state: ModeState) -> str:
    """``dropout is off in 12 modules (...); 3 norms (...) use their running statistics``."""
    parts = []
    dropouts = [m for m in modules if m.effect == "dropout"]
    norms = [m for m in modules if m.effect == "norm"]
    if dropouts:
        parts.append(f"dropout is off in {plural(len(dropouts), 'module')} ({_names(dropouts)}; {_ps(dropouts)})")
    if norms:
        of = "" if state.batches_tracked is None else f" of {plural(state.batches_tracked, 'batch')} so far"
        use = "uses its" if len(norms) == 1 else "use their"
        parts.append(f"{plural(len(norms), 'norm')} ({_names(norms)}) {use} running statistics{of}")
    return " and ".join(parts)


def _finding(
    run: Recording, message: str, asleep: _Asleep, root: RootModule, severity: Severity | None, about: str
) -> Finding:
    state, call = asleep.state, asleep.call()
    return Finding(
        message,
        at=(call.at if call is not None else None) or asleep.backward.at,
        evidence={
            "root": root.class_name,
            "modules": [m.name for m in asleep.modules[:50]],
            "in_eval": state.n_eval,
            "in_train": state.n_train,
            "set_by": call.how if call is not None else None,
            "backward": _line(asleep.backward.at),
        },
        fix=_train(run),
        severity=severity,
        about=about,
    )


def _train(run: Recording) -> str:
    if uses(run, "lightning"):
        return (
            "Call self.train() in on_train_epoch_start (Lightning keeps the mode it finds). What is meant to stay in "
            "eval should be frozen with requires_grad_(False)."
        )
    if uses(run, "transformers"):
        return (
            "Call model.train() before the training forward: the Trainer calls it once per step, before compute_loss."
        )
    return (
        "Call model.train() before the training loop and after every evaluation. What is meant to stay in eval should "
        "be frozen with requires_grad_(False)."
    )


# -------------------------------------------------------------------------------------------------- evaluation


def _evaluating(run: Recording, seen: Sequence[Evaluation]) -> Iterator[Finding]:
    """Evaluations in train mode, with dropout that never sleeps, or with gradients; each kind once per loader."""
    told: set[tuple[str, int]] = set()
    loaders = {x.id: x for x in (*run.loaders, *(run.boundary.loaders if run.boundary is not None else ()))}
    for one in seen:
        for kind, finding in (
            ("train", _in_train_mode(run, one, loaders.get(one.loader))),
            ("chance", _by_default(one, loaders.get(one.loader))),
            ("gradients", _with_gradients(run, one, loaders.get(one.loader))),
        ):
            if finding is not None and (kind, one.loader) not in told:
                told.add((kind, one.loader))
                yield finding


def _in_train_mode(run: Recording, one: Evaluation, loader: Loader | None) -> Finding | None:
    active = [e for e in one.dropouts() if e.active and e.module and e.root is not None]
    for root in run.roots:
        states = one.modes(root.id)
        # Of a model in eval mode, single modules in train mode are there on purpose.
        if not states or not states[-1].training:
            continue
        names = {m.name: m for m in root.mode_sensitive}
        dropouts = [names[e.module] for e in active if e.root == root.id and e.module in names]
        counts = [s.batches_tracked for s in states if s.batches_tracked is not None]
        norms = [m for m in root.mode_sensitive if m.effect == "norm" and m.name not in states[-1].in_eval]
        taken = counts[-1] - counts[0] if counts and norms and counts == sorted(counts) else 0
        losses, asked = one.losses(), _set_to_train(run, one)
        # Statistics that begin at zero are being made anew, as update_bn does; so may a pass that nothing is scored in.
        if not losses and (asked is not None or counts[:1] == [0]):
            continue
        if not dropouts and not taken:
            continue
        what = []
        if dropouts:
            what.append(f"dropout dropped in {plural(len(dropouts), 'module')} ({_names(dropouts)}; {_ps(dropouts)})")
        if taken:
            what.append(
                f"the running statistics of {plural(len(norms), 'norm')} ({_names(norms)}) took in its batches "
                f"({counts[0]} updates before, {counts[-1]} after)"
            )
        mode = f" train() was called before it ({_line(asked.at)})." if asked is not None else " Nothing called eval()."
        sure = asked is None and bool(losses)
        return Finding(
            f"{root.class_name} is evaluated in train mode: over {plural(one.batches, 'batch')} of "
            f"{_loader(loader)}, {' and '.join(what)}.{mode} Its scores depend on chance and on the batch.",
            at=_first_line(one),
            evidence={
                "root": root.class_name,
                "batches": one.batches,
                "dropouts": [m.name for m in dropouts[:50]],
                "norm_updates": taken or None,
                "losses": len(losses),
            },
            fix="Call model.eval() before the evaluation and model.train() after it, and run it under torch.no_grad()."
            if not uses(run, "lightning")
            else "Leave the mode of validation to Lightning, or call self.eval() in on_validation_epoch_start.",
            severity=None if sure else Severity.WARNING,
            about="evaluated-in-train",
        )
    return None


def _set_to_train(run: Recording, one: Evaluation) -> ModeChanged | None:
    """A call of train() since the last backward before an evaluation."""
    last = max((e.seq for e in whole_timeline(run) if isinstance(e, Backward) and e.seq < one.began), default=0)
    calls = [e for e in whole_timeline(run) if isinstance(e, ModeChanged) and last < e.seq < one.ended and e.training]
    return calls[-1] if calls else None


def _by_default(one: Evaluation, loader: Loader | None) -> Finding | None:
    """Functional dropout without ``training=``, at work although its module is in eval mode."""
    calls = [e for e in one.dropouts() if e.active and e.by_default and e.owner_training is False]
    if not calls:
        return None
    call = calls[0]
    lines = ", ".join(dict.fromkeys(_line(e.at) for e in calls))
    return Finding(
        f"The evaluation is left to chance: dropout ({lines}, p={number(call.p)}) drops in eval mode too. "
        f"{call.class_name} was in eval over {plural(one.batches, 'batch')} of {_loader(loader)}, but the call leaves "
        "out training=, whose default is True.",
        at=call.at,
        evidence={"calls": [_line(e.at) for e in calls], "p": call.p, "batches": one.batches},
        fix="Pass training=self.training to F.dropout, or use an nn.Dropout module.",
        about="dropout-by-default",
    )


def _with_gradients(run: Recording, one: Evaluation, loader: Loader | None) -> Finding | None:
    losses = one.losses()
    if not losses or not all(e.grad_enabled and e.input_requires_grad for e in losses):
        return None
    at = losses[0].at
    return Finding(
        f"The evaluation over {_loader(loader)} builds autograd graphs that nothing uses: "
        f"{losses[0].function} ({_line(at)}) ran with gradients on for {plural(one.batches, 'batch')}, and no backward "
        "followed. The activations are kept in memory for it.",
        at=at,
        evidence={"batches": one.batches, "losses": len(losses)},
        fix="Run the evaluation under torch.no_grad() or torch.inference_mode().",
        severity=Severity.INFO,
        about="evaluated-with-gradients",
    )


# ------------------------------------------------------------------------------------------------------- words


def _first_line(one: Evaluation) -> SourceLine | None:
    losses = one.losses()
    batch = next((e for e in one.events if isinstance(e, BatchFetched)), None)
    return (losses[0].at if losses else None) or (batch.at if batch is not None else None)


def _loader(loader: Loader | None) -> str:
    if loader is None:
        return "a loader"
    of = f" of {plural(loader.batches, 'batch')}" if loader.batches else ""
    return f"the {loader.class_name} opened at {place(loader.at)}{of}" if loader.at is not None else "a loader" + of


def _names(modules: Sequence[ModeSensitive]) -> str:
    shown = ", ".join(f"{m.class_name} {m.name}" if m.name.isdecimal() else m.name or m.class_name for m in modules[:3])
    return shown + (", ..." if len(modules) > 3 else "")


def _ps(modules: Sequence[ModeSensitive]) -> str:
    ps = sorted({m.p for m in modules if m.p is not None})
    return f"p={number(ps[0])}" if len(ps) == 1 else f"p={number(ps[0])} to {number(ps[-1])}" if ps else "p unknown"


def _line(at: SourceLine | None) -> str:
    return place(at) or "an unknown line"


# ---------------------------------------------------------------------------------------------- without a run


@check("TL305", SourceFacts, severity="error", catalog="O5")
def wrong_mode_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read from the order of eval(), train() and the forwards."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        yield from map(_from_source, (*stays_in_eval(trace), *evaluated_in_train_mode(trace)))
        for call in always_drops(trace):
            yield Finding(
                f"dropout ({place(call.at)}) has no training=, so it drops in evaluation too: the module is also "
                f"called without gradients. {NOT_RUN}",
                at=call.at,
                fix="Pass training=self.training, or use nn.Dropout.",
                severity=Severity.WARNING,
                about="functional-dropout",
            )


def _from_source(fault: ModelFault) -> Finding:
    at, forward = (call.at if call is not None else None for call in (fault.call, fault.other))
    name = fault.module.name or fault.module.class_name
    if fault.kind == "evaluated-in-train":
        text = (
            f"{name} has dropout or batch norm, is called without gradients at {place(at)}, and eval() is never "
            "called on it: the evaluation runs in train mode."
        )
        fix = f"Call {name}.eval() before the evaluation and {name}.train() after it."
    else:
        stays = fault.kind == "stays-in-eval"
        back = ("in this loop", "so from the second pass on it trains") if stays else ("anywhere", "so it trains")
        text = f"{name}.eval() ({place(at)}) is never taken back {back[0]}, {back[1]} in eval mode ({place(forward)})."
        fix = f"Call {name}.train() at the start of every epoch."
    return Finding(
        f"{text} {NOT_RUN}",
        at=at,
        evidence={"kind": fault.kind, "module": fault.module.class_name, "forward": place(forward)},
        fix=fix,
        severity=None if fault.sure else Severity.WARNING,
        about=f"{fault.kind}:{name}",
    )
