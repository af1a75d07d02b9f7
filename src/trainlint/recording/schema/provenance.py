"""Where weights came from: the loads that were watched, and what each of them matched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainlint.recording.schema.basics import SourceLine


@dataclass(frozen=True)
class NamedShape:
    """A tensor by its name and shape, in a module or in a file."""

    name: str
    shape: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShapeMismatch:
    """A parameter whose counterpart in the file has another shape."""

    name: str
    shape: tuple[int, ...]
    file_name: str
    file_shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightLoad:
    """One set of weights out of a file, and what of it is in one module when training begins.

    That a tensor arrived is known by comparing a sample of values with the file's, or by what ``load_state_dict`` and
    ``from_pretrained`` said; names alone never count. Floating point tensors only; a file's optimizer state is not
    counted.
    """

    path: str
    #: Keys inside the file that lead to the weights (``model``, ``state_dict``); empty: the file is nothing else.
    part: str = ""
    #: ``load_state_dict``, ``from_pretrained``, ``load_from_checkpoint``, ``copy`` (values were found in the module,
    #: and nothing was called on it), ``filtered`` (the file was read, the module got a state dict, and nothing of the
    #: file is in it), ``read`` (the same without the call).
    how: str = "load_state_dict"
    at: SourceLine | None = None
    #: The module that the weights are for: its root, its place in that, its class.
    root: int | None = None
    module: str = ""
    class_name: str = ""
    #: What a wrapper that it was loaded through puts before the names (``module.``, ``_orig_mod.``).
    wrapper: str = ""
    strict: bool | None = None
    #: Optimizer state of the same file, or of a file beside it, was loaded too: a run is resumed.
    resumed: bool = False
    #: The file's tensors and weights, and those that arrived in any module.
    file_tensors: int = 0
    file_weights: int = 0
    arrived_tensors: int = 0
    arrived_weights: int = 0
    #: The module's parameters, those that are from this file, and those that are from none.
    model_tensors: int = 0
    model_weights: int = 0
    matched_tensors: int = 0
    matched_weights: int = 0
    fresh_tensors: int = 0
    fresh_weights: int = 0
    #: The first of the parameters from no file, by their name in the module, and of the file's tensors that arrived
    #: nowhere.
    fresh: tuple[NamedShape, ...] = ()
    left: tuple[NamedShape, ...] = ()
    left_tensors: int = 0
    left_weights: int = 0
    mismatched: tuple[ShapeMismatch, ...] = ()
    #: Parameters from no file although this one has a tensor of their name and shape: left out, or set anew.
    passed_over: tuple[str, ...] = ()
    #: Parameters that did get the file's values and hold unrelated ones when training begins.
    overwritten_tensors: int = 0
    overwritten_weights: int = 0


@dataclass(frozen=True)
class NormDrift:
    """A norm that no optimizer trains and whose running statistics changed over the watched steps."""

    name: str
    class_name: str
    root: int
    #: The highest module around it whose parameters nothing trains; empty with ``whole``: the root.
    inside: str = ""
    whole: bool = False
    #: Tensors of ``inside``, and how many of them came out of a file. 0: the norm's own only, its neighbours train.
    inside_tensors: int = 0
    inside_loaded: int = 0
    #: The statistics themselves came out of a file: which.
    origin: str = "fresh"
    #: In train mode at the end of the watch.
    training: bool = True
    momentum: float | None = None
    affine: bool = True
    #: requires_grad of its own parameters is off.
    frozen: bool = False
    #: Something other than an optimizer moves the parameters of ``inside`` (an average).
    parameters_moved: bool = False
    #: Largest change of a running mean over the watch in standard deviations of its channel, and the median.
    mean_shift_max: float | None = None
    mean_shift_median: float | None = None
    #: Median of variance after / variance before.
    variance_ratio: float | None = None
    #: Batches that it took in between the two looks.
    batches: int | None = None


@dataclass(frozen=True)
class Provenance:
    """Where weights came from: the loads that were watched, and what each of them matched."""

    loads: tuple[WeightLoad, ...] = ()
    #: Files that weights were read from, whether they were used or not.
    files_read: tuple[str, ...] = ()
    norms: tuple[NormDrift, ...] = ()
    #: Norms with running statistics that were compared over the watch, and those that nothing trains; ``None``: never
    #: looked twice.
    norms_compared: int | None = None
    norms_untrained: int = 0
