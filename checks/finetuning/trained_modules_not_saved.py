"""TL605: what trains, and a save would leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, Severity, check
from trainlint.recording.describe import by_module, framework_settings, lines_of, place, plural, uses
from trainlint.recording.membership import held_by
from trainlint.recording.schema import AdaptedModel, Parameter, Save

#: Parts that a finished model is often used without: left out of a file for the weights alone, they are not missed.
_HELPERS = re.compile(
    r"proj|predict|decod|discrim|critic|aux|momentum|teacher|target|loss|criterion|prob|expander|temperature|logit_scale",
    re.IGNORECASE,
)


@check("TL605", Recording, severity="error", catalog="O21")
def trained_modules_not_saved(run: Recording) -> Iterator[Finding]:
    """Parameters that train, and that a save leaves out.

    ## What goes wrong
    `save_pretrained` of a PEFT model, and so every checkpoint of the transformers `Trainer`, writes the adapters and
    the modules named in `modules_to_save`, nothing else. A fresh classification head that was unfrozen by hand
    (`model.classifier.requires_grad_(True)`), embeddings that train with new tokens, or a batch-norm of the frozen
    base whose running statistics move, are part of what the model has learned and are gone after a reload: the head
    is random again. The other way round, `PeftModel.from_pretrained(base, adapter)` loads the adapter frozen, for
    inference: a training resumed so trains nothing, or the head alone. In programs that save by themselves, the file
    holds one part of the model (`model.encoder.state_dict()`) while the optimizer trains more.

    ## How it is detected
    At the end of the watch PEFT is asked for the state dict that the model's own save would hold (nothing is
    written), and its tensors are compared by identity with the tensors that moved in the watched steps. For
    batch-norms of the base the running statistics at the first backward are compared with those at the end. Error
    where the transformers Trainer saves the model or the program was seen to save only that; warning where it is not
    known how the program saves, and for norms. Silent where a save that holds everything was seen, and under
    Lightning, whose checkpoints hold the whole model.

    An adapter that was loaded for inference is an error when nothing at all is trainable, and a warning when other
    parts of the model train.

    For other programs: `torch.save` and safetensors in the watched steps and over the end of the epoch, by identity
    of the tensors, or name and shape. All files together count. A warning where none holds something that an
    optimizer moves, in a model of which other parts are saved; a file with weights alone may leave out parts that
    serve the training only (a projector, predictor, decoder, an auxiliary head).

    ## What to do
    Name the module in `modules_to_save` of the adapter's config (or `trainable_token_indices` for a few new tokens)
    and do not unfreeze by hand. Load an adapter that is to be trained on with `is_trainable=True`. Save
    `model.state_dict()` as a whole; with adapters of your own, everything that has `requires_grad`, and the buffers
    of norms.

    ## When it may be wrong
    A program that merges the adapter and saves the merged model after training, or writes the head to a file of its
    own at the end, is right; where only the end of training saves, nothing of it is seen (a warning at most).

    ## References
    PEFT LoraConfig.modules_to_save; PeftModel.from_pretrained(is_trainable); PEFT get_peft_model_state_dict.
    """
    models = run.adapters.models if run.adapters is not None else ()
    saves = run.adapters.saves if run.adapters is not None else ()
    peft = [m for m in models if m.library]
    frozen = [m for m in peft if _loaded_frozen(run, m)]
    for model in frozen:
        yield _resumed_frozen(run, model)
    if not run.steps:
        if frozen:
            return
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    if not peft and not saves:
        raise NotApplicable("no PEFT model was found, and nothing was saved in the watch or at the end of the epoch")
    moved = _moved(run)
    for model in peft:
        if model not in frozen:
            yield from _left_out_by_peft(run, model, moved, saves)
    if saves:
        yield from _left_out_by_files(run, {m.root for m in peft}, moved, saves)


def _moved(run: Recording) -> list[Parameter]:
    """Trainable tensors of modules that changed in a watched step."""
    ids = {i for m in run.steps for i, c in zip(m.parameters, m.changed, strict=False) if c}
    return [p for p in run.parameters if p.id in ids and p.requires_grad and p.root is not None]


# ------------------------------------------------------------------------------------------------------------- PEFT


def _loaded_frozen(run: Recording, model: AdaptedModel) -> bool:
    """Every adapter of a model that is trained is frozen, and its config says that it was loaded for inference."""
    own = {*model.parameters, *model.extra}
    tensors = [p for p in run.parameters if p.id in own]
    if not model.inference_mode or not tensors or any(p.requires_grad or p.requires_grad_later for p in tensors):
        return False
    return not _trainable(run) or model.root in {p.root for p in _trainable(run)}


def _trainable(run: Recording) -> list[Parameter]:
    """Trainable tensors in optimizers; without optimizers, of all modules."""
    held = held_by(run)
    return [p for p in run.parameters if p.requires_grad and (p.id in held or not held)]


def _resumed_frozen(run: Recording, model: AdaptedModel) -> Finding:
    own = {*model.parameters, *model.extra}
    tensors = [p for p in run.parameters if p.id in own]
    others = [p for p in _trainable(run) if p.root == model.root]
    rest = (
        f"only {lines_of(by_module(others, run.parameters), None, most=2)} can train"
        if others
        else "nothing in this run can train"
    )
    return Finding(
        f"The {model.method} adapter of {model.class_name} was loaded for inference (inference_mode=True): its "
        f"{plural(len(tensors), 'tensor')} are frozen, {rest}.",
        at=ParameterName(tensors[0].name),
        evidence={"adapter_tensors": len(tensors), "trainable_beside": len(others), "inference_mode": True},
        fix="Load it with PeftModel.from_pretrained(base, path, is_trainable=True) to train it on.",
        severity=Severity.WARNING if others else None,
        about="inference_mode",
    )


def _left_out_by_peft(
    run: Recording, model: AdaptedModel, moved: Sequence[Parameter], saves: Sequence[Save]
) -> Iterator[Finding]:
    if model.saved is None or uses(run, "lightning"):
        return
    # The adapters themselves may be saved in another form: prompts as the prefix that they are turned into.
    held = {*model.saved, *model.parameters, *(i for s in saves for i in s.parameters)}
    members = set(model.members)
    lost = [p for p in moved if p.id in members and p.id not in held]
    ids = {p.id for p in moved}
    if not ids & members or ids & set(model.adapted_weights):
        return  # a base that trains below its adapters is TL604's
    if model.vocabulary_unknown:
        lost = [p for p in lost if p.kind != "embedding" and "lm_head" not in p.name]
    by_trainer = (
        uses(run, "transformers")
        and not model.name
        and framework_settings(run, "transformers").get("save_strategy") != "no"
    )
    if by_trainer or not model.name or any(set(s.parameters) & members for s in saves):
        certain = by_trainer or any(set(s.parameters) & members for s in saves)
        if lost:
            yield _unsaved(run, model, lost, certain=certain)
        elif model.drifting_norms and not any(p.kind == "norm" and p.id in held for p in run.parameters):
            yield _drift(model)


def _unsaved(run: Recording, model: AdaptedModel, lost: Sequence[Parameter], *, certain: bool) -> Finding:
    trained = [p for p in run.parameters if p.requires_grad]
    groups = by_module(lost, trained)
    how = "as the Trainer does at every checkpoint" if uses(run, "transformers") else "model.save_pretrained"
    settings = framework_settings(run, "peft")
    named = ", ".join(model.modules_to_save) or "nothing"
    short = sorted({_module(p.name) for p in lost})
    return Finding(
        f"{plural(len(lost), 'tensor')} moved in the watched steps and would not be in the adapter file "
        f"({how}): {lines_of(groups, sum(p.numel for p in trained), most=3)}. It holds the "
        f"{model.method} adapters and modules_to_save ({named}). After a reload they are what they were before "
        "training.",
        at=ParameterName(groups[0].pattern),
        evidence={
            "tensors": len(lost),
            "weights": sum(p.numel for p in lost),
            "parameters": [p.name for p in lost[:50]],
            "modules_to_save": list(model.modules_to_save),
            "saved_tensors": len(model.saved or ()),
            "peft_type": str(settings.get("peft_type", model.method)),
        },
        fix=f"Put {', '.join(short[:3])} into modules_to_save of the adapter's config instead of unfreezing by hand, "
        "or save the module to a file of its own.",
        severity=None if certain else Severity.WARNING,
        about=groups[0].pattern,
    )


def _module(name: str) -> str:
    """``base_model.model.classifier.weight`` -> ``classifier``: what modules_to_save would name."""
    parts = [p for p in name.split(".")[:-1] if p not in ("base_model", "model") and not p.isdecimal()]
    return parts[-1] if parts else name


def _drift(model: AdaptedModel) -> Finding:
    shown = ", ".join(model.drifting_norms[:3]) + (", ..." if model.drifting_norms[3:] else "")
    return Finding(
        f"The running statistics of {plural(len(model.drifting_norms), 'norm')} of the frozen base moved in the "
        f"watched steps ({shown}), and the adapter file would not hold them: after a reload the adapters meet the "
        "statistics from before training.",
        at=ParameterName(model.drifting_norms[0]),
        evidence={"norms": list(model.drifting_norms)},
        fix="Keep the base's norms in eval mode while training (module.eval() after model.train()), or name them in "
        "modules_to_save.",
        severity=Severity.WARNING,
        about="norms",
    )


# ------------------------------------------------------------------------------------------------------ other saves


def _left_out_by_files(
    run: Recording, peft_roots: set[int | None], moved: Sequence[Parameter], saves: Sequence[Save]
) -> Iterator[Finding]:
    """In roots of which some file holds trained tensors: those that no file holds."""
    held = {i for s in saves for i in s.parameters}
    for root in dict.fromkeys(p.root for p in moved):
        own = [p for p in moved if p.root == root]
        lost = [p for p in own if p.id not in held]
        files = [s for s in saves if set(s.parameters) & {p.id for p in own}]
        if root in peft_roots or not lost or not files:
            continue
        resumes = any(s.optimizer_state for s in files)
        if not resumes:
            lost = [p for p in lost if not _HELPERS.search(p.name)]
        if not lost:
            continue
        groups = by_module(lost, own)
        where = place(files[0].at)
        yield Finding(
            f"{files[0].function}{f' at {where}' if where else ''} saves {plural(len(own) - len(lost), 'tensor')} of "
            f"the {len(own)} that the optimizer moves, and no other save was seen that holds the rest: "
            f"{lines_of(groups, sum(p.numel for p in own), most=3)}."
            + (" The file holds the optimizer's state for a resume." if resumes else ""),
            at=files[0].at or ParameterName(groups[0].pattern),
            evidence={
                "saved": len(own) - len(lost),
                "trained": len(own),
                "parameters": [p.name for p in lost[:50]],
                "optimizer_state": resumes,
                "saves": len(saves),
            },
            fix="Save the state dict of the whole model, or of every part that trains. If the rest is only needed for "
            "training and never resumed, ignore this.",
            severity=Severity.WARNING,
            about=groups[0].pattern,
        )
