"""The losses that training computes, by the line that calls them, and what all calls of a line have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trainlint.recording.describe import number, place
from trainlint.recording.schema import Backward, LossCall, LossInput, LossTarget, Recording, SourceLine
from trainlint.recording.timeline import of_kind

__all__ = ["LossLine", "alone", "calls_of", "lines_of", "lines_of_losses", "maker", "none_called"]


@dataclass(frozen=True)
class LossLine:
    """The calls of one loss function from one source line, in order."""

    function: str
    at: SourceLine | None
    calls: tuple[LossCall, ...]

    @property
    def name(self) -> str:
        """``cross_entropy (train.py:31)``."""
        where = place(self.at)
        return f"{self.function} ({where})" if where else self.function

    #: The operation that made the inputs (``LossInput.made_by``); empty when it is not known or was not asked for.
    made_by: str = ""

    @property
    def inputs(self) -> list[LossInput]:
        """What was measured of the inputs."""
        return [c.input for c in self.calls if c.input is not None]

    @property
    def targets(self) -> list[LossTarget]:
        """What was measured of the targets."""
        return [c.target for c in self.calls if c.target is not None]

    @property
    def rows(self) -> int:
        """Rows of the inputs that were looked at, over all calls."""
        return sum(i.rows for i in self.inputs)

    def low(self, of: Callable[[LossInput], float | None]) -> float | None:
        """The smallest of a figure over the measured inputs; ``None`` when it was not measured, NaN if one is."""
        return _extreme(map(of, self.inputs), min)

    def high(self, of: Callable[[LossInput], float | None]) -> float | None:
        """The largest of a figure over the measured inputs."""
        return _extreme(map(of, self.inputs), max)

    def values(self) -> str:
        """``0.02 to 0.31``: the values that reached the loss."""
        return f"{number(self.low(lambda i: i.minimum))} to {number(self.high(lambda i: i.maximum))}"

    def within(self, low: float, high: float, of: Callable[[LossInput], tuple[float | None, float | None]]) -> bool:
        """Whether a pair of figures (smallest, largest) lies in an interval on every measured input."""
        pairs = [of(i) for i in self.inputs]
        return bool(pairs) and all(a is not None and b is not None and low <= a and b <= high for a, b in pairs)

    def other_dimension(self) -> int | None:
        """The dimension that a softmax or log_softmax went over, when it is known and is not that of the classes."""
        over = {i.made_over for i in self.inputs}
        dimension = over.pop() if len(over) == 1 else None
        classes = 1 if len(self.calls[0].input_shape) > 1 else 0
        return dimension if dimension != classes else None

    def probabilities(self) -> bool:
        """Every row is a distribution over the classes: not below 0, and its sum is 1 to the precision of its dtype.

        By values alone, so rows that are (nearly) one-hot or all alike do not count, and neither do a few rows.
        """
        off = 1e-4 if all(c.input_dtype.endswith(("float32", "float64")) for c in self.calls) else 1e-2
        inputs = self.inputs
        return (
            self.rows >= 8
            and all((i.classes or 0) > 1 for i in inputs)
            and self.within(0.0, 1.0 + off, lambda i: (i.minimum, i.maximum))
            and self.within(1.0 - off, 1.0 + off, lambda i: (i.row_sum_min, i.row_sum_max))
            and all(i.saturated is not None and i.saturated < 0.5 for i in inputs)
            and all(i.minimum is not None and i.maximum is not None and i.maximum - i.minimum > 1e-3 for i in inputs)
        )


def _extreme(values: Iterable[float | None], pick: Callable[[Sequence[float]], float]) -> float | None:
    known = [v for v in values if v is not None]
    return (math.nan if any(map(math.isnan, known)) else pick(known)) if known else None


def calls_of(run: Recording, functions: Iterable[str]) -> list[LossCall]:
    """The calls of these losses that training could learn from: gradients on, and the input in the graph."""
    wanted = set(functions)
    return [c for c in of_kind(run, LossCall) if c.function in wanted and c.grad_enabled and c.input_requires_grad]


def lines_of_losses(calls: Iterable[LossCall], *, by_maker: bool = False) -> list[LossLine]:
    """The calls by function and source line, in the order of their first call.

    ``by_maker``: also by the operation that made the input, for a line (a helper) that serves several models.
    """
    groups: dict[tuple[str, str, int, str], list[LossCall]] = {}
    for call in calls:
        file, line = (call.at.file, call.at.line) if call.at is not None else ("", 0)
        made_by = call.input.made_by if by_maker and call.input is not None else ""
        groups.setdefault((call.function, file, line, made_by), []).append(call)
    return [LossLine(name, members[0].at, tuple(members), key) for (name, _, _, key), members in groups.items()]


def lines_of(run: Recording, functions: Iterable[str], *, by_maker: bool = False) -> list[LossLine]:
    """The lines that call these losses for training.

    A backward came back to at least one call of each (or the loss refused its arguments): a loss that is computed to be
    logged is none of these.
    """
    lines = lines_of_losses(calls_of(run, functions), by_maker=by_maker)
    if not any(c.gradient is not None for c in of_kind(run, LossCall)):
        return lines
    return [line for line in lines if any(c.gradient is not None or c.raised for c in line.calls)]


def none_called(run: Recording) -> str:
    """Why no loss was seen, when none was; empty when some was."""
    if of_kind(run, LossCall):
        return ""
    if not of_kind(run, Backward):
        return "no loss was computed in the watch; raise --timeout"
    return (
        "no loss function of torch.nn.functional was called: a loss written by hand, by another library or inside "
        "torch.compile is not seen"
    )


def alone(run: Recording, line: LossLine) -> bool:
    """Whether a backward got nothing but this loss, up to a constant factor that its graph shows."""
    backwards = of_kind(run, Backward)
    for call in line.calls:
        later = next((b for b in backwards if b.seq > call.seq), None)
        if later is None or later.value is None or call.value is None or call.reduction == "none":
            continue
        factor = later.divided_by if later.divided_by else 1.0
        expected = call.value * (later.loss_scale or 1.0) / factor
        if math.isclose(later.value, expected, rel_tol=1e-3, abs_tol=1e-9):
            return True
    return False


def maker(run: Recording, *class_names: str) -> str:
    """The one module of these classes in what is trained (``Net.head.2``); empty when there is none or several."""
    found = [
        f"{root.class_name}.{module.name}" if module.name else root.class_name
        for root in run.roots
        if root.n_trainable
        for module in root.submodules
        if module.class_name in class_names
    ]
    return found[0] if len(found) == 1 else ""
