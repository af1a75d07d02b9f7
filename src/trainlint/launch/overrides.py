"""``key=value`` of the command line, applied to a copy of the config.

YAML is changed on its node tree, never loaded and dumped: plain scalars stay as they were written (``1e-4`` stays what
PyYAML or OmegaConf makes of it), custom tags, merges, duplicate keys and interpolations survive.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainlint.launch.model import LaunchError
from trainlint.launch.pyproject import load_toml
from trainlint.launch.secrets import MASK, is_secret_name

YAML_SUFFIXES = (".yaml", ".yml")
_KEY = re.compile(r"^(\+\+|\+|~)?([^=\s]+?)(?:=(.*))?$", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One override. ``action``: ``set``, ``add`` (``+key``), ``force`` (``++key``), ``delete`` (``~key``)."""

    action: str
    path: str
    value: str
    raw: str

    @property
    def shown(self) -> str:
        """For messages: a secret's value is masked."""
        return self.raw if not is_secret_name(self.path) else f"{self.raw.partition('=')[0]}={MASK}"


def parse_override(text: str) -> Override:
    """Split ``key=value``, ``+key=value``, ``++key=value`` or ``~key``.

    Raises:
        LaunchError: it is none of these.
    """
    match = _KEY.match(text.removeprefix("--") if text.startswith("--") else text)
    if match is None or (match[3] is None and match[1] != "~"):
        raise LaunchError(
            f"{text.partition('=')[0]!r} is not an override.", "Write overrides as key=value, e.g. training.lr=1.0e-4."
        )
    action = {"+": "add", "++": "force", "~": "delete", None: "set"}[match[1]]
    return Override(action, match[2], match[3] if match[3] is not None else "", text)


def split_path(path: str) -> list[str]:
    """``a.b[0].c`` as ``["a", "b", "0", "c"]``."""
    return [part for part in re.sub(r"\[([^\]]*)\]", r".\1", path).split(".") if part != ""]


def resolved_copy(config: Path, overrides: Sequence[str]) -> str:
    """The text of ``config`` with the overrides applied, in its own format.

    Raises:
        LaunchError: the format cannot be changed, or a key lies inside a value that is no section.
    """
    parsed = [parse_override(text) for text in overrides]
    try:
        text = config.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LaunchError(f"{config} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise LaunchError(f"{config} is not UTF-8 text.", "Save it as UTF-8.") from None
    suffix = config.suffix.lower()
    if suffix in YAML_SUFFIXES:
        return _yaml(text, parsed, config)
    if suffix == ".json":
        return _plain(text, parsed, config, json.loads, lambda tree: json.dumps(tree, indent=2) + "\n")
    if suffix == ".toml":
        return _plain(text, parsed, config, load_toml, toml_text)
    raise LaunchError(
        f"Overrides cannot be applied to {config.name}: only YAML, JSON and TOML configs can be copied and changed.",
        f"Put them into the program's own command instead, behind --. Not applied: {_list(parsed)}",
    )


def _list(parsed: Sequence[Override]) -> str:
    return " ".join(item.shown for item in parsed)


# ------------------------------------------------------------------------------------------------ YAML


def _yaml(text: str, parsed: Sequence[Override], config: Path) -> str:
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise LaunchError(f"{config}{line}: not valid YAML: {problem}.") from None
    root = documents[0] if documents else None
    if root is None:
        root = _empty_mapping()
    if not isinstance(root, yaml.MappingNode):
        raise LaunchError(f"{config} holds no keys, so no override can be applied to it.")
    for item in parsed:
        _change_node(root, item, config)
    # `width`: long scalars must not be folded; some readers of YAML are simpler than YAML.
    result = yaml.serialize_all([root, *documents[1:]], Dumper=yaml.SafeDumper, width=10**9, allow_unicode=True)
    return str(result)


def _empty_mapping() -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", [], flow_style=False)


def _value_node(value: str) -> yaml.Node:
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return yaml.ScalarNode("tag:yaml.org,2002:str", value, style='"')
    return node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", "null")


def _find(node: yaml.MappingNode, key: str) -> int | None:
    """Index of the last pair with this key: the one that wins."""
    found = None
    for i, (name, _) in enumerate(node.value):
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            found = i
    return found


def _inherited(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    """The value that ``<<`` merges bring for a key, when the section does not set it itself."""
    for name, value in node.value:
        if isinstance(name, yaml.ScalarNode) and name.tag == "tag:yaml.org,2002:merge":
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(source, yaml.MappingNode):
                    i = _find(source, key)
                    found = source.value[i][1] if i is not None else _inherited(source, key)
                    if found is not None:
                        return found
    return None


def _own(node: yaml.Node) -> yaml.Node:
    """A copy of a section that an alias shares with others: changing one place must not change them all."""
    if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)):
        return type(node)(node.tag, list(node.value), flow_style=node.flow_style)
    return node


def _change_node(root: yaml.MappingNode, item: Override, config: Path) -> None:
    parts = split_path(item.path)
    if not parts:
        raise LaunchError(f"The override {item.shown!r} names no key.")
    if _find(root, item.path) is not None:  # a flat key that has dots in its name
        parts = [item.path]
    node: yaml.Node = root
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, yaml.MappingNode):
            index = _find(node, part)
            if last:
                if item.action == "delete":
                    node.value = [pair for pair in node.value if getattr(pair[0], "value", None) != part]
                elif index is None:
                    node.value.append((_key_node(part), _value_node(item.value)))
                else:
                    node.value[index] = (node.value[index][0], _value_node(item.value))
                return
            child = node.value[index][1] if index is not None else _inherited(node, part)
            if child is None or (isinstance(child, yaml.ScalarNode) and child.tag.endswith(":null")):
                child = _empty_mapping()
            child = _own(child)
            if index is None:
                node.value.append((_key_node(part), child))
            else:
                node.value[index] = (node.value[index][0], child)
            node = child
        elif isinstance(node, yaml.SequenceNode):
            position = _position(part, len(node.value), item, config, parts[:depth])
            if last:
                if item.action == "delete":
                    del node.value[position]
                else:
                    node.value[position] = _value_node(item.value)
                return
            child = _own(node.value[position])
            node.value[position] = child
            node = child
        else:
            raise _no_section(item, config, parts[:depth])


def _key_node(name: str) -> yaml.Node:
    node = yaml.compose(name, Loader=yaml.SafeLoader) if re.fullmatch(r"[\w-]+", name) else None
    return node if isinstance(node, yaml.ScalarNode) else yaml.ScalarNode("tag:yaml.org,2002:str", name)


def _position(part: str, length: int, item: Override, config: Path, above: Sequence[str]) -> int:
    if not re.fullmatch(r"-?\d+", part) or not -length <= int(part) < length:
        raise LaunchError(
            f"The override {item.shown!r} cannot be applied: {'.'.join(above)} in {config.name} is a list of {length}, "
            f"so {part!r} must be an index from 0 to {length - 1}."
        )
    return int(part)


def _no_section(item: Override, config: Path, above: Sequence[str]) -> LaunchError:
    return LaunchError(
        f"The override {item.shown!r} cannot be applied: {'.'.join(above)} in {config.name} is a value, not a section."
    )


# ------------------------------------------------------------------------------------------------ JSON and TOML


def _plain(
    text: str, parsed: Sequence[Override], config: Path, load: Callable[[str], Any], dump: Callable[[Any], str]
) -> str:
    try:
        tree = load(text)
    except ValueError as error:
        raise LaunchError(f"{config} cannot be parsed: {error}.") from None
    if not isinstance(tree, dict):
        raise LaunchError(f"{config} holds no keys, so no override can be applied to it.")
    for item in parsed:
        _change_tree(tree, item, config)
    return dump(tree)


def _scalar(value: str) -> Any:
    """An override's value for a format without YAML's rules: JSON first (so ``1e-4`` is a number), then YAML."""
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return value


def _change_tree(tree: Any, item: Override, config: Path) -> None:
    parts = [item.path] if item.path in tree else split_path(item.path)
    if not parts:
        raise LaunchError(f"The override {item.shown!r} names no key.")
    node = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: Any = part
        if isinstance(node, list):
            key = _position(part, len(node), item, config, parts[:depth])
        elif not isinstance(node, dict):
            raise _no_section(item, config, parts[:depth])
        if last and item.action == "delete":
            if isinstance(node, list) or key in node:
                del node[key]
        elif last:
            node[key] = _scalar(item.value)
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


def toml_text(tree: dict[str, Any]) -> str:
    """A TOML document: scalars and lists of a table first, then its tables, so that each stands under its header."""
    return "\n".join(_table(tree, ())) + "\n"


def _table(tree: dict[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    tables = {k: v for k, v in tree.items() if isinstance(v, dict)}
    arrays = {k: v for k, v in tree.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)}
    for key, value in tree.items():
        if key not in tables and key not in arrays and value is not None:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in tables.items():
        path = (*above, _toml_key(key))
        yield f"\n[{'.'.join(path)}]"
        yield from _table(value, path)
    for key, items in arrays.items():
        path = (*above, _toml_key(key))
        for entry in items:
            yield f"\n[[{'.'.join(path)}]]"
            yield from _table(entry, path)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps("" if value is None else str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
