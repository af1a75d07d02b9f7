"""Hydra apps: where a config stands among an app's config groups, and rebuilding the command of a run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainlint.launch.model import LaunchError
from trainlint.launch.repository import HYDRA_MAIN, Script
from trainlint.launch.shape import Shape, parse_config

SUFFIXES = (".yaml", ".yml")


def config_folder(script: Script) -> Path | None:
    """The folder that ``config_path`` of ``@hydra.main`` names, ``None`` when it is not given or not on disk."""
    if script.hydra_path is None or script.hydra_path.startswith("pkg://"):
        return None
    folder = Path(os.path.normpath(script.file.parent / script.hydra_path))
    return folder if folder.is_dir() else None


def primary_config(script: Script) -> Path | None:
    """The file that ``config_name`` names."""
    folder = config_folder(script)
    if folder is None or script.hydra_name is None:
        return None
    name = script.hydra_name
    for candidate in [folder / name] if name.endswith(SUFFIXES) else [folder / (name + s) for s in SUFFIXES]:
        if candidate.is_file():
            return candidate
    return None


def arguments_for(script: Script, config: Path, shape: Shape) -> tuple[tuple[str, ...], str] | None:
    """Arguments that make the app use ``config``, and a sentence why; ``None`` when it does not belong to the app."""
    folder = config_folder(script)
    if folder is None or not config.is_relative_to(folder):
        return None
    inside = config.relative_to(folder).with_suffix("")
    primary = primary_config(script)
    where = f"@hydra.main in {script.file.name}"
    if primary is not None and config.samefile(primary):
        return (), f"{config.name} is the primary config of {where}"
    if len(inside.parts) == 1:
        return (f"--config-name={inside.name}",), f"{config.name} lies in the config folder of {where}"
    group, option = "/".join(inside.parts[:-1]), inside.name
    if script.hydra_name and "/" in script.hydra_name and Path(script.hydra_name).parent.as_posix() == group:
        return (f"--config-name={inside.as_posix()}",), f"{config.name} lies in the config folder of {where}"
    chosen = default_groups(parse_config(primary)) if primary is not None else {}
    why = f"{config.name} is an option of the config group {group!r} of {where}"
    if group in chosen:
        return (() if chosen[group] == option else (f"{group}={option}",)), why
    # A file that only makes sense on its own (it composes the groups itself) is a primary config in a subfolder.
    composes = "defaults" in shape.tree and (not chosen or "_self_" in _plain(shape.tree["defaults"]))
    if composes and shape.package is None:
        if set(default_groups(shape.tree)) & _groups(folder):
            return (f"--config-name={inside.as_posix()}",), f"{config.name} composes the config groups of {where}"
    return (f"+{group}={option}",), why


def _plain(defaults: Any) -> list[Any]:
    return [item for item in defaults if isinstance(item, str)] if isinstance(defaults, list) else []


def _groups(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir() if entry.is_dir()}
    except OSError:
        return set()


def default_groups(tree: Any) -> dict[str, str | None]:
    """Config group -> option that a primary config's defaults list selects."""
    found: dict[str, str | None] = {}
    defaults = tree.get("defaults") if isinstance(tree, Mapping) else None
    for item in defaults if isinstance(defaults, list) else []:
        if not isinstance(item, Mapping):
            continue
        for key, option in item.items():
            words = str(key).split()
            if "override" in words[:-1]:
                continue
            group = words[-1].partition("@")[0].strip("/") if words else ""
            found[group] = option if isinstance(option, str) else None
    return found


# ------------------------------------------------------------------------------------------------ run folders


def run_folder_of(config: Path) -> Path | None:
    """The ``.hydra`` folder, when ``config`` is the ``config.yaml`` in it or the run folder above it."""
    folder = config / ".hydra" if config.is_dir() else config.parent
    if config.is_file() and config.name != "config.yaml":
        return None
    if folder.name == ".hydra" and all((folder / n).is_file() for n in ("config.yaml", "hydra.yaml", "overrides.yaml")):
        return folder
    return None


def rebuild(folder: Path, found: Sequence[Script], root: Path) -> tuple[Script, tuple[str, ...], Path]:
    """The script, arguments and working directory of the run that wrote a ``.hydra`` folder.

    Raises:
        LaunchError: the folder does not say, or the script is not in the repository.
    """
    hydra = parse_config(folder / "hydra.yaml")
    hydra = hydra.get("hydra") if isinstance(hydra, dict) else None
    overrides = parse_config(folder / "overrides.yaml")
    if not isinstance(hydra, dict) or not isinstance(overrides, (list, type(None))):
        raise LaunchError(
            f"{folder} does not say how its run was started.", "Give the command behind --, e.g. -- python train.py …"
        )
    job = _section(hydra, "job")
    runtime = _section(hydra, "runtime")
    name = str(job.get("name", ""))
    cwd = Path(str(runtime.get("cwd", ""))) if runtime.get("cwd") else root
    if not cwd.is_dir():
        cwd = root
    matching = [s for s in found if s.kind == HYDRA_MAIN and s.file.stem == name]
    sources = runtime.get("config_sources")
    listed = [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    mains = [str(source.get("path", "")) for source in listed if source.get("provider") == "main"]
    if len(matching) > 1 and mains:
        narrowed = [s for s in matching if (f := config_folder(s)) is not None and str(f) in mains]
        matching = narrowed or matching
    if not matching:
        raise LaunchError(
            f"{folder.parent} was written by a Hydra app named {name!r}, and {root} has no script of that name with "
            "@hydra.main.",
            f"Give the command behind --, e.g. -- python path/to/{name or 'train'}.py …",
        )
    if len(matching) > 1:
        files = ", ".join(os.path.relpath(s.file, cwd) for s in matching)
        raise LaunchError(
            f"{folder.parent} was written by a Hydra app named {name!r}; several scripts have that name: {files}.",
            "Give the command behind --.",
        )
    script = matching[0]
    arguments: list[str] = []
    config_name = job.get("config_name")
    if isinstance(config_name, str) and config_name != script.hydra_name:
        arguments.append(f"--config-name={config_name}")
    arguments.extend(str(item) for item in overrides or ())
    return script, tuple(arguments), cwd


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}
