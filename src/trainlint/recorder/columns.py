"""Columns that transformers' Trainer removes from the training data, and the program's own code that asks for them."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .core import is_user_file
from .patching import ImportHooks, around, wrap
from .values import attribute, class_name
from .watch import Session

#: Methods that get what is left of a batch; methods of the same class that they call count too.
METHODS = ("compute_loss", "training_step", "prediction_step", "_prepare_inputs", "_prepare_input")
#: Calls and operations that take an item by its name.
TAKES = ("get", "pop", "__getitem__")
DEPTH = 4


class Columns:
    def __init__(self, session: Session) -> None:
        self.recorder = session.recorder
        #: The Trainer, by id of the collator that removes columns for it.
        self._wrapped: dict[int, tuple[Any, Any]] = {}
        self._written: set[tuple[str, ...]] = set()

    def on_trainer(self, module: ModuleType) -> None:
        quiet = self.recorder.quiet
        trainer = module.Trainer
        wrap(trainer, "_remove_unused_columns", around(after=quiet(self.dataset_narrowed)))
        wrap(trainer, "_get_collator_with_removed_columns", around(after=quiet(self.collator_wrapped)))

    def on_utilities(self, module: ModuleType) -> None:
        collator = getattr(module, "RemoveColumnsCollator", None)
        if collator is not None:
            wrap(collator, "__call__", around(before=self.recorder.quiet(self.collated)))

    def dataset_narrowed(
        self, result: Any, token: Any, trainer: Any, dataset: Any, description: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """A ``datasets.Dataset``: its columns are known."""
        columns = attribute(dataset, "column_names")
        if isinstance(columns, list) and _training(description):
            self._note(trainer, [str(c) for c in columns])

    def collator_wrapped(
        self, result: Any, token: Any, trainer: Any, collator: Any, description: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if class_name(result) == "RemoveColumnsCollator" and _training(description):
            self._wrapped[id(result)] = (result, trainer)

    def collated(self, collator: Any, features: Any = None, *args: Any, **kwargs: Any) -> None:
        """Any other dataset: its samples say what columns there are (in this process, not in workers)."""
        known = self._wrapped.pop(id(collator), None)
        if known is not None and features and isinstance(features[0], dict):
            self._note(known[1], [str(c) for c in features[0]])

    def _note(self, trainer: Any, columns: list[str]) -> None:
        kept = attribute(trainer, "_signature_columns")
        if not attribute(trainer, "args", "remove_unused_columns") or not isinstance(kept, list):
            return
        key = tuple(columns)
        if key in self._written:
            return
        self._written.add(key)
        removed = [c for c in columns if c not in kept]
        payload = {
            "trainer": class_name(trainer),
            "columns": columns,
            "kept": [c for c in columns if c in kept],
            "dropped": list(asked_for(trainer, removed)),
            "model": class_name(attribute(trainer, "model")),
        }
        self.recorder.emit("samples", {"columns": [payload]})


def _training(description: Any) -> bool:
    return description is None or str(description).lower().startswith("train")


def asked_for(trainer: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Those of the removed columns that the program's own loss or collator takes by name."""
    readers = list(_readers(trainer))
    for column in columns:
        for name, function in readers:
            line = line_that_takes(function.__code__, column)
            if line is not None:
                at = {"file": function.__code__.co_filename, "line": line, "function": function.__qualname__}
                yield {"name": column, "asked_by": name, "at": at}
                break


def _readers(trainer: Any) -> Iterator[tuple[str, FunctionType]]:
    """The program's own functions that are handed a batch of the training."""
    kind = type(trainer)
    names = [name for name in METHODS if _own(getattr(kind, name, None)) is not None]
    for name in names:
        method = _own(getattr(kind, name, None))
        if method is not None:
            yield name, method
            names += [n for n in method.__code__.co_names if n not in names and _own(getattr(kind, n, None))]
    loss = _own(attribute(trainer, "compute_loss_func"))
    if loss is not None:
        yield "compute_loss_func", loss
    collator = attribute(trainer, "data_collator")
    for candidate in (collator, *(attribute(type(collator), name) for name in ("__call__", "torch_call"))):
        function = _own(candidate)
        if function is not None:
            yield "data collator", function


def _own(function: Any) -> FunctionType | None:
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType) and is_user_file(function.__code__.co_filename):
        return function
    return None


def line_that_takes(code: CodeType, name: str, depth: int = 0) -> int | None:
    """The line on which code takes an item by this name: ``inputs["name"]``, ``inputs.pop("name", None)``."""
    line = code.co_firstlineno
    before: list[dis.Instruction] = []
    instructions = list(dis.get_instructions(code))
    for position, one in enumerate(instructions):
        number = getattr(one, "line_number", None) or one.starts_line
        if isinstance(number, int) and not isinstance(number, bool):
            line = number
        if one.opname.startswith("LOAD_CONST") and one.argval == name:
            after = instructions[position + 1] if position + 1 < len(instructions) else None
            taken = after is not None and (
                after.opname == "BINARY_SUBSCR" or (after.opname == "BINARY_OP" and "[" in after.argrepr)
            )
            called = any(b.argval in TAKES for b in before[-3:] if isinstance(b.argval, str))
            if taken or called:
                return line
        before.append(one)
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and depth < DEPTH:
            found = line_that_takes(inner, name, depth + 1)
            if found is not None:
                return found
    return None


def install(session: Session, hooks: ImportHooks) -> None:
    columns = Columns(session)
    hooks.on_import("transformers.trainer", columns.on_trainer)
    hooks.on_import("transformers.trainer_utils", columns.on_utilities)
