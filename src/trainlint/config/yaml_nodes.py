"""YAML as plain data plus the line of every key, from PyYAML's node graph: nothing in the file is ever executed.

Values follow YAML 1.1 as PyYAML's ``safe_load`` reads them (``1e-4`` is text, ``no`` is false), because that is what
most programs get. A tag that the safe loader does not know (``!!python/object``, an application's own) becomes an
opaque text leaf.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from trainlint.config.errors import ConfigError
from trainlint.recorder.config_paths import KEY_CAP, element, join

_SAFE_TAGS = frozenset(t for t in yaml.SafeLoader.yaml_constructors if t is not None)
_MERGE = "tag:yaml.org,2002:merge"

#: The C loader is ten times faster and makes the same nodes; PyYAML may have been built without it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """Plain data and the 1-based line of every key and list element, by path.

    Raises:
        ConfigError: not valid YAML, several documents, recursive anchors, or nested too deeply.
    """
    _require_printable(text)
    loader = _Loader(text)
    try:
        if len(text) > 512 * 1024:
            _require_settings(text)
        node = loader.get_single_node()
        return _Walk(loader).run(node) if node is not None else (None, {})
    except yaml.MarkedYAMLError as error:
        raise _marked(error, text) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", "Check the file.") from None
    except RecursionError:
        raise ConfigError("the YAML is nested too deeply to read", "Name the file with the settings.") from None
    finally:
        loader.dispose()


def _require_settings(text: str) -> None:
    """Refuse a large file of many small entries early: building its nodes takes 40 s for 10 MB, counting events 1 s."""
    for count, _ in enumerate(yaml.parse(text, _Loader)):
        if count > 12 * KEY_CAP:
            raise _too_many()


def _too_many() -> ConfigError:
    return ConfigError(
        f"the config has more than {KEY_CAP:,} values",
        "This looks like data, not settings: name the file that the training program reads its settings from.",
    )


def _require_printable(text: str) -> None:
    """YAML forbids control characters; the C parser's own message for them has no line."""
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found is None:
        return
    line = text.count("\n", 0, found.start()) + 1
    raise ConfigError(
        f"line {line} holds the character U+{ord(found.group()):04X}, which YAML does not allow",
        "Remove it; a binary file is not a config.",
        line,
    )


def _marked(error: yaml.MarkedYAMLError, text: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    rows = text.splitlines()
    line = mark.line + 1 if mark is not None else None
    problem = error.problem or error.context or "it cannot be parsed"
    if "expected a single document" in (str(error.context) + problem):
        return ConfigError(
            f"the file holds several YAML documents (a second one starts at line {line})",
            "A config is one document: remove the `---` between them or name one file each.",
            line,
        )
    shown = rows[line - 1] if line is not None and line <= len(rows) else (rows[-1] if rows else "")
    hint = "Check the indentation and the quotes around that line."
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in problem:
        hint = "YAML does not allow tabs for indentation: use blanks."
    elif "mapping values are not allowed" in problem:
        hint = "A value that holds `: ` must be quoted, or the line is indented too far."
    if re.search(r"anchor|alias", problem):
        hint = "Define the anchor (`&name`) above its first use (`*name`)."
    where = f" at line {line}: {shown.strip()[:120]}" if line is not None else ""
    return ConfigError(f"not valid YAML: {problem}{where}", hint, line)


class _Walk:
    """Turns nodes into data. One node gives one object, however many aliases point at it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.lines: dict[str, int] = {}
        self.made: dict[int, Any] = {}
        self.open: set[int] = set()
        self.left = 4 * KEY_CAP

    def run(self, node: yaml.Node) -> tuple[Any, dict[str, int]]:
        return self.value(node, ""), self.lines

    def value(self, node: yaml.Node, path: str) -> Any:
        known = self.made.get(id(node))
        if known is not None:
            self.repeat(node, path)
            return known
        if id(node) in self.open:
            raise ConfigError(
                f"the anchor at line {node.start_mark.line + 1} contains itself",
                "A config cannot hold a section inside itself: remove the alias.",
                node.start_mark.line + 1,
            )
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        try:
            made = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        finally:
            self.open.discard(id(node))
        self.made[id(node)] = made
        return made

    def mark(self, path: str, node: yaml.Node) -> None:
        self.left -= 1
        if self.left < 0:
            raise _too_many()
        self.lines[path] = node.start_mark.line + 1

    def repeat(self, node: yaml.Node, path: str) -> None:
        """An alias of a section: its keys stand where the anchor is."""
        if isinstance(node, yaml.MappingNode):
            for key, value, at in self.pairs(node):
                below = join(path, key)
                self.mark(below, at)
                if isinstance(value, yaml.MappingNode):
                    self.repeat(value, below)

    def pairs(self, node: yaml.MappingNode) -> list[tuple[Any, yaml.Node, yaml.Node]]:
        """Key, value node, key node; merges (``<<``) first, so that the section's own keys win, and the last of two."""
        merged: dict[Any, tuple[Any, yaml.Node, yaml.Node]] = {}
        own: dict[Any, tuple[Any, yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in reversed(sources):
                    if not isinstance(source, yaml.MappingNode):
                        line = key_node.start_mark.line + 1
                        raise ConfigError(
                            f"line {line} merges (`<<`) something that is not a section",
                            "Merge a section: `<<: *name` where `&name` marks a mapping.",
                            line,
                        )
                    if id(source) in self.open and source is not node:
                        self.value(source, "")
                    if source is node:
                        raise ConfigError(
                            f"line {key_node.start_mark.line + 1} merges a section into itself", "Remove the merge."
                        )
                    for item in self.pairs(source):
                        merged[_hashable(item[0])] = item
                continue
            key = self.key(key_node)
            own[_hashable(key)] = (key, value_node, key_node)
        return list({**merged, **own}.values())

    def key(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.key(n) for n in node.value)
        line = node.start_mark.line + 1
        raise ConfigError(
            f"line {line}: a section is used as a key", "Quote the key, or a template such as '{{name}}'.", line
        )

    def mapping(self, node: yaml.MappingNode, path: str) -> Any:
        out: dict[Any, Any] = {}
        for key, value, at in self.pairs(node):
            below = join(path, key)
            self.mark(below, at)
            out[key] = self.value(value, below)
        return out

    def sequence(self, node: yaml.Node, path: str) -> Any:
        out = []
        for index, item in enumerate(node.value):
            below = element(path, index)
            self.mark(below, item)
            out.append(self.value(item, below) if not isinstance(item, tuple) else str(item))
        return out

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SAFE_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            return f"{tag} {node.value}".strip()
        try:
            return self.loader.construct_object(node)
        except (ValueError, TypeError, OverflowError, KeyError, yaml.YAMLError):
            return str(node.value)  # a date such as 2024-13-45: the loader would raise, here it is text


def _hashable(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool, tuple, type(None))) else str(key)
