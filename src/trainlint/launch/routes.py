"""How a run is found: from a command, an entry function, pyproject.toml, or what the repository shows."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainlint.launch import candidates as found_in
from trainlint.launch import hydra_app, repository
from trainlint.launch.candidates import BY_COPY, BY_HYDRA, BY_LIGHTNING, Candidate
from trainlint.launch.interpreter import default_python, is_python, resolve_command
from trainlint.launch.model import CONFIG, AmbiguousLaunch, Found, GeneratedFile, Launch, LaunchError, NoLaunch
from trainlint.launch.overrides import parse_override, resolved_copy
from trainlint.launch.pyproject import ToolTable, read_tool_table
from trainlint.launch.secrets import masked_command, secret_values
from trainlint.launch.shape import (
    ACCELERATE,
    AXOLOTL,
    DEEPSPEED,
    LLAMA_FACTORY,
    TORCHTUNE,
    Shape,
    config_shape,
    parse_config,
)

ENTRY_CONFIG = "{entry-config}"
_ENTRY = re.compile(r"^(?P<module>[A-Za-z_][\w.]*|[^:]+\.py):(?P<function>[A-Za-z_][\w.]*)$")
#: Programs named when several could read the config.
_LISTED = 8
_OPERATORS = ("&&", "||", "|", ";", ">", ">>", "<", "&")


def find_launch(
    config: Path | None,
    overrides: Sequence[str] = (),
    command: Sequence[str] = (),
    *,
    entry: str | None = None,
    table: ToolTable | None = None,
    python: str | None = None,
    cwd: Path | None = None,
) -> Found:
    """The program that reads ``config``, by the first route that fits, or :class:`NoLaunch` (route 6).

    Args:
        config: the config file, or the run folder of a Hydra app; ``None`` when only a command was given.
        overrides: ``key=value`` texts, applied the way the program would see them.
        command: what stands behind ``--``.
        entry: ``module:function`` (``--entry``).
        table: settings of the project; read from pyproject.toml when ``None``.
        python: interpreter (``--python``).
        cwd: where trainlint was called.

    Raises:
        LaunchError: the route that fits cannot be taken (nothing there, override that cannot be applied ...).
    """
    cwd = Path(os.path.abspath(cwd or Path.cwd()))
    if config is not None:
        config = Path(os.path.abspath(cwd / config))
        if not config.exists():
            raise LaunchError(f"There is no config {config}.", "Check the path.")
    if table is None:
        table = read_tool_table(cwd)
        if table.file is None and config is not None:
            table = read_tool_table(config if config.is_dir() else config.parent)
    if python is None and table.python is not None:
        python = table.python if os.sep not in table.python else str(table.base / os.path.expanduser(table.python))
    for text in overrides:
        parse_override(text)
    if command:
        return _told(1, "the command line", list(command), config, overrides, cwd, python)
    if entry is not None:
        return _entry(entry, "--entry", config, overrides, cwd, python)
    if table.entry is not None:
        return _entry(table.entry, f"[tool.trainlint] entry in {table.file}", config, overrides, table.base, python)
    if table.command is not None:
        by = f"[tool.trainlint] command in {table.file}"
        return _told(3, by, _words(table), config, overrides, table.base, python)
    if config is None:
        return NoLaunch("neither a config nor a command was given", "-- python train.py …")
    folder = hydra_app.run_folder_of(config)
    if folder is not None:
        return _run_folder(folder, overrides, cwd, python)
    if config.is_dir():
        raise LaunchError(f"{config} is a folder, not a config file.", "Give a config file, or a command behind --.")
    return _search(config, overrides, cwd, python)


# ------------------------------------------------------------------------------------------------ routes 1 and 3


def _words(table: ToolTable) -> list[str]:
    try:
        words = shlex.split(table.command or "")
    except ValueError as error:
        raise LaunchError(f"{table.file}: [tool.trainlint] command cannot be split into words: {error}.") from None
    operator = next((word for word in words if word in _OPERATORS), None)
    if operator is not None:
        raise LaunchError(
            f"{table.file}: [tool.trainlint] command holds {operator!r}, and it is started without a shell.",
            "Name one program, or wrap it: command = \"bash -c '…'\".",
        )
    if not words:
        raise LaunchError(
            f"{table.file}: [tool.trainlint] command is empty.", 'Write e.g. "python train.py --config {config}".'
        )
    return words


def _told(
    route: int, by: str, words: list[str], config: Path | None, overrides: Sequence[str], cwd: Path, python: str | None
) -> Launch:
    if config is None and any(CONFIG in word for word in words):
        raise LaunchError(
            f"The command needs a config in place of {CONFIG} and none was given.",
            "Name the config: trainlint check CONFIG …",
        )
    if config is None and overrides:
        raise LaunchError("There is no config that the overrides could change.", "Put them into the command behind --.")
    how = BY_COPY
    if overrides and config is not None and not any(CONFIG in word for word in words):
        words, how = _take_overrides(words, config, overrides, cwd)
    resolved = resolve_command(words, cwd, python)
    why = f"told by {by}"
    return _launch(
        Candidate(0, why, resolved.command, cwd, resolved.env, how),
        route, config, overrides, interpreter=resolved.interpreter, notes=resolved.notes,
    )  # fmt: skip


def _take_overrides(words: list[str], config: Path, overrides: Sequence[str], cwd: Path) -> tuple[list[str], str]:
    """How overrides reach a command without ``{config}``: through the config it names, or as its own arguments."""
    for i, word in enumerate(words[1:], 1):
        before, name = "", word
        if word.startswith("-") and "=" in word:
            before, _, name = word.partition("=")
            before += "="
        path = cwd / name
        if path.is_file() and path.samefile(config):
            return [*words[:i], before + CONFIG, *words[i + 1 :]], BY_COPY
    file = _script_of_command(words, cwd)
    kinds = {script.kind for script in repository.script_of(file)} if file is not None else set()
    if repository.HYDRA_MAIN in kinds:
        return words, BY_HYDRA
    if repository.LIGHTNING in kinds:
        return words, BY_LIGHTNING
    shown = masked_command(list(overrides))
    raise LaunchError(
        f"The overrides ({shown}) cannot reach the program: its command does not name {config.name}.",
        f"Write {CONFIG} where the command takes the config, or put the overrides into the command as the program "
        "expects them.",
    )


def _script_of_command(words: Sequence[str], cwd: Path) -> Path | None:
    """The Python file that a command runs, when it says so (``python a.py``, ``torchrun a.py``, ``python -m a.b``)."""
    for i, word in enumerate(words):
        if word.endswith(".py") and (cwd / word).is_file():
            return cwd / word
        if word == "-m" and i + 1 < len(words):
            relative = Path(*words[i + 1].split("."))
            for base in (cwd, cwd / "src"):
                for file in (base / relative.with_suffix(".py"), base / relative / "__main__.py"):
                    if file.is_file():
                        return file
    return None


# ------------------------------------------------------------------------------------------------ route 2


def _entry(entry: str, by: str, config: Path | None, overrides: Sequence[str], cwd: Path, python: str | None) -> Launch:
    if _ENTRY.match(entry) is None:
        raise LaunchError(f"{by}: {entry!r} is not module:function.", "Write e.g. --entry mypackage.train:main.")
    import trainlint.recorder

    runner = Path(trainlint.recorder.__file__).parent / "bootstrap" / "run_entry.py"
    chosen = default_python(cwd, python)
    words = [chosen, str(runner), entry]
    files: tuple[GeneratedFile, ...] = ()
    if config is not None:
        tree = parse_config(config)
        words += [CONFIG, ENTRY_CONFIG]
        if not overrides:
            files = (GeneratedFile(ENTRY_CONFIG, "entry-config.json", json.dumps(tree, default=str)),)
    elif overrides:
        raise LaunchError("There is no config that the overrides could change.", "Name it: trainlint check CONFIG …")
    launch = _launch(
        Candidate(0, f"the function {entry}, told by {by}", tuple(words), cwd),
        2, config, overrides, interpreter=chosen, absolute=True, files=files,
    )  # fmt: skip
    shown = _shown_path(config, cwd) if config is not None else ""
    return replace(launch, title=f"{entry}({shown})")


# ------------------------------------------------------------------------------------------------ routes 4, 5, 6


def _run_folder(folder: Path, overrides: Sequence[str], cwd: Path, python: str | None) -> Launch:
    hydra = parse_config(folder / "hydra.yaml")
    section = hydra.get("hydra") if isinstance(hydra, dict) else None
    runtime = section.get("runtime") if isinstance(section, dict) else None
    recorded = runtime.get("cwd") if isinstance(runtime, dict) else None
    start = Path(recorded) if isinstance(recorded, str) and Path(recorded).is_dir() else cwd
    root = repository.repository_root(start)
    script, arguments, run_cwd = hydra_app.rebuild(folder, repository.scripts(root), root)
    chosen = default_python(run_cwd, python)
    words, env = found_in.script_words(script, root, run_cwd, chosen, found_in.console_scripts(root))
    why = f"rebuilt from the Hydra run folder {folder.parent}"
    candidate = Candidate(0, why, (*words, *arguments), run_cwd, env, BY_HYDRA, script.file)
    return _launch(candidate, 4, folder / "config.yaml", overrides, interpreter=chosen)


def _search(config: Path, overrides: Sequence[str], cwd: Path, python: str | None) -> Found:
    shape = config_shape(config)
    inside = repository.repository_root(config)
    here = repository.repository_root(cwd)
    root = here if config.is_relative_to(here) else inside
    start = cwd if cwd.is_relative_to(root) else root
    chosen = default_python(start, python)
    launcher_only = shape.kinds & {ACCELERATE, DEEPSPEED}
    found = [] if launcher_only else found_in.candidates(config, shape, root, start, chosen)
    if not found and root != here and not launcher_only:
        found = found_in.candidates(config, shape, here, cwd, chosen)
    left = found_in.best(found, config, root)
    if len(left) == 1:
        candidate = left[0]
        interpreter = chosen
        if not is_python(candidate.template[0]):
            resolved = resolve_command(candidate.template, candidate.cwd, python)
            candidate = Candidate(
                candidate.rank, candidate.why, resolved.command, candidate.cwd,
                {**candidate.env, **resolved.env}, candidate.overrides_by, candidate.script,
            )  # fmt: skip
            interpreter = resolved.interpreter or chosen
        return _launch(candidate, 5, config, overrides, interpreter=interpreter, needs_confirmation=True)
    if left:
        commands = tuple(masked_command(_with_config(c.template, _shown_path(config, c.cwd))) for c in left)
        listed = "\n".join(f"  trainlint check {_shown_path(config, cwd)} -- {line}" for line in commands[:_LISTED])
        if len(commands) > _LISTED:
            listed += f"\n  … and {len(commands) - _LISTED} more"
        raise AmbiguousLaunch(
            f"{len(left)} programs of {root} could read {config.name}:\n{listed}",
            commands,
            'Give the right one behind --, or write it into pyproject.toml: [tool.trainlint] command = "…".',
        )
    return _nothing(config, shape, root)


def _nothing(config: Path, shape: Shape, root: Path) -> NoLaunch:
    if shape.kinds & {ACCELERATE, DEEPSPEED}:
        kind = next(iter(sorted(shape.kinds & {ACCELERATE, DEEPSPEED})))
        return NoLaunch(
            f"{config.name} configures {kind}, not a training program",
            "-- accelerate launch --config_file {config} train.py …",
        )
    for kind, command in ((AXOLOTL, "axolotl train {config}"), (LLAMA_FACTORY, "llamafactory-cli train {config}")):
        if kind in shape.kinds:
            tool = command.split()[0]
            return NoLaunch(
                f"{config.name} is for {kind}, and `{tool}` is not installed beside this Python nor on the PATH",
                f"-- {command}   (or --python with the environment that has it)",
            )
    if TORCHTUNE in shape.kinds:
        return NoLaunch(
            f"{config.name} is a torchtune config and does not name its recipe", "-- tune run RECIPE --config {config}"
        )
    scripts = sorted(root.glob("*train*.py")) + sorted(root.glob("*/*train*.py"))
    script = os.path.relpath(scripts[0], root) if scripts else "train.py"
    return NoLaunch(
        f"no program in {root} shows that it reads {config.name}",
        f"-- python {script} --config {{config}}   (or in pyproject.toml: [tool.trainlint] "
        f'command = "python {script} --config {{config}}")',
    )


# ------------------------------------------------------------------------------------------------ putting together


def _shown_path(config: Path, cwd: Path) -> str:
    """The config as one would type it in ``cwd``."""
    return os.path.relpath(config, cwd) if config.is_relative_to(cwd) else str(config)


def _with_config(template: Sequence[str], path: str) -> tuple[str, ...]:
    return tuple(word.replace(CONFIG, path) for word in template)


def _launch(
    candidate: Candidate,
    route: int,
    config: Path | None,
    overrides: Sequence[str],
    *,
    interpreter: str | None,
    needs_confirmation: bool = False,
    absolute: bool = False,
    files: tuple[GeneratedFile, ...] = (),
    notes: tuple[str, ...] = (),
) -> Launch:
    template = candidate.template
    how = candidate.overrides_by if overrides else ""
    if how == BY_HYDRA:
        template = (*template, *overrides)
    elif how == BY_LIGHTNING:
        template = (*template, *(_as_flag(text) for text in overrides))
    shown = "" if config is None else str(config) if absolute else _shown_path(config, candidate.cwd)
    if how == BY_COPY and config is not None:
        text = resolved_copy(config, overrides)
        files = (*files, GeneratedFile(CONFIG, config.name, text, beside=config.parent))
        if any(ENTRY_CONFIG in word for word in template):
            tree = _parse_text(text, config)
            files = (*files, GeneratedFile(ENTRY_CONFIG, "entry-config.json", json.dumps(tree, default=str)))
    else:
        template = _with_config(template, shown)
    return Launch(
        route=route,
        why=candidate.why,
        command=_with_config(template, shown),
        cwd=candidate.cwd,
        env=dict(candidate.env),
        config=config,
        overrides=tuple(overrides),
        overrides_by="copy" if how == BY_COPY else "arguments" if how else "",
        needs_confirmation=needs_confirmation,
        interpreter=interpreter,
        template=template,
        files=files,
        notes=notes,
    )


def _as_flag(text: str) -> str:
    override = parse_override(text)
    if override.action == "delete":
        raise LaunchError(f"{override.shown!r} cannot be given to Lightning's CLI.", "Remove the key in the config.")
    return f"--{override.path}={override.value}"


def _parse_text(text: str, config: Path) -> object:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="trainlint-") as folder:
        file = Path(folder, config.name)
        file.write_text(text, encoding="utf-8")
        return parse_config(file)


def config_secrets(config: Path | None) -> set[str]:
    """Secret values in a config, to be masked in what is kept of the program's output."""
    return secret_values(parse_config(config)) if config is not None and config.is_file() else set()
