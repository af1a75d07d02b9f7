"""The run card's row on weights: what came from which file, and what starts fresh."""

from __future__ import annotations

from typing import Any

from trainlint.recording.describe import by_module, percent, plural
from trainlint.recording.schema import Parameter, Recording
from trainlint.recording.weight_loads import file_name, in_play, loaded_and_fresh
from trainlint.report.model import CardLine

#: Models told one by one, files of each, and fresh modules named.
_MODELS, _FILES, _NAMES = 3, 3, 4


def weights(recording: Recording) -> tuple[list[CardLine], list[dict[str, Any]]]:
    """One row for each module that is trained or run and that a file had weights for; none when nothing was loaded."""
    provenance = recording.provenance
    if provenance is None or not provenance.loads:
        return [], []
    playing = in_play(recording)
    lines: list[CardLine] = []
    data: list[dict[str, Any]] = []
    for root in recording.roots:
        own = [p for p in recording.parameters if p.root == root.id]
        loads = [load for load in provenance.loads if load.root == root.id]
        if root.id not in playing or not own or not (loads or any(p.origin != "fresh" for p in own)):
            continue
        total = sum(p.numel for p in own)
        _, fresh = loaded_and_fresh(own)
        files: dict[str, list[Parameter]] = {load.path: [] for load in loads if not load.matched_tensors}
        for p in own:
            if p.origin != "fresh":
                files.setdefault(p.origin, []).append(p)
        resumed = {load.path for load in loads if load.resumed}
        parts = [
            f"{len(found)} of {plural(len(own), 'tensor')} ({percent(sum(p.numel for p in found), total)} of weights) "
            f"from {file_name(path)}{' (resumed)' if path in resumed else ''}"
            for path, found in sorted(files.items(), key=lambda f: (-sum(p.numel for p in f[1]), f[0]))
        ]
        if len(parts) > _FILES:
            parts = [*parts[:_FILES], f"{len(parts) - _FILES} more files"]
        if fresh:
            names = [g.pattern for g in by_module(fresh, own)]
            shown = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
            parts.append(f"{len(fresh)} fresh: {shown}")
        model = f"{root.class_name}: " if len(playing) > 1 else ""
        lines.append(CardLine("weights", model + ", ".join(parts)))
        data.append(
            {
                "class": root.class_name,
                "tensors": len(own),
                "weights": total,
                "files": {
                    file_name(path): {"tensors": len(f), "weights": sum(p.numel for p in f)}
                    for path, f in files.items()
                },
                "fresh_tensors": len(fresh),
                "fresh_weights": sum(p.numel for p in fresh),
                "resumed": bool(resumed),
            }
        )
    ranked = sorted(range(len(lines)), key=lambda i: (-data[i]["weights"], i))
    shown_lines = [lines[i] for i in ranked[:_MODELS]]
    if len(ranked) > _MODELS:
        shown_lines.append(CardLine("", f"and weights of {len(ranked) - _MODELS} more modules"))
    return shown_lines, [data[i] for i in ranked]
