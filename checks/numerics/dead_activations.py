"""TL803: units that are zero or saturated for every element of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, ParameterName, Recording, check
from trainlint.recording.describe import percent, place, plural
from trainlint.recording.schema import UnitUse

#: Units that a layer must have, samples and values per unit that must have been seen.
_UNITS, _SAMPLES, _VALUES = 8, 4, 32
#: Samples for a share below all, and the least share. A plain network of many layers has about half its deep units
#: dead for a whole batch at random: what is reported lies four standard deviations above that.
_SAMPLES_PART, _SHARE = 8, 0.75
#: Wider than this many times their inputs, layers are meant to be sparse.
_OVERCOMPLETE = 4


@check("TL803", Recording, severity="warning", catalog="S2 O25")
def dead_activations(run: Recording) -> Iterator[Finding]:
    """Most units of a layer are zero, or saturated, for the whole batch.

    ## What goes wrong
    A ReLU whose input is negative for every sample passes nothing on and nothing back: its unit gets no gradient and
    stays as it is. One step at too high a rate can push most of a layer there; inputs that were never scaled, or a bias
    that is far too negative, do it from the start. A tanh or sigmoid at the end of its range is as dead: its slope
    rounds to zero. When a whole layer is dead, nothing before it learns through it.

    ## How it is detected
    After the watched steps the last batch goes through the model once more in the mode that it trains in. For each
    relu, tanh and sigmoid (module, function or method) right behind a linear layer or convolution, norms and dropout
    in between, each feature or channel is looked at over all samples and positions: zero everywhere (relu), or beyond
    the point where float32 rounds to the end of the range everywhere (9.5 for tanh, 17.5 for sigmoid). Reported are
    layers that are dead as a whole, and those with at least 75% dead units over 8 samples and 32 values each.

    Measured at random initialisation, batch of 32: 0% behind a batch norm, 2 to 23% in plain networks of four layers,
    about 50% (at most 58%) in plain networks of twelve, whose samples come to look alike.

    ## What to do
    A lower rate or a warm-up; inputs scaled to mean 0 and deviation 1; a norm before the activation; biases that start
    at 0; GELU, SiLU or LeakyReLU in the place of ReLU; for deep plain networks an initialisation made for the
    activation (`nn.init.kaiming_normal_`) or residual connections.

    ## When it may be wrong
    Sparse layers are right where they are meant: layers more than four times as wide as their inputs (sparse
    autoencoders, memories) and pretrained ones are reported only when they are dead as a whole. One batch is looked at;
    units that fire for rare samples look dead in it.

    ## References
    Karpathy 2019, "A Recipe for Training Neural Networks"; Lu et al. 2019, "Dying ReLU and Initialization"; Glorot and
    Bengio 2010.
    """
    if run.replay is None or not run.replay.forwards:
        raise NotObserved("no training forward of a module was seen that could be repeated")
    if not any(f.outcome == "replayed" for f in run.replay.forwards):
        raise NotObserved(f"the batch could not be repeated: {run.replay.forwards[0].reason}")
    if not run.replay.units:
        raise NotApplicable("no relu, tanh or sigmoid behind a linear layer or convolution was called")
    found = [use for use in run.replay.units if _dead(run, use)]
    if not found:
        return
    found.sort(key=lambda use: (-use.dead / use.units, -use.units))
    worst = found[0]
    lines = [_text(use) for use in found[:3]]
    more = f"; and {plural(len(found) - 3, 'more layer')}" if len(found) > 3 else ""
    relu = worst.function == "relu"
    message = (
        f"{'Dead' if relu else 'Saturated'} for the whole batch ({plural(worst.samples, 'sample')}, "
        f"{worst.values:,} values per unit): {'; '.join(lines)}{more}."
    )
    if worst.dead == worst.units:
        message += " What lies before a layer that is dead as a whole learns nothing through it."
    if relu and worst.silent == worst.dead:
        message += " Its input is exactly 0 everywhere: the layer before gives nothing."
    yield Finding(
        message,
        at=worst.at or (ParameterName(worst.layer) if worst.layer else None),
        evidence={
            "layers": [
                {"module": u.module, "layer": u.layer, "function": u.function, "units": u.units, "dead": u.dead,
                 "samples": u.samples, "values": u.values}
                for u in found[:16]
            ]
        },
        fix="Lower the rate or warm it up, scale the inputs (mean 0, deviation 1), start biases at 0, put a norm "
        "before the activation, or use " + ("GELU, SiLU or LeakyReLU." if relu else "a smaller initialisation."),
        about=worst.layer or worst.module or worst.function,
    )  # fmt: skip


def _dead(run: Recording, use: UnitUse) -> bool:
    if use.units < _UNITS or use.samples < _SAMPLES or use.values < _VALUES:
        return False
    if use.dead == use.units:
        return True
    if use.samples < _SAMPLES_PART or (use.fan_in and use.units > _OVERCOMPLETE * use.fan_in):
        return False
    if any(p.id == use.weight and p.origin != "fresh" for p in run.parameters):
        return False
    return use.dead / use.units >= max(_SHARE, 0.5 + 4 * math.sqrt(0.25 / use.units))


def _text(use: UnitUse) -> str:
    name = f"{use.layer or use.layer_class} ({use.layer_class})" if use.layer else use.layer_class or "a layer"
    line = f" ({place(use.at)})" if use.at is not None else ""
    return f"{use.dead:,} of {use.units:,} units of {name} ({percent(use.dead, use.units)}) under {use.function}{line}"
