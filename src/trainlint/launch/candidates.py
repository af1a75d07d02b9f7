"""Route 5: the programs of a repository that could read a config, ranked."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainlint.launch import hydra_app, repository, shell
from trainlint.launch.model import CONFIG
from trainlint.launch.pyproject import load_toml
from trainlint.launch.repository import Script
from trainlint.launch.shape import (
    AXOLOTL,
    HYDRA,
    LIGHTNING_CLI,
    LLAMA_FACTORY,
    TRANSFORMERS,
    Shape,
)

#: How overrides reach a program.
BY_COPY = "copy"
BY_HYDRA = "hydra"
BY_LIGHTNING = "lightning"

_TRAIN = re.compile(r"train|finetun|fine_tun|fine-tun|fit|sft|dpo|grpo")


@dataclass(frozen=True)
class Candidate:
    """A command that would read the config. ``rank``: 0 proven by name, 1 by the config's shape, 2 possible."""

    rank: int
    why: str
    template: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    overrides_by: str = BY_COPY
    script: Path | None = None


def candidates(config: Path, shape: Shape, root: Path, cwd: Path, python: str) -> list[Candidate]:
    """All programs of the repository that could read ``config``, best first."""
    found = list(_from_shell(config, root, cwd, python))
    consoles = console_scripts(root)
    for script in repository.scripts(root):
        words, env = script_words(script, root, cwd, python, consoles)
        if not words:
            continue
        for candidate in _from_script(script, config, shape, cwd):
            found.append(replace(candidate, template=(*words, *candidate.template), env=env, script=script.file))
    found.extend(_from_tools(shape, cwd, python))
    unique: dict[tuple[str, ...], Candidate] = {}
    for candidate in sorted(found, key=lambda c: c.rank):
        unique.setdefault(candidate.template, candidate)
    return list(unique.values())


def best(found: Sequence[Candidate], config: Path, root: Path) -> list[Candidate]:
    """The candidates that remain when weaker ones give way; exactly one when the choice is clear."""
    if not found:
        return []
    training = [c for c in found if not shell.NOT_TRAINING.search(_name(c))]
    top = min(c.rank for c in training or found)
    left = [c for c in training or found if c.rank == top]
    if len(left) > 1:
        named = [c for c in left if _TRAIN.search(_name(c))]
        if len(named) == 1:
            return named
        # `recipes/zephyr/sft/config_full.yaml` beside `scripts/sft.py` and `scripts/dpo.py`.
        words = _path_words(config, root)
        namesakes = [c for c in left if c.script is not None and c.script.stem.lower() in words]
        if len(namesakes) == 1:
            return namesakes
        if top == 0:
            # Several shell scripts name the config: the program itself may still be the only one.
            lower = [c for c in training if c.rank == 1]
            if len(lower) == 1:
                return lower
    return left


def _path_words(config: Path, root: Path) -> set[str]:
    """Folder names and the words of the file's name, below the repository's root."""
    inside = config.relative_to(root) if config.is_relative_to(root) else Path(config.name)
    stem = inside.stem.lower()
    return {part.lower() for part in inside.parent.parts} | {stem, *re.split(r"[._\-]+", stem)}


def _name(candidate: Candidate) -> str:
    return candidate.script.stem if candidate.script is not None else " ".join(candidate.template[1:])


# ------------------------------------------------------------------------------------------------ from scripts


def _from_script(script: Script, config: Path, shape: Shape, cwd: Path) -> Iterator[Candidate]:
    """Candidates whose template holds the arguments only."""
    name = script.file.name
    words: tuple[str, ...]
    if script.kind == repository.HYDRA_MAIN:
        placed = hydra_app.arguments_for(script, config, shape)
        if placed is not None:
            yield Candidate(0, placed[1], placed[0], cwd, overrides_by=BY_HYDRA)
        elif HYDRA in shape.kinds and config.suffix in hydra_app.SUFFIXES:
            words = (f"--config-path={config.parent}", f"--config-name={config.stem}")
            yield Candidate(
                1, f"the config is a Hydra config and {name} is a Hydra app", words, cwd, overrides_by=BY_HYDRA
            )
        return
    if script.kind == repository.LIGHTNING:
        if LIGHTNING_CLI not in shape.kinds and not isinstance(shape.tree.get("trainer"), dict):
            if not any(isinstance(shape.tree.get(s), dict) for s in ("fit", "validate")):
                return
        words = ("--config", CONFIG)
        if script.subcommand:
            # A config with a section per subcommand goes before the subcommand.
            words = (*words, "fit") if isinstance(shape.tree.get("fit"), dict) else ("fit", *words)
        rank = 1 if LIGHTNING_CLI in shape.kinds else 2
        yield Candidate(
            rank,
            f"the config is for Lightning's CLI and {name} calls LightningCLI",
            words,
            cwd,
            overrides_by=BY_LIGHTNING,
        )
        return
    if script.kind in (repository.TRL, repository.HF_FILE):
        # LLaMA-Factory itself parses with HfArgumentParser; neither config has the names of TRL's options.
        if AXOLOTL in shape.kinds or (LLAMA_FACTORY in shape.kinds and script.kind == repository.TRL):
            return
        if script.suffixes and config.suffix.lower() not in script.suffixes:
            return
        words = (script.flag, CONFIG) if script.flag else (CONFIG,)
        parser = "TrlParser" if script.kind == repository.TRL else "HfArgumentParser"
        rank = 1 if TRANSFORMERS in shape.kinds else 2
        yield Candidate(rank, f"{name} reads its arguments from a config with {parser}", words, cwd)
        return
    if shape.kinds & {LIGHTNING_CLI, AXOLOTL, LLAMA_FACTORY}:
        return
    words = (script.flag, CONFIG) if script.flag else (CONFIG,)
    how = f"takes a config with {script.flag}" if script.flag else "takes a config as its argument"
    yield Candidate(2, f"{name} {how}", words, cwd)


def script_words(
    script: Script, root: Path, cwd: Path, python: str, consoles: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """How a script is started from ``cwd``: by path, as a module, or by its console script; empty when it is not."""
    top, module = module_name(script.file)
    if script.runnable and not (script.relative_imports and "." in module):
        return (python, os.path.relpath(script.file, cwd)), {}
    env = {} if top == cwd else {"PYTHONPATH": str(top)}
    if script.runnable:
        return (python, "-m", module), env
    for name, target in consoles.items():
        target_module, _, function = target.partition(":")
        if target_module == module and function == script.function:
            installed = shutil.which(name, path=os.path.dirname(python) + os.pathsep + os.environ.get("PATH", ""))
            if installed:
                return (installed,), {}
            return (python, "-c", f"from {module} import {function}; {function}()"), env
    return (), {}


def module_name(file: Path) -> tuple[Path, str]:
    """The folder to import from and the dotted name of a file: up to the highest folder with ``__init__.py``."""
    parts = [file.stem] if file.stem not in ("__init__", "__main__") else []
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        parts.append(folder.name)
        folder = folder.parent
    return folder, ".".join(reversed(parts)) or file.stem


def console_scripts(root: Path) -> dict[str, str]:
    """Console scripts that the repository's pyproject.toml declares: name -> ``module:function``."""
    try:
        data = load_toml((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, str] = {}
    project, tool = data.get("project"), data.get("tool")
    poetry = tool.get("poetry") if isinstance(tool, dict) else None
    for holder in (project, poetry):
        declared = holder.get("scripts") if isinstance(holder, dict) else None
        if isinstance(declared, dict):
            found.update({k: v for k, v in declared.items() if isinstance(v, str)})
    return found


# ------------------------------------------------------------------------------------------------ from elsewhere


def _from_shell(config: Path, root: Path, cwd: Path, python: str) -> Iterator[Candidate]:
    for command in shell.commands_naming(config, root, cwd):
        words = list(command.words)
        words[command.at] = command.before + CONFIG
        if re.match(r"^python[\d.]*$", os.path.basename(words[0])):
            words[0] = python
        where = f"{os.path.relpath(command.file, cwd)}:{command.line}"
        yield Candidate(0, f"{where} starts it with this config", tuple(words), command.cwd, dict(command.env))


def _from_tools(shape: Shape, cwd: Path, python: str) -> Iterator[Candidate]:
    for kind, name in ((AXOLOTL, "axolotl"), (LLAMA_FACTORY, "llamafactory-cli")):
        if kind in shape.kinds:
            installed = shutil.which(name, path=os.path.dirname(python) + os.pathsep + os.environ.get("PATH", ""))
            if installed:
                yield Candidate(1, f"the config is for {kind}", (installed, "train", CONFIG), cwd)
