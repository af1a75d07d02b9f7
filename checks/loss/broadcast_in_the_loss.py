"""TL508: prediction and target broadcast against each other inside the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainlint.contract import Finding, NotObserved, Recording, Severity, check
from trainlint.recording.describe import place, plural
from trainlint.recording.loss_calls import LossLine, lines_of, none_called
from trainlint.recording.schema import Backward, OuterDifference
from trainlint.recording.timeline import of_kind

#: Losses of prediction and target element by element, which broadcast.
_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "kl_div", "soft_margin_loss")

_POWERS = {"square": "squared", "absolute": "absolute"}


@check("TL508", Recording, severity="error")
def broadcast_in_the_loss(run: Recording) -> Iterator[Finding]:
    """Prediction and target broadcast against each other inside the loss.

    ## What goes wrong
    A prediction of shape (N, 1) and a target of shape (N,) broadcast to (N, N): every prediction is compared with the
    target of every sample. What minimises that is the mean of the targets, for all samples alike, so a regression
    learns to answer with a constant. The loss is finite and falls; torch warns once, and only in its own losses.

    ## How it is detected
    For the losses of torch: from the shapes they were called with. For a loss written by hand
    (`((prediction - target) ** 2).mean()`): in the graph of what backward got, a difference of shape (N, N) whose one
    operand is a prediction of shape (N, 1) or (N,), squared and averaged; that the other is a vector too is proven by
    the values, d[i, j] = a[i] - b[j].

    ## What to do
    Bring both to one shape: `prediction.squeeze(-1)` (not a bare `squeeze()`, which takes a batch of one apart), or
    `target.unsqueeze(-1)`.

    ## When it may be wrong
    Pairs are meant where both sides have the same number of dimensions ((N, 1, D) against (1, M, D)), where the sizes
    differ, or where both operands are predictions (ranking and contrastive losses, kernels, distance matrices): not
    reported. With `reduction="none"` the matrix may be what is wanted, and so may squared differences beside other
    terms (a distance between distributions): warnings. Absolute differences over all pairs are a term of energy
    distances: reported only where nothing else is in the loss. A difference inside torch.compile or behind other
    functions than a square or an absolute value is not seen.

    ## References
    torch documentation, "Broadcasting semantics"; the warning of `torch.nn.functional.mse_loss`.
    """
    lines = lines_of(run, _LOSSES)
    backwards = of_kind(run, Backward)
    if not backwards and not lines:
        raise NotObserved(none_called(run) or "no backward was seen in the watch; raise --timeout")
    for line in lines:
        found = _outer(line)
        if found is not None:
            yield found
    by_hand: dict[tuple[str, int], list[OuterDifference]] = {}
    for event in of_kind(run, OuterDifference):
        if event.power == "square" or event.alone:
            by_hand.setdefault((event.at.file, event.at.line) if event.at else ("", 0), []).append(event)
    for events in by_hand.values():
        yield _written_by_hand(events)
    if not lines and all((b.grad_fn or "").startswith("CompiledFunction") for b in backwards):
        raise NotObserved("the loss is computed inside torch.compile; run it without compiling once")


def _outer(line: LossLine) -> Finding | None:
    for call in line.calls:
        given, target = call.input_shape, call.target_shape
        both = _broadcast(given, target)
        if both is None or len(given) == len(target) or _without_ones(given) != _without_ones(target):
            continue
        n = math.prod(given)
        if math.prod(both) <= n:
            continue
        sure = call.reduction != "none"
        what = "every prediction is compared with the target of every sample" if sure else "the loss is a matrix"
        return Finding(
            f"{line.name} gets a prediction of shape {given} and a target of shape {target}, which broadcast to "
            f"{both}: {what}, {math.prod(both):,} differences instead of {n:,}. The best answer to that is the mean "
            "of the targets.",
            at=line.at,
            evidence={"input_shape": list(given), "target_shape": list(target), "broadcast_shape": list(both)},
            fix=_fix(given, target),
            severity=None if sure else Severity.WARNING,
            about=line.function,
        )
    return None


def _written_by_hand(events: list[OuterDifference]) -> Finding:
    event = max(events, key=lambda e: math.prod(e.shape))
    n = event.shape[0]
    where = f" ({place(event.at)})" if event.at else ""
    return Finding(
        f"The loss that backward got{where} is the {event.reduction} of {_POWERS[event.power]} differences of shape "
        f"{event.shape}: a prediction of shape {event.operand_shape} was broadcast against a vector of {n} targets, so "
        f"every prediction is compared with the target of every sample ({plural(len(events), 'backward')} seen). The "
        f"best answer to that is their {'mean' if event.power == 'square' else 'median'}.",
        at=event.at,
        evidence={"operand_shape": list(event.operand_shape), "shape": list(event.shape), "backwards": len(events)},
        fix=_fix(event.operand_shape, (n,) if len(event.operand_shape) > 1 else (n, 1)),
        # Beside other terms it may be one of a distance between distributions, which compares all pairs on purpose.
        severity=None if all(e.alone for e in events) else Severity.WARNING,
        about="by hand",
    )


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that both broadcast to, ``None`` when they do not."""
    size = max(len(a), len(b))
    padded = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    if any(x != y and 1 not in (x, y) for x, y in zip(*padded, strict=True)):
        return None
    return tuple(max(x, y) if 0 not in (x, y) else 0 for x, y in zip(*padded, strict=True))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _fix(prediction: tuple[int, ...], target: tuple[int, ...]) -> str:
    if len(prediction) > len(target) and prediction[-1] == 1:
        return "prediction.squeeze(-1), or target.unsqueeze(-1)."
    if len(target) > len(prediction) and target[-1] == 1:
        return "target.squeeze(-1), or prediction.unsqueeze(-1)."
    return "Bring both to one shape before the loss (view, reshape or unsqueeze)."
