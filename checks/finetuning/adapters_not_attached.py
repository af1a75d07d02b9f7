"""TL604: adapters that sit on too little, take no part, or do not train alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, ParameterName, Recording, Severity, check
from trainlint.recording.describe import by_module, lines_of, percent, plural
from trainlint.recording.gradient_cuts import idle_adapters
from trainlint.recording.membership import held_by
from trainlint.recording.schema import AdaptedModel, AdapterSite, Parameter

#: Layers of one kind below which leaving some out says nothing, and the share of them that counts as few.
_LAYERS, _FEW = 4, 0.5
#: What keeps adapters from taking part, in words, and what undoes it.
_IDLE = {
    "merged": ("merged into", "unmerge_adapter"),
    "disabled": ("switched off beside", "enable_adapter_layers"),
}
#: Share of the base's matrices that train beside hand-written adapters before freezing was forgotten.
_MOST = 0.5


@check("TL604", Recording, severity="error", catalog="O21")
def adapters_not_attached(run: Recording) -> Iterator[Finding]:
    """Adapters that sit on too little, take no part, or whose base trains with them.

    ## What goes wrong
    LoRA and its relatives train small matrices beside frozen weights. Four things go wrong without an exception. The
    list of target modules names a layer that this model calls differently (`out_proj` for `o_proj`): PEFT raises
    only when *nothing* matches. Adapters written by hand are put on one layer of many, because the loop that puts
    them there stops early. The adapters are frozen, merged or switched off while the program trains. Or the base is
    not frozen: a `requires_grad_(True)` after `get_peft_model`, or a hand-written adapter without the loop that
    freezes the rest; then the run is a full fine-tune at a rate chosen for adapters, with the memory of one, and the
    adapter file that is saved at the end does not hold what was trained.

    ## How it is detected
    PEFT's layers are known by their classes; adapters written by hand by their shapes: a matrix and two factors of
    low rank whose product has its shape, one of them all zero at the start or named as such. For each name in
    `target_modules` the layers that it fits are counted. Layers of the same name and make without an adapter are
    listed beside those with one. Whether adapters are merged or switched off is read at the begin of each watched
    backward. Whether the base trains is seen in the optimizer's steps: a weight counts when it moved.

    Adapters written by hand are judged by their base only where that was loaded from a file, or (a warning) where they
    are named as adapters: in a model trained from scratch such a part is an architecture.

    Error: no adapter tensor is trainable while other tensors of the model train; all adapters are merged or switched
    off at every backward and got no gradient; a weight that an adapter sits on moves. Warning: a target that fits
    nothing although a layer of nearly this name has no adapter; few of many equal layers are adapted and nobody
    asked for single layers; most of the base's matrices move beside the adapters.

    ## What to do
    Take the names from `model.named_modules()`, or `target_modules="all-linear"`. Freeze the base before the
    adapters are made, and do not unfreeze it after `get_peft_model`; what shall train in full (a head, embeddings)
    belongs in `modules_to_save`. Call `unmerge_adapter()` and `enable_adapter_layers()` before training.

    ## When it may be wrong
    A list of targets that serves several architectures is silent: a name that fits nothing is reported only when a
    layer of nearly this name has no adapter. Adapters in the last layers only, on every second layer, or where
    `layers_to_transform`, a pattern or full names asked for single ones are taken for meant. Norms, biases,
    embeddings and whole modules beside the adapters may train. A frozen adapter below another that trains is right.

    ## References
    Hu et al., LoRA (2021); PEFT LoraConfig (target_modules, layers_to_transform, modules_to_save).
    """
    if run.adapters is None or not run.adapters.models:
        raise NotApplicable("no adapters were found")
    parameters = {p.id: p for p in run.parameters}
    moved = _moved(run)
    held = held_by(run)
    trained_roots = {parameters[i].root for i in held if i in parameters}
    for model in run.adapters.models:
        own = [parameters[i] for i in (*model.parameters, *model.extra) if i in parameters]
        # A model that nobody trains (a reference, a teacher) may have its adapters as it likes.
        if model.root not in trained_roots or not own:
            continue
        yield from _asleep(run, model, moved)
        yield from _base_trains(model, [parameters[i] for i in model.members if i in parameters], moved)
        yield from _targets(model)
        yield from _few_layers(run, model)


def _moved(run: Recording) -> set[int]:
    """Parameters that changed in a watched step."""
    return {i for m in run.steps for i, c in zip(m.parameters, m.changed, strict=False) if c}


def _asleep(run: Recording, model: AdaptedModel, moved: set[int]) -> Iterator[Finding]:
    """No adapter can train: frozen, merged or switched off."""
    wanted, members = set(model.parameters), set(model.members)
    own = [p for p in run.parameters if p.id in wanted]
    if not own or any(p.gradient_seen for p in own):
        return
    where = _where(model)
    if not any(p.requires_grad or p.requires_grad_later for p in own):
        others = [p for p in run.parameters if p.id in members and p.id in moved]
        # An adapter that was trained before may be kept as it is; a fresh one that never trains changes nothing.
        if others and model.named and not model.inference_mode and all(p.origin == "fresh" for p in own):
            yield Finding(
                f"None of the {plural(len(own), 'tensor')} of the {model.method} adapters{where} is trainable, while "
                f"{plural(len(others), 'other tensor')} of the model moved in the watched steps. The adapters stay as "
                "they were made.",
                at=ParameterName(own[0].name),
                evidence={"adapter_tensors": len(own), "trainable": 0, "others_moved": len(others)},
                fix="Freeze the base before the adapters are put on it (get_peft_model freezes it by itself), or set "
                "requires_grad_(True) on the adapters' tensors again.",
                about="frozen",
            )
        return
    idle = idle_adapters(model)
    if idle:
        state, call = _IDLE[idle]
        yield Finding(
            f"The {model.method} adapters{where} were {state} the weights they sit on at each of "
            f"{plural(model.looks, 'backward')}: their {plural(len(own), 'tensor')} took no part in the forward pass "
            "and got no gradient.",
            at=ParameterName(own[0].name),
            evidence={"adapter_tensors": len(own), "backwards": model.looks, "state": idle},
            fix=f"Call model.{call}() before training goes on.",
            about=idle,
        )


def _base_trains(model: AdaptedModel, members: Sequence[Parameter], moved: set[int]) -> Iterator[Finding]:
    """Weights of the base move beside the adapters."""
    adapted = set(model.adapted_weights)
    apart = {*model.parameters, *model.extra}
    base = [p for p in members if p.id not in apart]
    under = [p for p in base if p.id in adapted and p.id in moved and p.requires_grad]
    matrices = [p for p in base if p.kind not in ("norm", "bias", "embedding") and len(p.shape) > 1]
    others = [p for p in matrices if p.id in moved and p.id not in adapted and p.requires_grad]
    trained = [p for p in members if p.id in moved]
    adapters = sum(p.numel for p in trained if p.id in apart)
    share = percent(adapters, sum(p.numel for p in trained))
    evidence = {
        "adapted_weights": len(adapted),
        "adapted_weights_moved": len(under),
        "base_matrices": len(matrices),
        "base_matrices_moved": len(under) + len(others),
        "adapter_share_of_moved": share,
    }
    # From scratch, a low-rank part beside a matrix is an architecture; over loaded weights it is an adapter.
    loaded = model.library or all(p.origin != "fresh" for p in under)
    if under and (loaded or model.named):
        groups = by_module(under, base)
        yield Finding(
            f"{len(under)} of {plural(len(adapted), 'weight')} that the {model.method} adapters{_where(model)} sit on "
            f"moved in the watched steps: the base is not frozen ({lines_of(groups, None, most=2)}). The adapters are "
            f"{share} of the weights that train.",
            at=ParameterName(groups[0].pattern),
            evidence=evidence,
            fix="Freeze the base (requires_grad_(False) on all but the adapters) before the optimizer is built, and "
            "set no requires_grad_(True) on the model after get_peft_model. What shall train in full belongs in "
            "modules_to_save.",
            severity=None if loaded else Severity.WARNING,
            about="base",
        )
    elif (
        others
        and (model.library or model.named)
        and len(others) >= _MOST * (len(matrices) - len(adapted))
        and len(others) >= _LAYERS
    ):
        groups = by_module(others, base)
        yield Finding(
            f"{len(others)} of {len(matrices)} matrices of the base move beside the {model.method} "
            f"adapters{_where(model)}: {lines_of(groups, None, most=2)}. The adapters are {share} "
            "of the weights that train.",
            at=ParameterName(groups[0].pattern),
            evidence=evidence,
            fix="Freeze everything but the adapters and the head before the optimizer is built. If the rest is meant "
            "to train, ignore this.",
            severity=Severity.WARNING,
            about="base",
        )


def _targets(model: AdaptedModel) -> Iterator[Finding]:
    """Names to adapt that fit nothing, although a layer of nearly this name has no adapter."""
    if not any(t.matched for t in model.targets):
        return  # how PEFT matched them is not understood
    for target in model.targets:
        if target.matched or not target.near:
            continue
        fit = ", ".join(f"{t.name} ({t.matched})" for t in model.targets if t.matched)
        near = " or ".join(target.near)
        yield Finding(
            f"target_modules names {target.name}, which fits no layer of {model.class_name}; {near} exists and has no "
            f"adapter. The others fit: {fit}.",
            at=ParameterName(target.near[0]),
            evidence={"target": target.name, "near": list(target.near), "matched": 0},
            fix=f"Write {target.near[0]} for {target.name}, or take it out of target_modules.",
            severity=Severity.WARNING,
            about=target.name,
        )


def _few_layers(run: Recording, model: AdaptedModel) -> Iterator[Finding]:
    """Few of many equal layers are adapted, in no order that a person would choose."""
    full_names = any("." in t.name or any(c.isdigit() for c in t.name) for t in model.targets)
    if model.layers_asked or model.target_pattern or full_names:
        return
    if not model.library and any(p.id in set(model.adapted_weights) and p.requires_grad for p in run.parameters):
        return  # low-rank parts of an architecture rather than adapters
    for site in model.sites:
        total = len(site.wrapped) + len(site.bare)
        if total < _LAYERS or len(site.wrapped) > _FEW * total or _chosen(site):
            continue
        yield Finding(
            f"Only {len(site.wrapped)} of {total} equal layers {site.name} ({site.class_name}) have an adapter: "
            f"{', '.join(site.wrapped[:3])}. {', '.join(site.bare[:2])} and others have none.",
            at=ParameterName(site.wrapped[0]),
            evidence={"name": site.name, "wrapped": len(site.wrapped), "equal": total},
            fix="Put an adapter on each of them: collect the modules first (list(model.named_modules())) and replace "
            "them then. If single layers are meant, ignore this.",
            severity=Severity.WARNING,
            about=site.name,
        )


def _chosen(site: AdapterSite) -> bool:
    """The adapted layers are the last ones, or evenly spaced."""
    order = sorted((*site.wrapped, *site.bare), key=_position)
    places = [i for i, name in enumerate(order) if name in set(site.wrapped)]
    if places[-1] == len(order) - 1:
        return True
    gaps = {b - a for a, b in itertools.pairwise(places)}
    return len(gaps) == 1 and gaps != {1}


def _position(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _where(model: AdaptedModel) -> str:
    return f" in {model.name}" if model.name else ""
