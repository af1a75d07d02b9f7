"""Parameter measurements around an optimizer step: in bulk, from samples, one transfer per device.

Large tensors are sampled at a fixed stride, so that no copy of the weights is ever made. Where a proof that *nothing*
changed is wanted, the bits of the whole tensor are summed before and after, which reads the tensor once and needs no
memory.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from typing import Any

#: Elements sampled per parameter.
SAMPLE = 1024

_BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def local(tensor: Any) -> Any:
    """The part of a tensor that this process holds (DTensor), detached."""
    shard = getattr(tensor, "_local_tensor", None)
    return (tensor if shard is None else shard).detach()


def emptied(tensor: Any) -> bool:
    """Whether the memory was given back under the tensor (``untyped_storage().resize_(0)``, as FSDP does)."""
    return bool(tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0)


def stride_of(n: int, most: int) -> tuple[int, int]:
    """The stride, and the number of elements, of a sample of at most about ``most`` out of ``n``."""
    stride = max(1, n // most)
    # An odd stride does not fall into step with power-of-two rows, which would sample a few columns only.
    if stride > 1 and stride % 2 == 0:
        stride -= 1
    return stride, min((n + stride - 1) // stride, 2 * most)


def sample_view(tensor: Any, most: int = SAMPLE) -> Any | None:
    """A strided view of at most about ``most`` elements spread over the tensor; ``None`` when there is none."""
    import torch

    tensor = local(tensor)
    n = tensor.numel()
    if n == 0 or tensor.layout != torch.strided or tensor.device.type == "meta" or emptied(tensor):
        return None
    stride, count = stride_of(n, most)
    if dense(tensor):
        return torch.as_strided(tensor, (count,), (stride,), tensor.storage_offset())
    return tensor.reshape(-1)[::stride][:count] if n <= 64 * SAMPLE else None


def dense(tensor: Any) -> bool:
    """Whether the tensor's elements are one unbroken run of its storage, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def bits(tensors: list[tuple[int, Any]]) -> dict[int, int | None]:
    """Sum of each tensor's bits as integers: two tensors that differ in one element never agree.

    One transfer per device; ``None`` where the bits cannot be summed.
    """
    import torch

    out: dict[int, int | None] = {}
    sums: dict[Any, list[tuple[int, Any]]] = {}
    for number, tensor in tensors:
        tensor = local(tensor)
        out[number] = None
        name = _BITS.get(tensor.element_size())
        if name is None or not dense(tensor) or tensor.is_complex() or tensor.layout != torch.strided:
            continue
        if tensor.device.type == "meta" or emptied(tensor):
            continue
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
        total = flat.view(getattr(torch, name)).sum(dtype=torch.int64)
        sums.setdefault(tensor.device, []).append((number, total))
    for items in sums.values():
        values = torch.stack([total for _, total in items]).tolist()
        out.update(zip([n for n, _ in items], values, strict=True))
    return out


class Samples:
    """Samples of many tensors, one flat tensor per device and dtype."""

    def __init__(self, tensors: list[tuple[int, Any]]) -> None:
        import torch

        groups: dict[tuple[Any, Any], list[tuple[int, Any]]] = {}
        for number, tensor in tensors:
            view = sample_view(tensor)
            if view is not None:
                groups.setdefault((view.device, view.dtype), []).append((number, view))
        self.groups = [
            ([n for n, _ in items], [v.numel() for _, v in items], torch.cat([v for _, v in items]))
            for items in groups.values()
        ]

    def sizes(self) -> dict[int, int]:
        return {n: size for numbers, sizes, _ in self.groups for n, size in zip(numbers, sizes, strict=True)}

    def norms(self, numels: dict[int, int]) -> dict[int, float]:
        """L2 norm per tensor, scaled up from the sample."""
        out: dict[int, float] = {}
        for numbers, sizes, flat in self.groups:
            squares = segment_sums(_square(flat), sizes)
            for n, size, square in zip(numbers, sizes, squares, strict=True):
                out[n] = math.sqrt(square * numels[n] / size) if square == square and square >= 0 else float("nan")
        return out

    def compare(self, after: Samples, numels: dict[int, int]) -> tuple[dict[int, float], dict[int, float]]:
        """Per tensor: norm of the difference (scaled up) and share of elements whose bits changed."""
        norms: dict[int, float] = {}
        changed: dict[int, float] = {}
        for (numbers, sizes, old), (numbers2, sizes2, new) in zip(self.groups, after.groups, strict=True):
            if numbers != numbers2 or sizes != sizes2:
                continue
            differs = segment_sums(_differs(old, new), sizes)
            squares = segment_sums(_square(new.float() - old.float() if not old.is_complex() else new - old), sizes)
            for n, size, square, count in zip(numbers, sizes, squares, differs, strict=True):
                ok = square == square and square >= 0
                norms[n] = math.sqrt(square * numels[n] / size) if ok else float("nan")
                changed[n] = count / size
        return norms, changed


def _square(flat: Any) -> Any:
    import torch

    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    flat = wide(flat)
    return flat * flat


def wide(tensor: Any) -> Any:
    """In the widest floating type that the device has."""
    return tensor.double() if tensor.device.type != "mps" else tensor.float()


def _differs(old: Any, new: Any) -> Any:
    import torch

    name = _BITS.get(old.element_size())
    if name is None or old.is_complex():
        return (old != new).float()
    dtype = getattr(torch, name)
    return (old.view(dtype) != new.view(dtype)).float()


def segment_sums(values: Any, sizes: list[int]) -> list[float]:
    """Sums of consecutive stretches of a flat tensor."""
    import torch

    if values.numel() != sum(sizes):  # complex numbers were unfolded
        sizes = [2 * s for s in sizes]
    index = _segments(tuple(sizes), values.device)
    out = torch.zeros(len(sizes), dtype=values.dtype, device=values.device)
    return [float(x) for x in out.index_add_(0, index, values).tolist()]


@functools.lru_cache(maxsize=32)
def _segments(sizes: tuple[int, ...], device: Any) -> Any:
    """For each element of a flat tensor the number of its stretch; moved to the device once."""
    import torch

    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, of which nothing here may become a part, and which nothing may ask."""
    import torch

    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def numbers(values: list[Any]) -> list[Any]:
    """The values, with one-element tensors as numbers: one transfer per device."""
    import torch

    out = list(values)
    places: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            places.setdefault(value.device, []).append(i)
    for found in places.values():
        read = torch.stack([values[i].detach().reshape(()).double() for i in found]).tolist()
        for i, number in zip(found, read, strict=True):
            out[i] = number
    return out


class Number:
    """The value of a one-element tensor that is asked for again and again (a GradScaler's scale).

    A device is waited for once after each write to it. ``of`` also knows it by its memory, under another name.
    """

    def __init__(self) -> None:
        self._tensor: Any = None
        self._version = -1
        self._value = 0.0

    def read(self, tensor: Any) -> float:
        if tensor is not self._tensor or tensor._version != self._version:
            self._tensor, self._version, self._value = tensor, tensor._version, float(tensor.item())
        return self._value

    def of(self, tensor: Any) -> float:
        own = self._tensor
        if own is not None and tensor.device == own.device and tensor.data_ptr() == own.data_ptr():
            if tensor.dtype == own.dtype and own._version == self._version:
                return self._value
        return float(tensor.item())


#: The scale of the GradScaler that was used last.
scale = Number()


def gradient_norms(tensors: list[tuple[int, Any]]) -> dict[int, float | None]:
    """L2 norm of ``.grad`` per parameter, ``None`` where there is no gradient. One transfer per device and dtype."""
    import torch

    out: dict[int, float | None] = {}
    groups: dict[tuple[Any, Any], list[tuple[int, Any]]] = {}
    for number, parameter in tensors:
        grad = parameter.grad
        if grad is None:
            out[number] = None
            continue
        grad = local(grad)
        if grad.layout != torch.strided:
            grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()
        if grad.numel() == 0:
            out[number] = 0.0
            continue
        groups.setdefault((grad.device, grad.dtype), []).append((number, grad))
    for (_, dtype), items in groups.items():
        grads = [g for _, g in items]
        if dtype in (torch.float16, torch.bfloat16):
            norms = list(torch._foreach_norm(grads, 2, dtype=torch.float32))
        elif dtype.is_complex:
            norms = [torch.linalg.vector_norm(torch.view_as_real(g)) for g in grads]
        else:
            norms = list(torch._foreach_norm(grads))
        for (number, _), value in zip(items, torch.stack(norms).tolist(), strict=True):
            out[number] = float(value)
    return out


def peak_memory() -> int | None:
    """Peak memory in bytes: of the GPU allocator when CUDA is in use, else of the process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return process_peak()


def device_memory(device: Any) -> tuple[int | None, int | None]:
    """Bytes that torch's allocator has given out on a CUDA device now, and the most so far.

    Read, not reset: the program may reset the most for a measurement of its own.
    """
    import torch

    allocated = torch.cuda.memory_stats_as_nested_dict(device).get("allocated_bytes", {}).get("all", {})
    return allocated.get("current"), allocated.get("peak")


def reserved_memory(device: Any) -> int:
    """The most bytes that torch's allocator has taken from a CUDA device."""
    import torch

    return int(torch.cuda.max_memory_reserved(device))


def process_memory() -> tuple[int | None, int | None]:
    """Bytes of resident memory of this process now, and the most so far."""
    try:
        handle = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            return int(os.read(handle, 128).split()[1]) * _PAGE, process_peak()
        finally:
            os.close(handle)
    except (OSError, ValueError, IndexError):
        return None, process_peak()


def process_peak() -> int | None:
    """The most bytes of resident memory of this process so far.

    It could be reset through ``/proc/self/clear_refs``, under the eyes of a program that reads it: it is not.
    """
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
    except Exception:
        return None


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
