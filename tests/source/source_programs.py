"""Small programs for the tests of reading source, and what the checks say about them without a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from trainlint.contract import Finding, NotApplicable, NotObserved, Severity, SourceFacts
from trainlint.judge.catalog import load_catalog
from trainlint.recording.schema import SourceTrace
from trainlint.source.facts import read_source
from trainlint.source.project import Project
from trainlint.source.reach import imported_files

#: What nearly every program starts with.
HEAD = """
import torch
from torch import nn, optim
import torch.nn.functional as F

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = optim.SGD(model.parameters(), lr=0.1)
"""


def write(folder: Path, **files: str) -> Path:
    """Write ``name=text`` as ``name.py``; the path of the first."""
    paths = []
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.write_text(dedent(text), encoding="utf-8")
        paths.append(path)
    return paths[0]


def facts(script: Path) -> SourceFacts:
    """Facts from a script and what it imports, as ``check --static -- python script`` gathers them."""
    return read_source(imported_files([str(script)], Project()), scripts=(str(script),))


def trace(folder: Path, text: str) -> SourceTrace:
    """The trace of a script."""
    found = [t for t in facts(write(folder, train=text)).traces or () if t.entry.function == ""]
    assert len(found) == 1
    return found[0]


def static_findings(source: SourceFacts) -> Iterator[tuple[str, str, Finding]]:
    """(code, severity, finding) of every check that judges source alone."""
    for entry in load_catalog():
        for check in entry.detectors:
            if check.facts is not SourceFacts:
                continue
            try:
                for finding in check.detector(source):
                    severity = Severity(finding.severity or check.severity)
                    assert severity.rank >= check.severity.rank
                    assert len(finding.message) < 700 and finding.fix
                    yield entry.code, severity.value, finding
            except (NotObserved, NotApplicable):
                continue


def said(folder: Path, text: str, **others: str) -> list[tuple[str, str, int]]:
    """(code, severity, line) of what is found in a program; ``others`` are further files beside it."""
    write(folder, **others) if others else None
    script = write(folder, train=text)
    return sorted((code, severity, f.at.line) for code, severity, f in static_findings(facts(script)))  # type: ignore[union-attr]
