"""TL306: gradients of several micro-batches are added up as if each were the whole batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, SourceFacts, check
from trainlint.recording.describe import framework_settings, name_optimizer, number, place, plural, uses
from trainlint.recording.intervals import Interval, Timeline
from trainlint.recording.micro_batches import micro_batches, shares_of, supervision
from trainlint.recording.schema import Backward, Clip, LossCall, Optimizer
from trainlint.recording.source_loops import undivided
from trainlint.recording.source_order import NOT_RUN, traces_of

#: How far a divisor may be from 1, or a norm from another, and still be called equal.
_CLOSE = 0.02
#: What trainers call the setting.
_SETTINGS = ("gradient_accumulation_steps", "accumulate_grad_batches")


@check("TL306", Recording, severity="error", catalog="O9")
def accumulation_not_divided(run: Recording) -> Iterator[Finding]:
    """Gradients of several micro-batches are added up as if each were the whole batch.

    ## What goes wrong
    `backward()` adds to `.grad`. With N micro-batches per step, each a full mean over its own samples, the step sees
    the sum: N times the gradient of the batch they form together. With SGD that is a learning rate N times too
    large. Adam divides the factor out again, so nothing diverges, but everything measured against the gradient is
    off by N: a clipping threshold binds N times earlier, L2 in the gradient counts N times less, eps N times less,
    and the logged gradient norm changes with the accumulation setting.

    ## How it is detected
    For every optimizer, the backwards between two of its steps. They count as micro-batches when they come from one
    source line, each has a batch of its own, nothing was cleared and nobody stepped in between. Then it is read from
    each backward's graph what lies between the loss function and the tensor that backward got: its reduction
    (`mean`) and the factor it was divided by (1: nothing). The gradient norm after the last backward is compared
    with the one the step used, so that a division of the gradients themselves is seen too. What each micro-batch
    added to the gradients is known from a sample of them, and with it the gradient of one large batch of the same
    samples: its norm, and the angle between the two.

    Without a run, from the source: the step runs under a condition that counts (or under accelerate's `accumulate`),
    the backward does not, and what it gets is the mean of a loss of torch with nothing between the two.

    ## What to do
    `(loss / N).backward()`. In Lightning's automatic optimization set `Trainer(accumulate_grad_batches=N)`, which
    divides; in manual optimization `self.manual_backward(loss / N)`. With accelerate, pass
    `gradient_accumulation_steps=N` and use `accelerator.backward(loss)` inside `with
    accelerator.accumulate(model):`. The transformers `Trainer` divides nothing for a model whose `forward` takes
    `**kwargs`: it hands it `num_items_in_batch` and leaves the division to it. Many heads of transformers itself
    take `**kwargs` and ignore that number (measured on 5.23: `BertForSequenceClassification` under accumulation 4
    gets exactly 4 times the gradient of one large batch, and the Trainer logs 4 times the loss). Set
    `model.accepts_loss_kwargs = False` before the Trainer is made, and it divides; a custom loss that gets
    `num_items_in_batch` should divide its sum by it.

    ## When it may be wrong
    Several losses of one batch (a GAN's real and fake halves, multi-task losses, penalties) come from different
    lines or share a batch: not reported. Sum-reduced losses, losses divided by a token count, gradients divided
    before the step, and backwards of another optimizer are not either. Where micro-batches were told only by the
    model's input (chunks of one batch, views, tasks), adding them up may be what is meant: a warning unless a
    setting asks for this accumulation. A learning rate that was divided by N on purpose makes SGD right again; that
    cannot be seen.

    ## References
    torch documentation, "Automatic Mixed Precision examples: gradient accumulation"; Goyal et al. 2017, "Accurate,
    Large Minibatch SGD"; huggingface/transformers issue 47688, "Heads that declare **kwargs but drop
    num_items_in_batch train with an inflated loss under gradient accumulation".
    """
    timeline = Timeline(run)
    if not timeline.steps:
        raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
    several = False
    for optimizer in run.optimizers:
        found, judged, doubtful = [], 0, 0
        for interval in timeline.intervals(optimizer.id):
            backwards = interval.backwards()
            if not backwards:
                continue
            judged += 1
            several = several or len(backwards) > 1
            window = _undivided(run, interval, backwards, optimizer)
            if window is not None and window.reaches_more:
                doubtful += 1
            elif window is not None:
                found.append(window)
        # One interval that looks so may be special (a warm-up pass before the loop); all of them are the loop. A last,
        # shorter window is still one of them. One in which a later backward reached more parameters may be of another
        # loss: it counts for nothing beside one that is none.
        if found and len(found) + doubtful == judged and any(w.told for w in found):
            yield _finding(run, optimizer, found)
    if not several:
        raise NotApplicable("one backward per optimizer step: nothing is accumulated")


@dataclass(frozen=True)
class _Window:
    interval: Interval
    backwards: Sequence[Backward]
    #: Each micro-batch was fetched from a loader (not only another input of the model).
    fetched: bool
    #: The micro-batches are known to differ.
    told: bool
    #: The gradients are known not to have been divided between the last backward and the step.
    measured: bool
    #: The divisor was read from the graph (not concluded from equal values).
    from_graph: bool
    #: A later backward reached parameters that no earlier one did.
    reaches_more: bool


def _undivided(
    run: Recording, interval: Interval, backwards: Sequence[Backward], optimizer: Optimizer
) -> _Window | None:
    """The accumulation window of one step, when every micro-batch in it is a full, undivided mean."""
    batches = micro_batches(run, interval, optimizer)
    if batches is None:
        return None
    if not batches.fetched and len(backwards) < 3 and not _asked(run, len(backwards)):
        return None  # two inputs of one batch (real and fake, two views) are as likely as two micro-batches
    from_graph = True
    for previous, backward in zip((None, *backwards), backwards, strict=False):
        if backward.gradient_argument is not None and abs(backward.gradient_argument - 1) > _CLOSE:
            return None
        if backward.divided_by is not None:
            if backward.micro_loss_reduction != "mean" or abs(backward.divided_by - 1) > _CLOSE:
                return None
        elif _equals_its_loss(interval, previous, backward):
            from_graph = False
        else:
            return None
    rescaled = _rescaled(interval, backwards)
    if rescaled:
        return None
    return _Window(
        interval, backwards, batches.fetched, batches.told, rescaled is not None, from_graph, batches.reaches_more
    )


def _equals_its_loss(interval: Interval, previous: Backward | None, backward: Backward) -> bool:
    """Without the graph: the value handed to backward is that of the one mean-reduced loss computed for it."""
    low = previous.seq if previous is not None else interval.after
    losses = [
        e
        for e in interval.between(low, backward.seq)
        if isinstance(e, LossCall) and e.grad_enabled and e.input_requires_grad
    ]
    if len(losses) != 1 or losses[0].reduction != "mean" or losses[0].value is None or backward.value is None:
        return False
    scale = backward.loss_scale or 1.0
    return math.isclose(losses[0].value, backward.value / scale, rel_tol=1e-3, abs_tol=1e-12)


def _rescaled(interval: Interval, backwards: Sequence[Backward]) -> bool | None:
    """Whether the gradients were made smaller between the last backward and the step by anything but clipping."""
    m = interval.measurement
    if m is None or m.gradient_norm_total is None or not m.gradient_norm_after_backward:
        return None
    ratio = m.gradient_norm_total / m.gradient_norm_after_backward
    if not math.isfinite(ratio):
        return None
    if abs(ratio - 1) <= _CLOSE:
        return False
    scale = backwards[-1].loss_scale
    if scale and abs(ratio * scale - 1) <= _CLOSE:
        return False
    clips = [c for c in interval.clips() if c.seq > backwards[-1].seq]
    if not clips:
        return True
    if any(c.method == "value" for c in clips) or any(c.total_norm is None for c in clips):
        return None
    # What clipping by norm found, before it scaled: the undivided norm, or one that was divided before.
    found = clips[0].total_norm or 0.0
    plain = m.gradient_norm_after_backward / (scale if scale and not clips[0].scaled else 1.0)
    return abs(found / plain - 1) > 0.05 if plain else None


def _finding(run: Recording, optimizer: Optimizer, windows: Sequence[_Window]) -> Finding:
    typical = max(windows, key=lambda w: len(w.backwards))
    n = len(typical.backwards)
    backward = typical.backwards[-1]
    asked = _asked(run, n)
    sure = (typical.fetched or asked) and all(w.measured for w in windows)
    m = typical.interval.measurement
    norm = m.gradient_norm_after_backward if m is not None else None
    if norm is not None and backward.loss_scale:
        norm /= backward.loss_scale
    clip = next((e for e in typical.interval.events if isinstance(e, Clip) and e.method == "norm"), None)
    values = [b.value / (b.loss_scale or 1.0) for b in typical.backwards if b.value is not None]
    how = "divided by 1 in its graph" if typical.from_graph else "equal to its loss"
    message = (
        f"{plural(n, 'micro-batch')} per step of {name_optimizer(optimizer)} are added up undivided: each backward "
        f"({place(backward.at) or 'unknown line'}) gets a full mean loss ({how}), so gradients are {n} times too large."
    )
    large = _large_batch(typical)
    if norm is not None:
        message += f" Measured norm {number(norm)}; one batch of the same samples has {number(norm / large.ratio)}"
        message += f", {large.angle:.0f} degrees away." if large.angle is not None and large.angle >= 1 else "."
    message += " " + _consequence(optimizer, n, clip)
    if _left_to_the_model(run):
        message += " The Trainer leaves the division to a forward that takes **kwargs; num_items_in_batch is not used."
    return Finding(
        message,
        at=backward.at,
        evidence={
            "factor": n,
            "windows": len(windows),
            "losses": values[:16],
            "gradient_norm": norm,
            "gradient_norm_of_one_batch": norm / large.ratio if norm is not None else None,
            "degrees_from_one_batch": large.angle,
            "clip_threshold": clip.threshold if clip is not None else None,
            "divided_by": backward.divided_by,
            "optimizer": optimizer.class_name,
        },
        fix=_fix(run, n),
        severity=None if sure else Severity.WARNING,
        about=optimizer.class_name,
    )


@dataclass(frozen=True)
class _LargeBatch:
    """The accumulated gradient beside that of one batch of all samples: how many times longer, how many degrees off."""

    ratio: float
    angle: float | None = None


def _large_batch(window: _Window) -> _LargeBatch:
    """Measured where the shares of the micro-batches are known, else by the count of equal micro-batches."""
    n = len(window.backwards)
    shares = shares_of(window.interval)
    if shares is None:
        return _LargeBatch(n)
    sizes = [s.positions for s in supervision(window.interval, window.backwards) or ()]
    weights = [size / sum(sizes) for size in sizes] if sizes else [1 / n] * n
    norm, cosine = shares.norm(weights), shares.cosine([1.0] * n, weights)
    if not norm or cosine is None:
        return _LargeBatch(n)
    return _LargeBatch(shares.norm([1.0] * n) / norm, math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))


def _asked(run: Recording, n: int) -> bool:
    """Whether a setting names this accumulation."""
    for framework in run.frameworks:
        if any(framework.settings.get(key) == n for key in _SETTINGS):
            return True
    keys = run.config.keys if run.config is not None else ()
    return any(k.meaning == "accumulation" and k.value == n for k in keys)


def _consequence(optimizer: Optimizer, n: int, clip: Clip | None) -> str:
    hyper = optimizer.groups[0].hyperparameters if optimizer.groups else {}
    bound = f" Clipping at {number(clip.threshold)} acts like {number(clip.threshold / n)}." if clip is not None else ""
    if "betas" in hyper:
        off = (
            "eps, L2 and the logged gradient norm"
            if _decay_in_gradient(optimizer)
            else "eps and the logged gradient norm"
        )
        return f"Adam's step size hardly changes, but {off} are off by {n}.{bound}"
    if "nesterov" in hyper or "dampening" in hyper:
        rate = hyper.get("lr")
        now = f" ({number(rate)} acts like {number(rate * n)})" if isinstance(rate, (int, float)) else ""
        return f"With {optimizer.class_name} the learning rate is effectively {n} times larger{now}.{bound}"
    return f"Whatever depends on the size of the gradient is off by {n}.{bound}"


def _decay_in_gradient(optimizer: Optimizer) -> bool:
    """Weight decay is L2 in the gradient (Adam), not apart from it (AdamW)."""
    return optimizer.class_name in ("Adam", "NAdam", "RAdam", "Adamax") and any(
        g.hyperparameters.get("weight_decay") and not g.hyperparameters.get("decoupled_weight_decay")
        for g in optimizer.groups
    )


def _left_to_the_model(run: Recording) -> bool:
    """The transformers Trainer divides only for models that take no ``num_items_in_batch``."""
    settings = framework_settings(run, "transformers")
    return (
        uses(run, "transformers")
        and settings.get("model_accepts_loss_kwargs") is True
        and not settings.get("compute_loss_func")
        and not _overrides(settings, "training_step")
    )


def _overrides(settings: Mapping[str, object], method: str) -> bool:
    names = settings.get("overridden")
    return isinstance(names, (list, tuple)) and method in names


def _fix(run: Recording, n: int) -> str:
    if uses(run, "lightning"):
        if framework_settings(run, "lightning").get("automatic_optimization") is False:
            return f"self.manual_backward(loss / {n})."
        return f"Trainer(accumulate_grad_batches={n}) divides the loss; accumulate nowhere else."
    if uses(run, "transformers"):
        settings = framework_settings(run, "transformers")
        if _left_to_the_model(run):
            model = "model.get_base_model()" if uses(run, "peft") else "model"
            return (
                f"Set {model}.accepts_loss_kwargs = False before the Trainer is made: it then divides by {n} itself. "
                "Or divide the summed loss by the num_items_in_batch that it hands over."
            )
        if _overrides(settings, "training_step"):
            return f"Divide in training_step: self.accelerator.backward(loss / {n})."
        return "Divide the summed loss by the num_items_in_batch that the Trainer hands over."
    if uses(run, "accelerate"):
        return (
            f"Accelerator(gradient_accumulation_steps={n}), and accelerator.backward(loss) inside "
            "`with accelerator.accumulate(model):`."
        )
    return f"(loss / {n}).backward()."


# ---------------------------------------------------------------------------------------------- without a run


@check("TL306", SourceFacts, severity="error", catalog="O9")
def accumulation_not_divided_in_source(source: SourceFacts) -> Iterator[Finding]:
    """The same, read in a loop that steps every n-th time."""
    if not source.traces:
        raise NotObserved("no code that trains could be read")
    for trace in traces_of(source):
        for fault in undivided(trace):
            block = fault.block
            by_accelerate = block is not None and block.kind == "accumulate"
            when = f"`with {block.text}`" if by_accelerate and block else f"`{block.text if block else ''}`"
            yield Finding(
                f"{fault.optimizer.name}.step() ({place(fault.other.at)}) runs under {when}, and every micro-batch "
                f"calls backward ({place(fault.call.at)}) on its full mean: nothing divides by the number of "
                f"micro-batches, so the accumulated gradient is that many times too large. {NOT_RUN}",
                at=fault.call.at,
                evidence={"backward": place(fault.call.at), "step": place(fault.other.at), "condition": when},
                fix="Call accelerator.backward(loss), which divides."
                if by_accelerate
                else "Divide each loss by the number of micro-batches: (loss / n).backward().",
                severity=None if fault.sure else Severity.WARNING,
                about="undivided",
            )
