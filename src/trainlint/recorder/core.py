"""The recorder of one process: its stream, its identifiers, its sense of where the user's code is.

The stream is a file of JSON lines, ``[tag, payload]``, flushed line by line so that whatever happened before a crash is
on disk. Payloads carry the field names of :mod:`trainlint.recording.schema`; ``recording/assemble.py`` puts them
together. Tags: ``program``, ``plan`` (partial objects, later lines update earlier), ``root``, ``parameter``,
``optimizer``, ``scheduler``, ``loader`` (by ``id``, last wins), ``framework`` (by ``name``, last wins), ``event``,
``event_value`` (fills fields of an earlier event), ``dropped``, ``measure``, ``outsiders``, ``second_moment``,
``config``, ``prevented``, ``problem``, ``mark``; ``provenance``, ``adapters``, ``replay``, ``numerics``, ``samples``,
``costs`` (partial: lists grow, other fields are replaced); ``boundary`` (partial, later lines update earlier; what
follows the first with ``began`` belongs to the epoch boundary).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import math
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from .settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

#: Top-level packages whose frames are never "the user's line".
FRAMEWORKS = frozenset(
    """torch torchvision torchaudio lightning pytorch_lightning lightning_fabric lightning_utilities transformers
    accelerate peft trl datasets deepspeed hydra omegaconf jsonargparse numpy pandas scipy sklearn safetensors wandb
    tensorboard tensorboardX mlflow yaml tqdm torchmetrics fsspec typeshed_client huggingface_hub tokenizers
    bitsandbytes ignite fairscale xformers triton optimum evaluate ray axolotl torchtune einops
    _trainlint_recorder trainlint""".split()
)

#: Events kept per kind; what comes after is counted only.
EVENT_CAP = 4000


def clean(value: Any) -> Any:
    """A JSON value: floats that are not finite become text, unknown objects their repr."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, enum.Enum):
        return clean(value.value)
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v) for v in value]
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return clean(float(value))
    if isinstance(value, str):
        return str(value)
    return _short_repr(value)


def _short_repr(value: Any) -> str:
    try:
        text = f"{type(value).__name__}" if len(repr(type(value))) > 300 else repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else text[:197] + "..."


def scalar(value: Any) -> Any:
    """A hyperparameter as schema ``Value``: scalars and flat sequences stay, 0-d tensors become numbers."""
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:
        try:
            value = item()
        except Exception:
            return _short_repr(value)
    if isinstance(value, (list, tuple)):
        return [scalar(v) if not isinstance(v, (list, tuple, dict)) else _short_repr(v) for v in value][:64]
    if value is None or isinstance(value, (bool, int, float, str, enum.Enum)):
        return clean(value)
    return _short_repr(value)


class Stream:
    """Appends JSON lines to one file; safe for several threads; re-opens itself after a fork."""

    def __init__(self, run_dir: str) -> None:
        self._dir = run_dir
        self._lock = threading.Lock()
        self._fd = -1
        self._pid = -1

    def write(self, tag: str, payload: Any) -> None:
        data = (json.dumps([tag, clean(payload)], ensure_ascii=True) + "\n").encode("ascii")
        with self._lock:
            if self._pid != os.getpid():
                self._open()
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]

    def _open(self) -> None:
        self._pid = os.getpid()
        path = os.path.join(self._dir, "stream", f"{self._pid}.jsonl")
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)

    def after_fork(self) -> None:
        self._lock = threading.Lock()


class Identities:
    """Small integers for objects, by identity, without keeping them alive where they can be weakly referenced."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}
        self._next = 0

    def get(self, obj: Any) -> int | None:
        """The number of ``obj`` or ``None`` when it has none yet."""
        found = self._known.get(id(obj))
        if found is None:
            return None
        number, ref = found
        alive = ref() if isinstance(ref, weakref.ref) else ref
        return number if alive is obj else None

    def of(self, obj: Any) -> int:
        """The number of ``obj``, given now if it has none."""
        number = self.get(obj)
        if number is None:
            number = self._next
            self._next += 1
            try:
                ref: Any = weakref.ref(obj)
            except TypeError:
                ref = obj
            self._known[id(obj)] = (number, ref)
        return number


class _Busy(threading.local):
    """Of one thread: whether an instrument is at work, since when, and the seconds that instruments took so far."""

    on = False
    since = 0.0
    spent = 0.0


class Recorder:
    """Everything the instruments share in one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stream = Stream(settings.run_dir)
        self.parameters = Identities()
        self.optimizers = Identities()
        self.schedulers = Identities()
        self.roots = Identities()
        self.loaders = Identities()
        self._seq = 0
        self._counts: dict[str, int] = {}
        self._problems: set[str] = set()
        #: What is known of the run's length so far (``plan`` lines).
        self.plan: dict[str, Any] = {}
        self._busy = _Busy()
        self._later: list[tuple[int, Callable[[Any], dict[str, Any]], Any]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.stream.after_fork)

    # -- writing

    def emit(self, tag: str, payload: Any) -> None:
        """Write one line of the stream."""
        if tag == "plan":
            self.plan.update(payload)
        self.stream.write(tag, payload)

    def count_anew(self) -> None:
        """Another part of the recording begins, with its own share of events."""
        self._counts = {}

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def event(self, kind: str, at: list[Any] | dict[str, Any] | None = None, **fields: Any) -> int:
        """Write one timeline event and return its ``seq``. ``at`` comes from :meth:`user_line`."""
        seq = self.next_seq()
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count > EVENT_CAP:
            if count % 1000 == 1:
                self.emit("dropped", {kind: count - EVENT_CAP})
            return seq
        fields.update(kind=kind, seq=seq, time_s=round(time.time() - self.settings.started, 6))
        if at is not None:
            fields["at"] = at
        self.emit("event", fields)
        return seq

    def later(self, seq: int, field: str, tensor: Any) -> None:
        """Fill a number of an event in when the next step is flushed, so that no GPU is waited for now.

        ``tensor`` is a detached tensor of one element; on the CPU it is read at once.
        """
        tensor = tensor.reshape(())
        # What a CUDA graph gave out is overwritten when it runs again: a copy can wait.
        self.later_fields(seq, tensor.clone() if tensor.is_cuda else tensor, lambda value: {field: value})

    def later_fields(self, seq: int, tensor: Any, fields: Callable[[Any], dict[str, Any]]) -> None:
        """Like :meth:`later` for a 1-d tensor of numbers: ``fields`` makes the event's fields from its list."""
        if getattr(tensor, "is_cuda", False) or getattr(getattr(tensor, "device", None), "type", "cpu") != "cpu":
            self._later.append((seq, fields, tensor))
        else:
            self.emit("event_value", {**fields(tensor.tolist()), "seq": seq})

    def flush_later(self) -> None:
        """Read the postponed numbers; after a failed kernel those that are on their way already can still be read."""
        waiting, self._later = self._later, []
        for seq, fields, tensor in waiting:
            try:
                self.emit("event_value", {**fields(tensor.tolist()), "seq": seq})
            except Exception as error:
                self.problem("reading a number of the device", error)

    def mark(self, name: str, **fields: Any) -> None:
        """Tell the supervisor something."""
        self.emit("mark", {"name": name, "time": time.time(), **fields})

    def problem(self, where: str, error: BaseException | str) -> None:
        """Note an internal error once; the user's program goes on."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        key = f"{where}|{text[:80]}"
        if key in self._problems or len(self._problems) > 50:
            return
        self._problems.add(key)
        try:
            self.emit("problem", {"where": where, "error": text[:500]})
        except Exception:
            pass

    # -- never raising into user code

    def quiet(self, function: F) -> F:
        """Wrap an instrument's own code: an exception is noted, never raised; re-entry from itself is skipped.

        ``BaseException`` (Ctrl-C, SystemExit) passes through.
        """

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            busy = self._busy
            if busy.on:
                return None
            busy.on = True
            busy.since = time.perf_counter()
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.problem(getattr(function, "__qualname__", str(function)), error)
                return None
            finally:
                busy.on = False
                busy.spent += time.perf_counter() - busy.since

        return guarded  # type: ignore[return-value]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """For the recorder's own work outside :meth:`quiet`: the instruments ignore the calls it makes."""
        busy, before = self._busy, self._busy.on
        if not before:
            busy.since = time.perf_counter()
        busy.on = True
        try:
            yield
        finally:
            busy.on = before
            if not before:
                busy.spent += time.perf_counter() - busy.since

    @property
    def busy(self) -> bool:
        """An instrument is at work in this thread: calls it makes are not the user's."""
        return self._busy.on

    def own_seconds(self) -> float:
        """Seconds that the instruments have taken in this thread."""
        return self._busy.spent

    def program_seconds(self) -> float:
        """A clock for this thread that stands still while an instrument is at work."""
        busy = self._busy
        return (busy.since if busy.on else time.perf_counter()) - busy.spent

    # -- where the user's code is

    def user_line(self) -> dict[str, Any] | None:
        """The innermost frame of the user's own code, as a ``SourceLine`` payload; ``None`` when there is none."""
        return line_of(user_frame(sys._getframe(1)))


_STDLIB = tuple(
    {os.path.realpath(p) + os.sep for p in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")) if p}
    | {p + os.sep for p in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")) if p}
)
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@functools.lru_cache(maxsize=8192)
def is_user_file(filename: str) -> bool:
    """Whether a file belongs to the user's program (not the standard library, a framework or trainlint)."""
    if not filename or filename.startswith("<"):
        return False
    if filename.startswith(_HERE):
        return False
    for marker in ("site-packages", "dist-packages"):
        _, found, tail = filename.rpartition(os.sep + marker + os.sep)
        if found:
            top = tail.split(os.sep, 1)[0]
            return top.removesuffix(".py") not in FRAMEWORKS
    return not filename.startswith(_STDLIB)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of the user's own code at or outside ``frame``."""
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return frame
        frame = frame.f_back
    return None


def line_of(frame: FrameType | None) -> dict[str, Any] | None:
    if frame is None:
        return None
    code = frame.f_code
    return {
        "file": os.path.abspath(code.co_filename),
        "line": frame.f_lineno,
        "function": getattr(code, "co_qualname", code.co_name),
    }
