"""TL808: a tracker gets the results and nothing of how they come about."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import place, plural, uses
from trainlint.recording.schema import Clip, Logged, ScalerEvent

_RATE = re.compile(r"(^|[^a-z])lr([^a-z]|$)|learning[_\- ]?rate", re.IGNORECASE)
#: Names of what shows how a run learns: norms, ratios, loss scale, distributions.
_DYNAMICS = re.compile(r"grad|norm|update|ratio|scale|hist|momentum|param|weight", re.IGNORECASE)
_COUNTERS = ("epoch", "step", "global_step", "iter", "iteration", "time")
#: Trackers; files that a program writes itself are its own business.
_TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio", "dvclive", "aim", "lightning", "accelerate")
#: Callbacks that log the rate, and such things, at their own pace.
_RATE_MONITORS = ("LearningRateMonitor", "LRMonitor")
_MONITORS = ("GradNorm", "GradientNorm", "OptimizerMonitor", "HistogramMonitor")


@check("TL808", Recording, severity="info", catalog="O22 O23 O24 O25 O26")
def dynamics_not_instrumented(run: Recording) -> Iterator[Finding]:
    """A tracker gets the results and nothing of how they come about.

    ## What goes wrong
    When a loss jumps, or stops falling in the third day, the question is what the gradients, the steps and the loss
    scale did just before. Where only losses and metrics were logged, nobody can tell any more, and the run has to be
    made again to find out.

    ## How it is detected
    All that reached a tracker in the watched steps and at the end of the epoch: values by name, and by comparison
    with the measured gradient norms; histograms. It is said where the numbers are there already: the program clips by
    norm, or a `GradScaler` is at work, several values and the learning rate are logged, and none of them is a gradient
    norm, a ratio of update and weight, a loss scale or a histogram. The few lines that would log them are named.

    ## What to do
    Log the norm that `clip_grad_norm_` returns anyway, beside the loss; with float16 `scaler.get_scale()`; now and
    then histograms (`writer.add_histogram`, `wandb.watch(model, log="all")`). Lightning: `LearningRateMonitor`, and
    `grad_norm(self, 2)` in `on_before_optimizer_step`. The transformers `Trainer` logs rate and norm by itself.

    ## When it may be wrong
    A program that logs nothing, its loss alone, or only to files of its own gives no finding. What is logged more
    rarely than the watch is long is not seen. While the learning rate itself is in no log, TL404 speaks alone.

    ## References
    lightning.pytorch.utilities.grad_norm; torch.nn.utils.clip_grad_norm_; Karpathy, "A Recipe for Training Neural
    Networks".
    """
    if not run.steps:
        raise NotObserved("no optimizer step was measured; raise --timeout or --steps")
    if uses(run, "transformers"):
        return  # its Trainer logs learning_rate and grad_norm
    later = run.boundary.events if run.boundary is not None else ()
    logged = [e for e in (*run.events, *later) if isinstance(e, Logged) and e.by.startswith(_TRACKERS)]
    lightning = next((f for f in run.frameworks if f.name == "lightning"), None)
    if lightning is not None and not lightning.loggers:
        logged = [e for e in logged if not e.by.startswith("lightning")]
    names = sorted({re.sub(r"_(step|epoch)$", "", e.name) for e in logged} - set(_COUNTERS))
    if len(names) < 2:
        raise NotApplicable("no tracker gets more than a loss")
    callbacks = [c for f in run.frameworks for c in f.callbacks]
    rates = {r for e in run.events for r in (*getattr(e, "rates", ()), *getattr(e, "rates_after", ())) if r}
    if not (
        any(_RATE.search(e.name) for e in logged)
        or any(m in c for c in callbacks for m in _RATE_MONITORS)
        or _equals(logged, rates)
    ):
        raise NotApplicable("the learning rate is not logged either, of which TL404 speaks")
    scaler = any(isinstance(e, ScalerEvent) and e.enabled for e in run.events)
    clip = next((e for e in run.events if isinstance(e, Clip) and e.method == "norm"), None)
    if not scaler and clip is None:
        raise NotApplicable("the run neither clips by norm nor scales its loss")
    if any(m in c for c in callbacks for m in _MONITORS):
        return
    if any(_DYNAMICS.search(e.name) or ".add_histogram" in e.by or e.by == "wandb.watch" for e in logged):
        return
    norms = {n for m in run.steps for n in (m.gradient_norm_total, m.gradient_norm_after_backward) if n}
    if _equals(logged, norms | {e.total_norm for e in run.events if isinstance(e, Clip) and e.total_norm}):
        return
    yield _finding(logged, names, clip, scaler=scaler, in_lightning=lightning is not None)


def _equals(logged: Sequence[Logged], known: set[float]) -> bool:
    """Whether any logged value is one of those."""
    values = [e.value for e in logged if e.value is not None]
    return any(math.isclose(v, k, rel_tol=1e-5) for v in values for k in known)


def _finding(
    logged: Sequence[Logged], names: Sequence[str], clip: Clip | None, *, scaler: bool, in_lightning: bool
) -> Finding:
    through = sorted({e.by for e in logged})
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    missing = "gradient norm, update ratio" + (", loss scale" if scaler else "") + " nor histogram"
    message = (
        f"{through[0]} gets {plural(len(names), 'value')} ({shown}), and neither {missing} among them: when the loss "
        "jumps or stalls, this log will not say why."
    )
    if in_lightning:
        fix = (
            "In the LightningModule: def on_before_optimizer_step(self, optimizer): self.log('grad_norm', "
            "lightning.pytorch.utilities.grad_norm(self, 2)['grad_2.0_norm_total'])."
        )
    else:
        norm = "torch.nn.utils.clip_grad_norm_(model.parameters(), float('inf'))"
        if clip is not None:
            where = f" ({place(clip.at)})" if clip.at is not None else ""
            norm = f"what clip_grad_norm_ returns{where}"
        how = (
            "wandb.log({'grad_norm': norm})" if "wandb" in through[0] else "writer.add_scalar('grad_norm', norm, step)"
        )
        if not through[0].startswith(("wandb", "tensorboard")):
            how = "the same call that logs the loss"
        fix = f"Log the gradient norm: norm = {norm}, then {how}" if clip is None else f"Log {norm}: {how}"
        fix += "; scaler.get_scale() beside it." if scaler else "."
    return Finding(
        message,
        at=logged[-1].at,
        evidence={"logged": list(names[:50]), "through": through, "scaler": scaler},
        fix=fix,
        severity=Severity.INFO,
        about="dynamics",
    )
