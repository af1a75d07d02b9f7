"""What methods do: of optimizers, schedulers, scalers, modules, tensors, and of what is one of these by its name."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainlint.recording.schema import Value as Plain
from trainlint.source import vocabulary as words
from trainlint.source.events import Events, attachment, cut, losses_in
from trainlint.source.values import Const, Items, Parameters, Routine, Tensor, Thing, Unknown, Value


@dataclass(frozen=True)
class Arguments:
    """What a call was given."""

    node: ast.Call
    positional: Sequence[Value] = ()
    named: Mapping[str, Value] = field(default_factory=dict)
    #: ``*args`` or ``**kwargs`` were passed on, so there may be more.
    more: bool = False

    def get(self, position: int, *names: str) -> Value | None:
        for name in names:
            if name in self.named:
                return self.named[name]
        return self.positional[position] if 0 <= position < len(self.positional) else None

    @property
    def all(self) -> list[Value]:
        return [*self.positional, *self.named.values()]


#: Methods of an optimizer, scheduler, scaler or accelerator that change neither gradients nor weights.
_QUIET_METHODS = frozenset(
    ("state_dict", "train", "eval", "register_step_post_hook", "register_step_pre_hook", "get_last_lr", "get_lr",
     "get_scale", "print", "log", "gather", "gather_for_metrics", "wait_for_everyone", "save_state", "load_state",
     "register_for_checkpointing", "init_trackers", "end_training", "get_tracker", "save_model", "save",
     "free_memory", "reduce", "pad_across_processes", "skip_first_batches", "autocast", "no_sync", "launch",
     "barrier", "log_dict", "seed_everything", "update", "is_enabled", "unscale_gradients", "get_state_dict",
     "main_process_first", "local_main_process_first", "on_main_process", "set_epoch", "all_gather", "all_reduce",
     "broadcast", "setup_dataloaders", "profile", "trigger_sync_in_backward", "share_memory")
)  # fmt: skip
#: Methods of a foreign module that may run a whole training step.
_TRAINING_METHODS = frozenset(
    ("fit", "train_batch", "learn", "optimize_parameters", "backward", "step", "training_step", "train_step", "update",
     "optimize", "train_on_batch", "partial_fit", "manual_backward")
)  # fmt: skip


class Methods(Events):
    """Calls of methods whose code is not the project's."""

    def call_routine(self, routine: Routine, given: Arguments) -> Value:
        raise NotImplementedError

    def call_module(self, thing: Thing, given: Arguments) -> Value:
        raise NotImplementedError

    def store(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- things

    def method_of_thing(self, thing: Thing, name: str, given: Arguments) -> Value:
        if thing.kind == "optimizer":
            return self._of_optimizer(thing, name, given)
        if thing.kind == "scheduler":
            if name == "step":
                shown = [v for v in given.all if not (isinstance(v, Const) and v.value is None)]
                self.emit("scheduler_step", given.node, (thing.number,), arguments=len(shown))
            elif name == "load_state_dict":
                self.emit("loaded", given.node, (thing.number,))
            elif name not in _QUIET_METHODS:
                self.opaque([thing, *given.all], given.node, name)
            return Unknown()
        if thing.kind == "scaler":
            return self._of_scaler(thing, name, given)
        if thing.kind == "accelerator":
            return self._of_accelerator(thing, name, given)
        if thing.kind == "module":
            return self._of_module(thing, name, given)
        if name not in _QUIET_METHODS:
            self.opaque([thing, *given.all], given.node, name)
        return Unknown(name, tuple(given.all))

    def _of_optimizer(self, thing: Thing, name: str, given: Arguments) -> Value:
        if name == "step":
            closure = given.get(0, "closure")
            if isinstance(closure, Routine):
                self.call_routine(closure, Arguments(given.node))
            unread = closure is not None and not isinstance(closure, (Routine, Const))
            self.emit("step", given.node, (thing.number,), closure=closure is not None, unread=unread)
        elif name == "zero_grad":
            self.emit("zero_grad", given.node, (thing.number,))
        elif name == "backward":
            self.backward(given.get(0), given, via=thing.name)
        elif name == "add_param_group":
            owners, _ = owners_of(given.get(0, "param_group"))
            thing.of = tuple(dict.fromkeys((*thing.of, *owners)))
            self.emit("added", given.node, (thing.number,))
        elif name == "load_state_dict":
            self.emit("loaded", given.node, (thing.number,))
        elif name not in _QUIET_METHODS:
            self.opaque([thing, *given.all], given.node, name)
        return Unknown()

    def _of_scaler(self, thing: Thing, name: str, given: Arguments) -> Value:
        first = given.get(0)
        if name == "scale":
            return replace(first, made_by="") if isinstance(first, Tensor) else Tensor()
        if name in ("unscale_", "step"):
            optimizer = self.as_optimizer(first, given)
            on = (optimizer.number,) if optimizer is not None else ()
            if name == "unscale_":
                self.emit("unscale", given.node, on)
            else:
                self.emit("step", given.node, on, scaler=thing.number, enabled=thing.details.get("enabled"))
        elif name not in _QUIET_METHODS:
            self.opaque([thing, *given.all], given.node, name)
        return Unknown()

    def as_optimizer(self, value: Value | None, given: Arguments) -> Thing | None:
        if isinstance(value, Thing):
            return value if value.kind == "optimizer" else None
        if isinstance(value, Unknown) and given.node.args and words.OPTIMIZER_NAME.match(last_name(value.name)):
            return self.assume("optimizer", given.node.args[0])
        return None

    def assume(self, kind: str, node: ast.expr) -> Thing:
        """What the code uses as one of ``kind``, made where it cannot be read; the same object from here on."""
        made = self.thing(kind, "", node, known=False, name=ast.unparse(node)[:60])
        # It was there before this line, whatever block this line stands under.
        made.path = ()
        self.store(node, made)
        return made

    def _of_accelerator(self, thing: Thing, name: str, given: Arguments) -> Value:
        if name in ("prepare", "setup", "setup_module", "setup_optimizers", "prepare_model", "prepare_optimizer",
                    "prepare_scheduler", "prepare_data_loader", "unwrap_model"):  # fmt: skip
            for value in given.positional:
                if isinstance(value, Thing):
                    value.details["prepared"] = thing.number
            return given.positional[0] if len(given.positional) == 1 else Items(list(given.positional))
        if name == "backward":
            self.backward(given.get(0, "loss"), given, via="accelerator", by=thing.number)
        elif name in ("clip_grad_norm_", "clip_grad_value_"):
            self.clip(given, via="accelerator")
        elif name == "clip_gradients":
            self.clip(given, position=1, via="accelerator")
        elif name not in _QUIET_METHODS:
            self.opaque(given.all, given.node, name)
        return Unknown()

    # ------------------------------------------------------------------------------------------- modules

    def _of_module(self, thing: Thing, name: str, given: Arguments) -> Value:
        on = (thing.number,)
        if name in ("parameters", "named_parameters", "trainable_parameters"):
            return Parameters(on, name != "trainable_parameters", once=True, named=name == "named_parameters",
                              taken_at=self.line(given.node))  # fmt: skip
        if name in ("forward", "__call__"):
            return self.call_module(thing, given)
        if name in ("train", "eval"):
            mode = given.get(0, "mode")
            if name == "train" and mode is not None:
                if not isinstance(mode, Const):
                    self.emit("train", given.node, on, unsure=True)
                    return thing
                name = "train" if mode.value else "eval"
            self.emit(name, given.node, on)
            return thing
        if name == "zero_grad":
            self.emit("zero_grad", given.node, on)
            return Unknown()
        if name == "requires_grad_":
            self.emit("freeze", given.node, on)
            thing.details["frozen"] = True
            return thing
        if name in words.SAME_THING:
            return thing
        if name in ("add_module", "register_module") and len(given.positional) > 1:
            key = given.positional[0]
            self.hold(thing, key.value if isinstance(key, Const) and isinstance(key.value, str) else "", given.get(1))
            return Unknown()
        if name in ("append", "extend", "insert"):
            for value in given.positional:
                self.hold(thing, "", value)
            return thing
        if name == "optimizers":
            return self._lightning_optimizers(thing, given)
        if name == "lr_schedulers":
            kept = thing.attributes.get("<schedulers>")
            return kept if kept is not None else self.thing("scheduler", "", given.node, known=False, name="scheduler")
        if name == "manual_backward":
            self.backward(given.get(0, "loss"), given, via="manual")
        elif name == "clip_gradients":
            self.clip(given, via="lightning")
        elif name in ("resize_token_embeddings", "add_adapter", "load_adapter", "prune_heads", "set_input_embeddings"):
            self.emit("replaced", given.node, on, part=f"{name}()", how=name)
        elif "freeze" in name:
            self.emit("freeze", given.node, on)
        elif name in _TRAINING_METHODS or thing.made is not None and not thing.made.whole and name not in _PLAIN:
            self.opaque([thing, *thing.attributes.values(), *given.all], given.node, name)
        return Unknown(f"{thing.name}.{name}", (thing,) if name in ("modules", "children", "named_modules") else ())

    def _lightning_optimizers(self, thing: Thing, given: Arguments) -> Value:
        kept = thing.attributes.get("<optimizers>")
        if kept is None:
            kept = self.thing("optimizer", "", given.node, known=False, name="self.optimizers()")
            kept.path = ()
            thing.attributes["<optimizers>"] = kept
        return kept

    def hold(self, owner: Thing, name: str, value: Value | None) -> None:
        """``value`` becomes a part of the module ``owner``; a list of modules does not register what is in it."""
        if isinstance(value, Thing) and value.kind == "module":
            if name:
                owner.attributes[name] = value
                value.name = value.name or name
            else:
                owner.parts.append(value)
            if not value.of:
                value.of = (owner.number,)
            name_in_list = value.details.pop("listed", None)
            for sibling in self.things if name_in_list is not None else ():
                # One stands for all that are gone through.
                if sibling.details.get("listed") == name_in_list and sibling.of == value.of:
                    del sibling.details["listed"]
        elif isinstance(value, Items):
            for part in value.elements:
                self.hold(owner, "", part)

    def listed(self, items: Items, part: Value) -> None:
        """A module in a plain list that a module keeps: nothing registers it."""
        if items.kept_by is not None and isinstance(part, Thing) and part.kind == "module" and not part.of:
            part.details["listed"] = items.kept_as
            part.of = (items.kept_by.number,)

    # ------------------------------------------------------------------------------------------- tensors

    def method_of_tensor(self, tensor: Tensor, name: str, given: Arguments) -> Value:
        at = self.line(given.node)
        if name == "backward":
            self.backward(tensor, given)
            return Unknown()
        if name == "requires_grad_":
            # On data it makes an input to optimize; on a result it only hides that there is no gradient.
            lost = tensor.loss or bool(tensor.cut_by) or tensor.attached
            return replace(tensor, patched_at=at) if lost else replace(tensor, attached=True)
        if name in words.CUT:
            return cut(replace(tensor, made_by=tensor.made_by if "detach" in name else ""), name.strip("_"), at)
        if name in words.SAME:
            return tensor
        if name in words.OPERATIONS:
            return replace(tensor, made_by=name.rstrip("_"), made_at=at, role="", loss=False)
        return self.reduced(tensor, name, given)

    def reduced(self, tensor: Tensor, name: str, given: Arguments) -> Tensor:
        """The result of any other operation on a tensor."""
        attached = attachment([tensor, *(v for v in given.all if isinstance(v, (Tensor, Unknown)))])
        role = tensor.role if name in ("squeeze", "sum") and tensor.role else ""
        if name == "sum" and tensor.made_by == "exp":
            return replace(tensor, made_by="sum of exp", attached=attached, role="")
        if name == "mean" and tensor.role in ("", "none") and not given.positional and not given.named:
            role = "mean"
        return replace(tensor, made_by="", made_at=None, attached=attached, role=role)

    def backward(
        self, loss: Value | None, given: Arguments, via: str = "", by: int | None = None, what: str = "backward"
    ) -> None:
        """A backward; what is known of the loss goes along."""
        details: dict[str, Plain] = {"via": via}
        if by is not None:
            details["by"] = by
        if isinstance(loss, Tensor):
            details.update(role=loss.role, attached=loss.attached, cut_by=loss.cut_by, is_loss=loss.loss)
            details["losses"] = tuple(sorted(loss.losses))
            for key, at in (("cut", loss.cut_at), ("patched", loss.patched_at)):
                if at is not None:
                    details[f"{key}_file"], details[f"{key}_line"] = at.file, at.line
        elif isinstance(loss, (Items, Unknown)):
            details["losses"] = tuple(sorted(losses_in([loss])))
        weighted = given.named.get("gradient") or (given.get(0) if not via else None)
        details["weighted"] = weighted is not None
        self.emit(what, given.node, (), **details)

    def clip(self, given: Arguments, position: int = 0, via: str = "") -> None:
        what = given.get(position, "parameters", "optimizer")
        value = what.elements[0] if isinstance(what, Items) and len(what.elements) == 1 else what
        on: tuple[int, ...] = ()
        bound = given.node.args[position + 1] if len(given.node.args) > position + 1 else None
        bounds = [bound, *(k.value for k in given.node.keywords if k.arg != "parameters")]
        details: dict[str, Plain] = {"via": via, "understood": False}
        # With an infinite threshold the norm is only measured.
        written = " ".join(ast.unparse(b).lower() for b in bounds if b is not None)
        details["measures"], details["times_scale"] = "inf" in written, "scale" in written
        if isinstance(value, Thing):
            on, details["understood"] = (value.number,), True
        elif isinstance(value, Parameters):
            on, details["understood"] = value.of, value.whole
            if value.once and value.spent_at is not None:
                details.update(spent_line=value.spent_at.line, spent_file=value.spent_at.file, spent_by=value.spent_by)
            elif value.once:
                value.spent_at, value.spent_by = self.line(given.node), "the clipping before"
        elif what is not None:
            on, details["understood"] = owners_of(what)
        self.emit("clip", given.node, on, **details)

    # ------------------------------------------------------------------------------------------- unknown owners

    def method_of_unknown(self, owner: Unknown, base: ast.expr, name: str, given: Arguments) -> Value:
        last = last_name(owner.name)
        kind = ""
        if name in ("step", "zero_grad", "add_param_group") and words.OPTIMIZER_NAME.match(last):
            kind = "optimizer"
        elif name == "step" and words.SCHEDULER_NAME.match(last):
            kind = "scheduler"
        elif name in ("scale", "unscale_", "step") and words.SCALER_NAME.match(last):
            kind = "scaler"
        elif name in ("parameters", "named_parameters", "train", "eval", "zero_grad") and not given.positional:
            if words.MODEL_NAME.match(last) or name in ("parameters", "named_parameters"):
                kind = "module"
        if kind and isinstance(base, (ast.Name, ast.Attribute)):
            return self.method_of_thing(self.assume(kind, base), name, given)
        if name == "backward":
            loss = given.get(0, "loss")
            handed = loss is not None and "gradient" not in given.named and not last.lower().endswith("loss")
            self.backward(loss if handed else None, given, via=owner.name if handed else "")
            return Unknown()
        if name in ("zero_grad", "eval", "train") and not given.positional:
            self.emit(name, given.node, ())
            return owner
        if name in ("clip_grad_norm_", "clip_grad_value_"):
            self.clip(given, via=owner.name)
            return Unknown()
        if name == "step" and not given.positional:
            self.emit("opaque", given.node, (), name=f"{owner.name}.step", stepping=True)
            return Unknown()
        if name.endswith("_") and ".grad" in f".{owner.name}.":
            self.emit("grads", given.node, ())
            return owner
        if name in words.OPERATIONS and not given.positional:
            return Tensor(made_by=name.rstrip("_"), made_at=self.line(given.node))
        if name in words.CUT and name != "data":
            return Tensor(attached=False, cut_by=name.strip("_"), cut_at=self.line(given.node))
        if name == "mean" and not given.positional and not given.named:
            return Tensor(role="mean")
        if name in ("softmax", "log_softmax"):
            return Tensor(made_by=name, made_at=self.line(given.node))
        self.opaque([*given.all, *(v for v in owner.holds if not isinstance(v, Tensor))], given.node,
                    f"{owner.name}.{name}")  # fmt: skip
        return Unknown(f"{owner.name}.{name}", (*owner.holds, *given.all))


#: Methods that every class above may have and that train nothing.
_PLAIN = frozenset(
    ("log", "log_dict", "save_hyperparameters", "print", "save_pretrained", "push_to_hub", "register_buffer",
     "toggle_optimizer", "untoggle_optimizer", "all_gather", "state_dict", "load_state_dict", "named_children",
     "children", "modules", "named_modules", "register_parameter", "get_parameter", "buffers", "named_buffers",
     "__init__", "apply", "init_weights", "post_init", "_init_weights", "get_submodule", "extra_repr")
)  # fmt: skip


def last_name(text: str) -> str:
    """``optimizer`` of ``self.optimizer`` and of ``optimizers["g"]``."""
    return text.split("[")[0].rstrip("()").rpartition(".")[2]


def owners_of(value: Value | None) -> tuple[tuple[int, ...], bool]:
    """Modules whose parameters ``value`` holds, and whether that is all there is in it."""
    if isinstance(value, Parameters):
        return value.of, value.whole
    if isinstance(value, Items):
        owners: list[int] = []
        whole = not value.many
        keys: list[str | None] = list(value.keys) or [None] * len(value.elements)
        for key, element in zip(keys, value.elements, strict=False):
            if key is not None and key != "params":
                continue
            inner, all_of_it = owners_of(element)
            owners += inner
            whole = whole and all_of_it
        return tuple(dict.fromkeys(owners)), whole
    return (), False
