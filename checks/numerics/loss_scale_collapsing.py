"""TL802: the loss scale falls and falls, and the steps are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import name_optimizer, number, place, plural
from trainlint.recording.schema import Scaler, ScalerEvent, ScalerState, SourceLine
from trainlint.recording.timeline import of_kind

#: Updates that must have been seen before anything is said: after the first step that was taken, and when none was.
_AFTER_FIRST = 10
_NEVER = 24
#: A scale that even a loss summed over millions of elements does not need.
_HOPELESS = 2.0**-6
#: Times that the scale may fall beyond its growth once the first step was taken.
_ALLOWED = 3
#: A loss divided by so much has lost its gradients.
_GONE = 1.0
_STUCK = 2.0**-10


@check("TL802", Recording, severity="error", catalog="O24")
def loss_scale_collapsing(run: Recording) -> Iterator[Finding]:
    """The loss scale falls and falls, and the steps are skipped.

    ## What goes wrong
    A `GradScaler` starts at 65536 and halves its scale whenever a gradient is not finite; that step is skipped. A few
    skips at the start are its calibration. When they do not end, some gradient is infinite or NaN whatever the scale
    is: an overflow in the forward pass, a division by zero, a loss that is NaN. The loop runs on, the loss is logged,
    and the weights are those of the first day. A scale that has fallen below 1 divides the loss, so that float16 loses
    the gradients that it was meant to save; it needs 2000 good steps in a row for each doubling on its way back.

    ## How it is detected
    The scale before and after every `update()` of the watch, and which steps were skipped. Reported is a scale that
    was only ever halved (24 updates and more, no step taken), one that fell four and more times more often than it
    grew after the first step that was taken, and one that ended below 1 by falling. Scaler state that was loaded from
    a checkpoint is judged by the scale in it. The three steps of a usual watch show only the beginning of the
    calibration: `--steps 20` shows what follows.

    ## What to do
    Find the value that is not finite: run one batch under `torch.autograd.set_detect_anomaly(True)`, look for logs,
    divisions, large logits and masks filled with -1e9 (float16 ends at 65504: use `torch.finfo(dtype).min`), and keep
    losses and norms in float32 (`with torch.autocast(..., enabled=False)`). bfloat16 does not overflow there. Do not
    load the state of a collapsed scaler: start with a new one.

    ## When it may be wrong
    A loss that is a sum over many elements may settle at a small scale by itself; falling to it happens in the first
    steps, and a scale that stays after that is not reported. Single skips later on are ordinary.

    ## References
    torch.amp.GradScaler; Micikevicius et al. 2018, "Mixed Precision Training".
    """
    events = [e for e in of_kind(run, ScalerEvent) if e.enabled]
    states = run.numerics.scaler_states if run.numerics is not None else ()
    scalers = [s for s in (run.numerics.scalers if run.numerics is not None else ()) if s.enabled]
    if not events and not states:
        raise NotApplicable("no enabled GradScaler is in use")
    for state in states:
        if state.scale is not None and state.scale < _GONE:
            yield _loaded(state)
    course = _Course.of(events)
    if len(scalers) > 1:
        raise NotObserved(f"{len(scalers)} scalers are in use; which update is whose is not told apart")
    if course.updates < (_NEVER if course.never else course.calibration + _AFTER_FIRST):
        raise NotObserved(
            f"{plural(course.updates, 'update')} of the scale in the watch, most of them its calibration; "
            "raise --steps to 20 or more"
        )
    if course.collapsing:
        yield _finding(run, course, scalers[0] if scalers else None)


@dataclass(frozen=True)
class _Course:
    """The loss scale over the watch."""

    #: Scale at the first ``scale()`` and after each update.
    scales: tuple[float, ...]
    steps: int
    skipped: int
    #: Updates before the first step that was taken (all, when none was).
    calibration: int
    at: SourceLine | None

    @classmethod
    def of(cls, events: list[ScalerEvent]) -> _Course:
        scales: list[float] = []
        taken_at: int | None = None
        steps = skipped = 0
        at = None
        for e in events:
            if e.call == "scale" and not scales and e.scale is not None or e.call == "update" and e.scale is not None:
                scales.append(e.scale)
            elif e.call == "step":
                steps += 1
                skipped += bool(e.skipped)
                at = at or e.at
                if not e.skipped and taken_at is None:
                    taken_at = max(0, len(scales) - 1)
        updates = max(0, len(scales) - 1)
        return cls(tuple(scales), steps, skipped, updates if taken_at is None else taken_at, at)

    @property
    def updates(self) -> int:
        return max(0, len(self.scales) - 1)

    def _changes(self) -> list[int]:
        """-1, 0, 1 for each update after the calibration."""
        late = self.scales[self.calibration :]
        return [(b > a) - (b < a) for a, b in pairwise(late)]

    @property
    def never(self) -> bool:
        """No step was taken."""
        return self.skipped == self.steps

    @property
    def falls(self) -> int:
        return sum(1 for c in self._changes() if c < 0)

    @property
    def collapsing(self) -> bool:
        if self.never:
            return self.updates >= _NEVER and self.scales[-1] < _HOPELESS
        changes = self._changes()
        if len(changes) < _AFTER_FIRST:
            return False
        net = -sum(changes)
        return net > _ALLOWED or (net > 0 and self.scales[-1] < _GONE <= self.scales[self.calibration])


def _loaded(state: ScalerState) -> Finding:
    assert state.scale is not None
    where = f" ({place(state.at)})" if state.at is not None else ""
    source = f" from {state.path.replace(chr(92), '/').rsplit('/', 1)[-1]}" if state.path else ""
    dead = state.scale == 0.0
    return Finding(
        f"The GradScaler was given{source}{where} a loss scale of {number(state.scale)}, which divides the loss: "
        f"{'every gradient is 0 from here on' if dead else 'the scaler had collapsed when it was saved'}"
        f"{'' if dead else ', and gradients below ' + number(6e-8 / state.scale) + ' vanish in float16'}.",
        at=state.at,
        evidence={"scale": state.scale, "growth_tracker": state.growth_tracker, "path": state.path},
        fix="Do not load the scaler's state (a new one starts at 65536), and find out which step made it fall: "
        "the checkpoint before that is the one to go on from.",
        severity=Severity.ERROR if state.scale < _STUCK else Severity.WARNING,
        about="loaded",
    )


def _finding(run: Recording, course: _Course, scaler: Scaler | None) -> Finding:
    first, last = course.scales[0], course.scales[-1]
    optimizer = next((o for o in run.optimizers if o.skipped_steps), None)
    whose = f" of {name_optimizer(optimizer)}" if optimizer is not None else ""
    never = course.never
    message = (
        f"The loss scale fell from {number(first)} to {number(last)} in {plural(course.updates, 'update')}: "
        f"{'all' if never else course.skipped} of {plural(course.steps, 'step')}{whose} "
        f"{'were' if course.skipped != 1 else 'was'} skipped, each for a gradient that is not finite"
    )
    if never:
        message += ". Nothing is trained."
    else:
        message += (
            f"; {course.falls} of the {course.updates - course.calibration} updates after the first step that was "
            "taken halved it, where a calibrated scale falls about once in 2,000."
        )
    return Finding(
        message,
        at=course.at or (scaler.at if scaler is not None else None),
        evidence={
            "scales": list(course.scales[:64]),
            "steps": course.steps,
            "skipped": course.skipped,
            "calibration": course.calibration,
            "falls_after_calibration": course.falls,
            "growth_interval": scaler.growth_interval if scaler is not None else None,
        },
        fix="Find the first value that is not finite (torch.autograd.set_detect_anomaly(True) on one batch): logs, "
        "divisions, masks of -1e9, losses in float16. Compute it in float32, or use bfloat16.",
        about="collapse",
    )
