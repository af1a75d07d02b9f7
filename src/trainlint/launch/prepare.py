"""From a :class:`Launch` to what is handed to the operating system: generated files, command, environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trainlint.recorder
from trainlint.launch.model import CONFIG, GeneratedFile, Launch, LaunchError, WatchOptions
from trainlint.recorder import settings, trackers

BOOTSTRAP = Path(trainlint.recorder.__file__).parent / "bootstrap"
_HIDES_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class Folder(Protocol):
    """The part of :class:`trainlint.launch.journal.RunFolder` that a watch needs."""

    run_id: str
    path: Path
    started_ns: int


@dataclass(frozen=True)
class Prepared:
    """What ``Popen`` gets."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    configs: tuple[Path, ...]
    notes: tuple[str, ...]
    started: float


def prepare(launch: Launch, options: WatchOptions, folder: Folder) -> Prepared:
    """Write the generated files and put the environment together.

    Raises:
        LaunchError: the working directory is gone, or a file cannot be written.
    """
    if not launch.cwd.is_dir():
        raise LaunchError(f"The program's folder {launch.cwd} does not exist.")
    command = launch.template or launch.command
    configs: list[Path] = []
    for file in launch.files:
        path = _write(file, folder)
        if file.placeholder == CONFIG:
            configs.append(path)
        command = tuple(word.replace(file.placeholder, str(path)) for word in command)
    if launch.config is not None:
        configs.append(launch.config)
    configs.extend(options.configs)
    started = time.time()
    notes = list(launch.notes)
    env = _environment(launch, options, folder, tuple(configs), started)
    if options.device == "cpu":
        notes.append("All GPUs were hidden from the program (--device cpu); code that asks for one by name will fail.")
    return Prepared(command, env, launch.cwd, tuple(configs), tuple(notes), started)


def _environment(
    launch: Launch, options: WatchOptions, folder: Folder, configs: tuple[Path, ...], started: float
) -> dict[str, str]:
    env = dict(os.environ)
    for name, value in launch.env.items():
        before = env.get(name)
        env[name] = value + os.pathsep + before if name.endswith("PATH") and before else value
    if options.device == "cpu":
        # -1 and not empty: torch reads an empty ROCR_VISIBLE_DEVICES as "not set".
        env.update(dict.fromkeys(_HIDES_GPUS, "-1"), CUDA_VISIBLE_DEVICES="")
    env.update(trackers.environment(str(folder.path), env))
    told = settings.Settings(
        run_dir=str(folder.path),
        run_id=folder.run_id,
        supervisor=os.getpid(),
        steps=options.steps,
        backward_cap=options.backward_cap,
        configs=tuple(str(config) for config in configs),
        started=started,
        started_ns=folder.started_ns,
        boundary=options.boundary,
        experiment=options.experiment,
    )
    env.update(told.to_environment())
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(BOOTSTRAP), env.get("PYTHONPATH", "")) if p)
    # Into a pipe Python holds output back, and what a killed program holds back is lost with it.
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


def _write(file: GeneratedFile, folder: Folder) -> Path:
    """Write a generated file beside the user's own, or into the run folder when that place takes none."""
    if file.beside is not None and os.access(file.beside, os.W_OK | os.X_OK):
        stem, dot, suffix = file.name.rpartition(".")
        # Hidden, so that no `*.yaml` of the program's picks it up; the suffix decides how it is parsed.
        path = file.beside / f".{stem if dot else file.name}.trainlint-{folder.run_id}{dot}{suffix if dot else ''}"
        try:
            _note_created(folder, path)
            _write_private(path, file.text)
            return path
        except OSError:
            pass
    path = folder.path / "scratch" / file.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_private(path, file.text)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}.") from None
    return path


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _note_created(folder: Folder, path: Path) -> None:
    """Have the journal remove the file, also when trainlint is killed. The line is on disk before the file is."""
    above = os.stat(path.parent)
    record = {"op": "create", "path": str(path), "kind": "f", "pt": [above.st_atime_ns, above.st_mtime_ns]}
    fd = os.open(folder.path / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, (json.dumps(record) + "\n").encode("ascii"))
        os.fsync(fd)
    finally:
        os.close(fd)
