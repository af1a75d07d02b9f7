"""What of the files' weights is in the modules when training begins, and what each load amounts to."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .fingerprints import Part, Sample, Shape, close, telling
from .modules import WRAPPERS, unwrap

if TYPE_CHECKING:
    from .provenance import Call, Provenance

Source = tuple[Part, str]

#: Names listed per load.
LISTED = 2000
#: Components of a name that wrappers put in.
_WRAPPING = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_layer"))
#: Correlation of samples, over all tensors of a load, below which values are unrelated (three standard deviations of
#: it where that is more), and how many values that takes.
_UNRELATED, _VALUES = 0.25, 36
#: Share of a file's weights, or tensors, that fit a module by their shapes, for the file to have been meant for it.
_MEANT = 0.5


class Entry:
    """A parameter or buffer of a root, and what it was recognised as."""

    def __init__(self, root: int, name: str, tensor: Any, number: int, parameter: bool) -> None:
        self.root = root
        self.name = name
        self.plain = ".".join(c for c in name.split(".") if c not in _WRAPPING)
        self.number = number
        self.parameter = parameter
        self.shape: Shape = tuple(tensor.shape)
        self.numel = math.prod(self.shape)
        self.sample: Sample | None = None
        self.flipped: Sample | None = None
        #: Parts and keys that it is from; empty: fresh.
        self.sources: list[Source] = []
        #: It is from one of these files, by the library's word.
        self.files: list[Part] = []
        self.overwritten = False

    @property
    def loaded(self) -> bool:
        return bool(self.sources or self.files)

    def is_from(self, parts: Iterable[Part]) -> bool:
        wanted = {id(p) for p in parts}
        return any(id(p) in wanted for p in (*(p for p, _ in self.sources), *self.files))


class Arrivals:
    """Compares the modules with the files once, before the first step."""

    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self.recorder = provenance.recorder
        self._settled: set[tuple[int, str]] = set()
        self._written: set[int] = set()
        self._files: set[str] = set()
        #: Where statistics of norms came from, by their number: the file.
        self.buffers: dict[int, str] = {}

    def settle(self, roots: list[Any]) -> dict[int, str]:
        """The file of each parameter that came from one, by number. Writes the loads."""
        provenance = self.provenance
        if not provenance.parts and not provenance.calls:
            return {}
        provenance.up_to_date()
        entries, places = self._entries(roots)
        self._recognise(entries)
        origins: dict[int, str] = {}
        # The shards of one model are one source.
        together = {id(p): c.parts for c in provenance.calls if c.how == "from_pretrained" for p in c.parts}
        for entry in entries:
            if entry.loaded:
                parts = together.get(id(entry.sources[0][0]), [entry.sources[0][0]]) if entry.sources else entry.files
                path = where(parts)
                (origins if entry.parameter else self.buffers)[entry.number] = path
        loads = self._loads(entries, places)
        files = [p.path for p in provenance.parts if p.path not in self._files]
        self._files.update(files)
        if loads or files:
            self.recorder.emit("provenance", {"loads": loads, "files_read": list(dict.fromkeys(files))[:200]})
        return origins

    def _entries(self, roots: list[Any]) -> tuple[list[Entry], dict[int, tuple[int, str]]]:
        import torch

        entries: list[Entry] = []
        places: dict[int, tuple[int, str]] = {}
        tensors: list[Any] = []
        for root in roots:
            if next(root.parameters(), None) is None:
                continue
            inner, _ = unwrap(root)
            number = self.recorder.roots.of(root)
            places[id(root)] = (number, "")
            for prefix, module in inner.named_modules():
                places.setdefault(id(module), (number, prefix))
            own = [(n, t, True) for n, t in inner.named_parameters()]
            own += [(n, t, False) for n, t in inner.named_buffers() if t.is_floating_point()]
            for name, tensor, parameter in own:
                if (number, name) not in self._settled:
                    self._settled.add((number, name))
                    entries.append(Entry(number, name, tensor, self.recorder.parameters.of(tensor), parameter))
                    tensors.append(tensor)
        sampler = self.provenance.sampler
        for entry, sample in zip(entries, sampler.take(tensors), strict=True):
            entry.sample = sample
        matrices = [(e, t) for e, t in zip(entries, tensors, strict=True) if e.sample is not None and t.ndim == 2]
        with torch.no_grad():
            flipped = sampler.take([t.detach().t() for _, t in matrices])
        for (entry, _), sample in zip(matrices, flipped, strict=True):
            entry.flipped = sample
        return entries, places

    # -- recognising

    def _recognise(self, entries: list[Entry]) -> None:
        received: dict[int, tuple[Source | None, Call]] = {}
        for call in self.provenance.calls:
            received.update({number: (source, call) for number, source in call.received.items()})
        rest = []
        for entry in entries:
            told = received.get(entry.number)
            if not self._by_value(entry, told[0] if told else None):
                rest.append(entry)
        self._by_word(rest, received)
        self._by_neighbours(entries)

    def _by_value(self, entry: Entry, told: Source | None) -> bool:
        if entry.sample is None or not telling(entry.sample):
            return False
        index = self.provenance.index
        found = index.find(entry.shape, entry.sample)
        if not found and entry.flipped is not None:
            found = index.find(entry.shape[::-1], entry.flipped)
        if not found:
            found = index.resized(entry.shape, entry.sample)
        if told is not None and any(p is told[0] for p, _ in found):
            found = [(p, k) for p, k in found if p is told[0]]
        elif found:
            last = max((p for p, _ in found), key=lambda p: self.provenance.orders[id(p)])
            found = [(p, k) for p, k in found if p is last]
        if told is None:  # what a file was written from holds its values without having been loaded from it
            written = self.provenance.written
            found = [(p, k) for p, k in found if entry.number not in written.get(p.path, ())]
        entry.sources = found
        return bool(found)

    def _by_word(self, rest: list[Entry], received: dict[int, tuple[Source | None, Call]]) -> None:
        """What a load is said to have set, though its values are no longer (or could not be) recognised."""
        differing: dict[int, list[tuple[Entry, Source, Sample, Sample]]] = {}
        for entry in rest:
            if entry.number not in received:
                continue
            source, call = received[entry.number]
            if source is None:
                source = next(
                    ((p, k) for p in call.parts for k in _same_name(p, entry) if p.shapes[k] == entry.shape), None
                )
            theirs = source[0].samples().get(source[1]) if source is not None else None
            if source is None or theirs is None or entry.sample is None or len(theirs) != len(entry.sample):
                entry.files = call.parts
            elif not entry.parameter or close(entry.sample, theirs):  # statistics move with the first forward
                entry.sources = [source]
            elif telling(theirs):
                differing.setdefault(id(call), []).append((entry, source, entry.sample, theirs))
        for items in differing.values():
            anew = unrelated([(mine, theirs) for *_, mine, theirs in items])
            for entry, source, *_ in items:
                if anew:
                    entry.overwritten = True
                else:  # rescaled, averaged, pruned, trained on
                    entry.sources = [source]

    def _by_neighbours(self, entries: list[Entry]) -> None:
        """Constants (biases of 0, norms of 1): they came with the tensors beside them, under the same renaming."""
        renamings: dict[tuple[int, int], Counter[tuple[str, str]]] = {}
        parts = {id(p): p for p in self.provenance.parts}
        beside: set[tuple[int, str, int]] = set()
        for entry in entries:
            for part, key in entry.sources[:1]:
                renamings.setdefault((entry.root, id(part)), Counter())[renaming(entry.plain, key)] += 1
                beside.add((entry.root, entry.name.rpartition(".")[0], id(part)))
        for entry in entries:
            if entry.loaded or entry.overwritten or entry.sample is None:
                continue
            if telling(entry.sample) and entry.parameter:
                continue
            for (root, number), found in renamings.items():
                part = parts[number]
                names = renamed(entry.plain, found) if root == entry.root else ()
                key = next((k for k in names if part.shapes.get(k) == entry.shape), "")
                if not key:
                    continue
                # Statistics have moved with the first forward; their norm's own parameters tell of them.
                moved = not entry.parameter and (root, entry.name.rpartition(".")[0], number) in beside
                if moved or close(entry.sample, part.samples().get(key, ())):
                    entry.sources = [(part, key)]
                    if entry.parameter:
                        beside.add((root, entry.name.rpartition(".")[0], number))
                    break

    # -- what each load amounts to

    def _loads(self, entries: list[Entry], places: dict[int, tuple[int, str]]) -> list[dict[str, Any]]:
        anywhere = self._arrived(entries)
        arrivals = {r: self._arrived([e for e in entries if e.root == r]) for r in {e.root for e in entries}}
        out = []
        told: set[int] = set()
        for call in self.provenance.calls:
            place = places.get(id(call.module()))
            told.update(id(p) for p in call.parts)
            if place is not None and call.parts and id(call) not in self._written:
                self._written.add(id(call))
                out.append(self._load(call.how, call.parts, place, entries, arrivals.get(place[0], anywhere), call))
        for part in self.provenance.parts:
            if id(part) in told or id(part) in self._written:
                continue
            mine = [e for e in entries if e.parameter and e.is_from([part])]
            if mine:
                root = Counter(e.root for e in mine).most_common(1)[0][0]
                place = root, _common([e.name for e in mine if e.root == root])
                self._written.add(id(part))
                out.append(self._load("copy", [part], place, entries, arrivals[root], None))
        for part in self.provenance.parts:
            if id(part) not in told | self._written and not any(anywhere.get(id(p)) for p in self._of_file(part)):
                lost = self._lost(part, entries, places, anywhere)
                if lost is not None:
                    self._written.add(id(part))
                    out.append(lost)
        return out

    def _of_file(self, part: Part) -> list[Part]:
        return [p for p in self.provenance.parts if p.path == part.path]

    def _arrived(self, entries: list[Entry]) -> dict[int, set[str]]:
        """Keys of each part that are in a module, or were put into one, also one that is gone."""
        out: dict[int, set[str]] = {}
        for entry in entries:
            for part, key in entry.sources:
                out.setdefault(id(part), set()).add(key)
        for call in self.provenance.calls:
            for source in call.received.values():
                if source is not None:
                    out.setdefault(id(source[0]), set()).add(source[1])
            if call.how == "from_pretrained" and None in call.received.values():
                for part in call.parts:
                    out.setdefault(id(part), set()).update(k for k in part.shapes if not named(k, call.unexpected))
        for part in self.provenance.parts:  # a tensor that is stored under two names
            keys = out.get(id(part))
            if keys:
                samples = part.samples()
                values = {(part.shapes[k], samples[k]) for k in keys if k in samples and telling(samples[k])}
                keys.update(k for k, s in samples.items() if (part.shapes[k], s) in values)
        return out

    def _lost(
        self, part: Part, entries: list[Entry], places: dict[int, tuple[int, str]], arrived: dict[int, set[str]]
    ) -> dict[str, Any] | None:
        """A file of weights that was read and is in no module, if it was meant for one of them."""
        if len(part.shapes) < 2 or 2 * sum("." in k for k in part.shapes) < len(part.shapes):
            return None
        total = sum(math.prod(s) for s in part.shapes.values())
        fitting: dict[int, int] = {}
        for root in sorted({e.root for e in entries}):
            fresh = Counter(e.shape for e in entries if e.root == root and not e.loaded)
            pairs = {s: min(n, fresh[s]) for s, n in Counter(part.shapes.values()).items()}
            weights = sum(math.prod(s) * n for s, n in pairs.items())
            if weights and (weights >= _MEANT * total or sum(pairs.values()) >= _MEANT * len(part.shapes)):
                fitting[root] = weights
        since = self.provenance.orders[id(part)]
        for call in self.provenance.calls:  # one that was given its own values back, after the file was read
            place = places.get(id(call.module()))
            if not call.parts and call.order > since and place is not None and place[0] in fitting:
                # Values that are no file's may be made of this one's: an average, a dequantised copy.
                return self._load("filtered", [part], place, entries, arrived, call) if call.echo else None
        if not fitting or part.path in self.provenance.written:
            return None
        root = max(fitting, key=lambda r: (fitting[r], -r))
        return self._load("read", [part], (root, ""), entries, arrived, None)

    def _load(
        self,
        how: str,
        parts: list[Part],
        place: tuple[int, str],
        entries: list[Entry],
        arrived: dict[int, set[str]],
        call: Call | None,
    ) -> dict[str, Any]:
        root, module = place
        target = call.module() if call is not None else None
        wrapper = "".join(f"{WRAPPERS[w]}." for w in unwrap(target)[1]) if target is not None else ""
        inside = [e for e in entries if e.root == root and e.parameter and _within(e.name, module)]
        matched = [e for e in inside if e.is_from(parts)]
        fresh = [e for e in inside if not e.loaded]
        held = {k: (p, s) for p in parts for k, s in p.shapes.items()}
        constants = {(e.shape, e.sample) for e in entries if e.sample is not None and not telling(e.sample)}
        left = [
            (k, s)
            for k, (p, s) in held.items()
            # A constant that a tensor of its shape also holds cannot be said to be missing.
            if k not in arrived.get(id(p), ()) and not (matched and (s, p.samples().get(k)) in constants)
        ]
        at_rest = dict(left)
        renamings = Counter(renaming(wrapper + _below(e.plain, module), k) for e in matched for p, k in e.sources[:1])
        renamings[("", "")] += 1
        mismatched, passed = [], []
        for entry in fresh:
            name = wrapper + _below(entry.plain, module)
            key = next((k for k in renamed(name, renamings) if k in at_rest or (entry.overwritten and k in held)), None)
            if key is None:
                continue
            if held[key][1] == entry.shape:
                passed.append(entry.name)
            else:
                mismatched.append(
                    {"name": entry.name, "shape": entry.shape, "file_name": key, "file_shape": held[key][1]}
                )
        overwritten = [e for e in fresh if e.overwritten]
        return {
            "path": where(parts),
            "part": parts[0].name if len(parts) == 1 else "",
            "how": how,
            "at": (call.at if call is not None else None) or parts[0].at,
            "root": root,
            "module": module,
            "wrapper": wrapper,
            "class_name": call.class_name if call is not None else "",
            "strict": call.strict if call is not None else None,
            "resumed": any(self.provenance.is_resumed(p.path) for p in parts),
            "file_tensors": len(held),
            "file_weights": sum(math.prod(s) for _, s in held.values()),
            "arrived_tensors": len(held) - len(left),
            "arrived_weights": sum(math.prod(s) for _, s in held.values()) - sum(math.prod(s) for _, s in left),
            "model_tensors": len(inside),
            "model_weights": sum(e.numel for e in inside),
            "matched_tensors": len(matched),
            "matched_weights": sum(e.numel for e in matched),
            "fresh_tensors": len(fresh),
            "fresh_weights": sum(e.numel for e in fresh),
            "fresh": [{"name": e.name, "shape": e.shape} for e in fresh[:LISTED]],
            "left": [{"name": k, "shape": s} for k, s in left[:LISTED]],
            "left_tensors": len(left),
            "left_weights": sum(math.prod(s) for _, s in left),
            "mismatched": mismatched[:LISTED],
            "passed_over": passed[:LISTED],
            "overwritten_tensors": len(overwritten),
            "overwritten_weights": sum(e.numel for e in overwritten),
        }


def where(parts: list[Part]) -> str:
    """The file, or the folder of several."""
    paths = list(dict.fromkeys(p.path for p in parts))
    return paths[0] if len(paths) == 1 else os.path.commonpath(paths)


def renaming(name: str, key: str) -> tuple[str, str]:
    """What stands before the components that both names end in: ``("backbone.", "")``."""
    mine, theirs = name.split("."), key.split(".")
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    return tuple("".join(f"{c}." for c in parts[: len(parts) - shared]) for parts in (mine, theirs))  # type: ignore[return-value]


def renamed(name: str, renamings: Counter[tuple[str, str]]) -> Iterable[str]:
    """Names in the file that a name in the module would have, the most usual renaming first."""
    for (mine, theirs), _ in renamings.most_common(200):
        if name.startswith(mine):
            yield theirs + name[len(mine) :]


def _same_name(part: Part, entry: Entry) -> Iterable[str]:
    pieces = entry.plain.split(".")
    for i in range(len(pieces)):
        key = ".".join(pieces[i:])
        if key in part.shapes:
            yield key
    yield from (k for k in part.shapes if k.endswith(f".{entry.plain}"))


def named(key: str, names: set[str]) -> bool:
    """Whether a library that may drop or add the name of the base model in front means this key."""
    pieces = key.split(".")
    if any(".".join(pieces[i:]) in names for i in range(len(pieces))):
        return True
    return any(n.endswith(f".{key}") for n in names)


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _below(plain: str, module: str) -> str:
    """A name as the module inside the root has it."""
    prefix = "".join(f"{c}." for c in module.split(".") if c and c not in _WRAPPING)
    return plain.removeprefix(prefix)


def _common(names: list[str]) -> str:
    """The innermost module that all names lie in."""
    shared = names[0].split(".")[:-1]
    for name in names[1:]:
        other = name.split(".")
        while shared != other[: len(shared)]:
            shared.pop()
    return ".".join(shared)


def unrelated(pairs: list[tuple[Sample, Sample]]) -> bool:
    """Whether values have nothing to do with the file's: their deviations from each tensor's mean do not correlate.

    Half of an average of two files, or what pruning and noise leave, still correlates by 0.7 and more.
    """
    cross = mine = theirs = 0.0
    count = 0
    for a, b in pairs:
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        scale = sum((y - mean_b) ** 2 for y in b) or 1.0
        cross += sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / scale
        mine += sum((x - mean_a) ** 2 for x in a) / scale
        theirs += sum((y - mean_b) ** 2 for y in b) / scale
        count += len(a)
    if count < _VALUES or not theirs or not mine:
        return False
    return abs(cross) / math.sqrt(mine * theirs) < min(0.5, max(_UNRELATED, 3 / math.sqrt(count)))
