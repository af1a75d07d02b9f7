"""Adapters on a model (LoRA and its relatives), what a save would leave out, and where a gradient's path is cut."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


@dataclass(frozen=True)
class AdapterTarget:
    """A name in the list of modules to adapt: how many modules it fits, and unadapted ones of nearly this name."""

    name: str
    matched: int = 0
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSite:
    """Modules of one name (``q_proj``) and one make in all layers: those with an adapter and those without."""

    name: str
    #: Class of the module that is, or would be, adapted.
    class_name: str
    wrapped: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters. Columns of numbers are ids of parameters."""

    root: int
    #: Where in the root it is (empty: the root itself) and its class.
    name: str = ""
    class_name: str = ""
    #: ``peft``, or empty for adapters written by hand, which are known by their shapes.
    library: str = ""
    #: Their own names say that they are adapters (``lora``), or PEFT made them.
    named: bool = False
    #: What PEFT calls it (``LORA``, ``IA3``, ``PROMPT_TUNING``); ``low-rank`` where written by hand.
    method: str = ""
    adapters: tuple[str, ...] = ()
    #: Names to adapt as the program gave them, or the one pattern; whether single layers were asked for.
    targets: tuple[AdapterTarget, ...] = ()
    target_pattern: str = ""
    layers_asked: bool = False
    modules_to_save: tuple[str, ...] = ()
    inference_mode: bool | None = None
    sites: tuple[AdapterSite, ...] = ()
    #: Tensors of the adapters, of the copies in modules_to_save, the weights that adapters sit on, and all tensors of
    #: the model.
    parameters: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    adapted_weights: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    #: Backwards at whose begin it was looked at, and those of them where every adapter was switched off, or merged into
    #: the weights it sits on.
    looks: int = 0
    disabled: int = 0
    merged: int = 0
    #: What the model's own save would hold (``None``: not computed, ``not_saved_because`` says why), and norms of the
    #: base whose running statistics moved in the watch and are not in it.
    saved: tuple[int, ...] | None = None
    not_saved_because: str = ""
    drifting_norms: tuple[str, ...] = ()
    #: Its save would ask a hub how large the base model's vocabulary was, to tell whether embeddings are to be saved.
    vocabulary_unknown: bool = False


@dataclass(frozen=True)
class Save:
    """Tensors of known modules in one call of ``torch.save`` or of safetensors, by identity or by name and shape."""

    function: str
    path: str = ""
    parameters: tuple[int, ...] = ()
    #: It holds the state of an optimizer too: something to resume from.
    optimizer_state: bool = False
    at: SourceLine | None = None


@dataclass(frozen=True)
class GradientCut:
    """A place that no gradient passes, on the way to trainable tensors.

    ``cause``: ``checkpoint`` (reentrant activation checkpointing, and no input of the function requires a gradient),
    ``no_grad`` or ``inference_mode`` (the module was called so), ``leaves`` (``function`` took what the module returned
    out of the graph, and no other path leads from the loss to it). ``function`` is ``a condition`` where the line that
    switches gradients off does so by a value or condition: it may let them through later.
    """

    cause: str
    #: Names of the modules in their root: the outermost that the cut concerns.
    modules: tuple[str, ...] = ()
    class_name: str = ""
    parameters: tuple[int, ...] = ()
    #: How often it was seen.
    calls: int = 0
    function: str = ""
    at: SourceLine | None = None


@dataclass(frozen=True)
class Adapters:
    """Adapters on a model (LoRA and its relatives), saves, and where a gradient's path is cut."""

    models: tuple[AdaptedModel, ...] = ()
    saves: tuple[Save, ...] = ()
    cuts: tuple[GradientCut, ...] = ()
