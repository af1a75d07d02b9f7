"""Why a config key that was not read in the watched steps may still be right: it is not its turn."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainlint.recording.schema import ConfigKey, ConfigRead, NameRead, Recording, SourceLine

_INDEX = re.compile(r"\[\d+\]$")
_INDICES = re.compile(r"(?:\[\d+\])+$")
_QUOTED = re.compile(r'\["((?:[^"\\]|\\.)*)"\]$')
_ENDINGS = re.compile(r"_(?:config|cfg|conf|args|kwargs|params|parameters|settings|options|opts|hparams|arguments)$")


class Unread:
    """The reads of a run's config, asked about keys that nobody read one by one."""

    def __init__(self, run: Recording) -> None:
        config = run.config
        self.keys = config.keys if config is not None else ()
        self.missing = config.missing if config is not None else ()
        self.mentions = {m.name: m for m in (config.mentions if config is not None else None) or ()}
        #: Lines that read some key of the config while watched.
        self.executed = {(r.at.file, r.at.line) for k in self.keys for r in k.reads or () if r.at is not None}
        self.executed |= {(m.at.file, m.at.line) for m in self.missing if m.at is not None}

    def later_reads(self, key: ConfigKey) -> list[SourceLine]:
        """Lines of the program that could read this very key and read nothing in the watched steps."""
        return [read.at for read in self._places(key)]

    def is_switched_off(self, key: ConfigKey) -> bool:
        """Every line that could read the key stands under a condition that was looked at and reads another key."""
        places = list(self._places(key))
        return bool(places) and all(
            any((p.at.file, line) in self.executed for line in p.conditions if line != p.at.line) for p in places
        )

    def _places(self, key: ConfigKey) -> Iterator[NameRead]:
        if _read_alone(key):
            return
        name, section = last_name(key.path), last_name(section_of(key.path))
        mention = self.mentions.get(name)
        for read in (mention.reads if mention is not None else None) or ():
            if (read.at.file, read.at.line) not in self.executed and _same_section(read.section, section):
                yield read

    def is_alternative(self, key: ConfigKey) -> bool:
        """The key's section was not entered, and a section beside it, with a key of the same name, was.

        So it is with settings of another optimizer than the chosen one, or of a phase that has not begun. A read that
        takes both sections at once (a dump of the whole config) enters neither.
        """
        section = section_of(key.path)
        if not section or _read_alone(key):
            return False
        inside = [k for k in self.keys if _within(k.path, section)]
        if any(_read_alone(k) for k in inside):
            return False
        parent, name = parent_of(section), last_name(key.path)
        dumps = {_site(r) for k in inside for r in k.reads or ()}
        elsewhere = {_site(r) for k in self.keys if not _within(k.path, section) for r in k.reads or ()}
        if dumps - elsewhere:
            return False
        for other in self.keys:
            beside = section_of(other.path)
            if beside == section or not beside or parent_of(beside) != parent or last_name(other.path) != name:
                continue
            if any(r.how != "bulk" or _site(r) not in dumps for r in other.reads or ()):
                return True
        looked_for = {section_of(m.path) for m in self.missing if last_name(m.path) == name}
        return any(s and s != section and parent_of(s) == parent for s in looked_for)


def section_of(path: str) -> str:
    """The section that a key stands in: ``a.b`` of ``a.b.c`` and of ``a.b.c[0]``; empty at the top."""
    return _cut(_INDICES.sub("", path))


def parent_of(section: str) -> str:
    """What holds a section: ``a`` of ``a.b`` and of ``a[0]``."""
    return _INDEX.sub("", section) if _INDEX.search(section) else _cut(section)


def _cut(path: str) -> str:
    quoted = _QUOTED.search(path)
    return path[: quoted.start()] if quoted else path.rpartition(".")[0]


def last_name(path: str) -> str:
    """The last name of a path, without list indices and quotes."""
    bare = _INDICES.sub("", path)
    quoted = _QUOTED.search(bare)
    return quoted.group(1) if quoted else bare.rpartition(".")[2]


def _within(path: str, section: str) -> bool:
    return path.startswith(section) and path[len(section) : len(section) + 1] in (".", "[")


def _read_alone(key: ConfigKey) -> bool:
    return any(r.how != "bulk" for r in key.reads or ())


def _site(read: ConfigRead) -> tuple[str, str, int]:
    return (read.by, read.at.file, read.at.line) if read.at is not None else (read.by, "", 0)


def _same_section(named: str, section: str) -> bool:
    """Whether an expression that names ``named`` may mean ``section``: ``self.train_cfg.lr`` and ``train``."""
    if not named:
        return True
    if not section:
        return False
    a, b = (_ENDINGS.sub("", s.strip("_").lower()) for s in (named, section))
    return a == b or (min(len(a), len(b)) >= 3 and (a in b or b in a))
