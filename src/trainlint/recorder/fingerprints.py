"""A few values of a tensor, by which it is known again: in a file, in a state dict, in a model.

Sixteen elements at four places. A cast to another precision keeps them within a rounding, a transposed copy is looked
for by its own shape. Of a file no more than four pages per tensor are touched.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

from .measure import emptied

Sample = tuple[float, ...]
Shape = tuple[int, ...]

_PLACES, _RUN = 4, 4
#: Relative difference that a rounding to bfloat16, or two in a row, may make; the smallest float16.
_ROUNDING = 0.0085
_TINY = 6e-8
#: Candidates of one shape that a sample is compared with one by one.
_CANDIDATES = 3000
#: Headers of safetensors files are smaller than this.
_HEADER = 100 * 2**20
_FORMATS = {"F64": ("<d", 8), "F32": ("<f", 4), "F16": ("<e", 2), "BF16": ("", 2)}


def positions(numel: int) -> list[int]:
    """Flat row-major positions of the sampled elements; the first four are the tensor's first."""
    if numel <= _PLACES * _RUN:
        return list(range(numel))
    starts = [0, *(numel * k // _PLACES + k for k in range(1, _PLACES))]
    return [min(start + i, numel - _RUN + i) for start in starts for i in range(_RUN)]


class Sampler:
    """Takes samples of tensors, with one transfer per device."""

    def __init__(self) -> None:
        self._indices: dict[tuple[Shape, Any], tuple[Any, ...]] = {}

    def view(self, tensor: Any) -> Any | None:
        """The sampled elements where the tensor is; ``None`` when it has none that can be read."""
        import torch

        tensor = tensor.detach()  # a shard is not compared with a whole tensor: its type is another
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return None
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.device.type == "meta" or emptied(tensor):
            return None
        if tensor.ndim == 0:
            return tensor.reshape(1)
        return tensor[self._index(tuple(tensor.shape), tensor.device)]

    def _index(self, shape: Shape, device: Any) -> tuple[Any, ...]:
        import torch

        known = self._indices.get((shape, device))
        if known is None:
            flat = positions(math.prod(shape))
            columns = []
            for size in reversed(shape):
                columns.append([p % size for p in flat])
                flat = [p // size for p in flat]
            known = tuple(torch.tensor(c, dtype=torch.int64, device=device) for c in reversed(columns))
            self._indices[shape, device] = known
        return known

    def take(self, tensors: list[Any]) -> list[Sample | None]:
        """A sample of each tensor, ``None`` where there is none."""
        import torch

        out: list[Sample | None] = [None] * len(tensors)
        groups: dict[Any, list[tuple[int, Any]]] = {}
        with torch.no_grad():
            for i, tensor in enumerate(tensors):
                try:
                    view = self.view(tensor)
                except (RuntimeError, NotImplementedError, TypeError, IndexError):
                    continue  # a dtype or a subclass that cannot be indexed
                if view is not None:
                    groups.setdefault((view.device, view.dtype), []).append((i, view))
            for items in groups.values():
                flat = torch.cat([v for _, v in items]).float().tolist()
                start = 0
                for i, view in items:
                    out[i] = tuple(flat[start : start + view.numel()])
                    start += view.numel()
        return out


def telling(sample: Sample) -> bool:
    """Whether these values can be told from others': a constant, or fewer than four numbers, prove nothing."""
    return len(sample) >= 4 and len(set(sample)) > 2 and math.isfinite(sum(sample))


def close(a: Sample, b: Sample) -> bool:
    """Whether two samples are the same values up to a cast."""
    return len(a) == len(b) and all(
        x == y or abs(x - y) <= _ROUNDING * max(abs(x), abs(y)) + _TINY for x, y in zip(a, b, strict=True)
    )


class Part:
    """One set of named tensors in a file: a state dict."""

    def __init__(self, path: str, name: str, at: dict[str, Any] | None) -> None:
        self.path = path
        self.name = name
        self.at = at
        self.shapes: dict[str, Shape] = {}
        self._samples: dict[str, Sample] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self._stamp: tuple[int, int] | None = None

    def add(self, key: str, shape: Shape, sample: Sample) -> None:
        self.shapes[key] = shape
        self._samples[key] = sample

    def samples(self) -> dict[str, Sample]:
        """By key; those of a safetensors file are read from it now, where it is still there and the same."""
        if self._where:
            where, self._where = self._where, {}
            with contextlib.suppress(FileNotFoundError):  # a temporary folder of the program's
                if _stamp(self.path) == self._stamp:
                    self._read(where)
        return self._samples

    def _read(self, where: dict[str, tuple[str, int]]) -> None:
        with open(self.path, "rb") as file:
            descriptor = file.fileno()
            for key, (dtype, start) in where.items():
                code, size = _FORMATS[dtype]
                flat = positions(math.prod(self.shapes[key]))
                data = b""
                for i in range(0, len(flat), _RUN):
                    run = flat[i : i + _RUN]
                    data += os.pread(descriptor, size * len(run), start + size * run[0])
                if len(data) != size * len(flat):
                    continue
                if not code:  # bfloat16: the upper half of a float
                    data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
                    code, size = "<f", 4
                self._samples[key] = tuple(v for (v,) in struct.iter_unpack(code, data))

    @classmethod
    def of_safetensors(cls, path: str, at: dict[str, Any] | None) -> Part:
        """The tensors that a safetensors file's header lists."""
        part = cls(path, "", at)
        part._stamp = _stamp(path)
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER:
                return part
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key == "__metadata__" or entry.get("dtype") not in _FORMATS:
                continue
            if math.prod(entry["shape"]):
                part.shapes[key] = tuple(entry["shape"])
                part._where[key] = (entry["dtype"], 8 + length + entry["data_offsets"][0])
        return part


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class Index:
    """Finds the tensors of files that a sample could be."""

    def __init__(self) -> None:
        self._exact: dict[tuple[Shape, Sample], list[tuple[Part, str]]] = {}
        self._by_shape: dict[Shape, list[tuple[Sample, Part, str]]] = {}
        self._heads: dict[tuple[Shape, Sample], list[tuple[Part, str]]] = {}
        self._known: set[int] = set()

    def add(self, part: Part) -> None:
        if id(part) in self._known:
            return
        self._known.add(id(part))
        for key, sample in part.samples().items():
            shape = part.shapes[key]
            self._exact.setdefault((shape, sample), []).append((part, key))
            self._by_shape.setdefault(shape, []).append((sample, part, key))
            if len(shape) > 1 and telling(sample[:_RUN]):
                self._heads.setdefault((shape[1:], sample[:_RUN]), []).append((part, key))

    def find(self, shape: Shape, sample: Sample) -> list[tuple[Part, str]]:
        """Tensors of files with these values, up to a cast."""
        exact = self._exact.get((shape, sample))
        if exact is not None:
            return exact
        candidates = self._by_shape.get(shape, ())[:_CANDIDATES]
        return [(part, key) for other, part, key in candidates if close(sample, other)]

    def resized(self, shape: Shape, sample: Sample) -> list[tuple[Part, str]]:
        """Tensors of files that begin with the same values and have another number of rows."""
        return self._heads.get((shape[1:], sample[:_RUN]), []) if len(shape) > 1 else []


def tensors_in(obj: Any, *, most: int = 20000) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The state dicts in what a file held: where each is, its tensors, whether it is an optimizer's."""
    import torch

    left = most

    def walk(value: Any, where: str, depth: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
        nonlocal left
        if depth > 5 or left <= 0:
            return
        if isinstance(value, torch.nn.Module):
            value = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        if isinstance(value, torch.Tensor):
            value = {"": value}
        if not isinstance(value, (dict, list, tuple)) or len(value) > most:
            return
        if isinstance(value, dict) and "param_groups" in value and "state" in value:
            state = value["state"]
            states = list(state.values())[:4] if isinstance(state, dict) else []
            found = [t for s in states if isinstance(s, dict) for t in s.values() if isinstance(t, torch.Tensor)]
            yield where, {str(i): t for i, t in enumerate(found)}, True
            return
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        own = {str(k): v for k, v in items if isinstance(v, torch.Tensor)}
        left -= len(own)
        if own:
            yield where, own, False
        for key, item in items:
            if isinstance(item, (dict, list, tuple, torch.nn.Module)):
                yield from walk(item, f"{where}.{key}" if where else str(key), depth + 1)

    yield from walk(obj, "", 0)
