"""Labels that a trainer hands to a loss of its own, which no function of torch computes (TRL's fused logarithms)."""

from __future__ import annotations

from trainlint.recording.describe import uses
from trainlint.recording.loss_calls import LossLine
from trainlint.recording.schema import BatchFetched, LossCall, LossGradient, LossTarget, Recording
from trainlint.recording.timeline import of_kind

__all__ = ["OWN_LOSS", "label_lines"]

#: What such a loss is called in findings.
OWN_LOSS = "the trainer's own loss"


def label_lines(run: Recording) -> list[LossLine]:
    """The labels of the training batches as calls of one loss that ignores -100; empty without transformers."""
    if not uses(run, "transformers"):
        return []
    training = {loader.id for loader in run.loaders if loader.training}
    calls = tuple(
        LossCall(
            seq=batch.seq,
            time_s=batch.time_s,
            function=OWN_LOSS,
            reduction="sum",
            target=LossTarget(positions=rows.rows * rows.length, ignored=rows.ignored),
            rows=rows,
            gradient=LossGradient(),
            at=batch.at,
        )
        for batch in of_kind(run, BatchFetched)
        if (rows := batch.labels) is not None and batch.loader in training
    )
    return [LossLine(OWN_LOSS, calls[0].at, calls)] if calls else []
