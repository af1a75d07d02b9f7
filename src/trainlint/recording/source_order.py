"""Reading what source code does in what order: which call is always made before which, and in which loop.

Pure questions over :class:`SourceTrace`; used by the checks that judge source alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from trainlint.recording.schema import SourceBlock, SourceCall, SourceFacts, SourceObject, SourceTrace

#: Ends every message that rests on the source alone.
NOT_RUN = "Read in the source; nothing was run."
_LOOPS = ("for", "while", "step")
#: Calls that may leave gradients that nobody saw arrive.
_HIDDEN = ("backward", "grads")


def traces_of(source: SourceFacts) -> Iterator[Trace]:
    """Every trace, ready to be asked."""
    for trace in source.traces or ():
        yield Trace(trace)


@dataclass(frozen=True, eq=False)
class Trace:
    """One trace with its questions."""

    trace: SourceTrace

    @cached_property
    def calls(self) -> tuple[SourceCall, ...]:
        return self.trace.calls

    @cached_property
    def objects(self) -> dict[int, SourceObject]:
        return {o.number: o for o in self.trace.objects}

    @cached_property
    def position(self) -> dict[int, int]:
        return {id(c): i for i, c in enumerate(self.calls)}

    def of_kind(self, *kinds: str) -> list[SourceCall]:
        return [c for c in self.calls if c.what in kinds]

    def blocks(self, call: SourceCall) -> list[SourceBlock]:
        return [self.trace.blocks[i] for i in call.path]

    # ------------------------------------------------------------------------------------------- loops

    def loop_of(self, call: SourceCall) -> int | None:
        """The innermost loop that a call stands in."""
        loops = [i for i in call.path if self.trace.blocks[i].kind in _LOOPS]
        return loops[-1] if loops else None

    def loops_of(self, call: SourceCall) -> list[int]:
        """The loops that a call stands in, outermost first."""
        return [i for i in call.path if self.trace.blocks[i].kind in _LOOPS]

    def inside(self, loop: int) -> list[SourceCall]:
        """Calls in a loop, in the order of one pass."""
        return [c for c in self.calls if loop in c.path]

    def below(self, call: SourceCall, loop: int) -> tuple[int, ...]:
        """The blocks between a loop and a call in it."""
        return call.path[call.path.index(loop) + 1 :]

    def counting(self, call: SourceCall, loop: int) -> int | None:
        """The one condition between a loop and a call in it, when that counts (``(i + 1) % n == 0``)."""
        between = self.below(call, loop)
        counted = [i for i in between if self.trace.blocks[i].counts]
        plain = all(self.trace.blocks[i].counts or self.trace.blocks[i].kind == "accumulate" for i in between)
        return counted[0] if counted and plain else None

    # ------------------------------------------------------------------------------------------- order

    def before(self, a: SourceCall, b: SourceCall) -> bool:
        """``a`` comes before ``b`` in the order of the code."""
        return self.position[id(a)] < self.position[id(b)]

    @staticmethod
    def always_with(a: SourceCall, b: SourceCall) -> bool:
        """Whenever ``b`` is made, ``a`` is made in the same pass through the same loops."""
        return b.path[: len(a.path)] == a.path

    def between(self, calls: Sequence[SourceCall], a: SourceCall, b: SourceCall) -> list[SourceCall]:
        low, high = self.position[id(a)], self.position[id(b)]
        return [c for c in calls if low < self.position[id(c)] < high]

    def hidden(self, calls: Sequence[SourceCall], optimizer: SourceObject) -> bool:
        """Whether one of these calls may make gradients for an optimizer, step or clear it, without showing it."""
        return any(c.what in _HIDDEN or self.opaque_to(c, optimizer) for c in calls)

    def opaque_to(self, call: SourceCall, optimizer: SourceObject) -> bool:
        """Whether something unread got hold of an optimizer, of what it trains, or of a loss."""
        if call.what != "opaque":
            return False
        about = {*self.same(optimizer.number), *self.family(optimizer.of)}
        plain = ("loss", "routine", "stepping")
        return any(call.details.get(k) for k in plain) or any(n in about for n in call.on) or not optimizer.of

    # ------------------------------------------------------------------------------------------- objects

    def name(self, number: int) -> str:
        found = self.objects.get(number)
        return (found.name or found.class_name or found.kind) if found is not None else "?"

    def same(self, number: int) -> set[int]:
        """Numbers that may be the same object: an optimizer that one of two branches made."""
        out = {number}
        for o in (*self._joined, *reversed(self._joined)):
            alternatives = o.details.get("alternatives")
            if isinstance(alternatives, tuple) and (o.number in out or not out.isdisjoint(alternatives)):
                out |= {o.number, *(n for n in alternatives if isinstance(n, int))}
        return out

    @cached_property
    def _joined(self) -> list[SourceObject]:
        return [o for o in self.trace.objects if "alternatives" in o.details]

    def family(self, numbers: Iterable[int]) -> set[int]:
        """Modules, everything they are part of, and everything that is part of them."""
        own = set(numbers) | {n for number in numbers for n in self.same(number)}
        above = set(own)
        queue = list(own)
        while queue:
            found = self.objects.get(queue.pop())
            for parent in found.of if found is not None and found.kind == "module" else ():
                if parent not in above:
                    above.add(parent)
                    queue.append(parent)
        return above | self.parts(own)

    def parts(self, numbers: Iterable[int]) -> set[int]:
        """Modules and everything below them."""
        out = set(numbers)
        grown = True
        while grown:
            grown = False
            for o in self.trace.objects:
                if o.kind == "module" and o.number not in out and any(n in out for n in o.of):
                    out.add(o.number)
                    grown = True
        return out

    def clears(self, call: SourceCall, optimizer: SourceObject, *, surely: bool) -> bool:
        """Whether a ``zero_grad`` clears an optimizer's gradients: for certain, or possibly."""
        if call.what != "zero_grad":
            return False
        if any(n in self.same(optimizer.number) for n in call.on):
            return True
        modules = [n for n in call.on if n in self.objects and self.objects[n].kind == "module"]
        if surely:
            whole = bool(optimizer.of) and optimizer.details.get("understood") is True
            covered = self.parts(modules)
            return whole and all(n in covered for n in optimizer.of)
        if not call.on or not optimizer.of or not optimizer.details.get("understood"):
            return not call.on or bool(modules)
        return bool(self.family(modules) & set(optimizer.of)) or any(not self.objects[n].known for n in modules)

    def steps(self, loop: int | None = None) -> list[tuple[SourceCall, SourceObject]]:
        """Optimizer steps with the optimizer, in a loop or anywhere."""
        out = []
        for call in self.calls if loop is None else self.inside(loop):
            if call.what == "step" and call.on and call.on[0] in self.objects:
                out.append((call, self.objects[call.on[0]]))
        return out
