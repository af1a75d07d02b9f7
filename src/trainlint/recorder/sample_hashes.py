"""Hashes of samples: equal hashes are equal values. Only memory of the host is looked at, and a bounded part of it."""

from __future__ import annotations

import hashlib
from typing import Any

#: Bytes of one tensor, array or text that go into the hash of a sample; of larger ones an even share.
BYTES = 1 << 20
#: Samples of a batch, and values of each, that are hashed.
SAMPLES = 64
VALUES = 1024
#: Parts of a sample that are followed, and how deep.
PARTS = 256
DEPTH = 5
#: Names that a class goes by in a batch.
LABELS = ("label", "labels", "target", "targets", "y", "class", "cls")


def of_sample(item: Any) -> str:
    """Hash of one sample as a dataset returns it: tensors, arrays, images, text, numbers, nested."""
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, item, 0)
    return digest.hexdigest()


def _add(digest: Any, item: Any, depth: int) -> None:
    raw = bytes_of(item)
    if raw is not None:
        digest.update(type(item).__name__.encode())
        digest.update(raw)
    elif depth < DEPTH:
        if isinstance(item, dict) or hasattr(item, "keys") and hasattr(item, "values"):
            for key in list(item.keys())[:PARTS]:
                digest.update(str(key)[:200].encode())
                _add(digest, item[key], depth + 1)
        elif isinstance(item, (list, tuple)):
            if len(item) > 16 and all(type(x) in (int, float, bool) for x in item[:16]):
                digest.update(str(item[: BYTES // 64]).encode())
            else:
                for part in item[:PARTS]:
                    _add(digest, part, depth + 1)
        elif hasattr(item, "__dict__"):
            _add(digest, vars(item), depth + 1)
        else:
            digest.update(type(item).__name__.encode())


def bytes_of(item: Any) -> bytes | None:
    """The values of a tensor, array, image, text or number; ``None`` for anything else and for devices' memory."""
    import torch

    if isinstance(item, torch.Tensor):
        if item.device.type != "cpu" or item.layout != torch.strided:
            return None
        flat = _share(item.detach().reshape(-1), item.numel(), item.element_size())
        return str(tuple(item.shape)).encode() + bytes(flat.contiguous().view(torch.uint8).numpy().tobytes())
    if item is None or isinstance(item, (bool, int, float, complex)):
        return repr(item).encode()
    if isinstance(item, str):
        return item[:BYTES].encode("utf-8", "replace")
    if isinstance(item, (bytes, bytearray)):
        return bytes(item[:BYTES])
    shape, dtype = getattr(item, "shape", None), getattr(item, "dtype", None)
    if shape is not None and dtype is not None and hasattr(item, "tobytes") and hasattr(item, "reshape"):
        if getattr(dtype, "hasobject", False):
            return repr(item)[:BYTES].encode("utf-8", "replace")
        flat = _share(item.reshape(-1), int(item.size), int(item.itemsize))
        return str(tuple(shape)).encode() + bytes(flat.tobytes())
    if hasattr(item, "tobytes") and hasattr(item, "size") and hasattr(item, "mode"):  # PIL images
        return str(item.size).encode() + bytes(item.tobytes())
    return None


def _share(flat: Any, count: int, width: int) -> Any:
    return flat[:: -(-count * width // BYTES)] if count * width > BYTES else flat


def inputs_of(item: Any) -> str:
    """Hash of what a model is given of a sample: its largest part. Empty when that is all one value, or a number."""
    best: bytes | None = None
    for raw in _parts(item, 0):
        if best is None or len(raw) > len(best):
            best = raw
    if best is None or len(best) < 16 or len(set(best)) < 3:
        return ""
    return hashlib.blake2b(best, digest_size=8).hexdigest()


def _parts(item: Any, depth: int) -> list[bytes]:
    raw = bytes_of(item)
    if raw is not None:
        return [raw[raw.find(b")") + 1 :] if not isinstance(item, (str, bytes)) else raw]
    if depth >= DEPTH:
        return []
    if isinstance(item, dict) or hasattr(item, "keys") and hasattr(item, "values"):
        values = [item[key] for key in list(item.keys())[:PARTS] if str(key) not in LABELS]
    elif isinstance(item, (list, tuple)):
        if len(item) > 16 and all(type(x) in (int, float) for x in item[:16]):
            return [str(item[: BYTES // 64]).encode()]
        values = list(item[:PARTS])
    else:
        values = []
    return [part for value in values for part in _parts(value, depth + 1)]


def of_batch(tensors: list[tuple[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Hash of each sample's row of the largest tensor of a batch, and the class of each sample where there is one.

    ``tensors``: names and tensors of the batch; those whose leading size is ``size`` have a row per sample.
    """
    rows = [(name, t) for name, t in tensors if t.ndim and t.shape[0] == size and t.numel() and _plain(t)]
    if not rows or not size:
        return [], []
    inputs = max((t for _, t in rows), key=lambda t: t.numel())
    return [_row_hash(row) for row in _rows(inputs)], _classes(rows)


def _plain(tensor: Any) -> bool:
    import torch

    return bool(tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized)


def _rows(tensor: Any) -> list[bytes]:
    import torch

    flat = tensor.detach()[:SAMPLES].reshape(min(len(tensor), SAMPLES), -1)
    step = -(-flat.shape[1] // VALUES)
    flat = flat[:, ::step].contiguous()
    values = flat.view(torch.uint8).numpy() if flat.dtype != torch.bool else flat.to(torch.uint8).numpy()
    return [row.tobytes() for row in values]


def _row_hash(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=8).hexdigest() if len(set(raw)) > 2 else ""


def _classes(rows: list[tuple[str, Any]]) -> list[int]:
    """Of the tensors with one integer per sample that called a label, else the last when it is the only one."""
    found = [(name, t) for name, t in rows if t.ndim == 1 and not t.is_floating_point() and not t.is_complex()]
    named = [t for name, t in found if name.lower() in LABELS]
    chosen = named[0] if named else found[0][1] if len(found) == 1 and len(rows) > 1 else None
    return [int(v) for v in chosen[:SAMPLES].tolist()] if chosen is not None else []
