"""TL804: weights that have collapsed: units that are copies of each other, and zeros that cannot move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotObserved, ParameterName, Recording, check
from trainlint.recording.describe import plural
from trainlint.recording.schema import Distribution, OptimizerStep, Parameter, StepMeasurement

#: Steps, at a rate above 0, that a weight of zeros must have been left at.
_STEPS = 3


@check("TL804", Recording, severity="warning", catalog="S2 O26")
def degenerate_distributions(run: Recording) -> Iterator[Finding]:
    """Weights whose units are all copies of each other, or zeros that no gradient can move.

    ## What goes wrong
    Units that start with the same weights compute the same value, get the same gradient and stay the same for good: a
    layer of 512 of them is worth one. It comes of `nn.init.constant_`, `ones_` or `zeros_` on a weight matrix. And a
    matrix of zeros is harmless only while something else gives it a gradient: where the factor before or behind it
    is zero too (both matrices of a low-rank update, a zero layer behind a zero layer), its gradient is zero in every
    step, and it never moves.

    ## How it is detected
    After the last watched step, all trainable weight matrices of at least 4 by 4 elements that an optimizer holds are
    looked at. Reported are those whose rows are the same bits although steps moved them, with a gradient whose rows
    are the same bits too; and those of zeros alone whose gradient was exactly 0 in every one of at least 3 steps
    made at a rate above 0.

    The recording keeps histograms of weights, gradients and activations beside this.

    ## What to do
    Initialise weight matrices at random (`nn.init.kaiming_uniform_`, `xavier_uniform_`, `normal_`), biases at 0. Of two
    factors initialise one at random and one at 0, as LoRA does.

    ## When it may be wrong
    A single zero matrix that gets a gradient is right (LoRA's B, zero-initialised heads and residual branches, adaLN-
    zero, ControlNet's zero convolutions) and not reported, and neither are frozen weights, rows that no step has
    moved yet, or experts without a token. Copies that dropout or noise will part later show in the next steps.

    ## References
    Goodfellow et al. 2016, "Deep Learning", 8.4 (symmetry breaking); Hu et al. 2021, "LoRA".
    """
    if run.replay is None or not run.replay.distributions:
        raise NotObserved("weights were not looked at: the run ended before its watched steps were made")
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    weights = {d.name: d for d in run.replay.distributions if d.what == "weight" and d.identical_rows}
    gradients = {d.name: d for d in run.replay.distributions if d.what == "gradient"}
    copies: list[tuple[Parameter, Distribution]] = []
    stuck: list[tuple[Parameter, Distribution]] = []
    for parameter in run.parameters:
        weight, gradient = weights.get(parameter.name), gradients.get(parameter.name)
        if weight is None or not parameter.requires_grad or weight.shape != parameter.shape:
            continue
        column = _column(run, parameter.id)
        if weight.minimum == weight.maximum == 0.0:
            if len(column) >= _STEPS and all(norm == 0.0 for norm, _ in column):
                stuck.append((parameter, weight))
        elif gradient is not None and gradient.identical_rows and any((gradient.minimum, gradient.maximum)):
            if any(moved for _, moved in column):
                copies.append((parameter, weight))
    if copies:
        yield _copies(copies)
    if stuck:
        yield _stuck(stuck, len(_column(run, stuck[0][0].id)))


def _column(run: Recording, parameter: int) -> list[tuple[float | None, bool]]:
    """Gradient norm and whether it moved, for each measured step at a rate above 0."""
    rated = {(e.optimizer, e.index) for e in run.events if isinstance(e, OptimizerStep) and any(e.rates)}
    return [_entry(m, parameter) for m in run.steps if parameter in m.parameters and (m.optimizer, m.index) in rated]


def _entry(measured: StepMeasurement, parameter: int) -> tuple[float | None, bool]:
    place = measured.parameters.index(parameter)
    return measured.gradient_norm[place], bool(measured.changed[place])


def _copies(found: Sequence[tuple[Parameter, Distribution]]) -> Finding:
    parameter, weight = found[0]
    more = f" ({plural(len(found) - 1, 'more tensor')} alike)" if len(found) > 1 else ""
    return Finding(
        f"All {weight.shape[0]} rows of {parameter.name} {parameter.shape} are the same bits after the watched steps, "
        f"and so are those of its gradient{more}: its units are copies of each other and stay so.",
        at=ParameterName(parameter.name),
        evidence={"parameters": [p.name for p, _ in found[:16]], "rows": weight.shape[0]},
        fix="Initialise the matrix at random (nn.init.kaiming_uniform_, xavier_uniform_, normal_); constants are for "
        "biases and norms.",
        about=parameter.name,
    )


def _stuck(found: Sequence[tuple[Parameter, Distribution]], steps: int) -> Finding:
    parameter, _ = found[0]
    names = ", ".join(p.name for p, _ in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return Finding(
        f"{names} {'holds' if len(found) == 1 else 'hold'} zeros only, and the gradient was exactly 0 in all "
        f"{steps} watched steps: nothing can move {'it' if len(found) == 1 else 'them'}.",
        at=ParameterName(parameter.name),
        evidence={"parameters": [p.name for p, _ in found[:16]], "steps": steps},
        fix="Initialise one of the factors at random (LoRA: A at random, B at 0), or the layer before it.",
        about=parameter.name,
    )
