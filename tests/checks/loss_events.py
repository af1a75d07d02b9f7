"""Timelines of losses, as the recorder would have written them."""

from __future__ import annotations

from typing import Any

from tests.support.build import Run, at
from trainlint.recording.schema import LossCall, LossInput, LossTarget

#: Figures of four classes over 32 rows.
PROBABILITIES = {
    "rows": 32, "classes": 4, "minimum": 0.1, "maximum": 0.5, "mean": 0.25, "row_sum_min": 1.0, "row_sum_max": 1.0,
    "row_logsumexp_min": 1.63, "row_logsumexp_max": 1.65, "saturated": 0.0, "finite": True,
}  # fmt: skip
SCORES = {
    "rows": 32, "classes": 4, "minimum": -1.2, "maximum": 2.1, "mean": 0.1, "row_sum_min": -2.0, "row_sum_max": 3.0,
    "row_logsumexp_min": 1.1, "row_logsumexp_max": 2.5, "saturated": 0.0, "finite": True, "made_by": "linear",
    "node": "AddmmBackward0",
}  # fmt: skip
LOG_PROBABILITIES = {
    "rows": 32, "classes": 4, "minimum": -2.3, "maximum": -0.7, "mean": -1.4, "row_sum_min": -6.0, "row_sum_max": -5.5,
    "row_logsumexp_min": 0.0, "row_logsumexp_max": 0.0, "saturated": 0.0, "finite": True, "made_by": "log_softmax",
    "made_over": 1, "node": "LogSoftmaxBackward0",
}  # fmt: skip
INDICES = {"positions": 32, "ignored": 0, "minimum": 0.0, "maximum": 3.0, "integral": True, "out_of_range": 0}
LABELS = {"positions": 32, "minimum": 0.0, "maximum": 1.0, "integral": True, "positives": 16, "samples": 32}


def trained(
    function: str,
    given: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    *,
    calls: int = 3,
    line: int = 8,
    added: float = 0.0,
    run: Run | None = None,
    **fields: Any,
) -> Run:
    """A loop that computes one loss and sends it backward; ``added``: what else is in the tensor backward gets."""
    run = run or Run()
    for _ in range(calls):
        call: dict[str, Any] = {
            "function": function,
            "reduction": "mean",
            "input_shape": (32, 4),
            "input_dtype": "float32",
            "target_shape": (32,),
            "target_dtype": "int64",
            "value": 1.3,
            "at": at(line),
            "input": LossInput(**given) if given is not None else None,
            "target": LossTarget(**target) if target is not None else None,
        }
        run._emit(LossCall, **{**call, **fields})
        if "raised" in fields:
            break
        run.backward(value=1.3 + added)
    return run
