"""Root modules, parameters and modes."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .core import Recorder
from .modes import Modes
from .patching import ImportHooks, wrap
from .watch import Session, rank, world_size

#: Wrappers are looked through: the attribute that holds the wrapped module, by class name.
WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "DeepSpeedEngine": "module",
}
#: Sub-modules listed per root.
SUBMODULE_CAP = 5000
#: Instruments that want the roots within this time of the program's own find those of the first of them.
AT_ONCE_S = 0.002

PACKAGES = (
    "lightning pytorch_lightning transformers accelerate peft trl datasets deepspeed hydra omegaconf jsonargparse "
    "bitsandbytes torchtune timm safetensors numpy"
).split()


class Modules:
    """Finds root modules by one garbage-collector scan and writes them with their parameters."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recorder: Recorder = session.recorder
        #: Parameter number -> weak parameter lookups are through the tensors held here.
        self.roots: list[Any] = []
        self.parameters: dict[int, Any] = {}
        #: File of each parameter that was loaded from one, by number, and who knows it of the roots that are found.
        self.origins: dict[int, str] = {}
        self.origins_of: Callable[[list[Any]], dict[int, str]] | None = None
        self.gradient_seen: set[int] = set()
        self._emitted: dict[int, dict[str, Any]] = {}
        self._program_written = False
        self._unregistered: dict[int, str] = {}
        self._shards: dict[int, Any] = {}
        #: The program's own clock at the last scan.
        self._scanned: float | None = None
        self.modes = Modes(session)

    def scan(self) -> None:
        """Find roots and emit them. Called at the first backward and when an optimizer steps for the first time."""
        if self._scanned is None or self.recorder.program_seconds() - self._scanned > AT_ONCE_S:
            self._search()
        self._scanned = self.recorder.program_seconds()
        self.modes.forget()
        if self.origins_of is not None:
            try:
                self.origins.update(self.origins_of(self.roots))
            except Exception as error:
                self.recorder.problem("telling where weights came from", error)
        for root in self.roots:
            self._emit_root(root)
        self.write_program()

    def _search(self) -> None:
        """Look through all objects of the process, of which there are some hundred thousand."""
        import torch

        module = torch.nn.Module
        found = instances(module)
        children: set[int] = set()
        for one in found:
            held = one.__dict__.get("_modules") or {}
            children.update(id(child) for child in held.values() if child is not None)
        self.roots = [m for m in found if id(m) not in children]
        self._unregistered = unregistered(found, module)
        self._shards = shards(found)

    def _emit_root(self, root: Any) -> None:
        first = next(root.parameters(), None)
        if first is None:
            return
        inner, wrappers = unwrap(root)
        number = self.recorder.roots.of(root)
        names: dict[int, list[str]] = {}
        owners: dict[int, tuple[Any, str]] = {}
        tensors: dict[int, Any] = {}
        submodules: list[dict[str, Any]] = []
        for prefix, sub in inner.named_modules():
            if len(submodules) < SUBMODULE_CAP and prefix:
                submodules.append({"name": prefix, "class_name": type(sub).__name__, "training": sub.training})
            for name, tensor in sub.__dict__.get("_parameters", {}).items():
                if tensor is None:
                    continue
                tensor = self._shards.get(id(tensor), tensor)
                ident = self.recorder.parameters.of(tensor)
                tensors[ident] = tensor
                names.setdefault(ident, []).append(f"{prefix}.{name}" if prefix else name)
                owners.setdefault(ident, (sub, name))
        # Parameters of the wrappers themselves (rare) and modules registered twice keep their first name.
        total = sum(t.numel() for t in tensors.values())
        trainable = sum(t.numel() for t in tensors.values() if t.requires_grad)
        self.recorder.emit(
            "root",
            {
                "id": number,
                "class_name": type(inner).__name__,
                "defined_in": type(inner).__module__,
                "training": bool(inner.training),
                "n_parameters": total,
                "n_trainable": trainable,
                "wrappers": wrappers,
                "submodules": submodules,
                "unregistered_in": self._unregistered.get(id(root), ""),
                "mode_sensitive": self.modes.describe(number, root, inner),
            },
        )
        for ident, tensor in tensors.items():
            owner, attribute = owners[ident]
            self.parameters[ident] = tensor
            self._emit_parameter(
                ident, tensor, names[ident], kind=kind_of(owner, attribute), root=number, owner=type(owner).__name__
            )

    def _emit_parameter(
        self, ident: int, tensor: Any, names: list[str], *, kind: str, root: int | None, owner: str
    ) -> None:
        known = self._emitted.get(ident)
        if known is not None and known["root"] is not None and known["root"] != root:
            return  # a module that two roots share: the first root names it
        payload = {
            "id": ident,
            "name": names[0],
            "tied": names[1:],
            "shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            "device": str(tensor.device),
            "requires_grad": bool(tensor.requires_grad),
            "kind": kind,
            "root": root,
            "owner": owner,
            "origin": self.origins.get(ident, "fresh"),
        }
        if payload != known:
            self._emitted[ident] = payload
            self.recorder.emit("parameter", payload)

    def know(self, tensor: Any, name: str) -> int:
        """The number of a tensor that an optimizer holds; a tensor of no module is written under ``name``."""
        number = self.recorder.parameters.of(tensor)
        if number not in self.parameters:
            self.parameters[number] = tensor
            self._emit_parameter(number, tensor, [name], kind="other", root=None, owner="")
        return number

    def close(self) -> None:
        """Write what changed over the watch: requires_grad, gradients seen."""
        for number, payload in list(self._emitted.items()):
            tensor = self.parameters.get(number)
            if tensor is None:
                continue
            later = bool(tensor.requires_grad)
            seen = number in self.gradient_seen or tensor.grad is not None
            update: dict[str, Any] = {}
            if later != payload["requires_grad"]:
                update["requires_grad_later"] = later
            if self.session.backwards:
                update["gradient_seen"] = seen
            if update:
                self.recorder.emit("parameter", {**payload, **update})
        self.write_program(final=True)

    def write_program(self, *, final: bool = False) -> None:
        import torch

        device = next((t.device for t in self.parameters.values() if t.requires_grad), None)
        payload: dict[str, Any] = {
            "interpreter": sys.executable,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "platform": sys.platform,
            "packages": {p: version_of(p) for p in PACKAGES if p in sys.modules},
            "world_size": world_size(),
            "rank": rank(),
            "flags": {
                "default_dtype": dtype_name(torch.get_default_dtype()),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "pid": os.getpid(),
            },
        }
        if device is not None:
            payload["device"] = str(device)
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                payload["device_name"] = properties.name
                payload["device_memory_bytes"] = properties.total_memory
        if not self._program_written:
            payload["time_to_first_step_s"] = round(time.time() - self.recorder.settings.started, 3)
            self._program_written = True
        if final:
            payload["sources"] = loaded_sources()
        self.recorder.emit("program", payload)


def instances(base: type) -> list[Any]:
    """The objects of a class that the garbage collector knows."""
    objects = gc.get_objects()
    try:
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, base)}
        return list(itertools.compress(objects, map(kinds.__contains__, map(type, objects))))
    except TypeError:  # a metaclass whose classes have no hash
        return [obj for obj in objects if issubclass(type(obj), base)]


def unwrap(root: Any) -> tuple[Any, list[str]]:
    """The module inside DDP, FSDP, torch.compile ... and the names of the wrappers from outside in."""
    wrappers: list[str] = []
    while True:
        attribute = WRAPPERS.get(type(root).__name__)
        inner = root.__dict__.get("_modules", {}).get(attribute) if attribute else None
        if inner is None:
            return root, wrappers
        wrappers.append(type(root).__name__)
        root = inner


def shards(modules: list[Any]) -> dict[int, Any]:
    """By id of the whole parameter that ``fully_shard`` puts in its place around forward and backward: the shard.

    The shard is what optimizers hold, and what has the gradient; the whole one is emptied again.
    """
    out: dict[int, Any] = {}
    for module in modules:
        if not hasattr(type(module), "_get_fsdp_state"):
            continue
        try:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # newer torch has several
            for group in [state._fsdp_param_group] if groups is None else groups:
                for parameter in group.fsdp_params if group is not None else ():
                    whole = getattr(parameter, "_unsharded_param", None)
                    if whole is not None:
                        out[id(whole)] = parameter.sharded_param
        except AttributeError:
            continue  # private to torch: without it the modules are seen as they stand
    return out


def unregistered(modules: list[Any], base: type) -> dict[int, str]:
    """Modules that another module keeps in a plain list, tuple or dict: id -> ``Net.layers[0]``."""
    out: dict[int, str] = {}
    for holder in modules:
        for name, value in list(holder.__dict__.items()):
            if name.startswith("_") or type(value) not in (list, tuple, dict) or len(value) > 1000:
                continue
            items = value.items() if type(value) is dict else enumerate(value)
            for key, item in list(items):
                if issubclass(type(item), base):
                    out.setdefault(id(item), f"{type(holder).__name__}.{name}[{key!r}]")
    return out


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a wrapper that looks like one (accelerate's ``AcceleratedOptimizer``)."""
    for _ in range(4):
        inner = getattr(optimizer, "__dict__", {}).get("optimizer")
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer


def kind_of(owner: Any, attribute: str) -> str:
    """``norm``, ``embedding``, ``bias``, ``weight`` or ``other``."""
    import torch

    if "norm" in type(owner).__name__.lower():
        return "norm"
    if isinstance(owner, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return "embedding"
    if attribute == "bias" or attribute.startswith("bias"):
        return "bias"
    return "weight" if "weight" in attribute else "other"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def version_of(package: str) -> str:
    version = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(version, str):
        return version
    try:
        from importlib.metadata import version as installed

        return installed({"lightning": "lightning", "hydra": "hydra-core"}.get(package, package))
    except Exception:
        return ""


def loaded_sources() -> list[str]:
    """Files of the loaded modules outside the standard library and trainlint."""
    import sysconfig

    stdlib = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    here = os.path.dirname(os.path.abspath(__file__))
    out = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        file = os.path.abspath(file)
        in_packages = f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file
        if file.startswith(here) or (not in_packages and any(file.startswith(p + os.sep) for p in stdlib if p)):
            continue
        out.add(file)
    return sorted(out)


def install(session: Session, hooks: ImportHooks) -> None:
    import torch

    modules = Modules(session)
    session.modules = modules
    session.closers.append(modules.close)
    recorder = session.recorder

    depth = threading.local()

    @recorder.quiet
    def note(module: Any, mode: bool) -> None:
        seq = recorder.event(
            "mode",
            at=recorder.user_line(),
            root=recorder.roots.get(module),
            training=bool(mode),
            class_name=type(module).__name__,
        )
        modules.modes.called(module, bool(mode), seq)

    def make(original: Any) -> Any:
        def train(self: Any, mode: bool = True) -> Any:
            if torch.compiler.is_compiling():
                return original(self, mode)
            # Module.train calls itself on every child: only the outermost call is an event.
            if getattr(depth, "inside", False):
                return original(self, mode)
            depth.inside = True
            try:
                note(self, mode)
                return original(self, mode)
            finally:
                depth.inside = False

        return train

    wrap(torch.nn.Module, "train", make)
