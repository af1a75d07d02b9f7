"""Follows the config that Hydra composes, through ``@hydra.main`` and ``hydra.compose``."""

from __future__ import annotations

import functools
import os
import sys
from types import FrameType, ModuleType
from typing import Any

from .config_omega import Omega, is_container, library, plain_section
from .config_paths import join
from .config_section import plain, section_of
from .config_tracker import Tracker
from .patching import wrap


def install_hydra_main(omega: Omega, module: ModuleType) -> None:
    """``hydra.core.utils.run_job``: the config that a ``@hydra.main`` function gets."""
    library(module)

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def run_job(*args: Any, **kwargs: Any) -> Any:
            task = kwargs.get("task_function", args[0] if args else None)
            config = kwargs.get("config", args[1] if len(args) > 1 else None)
            if callable(task):
                facts = _composition(config)

                @functools.wraps(task)
                def watched(cfg: Any, *rest: Any, **more: Any) -> Any:
                    omega.recorder.quiet(omega.adopt)(cfg, kind="hydra", by="hydra.main", **facts)
                    return task(cfg, *rest, **more)

                if "task_function" in kwargs:
                    kwargs["task_function"] = watched
                else:
                    args = (watched, *args[1:])
            return original(*args, **kwargs)

        return run_job

    wrap(module, "run_job", make)


def install_hydra_compose(omega: Omega, module: ModuleType) -> None:
    """``hydra.compose``: the composition API."""
    library(module)

    def make(original: Any) -> Any:
        def compose(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            overrides = args[1] if len(args) > 1 else kwargs.get("overrides")
            facts = dict(omega.hydra_info) or {"overridden": _overridden(overrides or ())}
            omega.recorder.quiet(omega.adopt)(made, kind="hydra", by="hydra.compose", **facts)
            return made

        return compose

    wrap(module, "compose", make)


def install_hydra_internal(omega: Omega, module: ModuleType) -> None:
    """``Hydra.compose_config`` knows the files; ``hydra.compose`` drops that."""
    library(module)

    def make(original: Any) -> Any:
        def compose_config(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            omega.hydra_info = _composition(made)
            return made

        return compose_config

    wrap(module.Hydra, "compose_config", make)


def install_hydra_instantiate(omega: Omega, module: ModuleType) -> None:
    """``hydra.utils.instantiate``: what a ``_target_`` gets as arguments is used."""
    library(module)

    def make(original: Any) -> Any:
        def instantiate(*args: Any, **kwargs: Any) -> Any:
            config = args[0] if args else kwargs.get("config")
            frame = sys._getframe(1)
            info = section_of(config) or (omega.where(config) if omega.roots and is_container(config) else None)
            if info is not None and info[0].active:
                content = plain(config) if section_of(config) else omega.raw(config)
                omega.recorder.quiet(_instantiated)(content, info[0], info[1], frame)
                if args:
                    args = (plain_section(args[0]), *args[1:])
            return original(*args, **kwargs)

        return instantiate

    wrap(module, "instantiate", make)


def _instantiated(content: Any, tracker: Tracker, path: str, frame: FrameType) -> None:
    if isinstance(content, dict):
        if "_target_" in content:
            tracker.bulk(path, "hydra.utils.instantiate", frame, how="item")
            return
        for key, value in content.items():
            _instantiated(value, tracker, join(path, key), frame)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _instantiated(value, tracker, f"{path}[{index}]", frame)
    else:
        tracker.note(path, "bulk", frame, "hydra.utils.instantiate")


def _overridden(overrides: Any) -> tuple[str, ...]:
    """Paths set by Hydra overrides; group choices (``model=large``) name sections and do no harm here."""
    found = []
    for text in overrides:
        key = str(text).partition("=")[0].lstrip("+~").partition("@")[0]
        if key and "=" in str(text) and "/" not in key:
            found.append(key)
    return tuple(found)


def _composition(config: Any) -> dict[str, Any]:
    """Files and overrides of a composed config that still has its ``hydra`` node."""
    try:
        hydra = config.hydra
        groups = {str(k).partition("@")[0]: v for k, v in hydra.runtime.choices.items()}
        directories = [
            s.path for s in hydra.runtime.config_sources if s.schema == "file" and os.path.isdir(str(s.path))
        ]
        names = [str(hydra.job.config_name or "")]
        names += [f"{group}/{choice}" for group, choice in groups.items() if choice and not group.startswith("hydra/")]
        files = []
        for name in names:
            name = name.removesuffix(".yaml")
            for directory in directories:
                path = os.path.join(directory, name + ".yaml")
                if os.path.isfile(path):
                    files.append(path)
                    break
        overridden = [k for k in _overridden(hydra.overrides.task) if k not in groups]
        return {"files": tuple(files), "overridden": tuple(overridden)}
    except Exception:
        return {}
