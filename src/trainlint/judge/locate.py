"""Where a finding points, as file and line, and the fingerprint by which it is known again."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from trainlint.contract import Finding, Key, ParameterName, SourceLine
from trainlint.recording.schema import ConfigFacts, ConfigKey, Recording
from trainlint.report.model import Location


class Locator:
    """Turns what a check points at into a file and a line.

    Files below ``cwd`` are named relative to it, so that a report reads the same on every machine.
    """

    def __init__(self, recording: Recording | None, configs: Iterable[ConfigFacts | None], cwd: Path) -> None:
        """``configs``: where keys are looked up, the first that knows the key's line wins."""
        self._recording = recording
        self._configs = [c for c in configs if c is not None]
        self._cwd = os.path.abspath(cwd)

    def locate(self, finding: Finding) -> Location | None:
        at = finding.at
        if isinstance(at, SourceLine):
            return self._line(at, None)
        if isinstance(at, Key):
            return self._key(at.path)
        if isinstance(at, ParameterName):
            return self._parameter(at.name)
        return None

    def file(self, path: str) -> str:
        """``path`` relative to the working directory when it lies below it, with forward slashes."""
        absolute = os.path.normpath(os.path.join(self._cwd, path))
        inside = absolute.startswith(self._cwd.rstrip(os.sep) + os.sep)
        return (os.path.relpath(absolute, self._cwd) if inside else absolute).replace(os.sep, "/")

    def _line(self, at: SourceLine, key: str | None) -> Location:
        return Location(self.file(at.file) if at.file else None, at.line or None, key)

    def _key(self, path: str) -> Location:
        found = [at for config in self._configs if (at := self._in_config(config, path)) is not None]
        return next((at for at in found if at.file is not None), found[0] if found else Location(None, None, path))

    def _in_config(self, config: ConfigFacts, path: str) -> Location | None:
        for key in config.keys:
            if key.path == path:
                return self._config_key(key, path)
        below = [k for k in config.keys if k.path.startswith((f"{path}.", f"{path}["))]
        if below:
            # A section: the first line of it that is known.
            placed = [k for k in below if k.at is not None and k.origin == "file"]
            first = min(placed, key=lambda k: k.at.line if k.at else 0) if placed else below[0]
            return self._config_key(first, path)
        for missing in config.missing:
            if missing.path == path and missing.at is not None:
                return self._line(missing.at, path)
        return None

    def _config_key(self, key: ConfigKey, path: str) -> Location:
        # A key given on the command line is in no file, even when the file has another value for it.
        if key.at is None or key.origin == "override":
            return Location(None, None, path)
        return self._line(key.at, path)

    def _parameter(self, name: str) -> Location | None:
        """Where the optimizer that holds the parameter is built, when only one comes into question."""
        run = self._recording
        if run is None:
            return None
        matching = {
            p.id for p in run.parameters if p.name == name or name in p.tied or fnmatch.fnmatchcase(p.name, name)
        }
        holders = [o for o in run.optimizers if any(not matching.isdisjoint(g.parameters) for g in o.groups)]
        candidates = {o.at for o in (holders or run.optimizers) if o.at is not None}
        return self._line(candidates.pop(), None) if len(candidates) == 1 else None


def fingerprint(code: str, location: Location | None, finding: Finding) -> str:
    """What tells a finding from others, stable while lines move and measured numbers change."""
    subject = [finding.about]
    if isinstance(finding.at, Key):
        subject.append(finding.at.path)
    elif isinstance(finding.at, ParameterName):
        subject.append(finding.at.name)
    elif isinstance(finding.at, SourceLine) and not finding.about:
        subject.append(finding.at.function)
    file = (location.file if location else None) or ""
    return hashlib.sha256("\0".join((code, file, *subject)).encode("utf-8", "replace")).hexdigest()[:16]
