"""TL603: weights that a load left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, Recording, Severity, check
from trainlint.recording.describe import percent, place, plural, uses
from trainlint.recording.schema import WeightLoad
from trainlint.recording.weight_loads import Renaming, best_renaming, file_name, fitting_shapes, in_play, module_names

#: Share of a module's weights from which a part that was left out is more than a head.
_PART = 0.1
#: Share from which it is most of what was to be loaded.
_MOST = 0.5
#: Share of the fresh weights that the rest of the file must fit, for a renaming of single layers.
_FITS = 0.8
#: Other shapes: share of the weights and of the tensors from which it is not only embeddings and a head.
_OTHER_WEIGHTS, _OTHER_TENSORS = 0.3, 0.25
#: Of the weights that were loaded, the share that holds other values by the first step.
_OVERWRITTEN = 0.9

_CALLED = ("load_state_dict", "from_pretrained", "load_from_checkpoint")


@dataclass(frozen=True)
class _Fault:
    kind: str
    severity: Severity
    why: str
    fix: str


@check("TL603", Recording, severity="error", catalog="O20 S0")
def partial_weight_load(run: Recording) -> Iterator[Finding]:
    """Weights that a load left out.

    ## What goes wrong
    `load_state_dict(strict=False)`, a dictionary filtered by name and shape, and `from_pretrained` all go on when
    names do not match. A `module.` of DistributedDataParallel, an `_orig_mod.` of torch.compile or a `model.` of a
    Lightning module at the front of every name is enough: nothing is loaded, nothing is raised, and the run that is
    called fine-tuning trains from random weights. The loss falls, only more slowly and less far.

    ## How it is detected
    A few values of every tensor that is read from a file are kept, and before the first step each parameter is
    compared with them; with what `load_state_dict` and `from_pretrained` said, that tells for every file which of its
    tensors arrived and which parameters came from no file at all. Names are only used to say what would have fitted.

    Error: nothing of the file arrived in the module it was loaded into; or a prefix on one side keeps at least 10% of
    the module's weights out; or most of the module stayed fresh although an unfiltered file holds tensors of just
    those shapes under other names; or nearly all that was loaded held unrelated values by the first step
    (initialised again). Warning: smaller parts that would fit under another name, many tensors of another
    shape, and a file that was read, would fit with a prefix taken off, and is in no module.

    ## What to do
    Rename the keys before loading (`{k.removeprefix("module."): v for k, v in state.items()}`), or load into the
    module inside the wrapper, and look at what `load_state_dict` returns: `missing_keys` should name the new head and
    nothing else. Where only the head differs, remove its keys from the file and load with `strict=True` into the
    backbone. With transformers, load through the class that saved the weights, or its base model.

    ## When it may be wrong
    A fresh head, adapters, and whole parts that the file has nothing for are how fine-tuning is meant and are not
    reported, nor is anything of the file that the model has no room for. Tensors of the same name and shape that are
    not in the model are taken as left out on purpose. A part that is deliberately initialised anew after the load,
    where that is nearly all of it, is reported; so is a part with the same shapes as an unused part of the file
    (a warning). Weights in sharded (FSDP) modules are compared by the word of the load only.

    ## References
    torch.nn.Module.load_state_dict; transformers documentation, "output_loading_info" and "ignore_mismatched_sizes".
    """
    if run.provenance is None or not run.provenance.loads:
        raise NotApplicable("no weights were loaded from a file")
    playing = in_play(run)
    told: set[tuple[str, str]] = set()
    for load in run.provenance.loads:
        if load.root not in playing or not load.fresh_tensors:
            continue
        fault = _fault(run, load)
        about = f"{file_name(load.path)}-{load.module or load.class_name}"
        if fault is not None and (about, fault.kind) not in told:
            told.add((about, fault.kind))
            yield _finding(run, load, fault, about)


def _fault(run: Recording, load: WeightLoad) -> _Fault | None:
    called = load.how in _CALLED
    renaming = best_renaming(load)
    if renaming is not None and renaming.weights >= _PART * load.model_weights:
        fits_whole = renaming.tensors >= 2 or renaming.weights >= _MOST * load.left_weights
        if renaming.one_sided and fits_whole:
            most = renaming.weights >= _MOST * load.left_weights or renaming.tensors >= _MOST * load.left_tensors
            proven = called or (load.how == "filtered" and most)
            if load.how != "read" or renaming.weights >= 0.9 * load.file_weights:
                return _Fault(
                    "prefix",
                    Severity.ERROR if proven else Severity.WARNING,
                    _prefix_words(load, renaming),
                    _prefix_fix(run, load, renaming),
                )
    if load.overwritten_tensors >= 2:
        share = load.overwritten_weights / max(1, load.overwritten_weights + load.matched_weights)
        if share >= _OVERWRITTEN:
            return _Fault(
                "overwritten",
                Severity.ERROR,
                f"by the first step {plural(load.overwritten_tensors, 'tensor')} "
                f"({percent(load.overwritten_weights, load.model_weights)} of its weights) held values unrelated to "
                "the file's: they were set anew after the load",
                "Initialise first and load afterwards: move the load below whatever calls reset_parameters, "
                "init_weights or apply(...) on the module.",
            )
    if called and not load.arrived_tensors and not load.matched_tensors:
        ours = ", ".join(t.name for t in module_names(load)[:2])
        theirs = ", ".join(t.name for t in load.left[:2])
        return _Fault(
            "nothing",
            Severity.ERROR,
            f"the file has {theirs}, ...; the module has {ours}, ...",
            "Compare the two lists of names and shapes and rename the keys before loading; load with strict=True to be "
            "told when they differ.",
        )
    if load.how == "read":
        return None
    if renaming is not None and not renaming.one_sided and renaming.tensors >= 2:
        if renaming.weights >= _PART * load.model_weights:
            return _Fault(
                "renamed",
                Severity.WARNING,
                f"{plural(renaming.tensors, 'tensor')} of the file that arrived nowhere would fit if "
                f"{renaming.theirs}* were {renaming.ours}*",
                f"If {renaming.theirs}* belongs in {renaming.ours}*, rename those keys before loading.",
            )
    tensors, weights = fitting_shapes(load)
    known = sum(math.prod(m.shape) for m in load.mismatched)
    unknown = load.fresh_weights - known
    if tensors >= 3 and weights >= _PART * load.model_weights and weights >= _FITS * unknown:
        dropped = called and load.strict is False or load.how == "from_pretrained"
        return _Fault(
            "renamed",
            Severity.ERROR if dropped and weights >= _MOST * load.model_weights else Severity.WARNING,
            f"the file still holds {tensors} matrices of just the shapes that stayed fresh, under other names "
            f"({load.left[0].name}, ... where the module has {module_names(load)[0].name}, ...)",
            "Map the file's names to the module's before loading.",
        )
    if len(load.mismatched) >= 3 and len(load.mismatched) >= _OTHER_TENSORS * load.model_tensors:
        if known >= _OTHER_WEIGHTS * load.model_weights:
            first = load.mismatched[0]
            return _Fault(
                "shapes",
                Severity.WARNING,
                f"{plural(len(load.mismatched), 'tensor')} have another shape in the file ({first.name}: "
                f"{tuple(first.file_shape)} there, {tuple(first.shape)} here)",
                "Build the model with the sizes that the file was saved with, or take the file that belongs to it.",
            )
    return None


def _prefix_words(load: WeightLoad, renaming: Renaming) -> str:
    fits = f"{plural(renaming.tensors, 'tensor')}, {percent(renaming.weights, load.model_weights)} of its weights"
    if renaming.theirs.endswith(renaming.ours):
        extra = renaming.theirs[: len(renaming.theirs) - len(renaming.ours)]
        return f"the file's names begin with \"{extra}\" and the module's do not; without it {fits}, fit"
    extra = renaming.ours[: len(renaming.ours) - len(renaming.theirs)]
    return f"the module's names begin with \"{extra}\" and the file's do not; with it {fits}, fit"


def _prefix_fix(run: Recording, load: WeightLoad, renaming: Renaming) -> str:
    if renaming.theirs.endswith(renaming.ours):
        extra = renaming.theirs[: len(renaming.theirs) - len(renaming.ours)]
        rename = f'state = {{k.removeprefix("{extra}"): v for k, v in state.items()}} before loading.'
    else:
        extra = renaming.ours[: len(renaming.ours) - len(renaming.theirs)]
        if load.wrapper and load.wrapper.startswith(extra):
            inside = load.wrapper.rstrip(".")
            return f"Load into the module inside the wrapper: model.{inside}.load_state_dict(state)."
        rename = (
            f'state = {{"{extra}" + k: v for k, v in state.items()}} before loading, or load into the module below.'
        )
    if load.how == "from_pretrained":
        rename += (
            " With from_pretrained, save the weights once more from the model inside the wrapper, with save_pretrained."
        )
    if load.how == "load_from_checkpoint" or uses(run, "lightning"):
        rename += " A checkpoint of a LightningModule names its network after the attribute that holds it."
    return rename


def _finding(run: Recording, load: WeightLoad, fault: _Fault, about: str) -> Finding:
    model = next((r.class_name for r in run.roots if r.id == load.root), "the model")
    if load.module and load.class_name:
        model = load.class_name
    if load.module:
        model = f"{model} ({load.module})" if load.class_name else load.module
    at = place(load.at)
    strict = ", strict=False" if load.strict is False else ""
    way = {
        "filtered": "read, and load_state_dict was called with other values",
        "read": "read and not used",
        "copy": "copied",
    }.get(load.how, f"{load.how}{strict}")
    source = f"{file_name(load.path)} ({f'{at}, ' if at else ''}{way})"
    arrived = (
        f"Only {load.matched_tensors} of {plural(load.model_tensors, 'tensor')} of {model} "
        f"({percent(load.matched_weights, load.model_weights)} of its weights) came from {source}"
        if load.matched_tensors
        else f"Nothing of {source} is in {model}: 0 of its {plural(load.model_tensors, 'tensor')}"
    )
    return Finding(
        f"{arrived}; {fault.why}. {plural(load.fresh_tensors, 'tensor')} start fresh.",
        at=load.at,
        evidence={
            "file": file_name(load.path),
            "how": load.how,
            "strict": load.strict,
            "kind": fault.kind,
            "model_tensors": load.model_tensors,
            "model_weights": load.model_weights,
            "matched_tensors": load.matched_tensors,
            "matched_weights": load.matched_weights,
            "file_tensors": load.file_tensors,
            "arrived_tensors": load.arrived_tensors,
            "fresh": [t.name for t in load.fresh[:50]],
            "left": [t.name for t in load.left[:50]],
            "mismatched": [[m.name, list(m.shape), list(m.file_shape)] for m in load.mismatched[:50]],
            "overwritten_tensors": load.overwritten_tensors,
        },
        fix=fault.fix,
        severity=fault.severity,
        about=about,
    )
