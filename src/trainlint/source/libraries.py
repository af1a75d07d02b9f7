"""What functions and classes from outside the project do: torch's by name, the rest only with what they are given."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from trainlint.recording.schema import Value as Plain
from trainlint.source import vocabulary as words
from trainlint.source.events import attachment, cut, losses_in
from trainlint.source.methods import Arguments, Methods, owners_of
from trainlint.source.values import (
    Const,
    Items,
    Parameters,
    ProjectClass,
    Routine,
    Scope,
    Super,
    Tensor,
    Thing,
    Unknown,
    Value,
    objects_in,
)


class Libraries(Methods):
    """Calls of what was imported from outside the project."""

    def call_library(self, name: str, given: Arguments) -> Value:
        last = name.rpartition(".")[2]
        if name.startswith("torch.nn.functional.") and last in words.LOSS_FUNCTIONS:
            return self.loss(last, given)
        if name == "torch.nn.functional.dropout" and "training" not in given.named and len(given.positional) < 3:
            self.emit("dropout", given.node, (), inside=self.inside > 0, grad=self.grad)
        if name.startswith("torch.nn.") and last in words.LOSS_MODULES:
            made = self.thing("loss", words.LOSS_MODULES[last], given.node)
            made.attributes = dict(given.named)
            if last == "CrossEntropyLoss" and len(given.positional) > 1:
                made.attributes["reduction"] = Unknown()
            return made
        if name.startswith("torch.nn.") and last[:1].isupper() and ".utils." not in name and last != "Parameter":
            return self._torch_module(name, last, given)
        if name == "torch.nn.Parameter" or name == "torch.nn.parameter.Parameter":
            return Tensor(attached=True)
        if (words.OPTIMIZER_LIBRARIES.match(name) and last in words.OPTIMIZERS) or (
            name.startswith("torch.optim.") and "lr_scheduler" not in name and last[:1].isupper()
        ):
            return self._optimizer(last, given)
        if name.startswith("torch.optim.lr_scheduler.") or words.SCHEDULER_FACTORY.search(name):
            return self._scheduler(name, last, given)
        if last == "GradScaler":
            made = self.thing("scaler", last, given.node)
            enabled = given.named.get("enabled")
            made.details["enabled"] = True if enabled is None else enabled.value if isinstance(enabled, Const) else None
            return made
        if name.endswith((".Accelerator", "Fabric")) and name.split(".")[0] in (
            "accelerate",
            "lightning",
            "pytorch_lightning",
            "lightning_fabric",
        ):
            made = self.thing("accelerator", last, given.node)
            accumulation = given.named.get("gradient_accumulation_steps")
            known = accumulation.value if isinstance(accumulation, Const) else None
            made.details["accumulates"] = accumulation is not None and known != 1
            made.details["accumulation"] = known if isinstance(known, int) else None
            made.details["library"] = name.split(".")[0]
            return made
        return self._other_library(name, last, given)

    def _torch_module(self, name: str, last: str, given: Arguments) -> Value:
        if words.SAME_MODULE.search(name) and given.positional:
            self._sharded(last, given.positional[0], given)
            return given.positional[0]
        made = self.thing("module", last, given.node)
        for value in given.positional:
            parts = value.elements if isinstance(value, Items) else [value]
            for part in parts:
                self.hold(made, "", part)
                if not isinstance(part, Thing) and last in words.CONTAINERS:
                    made.parts.append(part)
        if isinstance(given.get(0), Items) and given.get(0).many and last == "Sequential":  # type: ignore[union-attr]
            made.parts.append(Unknown())
        if given.more and last == "Sequential":
            # A list that grows elsewhere: what comes last is not known.
            made.parts = (
                [*made.parts, Unknown()] if not all(isinstance(v, Thing) for v in given.positional) else made.parts
            )
        return made

    def _optimizer(self, last: str, given: Arguments) -> Value:
        made = self.thing("optimizer", last, given.node)
        what = given.get(0, "params")
        made.of, understood = owners_of(what)
        made.details["understood"] = understood and not given.more
        decay = given.named.get("weight_decay") or _of_groups(what, "weight_decay")
        if (
            isinstance(decay, Const)
            and "decoupled_weight_decay" not in given.named
            and not given.more
            and isinstance(decay.value, (int, float))
        ):
            made.details["weight_decay"] = float(decay.value)
        if isinstance(what, Parameters) and what.once and what.spent_at is not None:
            made.details["spent_line"] = what.spent_at.line
        self.spend([what] if what is not None else [], given.node, last)
        self.emit("built", given.node, (made.number,))
        return made

    def _scheduler(self, name: str, last: str, given: Arguments) -> Value:
        made = self.thing("scheduler", last, given.node)
        first = given.get(0 if not words.SCHEDULER_FACTORY.search(name) else -1, "optimizer")
        if first is None:
            first = next((v for v in given.all if isinstance(v, Thing) and v.kind == "optimizer"), None)
        made.of = (first.number,) if isinstance(first, Thing) else ()
        made.known = name.startswith(("torch.optim.lr_scheduler.", "transformers."))
        return made

    def spend(self, values: Iterable[Value], node: ast.AST, by: str) -> None:
        """An iterator over parameters was handed to something that goes through it."""
        for value in values:
            if isinstance(value, Parameters) and value.once and value.spent_at is None:
                value.spent_at, value.spent_by = self.line(node), by

    def loss(self, function: str, given: Arguments) -> Value:
        """A loss of torch; what made its input goes along."""
        first, target = given.get(0, "input"), given.get(1, "target")
        reduction = given.named.get("reduction")
        if reduction is None:
            role = "mean" if not {"size_average", "reduce"} & set(given.named) and not given.more else ""
        else:
            role = str(reduction.value) if isinstance(reduction, Const) else ""
        details: dict[str, Plain] = {"function": function, "reduction": role, "grad": self.grad}
        if isinstance(first, Tensor) and first.made_by:
            details["made_by"] = first.made_by
            if first.made_at is not None:
                details.update(made_file=first.made_at.file, made_line=first.made_at.line)
        number = len(self.calls)
        details["number"] = number
        self.emit("loss", given.node, (), **details)
        attached = attachment([v for v in (first, target) if v is not None])
        out = Tensor("", self.line(given.node), attached, role, loss=True, losses=frozenset((number,)))
        if self.grad is False:
            return cut(out, "no_grad", self.grad_off)
        if attached is False and isinstance(first, Tensor):
            return cut(out, first.cut_by, first.cut_at)
        return out

    def _sharded(self, last: str, first: Value, given: Arguments) -> None:
        """FSDP puts other parameters in the place of a module's own."""
        keeps = given.named.get("use_orig_params", Const(False))
        replaces = last == "fully_shard" or (
            last in ("FullyShardedDataParallel", "FSDP") and isinstance(keeps, Const) and not keeps.value
        )
        if replaces and isinstance(first, Thing) and first.kind == "module":
            self.emit("replaced", given.node, (first.number,), part=f"{last}()", how=last)

    def _other_library(self, name: str, last: str, given: Arguments) -> Value:
        first = given.positional[0] if given.positional else None
        if last in ("clip_grad_norm_", "clip_grad_value_", "clip_grad_norm") and "nn.utils" in name:
            self.clip(given)
            return Unknown()
        if name.startswith("torch.") and last == "set_grad_enabled":
            self.grad = bool(first.value) if isinstance(first, Const) else None
            self.grad_off = self.line(given.node)
            return Unknown()
        if name in ("torch.autograd.grad", "torch.func.grad"):
            self.emit("grads", given.node, ())
            return Unknown("grad", tuple(given.all))
        if name == "torch.autograd.backward":
            self.backward(first, given, via="torch.autograd")
            return Unknown()
        if words.SAME_MODULE.search(name) and isinstance(first, (Thing, Routine)):
            self._sharded(last, first, given)
            return first
        if name.endswith(("get_peft_model", "inject_adapter_in_model")) and isinstance(first, Thing):
            self.emit("replaced", given.node, (first.number,), part=f"{last}()", how=last)
            return first
        if name == "copy.deepcopy" and isinstance(first, Thing) and first.kind == "module":
            return self.copied(first, given)
        if name in ("copy.deepcopy", "copy.copy") and first is not None:
            return first if not isinstance(first, Thing) else Unknown()
        if name == "builtins.super":
            return self._super(given)
        if name in ("builtins.filter", "builtins.map") and len(given.positional) > 1:
            inner = given.positional[1]
            if isinstance(inner, Parameters) and last == "filter":
                return Parameters(inner.of, trainable_only(given.node.args[0]), once=True, named=inner.named,
                                  taken_at=self.line(given.node))  # fmt: skip
        if name in ("builtins.list", "builtins.tuple", "builtins.set", "builtins.sorted") and first is not None:
            if isinstance(first, Parameters):
                self.spend([first], given.node, last)
                return Parameters(first.of, first.whole, named=first.named, taken_at=first.taken_at)
            return first if isinstance(first, Items) else Unknown(holds=(first,))
        if name == "builtins.dict":
            return Items(list(given.named.values()), list(given.named), many=bool(given.positional))
        if name == "builtins.setattr" and len(given.positional) > 2 and isinstance(first, Thing):
            if first.kind == "module":
                key = given.positional[1]
                self.hold(first, key.value if isinstance(key, Const) and isinstance(key.value, str) else "",
                          given.positional[2])  # fmt: skip
            return Unknown()
        if name in ("itertools.chain", "builtins.zip", "builtins.enumerate", "builtins.reversed"):
            return Items(list(given.positional)) if last == "chain" else Unknown(name, tuple(given.all))
        if name == "builtins.sum" and losses_in(given.all):
            return Tensor(attached=attachment(given.positional[:1]), loss=True, losses=losses_in(given.all))
        if name in ("builtins.abs", "builtins.pow", "builtins.round") and isinstance(first, Tensor):
            return self.reduced(first, last, Arguments(given.node))
        if name == "builtins.float" and isinstance(first, Tensor):
            return cut(first, "float", self.line(given.node))
        if name.startswith("torch.") and not words.HARMFUL.match(name):
            return self._tensor_function(name, last, given)
        if words.HARMLESS.match(name):
            return Unknown(f"{name}()", tuple(v for v in given.all if not isinstance(v, Tensor)))
        if is_model_factory(name):
            made = self.thing("module", last if last[:1].isupper() else name.rpartition(".")[2], given.node)
            made.details["from"] = name
            return made
        self.opaque(given.all, given.node, name)
        return Unknown(f"{name}()", tuple(v for v in given.all if not isinstance(v, Tensor)))

    def copied(self, thing: Thing, given: Arguments) -> Thing:
        """A deep copy of a module, with parts of its own."""
        made = self.thing("module", thing.class_name, given.node)
        made.made, made.known, made.at = thing.made, thing.known, thing.at
        made.details.update(
            {k: v for k, v in thing.details.items() if k not in ("used", "trained")}, copy_of=thing.number
        )

        def part(value: Value) -> Value:
            if not (isinstance(value, Thing) and value.kind == "module" and thing.number in value.of):
                return value
            inner = self.copied(value, given)
            inner.name, inner.of = value.name, (made.number,)
            return inner

        made.attributes = {k: part(v) for k, v in thing.attributes.items()}
        made.parts = [part(v) for v in thing.parts]
        return made

    def _tensor_function(self, name: str, last: str, given: Arguments) -> Value:
        first = given.positional[0] if given.positional else given.named.get("input")
        at = self.line(given.node)
        if name in ("torch.autograd.Variable", "torch.autograd.variable.Variable"):
            asks = given.named.get("requires_grad")
            if isinstance(first, Tensor):
                patched = at if isinstance(asks, Const) and asks.value else None
                out = cut(first, "Variable", at)
                return Tensor(out.made_by, out.made_at, False, out.role, "Variable", at, patched, out.loss)
            return Tensor(attached=None)
        if name in words.FRESH:
            asks = given.named.get("requires_grad")
            patched = at if isinstance(asks, Const) and asks.value else None
            copied = objects_in(first) if first is not None else []
            loss = any(isinstance(v, Tensor) and v.loss for v in copied)
            lost = loss or (isinstance(first, Tensor) and (first.attached or first.cut_by != ""))
            # A new tensor that asks for a gradient is a parameter of its own, unless it is the copy of a result.
            attached = False if lost or asks is None else True if patched is not None else None
            return Tensor(attached=attached, cut_by=last if lost else "", cut_at=at if lost else None,
                          patched_at=patched if lost else None, loss=loss, losses=losses_in(copied))  # fmt: skip
        if last in words.SAME and isinstance(first, Tensor):
            return first
        if last in words.SAME and isinstance(first, Items):
            kinds = [e for e in first.elements if isinstance(e, Tensor)]
            if kinds and len(kinds) == len(first.elements):
                return self.join(list(kinds), given.node)
        if last in words.OPERATIONS or last in ("softmax", "log_softmax"):
            attached = attachment([first]) if first is not None else None
            out = Tensor(last.rstrip("_"), at, attached)
            return cut(out, "no_grad", self.grad_off) if self.grad is False else out
        tensors = [v for v in given.all if isinstance(v, (Tensor, Unknown, Items))]
        if not tensors:
            return Unknown(f"{name}()")
        attached = attachment(tensors)
        loss = any(isinstance(v, Tensor) and v.loss for v in tensors)
        if last == "sum" and isinstance(first, Tensor) and first.made_by == "exp":
            return Tensor("sum of exp", at, attached)
        role = "mean" if last == "mean" and len(given.positional) == 1 and not given.named else ""
        if isinstance(first, Tensor) and first.loss and last == "mean":
            role = first.role if first.role == "mean" else role
        out = Tensor("", at, attached, role, loss=loss, losses=losses_in(tensors))
        return cut(out, "no_grad", self.grad_off) if self.grad is False else out

    def _super(self, given: Arguments) -> Value:
        scope: Scope | None = self.here
        while scope is not None:
            owner = scope.names.get("self")
            holder = scope.names.get("__class__")
            if isinstance(holder, ProjectClass) and owner is not None:
                return Super(owner, holder)
            scope = scope.parent
        return Unknown("super()")


def _of_groups(groups: Value | None, name: str) -> Value | None:
    """The largest number that any param group has for a setting."""
    found = [
        value
        for group in (groups.elements if isinstance(groups, Items) and not groups.keys else ())
        if isinstance(group, Items)
        for key, value in zip(group.keys, group.elements, strict=False)
        if key == name and isinstance(value, Const) and isinstance(value.value, (int, float))
    ]
    return max(found, key=lambda v: v.value, default=None)


def trainable_only(condition: ast.expr) -> bool:
    """Whether a condition on parameters asks for nothing but ``requires_grad``."""
    body = condition.body if isinstance(condition, ast.Lambda) else condition
    return isinstance(body, ast.Attribute) and body.attr == "requires_grad"


def is_model_factory(name: str) -> bool:
    return (
        name.startswith(("torchvision.models.", "timm.create_model", "timm.models.", "segmentation_models_pytorch."))
        or (name.endswith((".from_pretrained", ".from_config")) and ("Model" in name or "model" in name))
        or (name.startswith(("transformers.", "diffusers.")) and name.rpartition(".")[2].endswith("Model"))
    )
