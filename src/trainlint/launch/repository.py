"""Which programs of a repository read configs, and how: found with the syntax tree, nothing is imported."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILES = 4000
#: A data set of a million folders beside the code must not be walked through.
MAX_FOLDERS = 10_000
MAX_BYTES = 1_000_000
_SKIP = frozenset(
    [
        "node_modules",
        "venv",
        "env",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "build",
        "dist",
        "wandb",
        "mlruns",
        "lightning_logs",
        "outputs",
        "multirun",
        "checkpoints",
        "third_party",
    ]
)
#: One of these must be in the text before a file is worth parsing.
_WORTH = re.compile(rb"hydra|LightningCLI|HfArgumentParser|TrlParser|sys\.argv|add_argument|click\.option|typer\.")
_CONFIG_FLAG = re.compile(r"^--?(?:config|cfg|conf|c|config[-_]?(?:file|path|yaml)|cfg[-_]?(?:file|path))$")
_CONFIG_NAME = re.compile(r"^(?:config|cfg|conf|config_?(?:file|path|yaml)|cfg_?(?:file|path))$")
_TRAINS = re.compile(rb"\b(?:torch|lightning|pytorch_lightning|transformers|accelerate|trl)\b")
_LOADS = re.compile(rb"yaml|OmegaConf|json\.load|tomllib|tomli|toml\.load")

#: Calls at module level that make a file a program.
_STARTS = frozenset(
    {"main", "train", "run", "app", "cli", "fit", "parse_args", "parse_known_args", "parse_args_and_config"}
)

#: How a program takes its config. Kinds, most specific first.
HYDRA_MAIN = "hydra"
LIGHTNING = "lightning"
TRL = "trl"
HF_FILE = "hf-file"
FLAG = "flag"
ARGV = "argv"


@dataclass(frozen=True)
class Script:
    """A program and how it takes its config."""

    file: Path
    kind: str
    #: The flag that takes the config (``--config``), or empty when it is positional.
    flag: str = ""
    #: ``config_path`` and ``config_name`` of ``@hydra.main``; ``None`` when not given or not a literal.
    hydra_path: str | None = None
    hydra_name: str | None = None
    #: Function that starts it (for console scripts).
    function: str = ""
    #: LightningCLI takes a subcommand (``fit``); false with ``run=False``.
    subcommand: bool = True
    #: Suffixes that it reads, empty when it does not care.
    suffixes: tuple[str, ...] = ()
    #: There is ``if __name__ == "__main__"`` or a call at module level, so the file can be run.
    runnable: bool = True
    relative_imports: bool = False


def repository_root(start: Path) -> Path:
    """The nearest folder upwards with ``pyproject.toml`` or ``setup.py``, else with ``.git``, else ``start``."""
    start = start if start.is_dir() else start.parent
    marked: Path | None = None
    for folder in (start, *start.parents):
        if (folder / ".git").exists():
            return folder if marked is None else marked
        if marked is None and any((folder / name).is_file() for name in ("pyproject.toml", "setup.py", "setup.cfg")):
            marked = folder
    if marked is not None:
        return marked
    # No marks: a config folder below the programs (`conf/model/small.yaml`).
    for folder in (start, *start.parents[:3]):
        if folder not in (Path.home(), Path(folder.anchor)) and any(folder.glob("*.py")):
            return folder
    return start


def walk(root: Path, suffixes: tuple[str, ...], names: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files with these suffixes in a fixed order, bounded in number; no environments or caches."""
    count = 0
    for visited, (folder, folders, files) in enumerate(os.walk(root)):
        if visited >= MAX_FOLDERS:
            return
        kept = []
        for name in sorted(folders):
            if name.startswith(".") or name in _SKIP or name.endswith(".egg-info"):
                continue
            if os.path.exists(os.path.join(folder, name, "pyvenv.cfg")):
                continue
            kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if name.endswith(suffixes) or name in names:
                count += 1
                if count > MAX_FILES:
                    return
                yield Path(folder, name)


def scripts(root: Path) -> list[Script]:
    """All programs of the repository that take a config."""
    found: list[Script] = []
    for file in walk(root, (".py",)):
        if file.name.startswith("test_") or file.name in ("conftest.py", "setup.py"):
            continue
        found.extend(script_of(file))
    return found


def script_of(file: Path) -> list[Script]:
    """How one Python file takes a config; empty when it takes none or cannot be parsed."""
    try:
        if file.stat().st_size > MAX_BYTES:
            return []
        data = file.read_bytes()
    except OSError:
        return []
    if not _WORTH.search(data):
        return []
    try:
        tree = ast.parse(data, filename=str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return list(_Reader(file, data, tree).scripts())


class _Reader:
    def __init__(self, file: Path, data: bytes, tree: ast.Module) -> None:
        self.file = file
        self.data = data
        self.tree = tree
        self.imports = self._imports()
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.runnable = self._runnable()
        self.relative = any(isinstance(n, ast.ImportFrom) and n.level > 0 for n in ast.walk(tree))

    def _imports(self) -> dict[str, str]:
        """Local name -> dotted name it stands for."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    names[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return names

    def _name(self, node: ast.expr) -> str:
        """The dotted name of an expression with imports resolved; empty when it is none."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        parts.append(self.imports.get(node.id, node.id))
        return ".".join(reversed(parts))

    def _runnable(self) -> bool:
        """Whether running the file does something: a main guard, a loop, or a call that starts a program."""
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
                continue
            if isinstance(node, (ast.For, ast.While, ast.With)):
                return True
            if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
                return True
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call) and (self._last(inner) in _STARTS or "CLI" in self._last(inner)):
                    return True
                if isinstance(inner, ast.Attribute) and self._name(inner) == "sys.argv":
                    return True
        return False

    def scripts(self) -> Iterator[Script]:
        common = {"file": self.file, "runnable": self.runnable, "relative_imports": self.relative}
        hydra = list(self._hydra())
        for function, path, name in hydra:
            yield Script(kind=HYDRA_MAIN, hydra_path=path, hydra_name=name, function=function, **common)  # type: ignore[arg-type]
        if hydra:
            return
        lightning = self._lightning()
        if lightning is not None:
            function, subcommand = lightning
            yield Script(
                kind=LIGHTNING,
                flag="--config",
                function=function,
                subcommand=subcommand,
                **common,  # type: ignore[arg-type]
            )
            return
        called = {self._last(call) for call in self.calls}
        names = {self._name(call.func).rpartition(".")[2] for call in self.calls}
        if "TrlParser" in names and "parse_args_and_config" in called:
            yield Script(kind=TRL, flag="--config", function=self._owner("parse_args_and_config"), **common)  # type: ignore[arg-type]
            return
        readers = {"parse_yaml_file": (".yaml", ".yml"), "parse_json_file": (".json",)}
        suffixes = tuple(s for name, found in readers.items() if name in called for s in found)
        flag = self._flag()
        if "HfArgumentParser" in names and suffixes:
            if "sys.argv" in {self._name(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}:
                flag = None
            function = self._owner("parse_yaml_file") or self._owner("parse_json_file")
            yield Script(kind=HF_FILE, flag=flag or "", function=function, suffixes=suffixes, **common)  # type: ignore[arg-type]
            return
        trains = _TRAINS.search(self.data) or re.search(r"train|finetune|fine_tune|fit|run|main", self.file.stem)
        if not trains:
            return
        if flag is not None:
            yield Script(kind=FLAG, flag=flag, function=self._owner("parse_args"), **common)  # type: ignore[arg-type]
        elif self._reads_first_argument() and _LOADS.search(self.data):
            yield Script(kind=ARGV, **common)  # type: ignore[arg-type]

    @staticmethod
    def _last(call: ast.Call) -> str:
        return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")

    def _functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node

    def _owner(self, called: str) -> str:
        """Name of the top-level function that calls a method of this name."""
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if any(isinstance(n, ast.Call) and self._last(n) == called for n in ast.walk(node)):
                    return node.name
        return ""

    def _hydra(self) -> Iterator[tuple[str, str | None, str | None]]:
        for function in self._functions():
            for decorator in function.decorator_list:
                call = decorator if isinstance(decorator, ast.Call) else None
                if self._name(call.func if call else decorator) not in ("hydra.main", "hydra.main.main"):
                    continue
                values: dict[str, str | None] = {}
                for name, node in zip(("config_path", "config_name"), call.args if call else ()):
                    values[name] = self._text(node)
                for keyword in call.keywords if call else ():
                    if keyword.arg:
                        values[keyword.arg] = self._text(keyword.value)
                yield function.name, values.get("config_path"), values.get("config_name")

    def _text(self, node: ast.expr) -> str | None:
        """A literal text, also through a module-level constant."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.Name):
            for item in self.tree.body:
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
                    if any(isinstance(t, ast.Name) and t.id == node.id for t in item.targets):
                        return item.value.value if isinstance(item.value.value, str) else None
        return None

    def _lightning(self) -> tuple[str, bool] | None:
        classes = {
            node.name
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef) and any(self._name(b).endswith("LightningCLI") for b in node.bases)
        }
        for call in self.calls:
            name = self._name(call.func)
            if name.rpartition(".")[2] == "LightningCLI" or name in classes:
                run = next((k.value for k in call.keywords if k.arg == "run"), None)
                subcommand = not (isinstance(run, ast.Constant) and run.value is False)
                if any(k.arg == "args" for k in call.keywords):
                    # Arguments are given by the program itself: the command line does not reach it.
                    given = next(k.value for k in call.keywords if k.arg == "args")
                    if not isinstance(given, (ast.Name, ast.Attribute)):
                        continue
                owner = ""
                for node in self.tree.body:
                    if isinstance(node, ast.FunctionDef) and call in list(ast.walk(node)):
                        owner = node.name
                return owner, subcommand
        return None

    def _flag(self) -> str | None:
        """The option of argparse, click or typer that takes a config; empty: a positional; ``None``: none does."""
        positional: str | None = None
        for call in self.calls:
            last = self._last(call)
            if last not in ("add_argument", "option", "argument", "Option"):
                continue
            words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            long = [w for w in words if _CONFIG_FLAG.match(w)]
            if long and last != "argument":
                return max(long, key=len)
            if last in ("add_argument", "argument") and len(words) == 1 and _CONFIG_NAME.match(words[0]):
                positional = ""
        return positional

    def _reads_first_argument(self) -> bool:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Subscript) and self._name(node.value) == "sys.argv":
                if isinstance(node.slice, ast.Constant) and node.slice.value == 1:
                    return True
        return False
