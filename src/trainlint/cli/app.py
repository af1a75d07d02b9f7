"""The commands and their options. What they do is in the modules beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from trainlint import __version__
from trainlint.cli.arguments import codes_of, experiments_of, fill_deep, read_target, split_command
from trainlint.cli.failure import Failure, not_available

app = typer.Typer(
    name="trainlint",
    help="Finds silent training bugs before launch: starts your own program, watches its first optimizer steps, "
    "and reports what is wrong, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WATCHING = "Watching"
_JUDGING = "Judging"
_REPORTING = "Reporting"


def dispatch(argv: Sequence[str]) -> int:
    """Parse a command line and run it; the exit status.

    Raises:
        Failure: the job cannot be done as asked.
    """
    command: tuple[str, ...] | None = None
    words = list(argv)
    if next((word for word in words if not word.startswith("-")), "") == "check":
        words, command = split_command(words)
        words = fill_deep(words)
    try:
        typer.main.get_command(app).main(args=words, prog_name="trainlint", obj=command, standalone_mode=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else (0 if done.code is None else 2)
    return 0


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trainlint {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    help="Check a training run before launch.\n\n"
    "Starts the program as it is, watches its first optimizer steps, ends it, undoes what it did to files, and holds "
    "what it saw against the catalog of checks.\n\n"
    "trainlint check conf/config.yaml\n\n"
    "trainlint check -- python train.py --lr 3e-4\n\n"
    "trainlint check config.yaml optimizer.lr=1.0e-4 -- torchrun train.py --config {config}",
    epilog="Exit status: 0 nothing at or above --fail-on, 1 findings, 2 the job could not be done.",
)
def check(
    context: typer.Context,
    target: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="CONFIG KEY=VALUE … -- COMMAND …",
            help="The config file, settings that override it, and behind -- the command that starts training "
            "({config} in it becomes the config); each may be left out. Without a command it is found.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        Optional[int],
        typer.Option(min=1, help="Optimizer steps to watch. (default 3)", rich_help_panel=_WATCHING),
    ] = None,
    timeout: Annotated[
        Optional[float],
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            help="Longest wait for the first optimizer step, and again from there to the last. (default 600)",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    deep: Annotated[
        Optional[str],
        typer.Option(
            "--deep",
            metavar="[overfit,lr-range]",
            help="Experiments after the watch, each on the program started anew: overfit one batch (up to 300 steps), "
            "learning-rate range test (100 steps). Alone: all.",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(metavar="auto|cpu", help="cpu: hide all GPUs from the program.", rich_help_panel=_WATCHING),
    ] = "auto",
    boundary: Annotated[
        Optional[bool],
        typer.Option(
            "--boundary/--no-boundary",
            help="After the steps, end the epoch early and watch evaluation and the next epoch's first steps. "
            "(default: yes, for as long as the steps took, 60 s at most)",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    entry: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function that trains, called with the config.",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    python: Annotated[
        Optional[str],
        typer.Option(metavar="PATH", help="The Python that has the program's packages.", rich_help_panel=_WATCHING),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Run a command that was found without asking.", rich_help_panel=_WATCHING),
    ] = False,
    save_recording: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Save what was seen, to judge it again.", rich_help_panel=_WATCHING),
    ] = None,
    recording: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Judge a saved recording; start nothing.", rich_help_panel=_JUDGING),
    ] = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="Judge config and source only; never start the program.", rich_help_panel=_JUDGING
        ),
    ] = False,
    select: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="CODES",
            help="Only these checks: codes or their beginnings (TL2,TL401), or ALL.",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    extend_select: Annotated[
        Optional[list[str]],
        typer.Option(metavar="CODES", help="These checks as well.", rich_help_panel=_JUDGING),
    ] = None,
    ignore: Annotated[
        Optional[list[str]],
        typer.Option(metavar="CODES", help="Not these checks.", rich_help_panel=_JUDGING),
    ] = None,
    fail_on: Annotated[
        Optional[str],
        typer.Option(
            metavar="error|warning|info",
            help="Exit with 1 from this severity on. (default error)",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 in spite of findings.", rich_help_panel=_JUDGING)
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", metavar="text|json", help="Form of the report.", rich_help_panel=_REPORTING)
    ] = "text",
    output_file: Annotated[
        Optional[Path],
        typer.Option(metavar="PATH", help="Write the report there, not to stdout.", rich_help_panel=_REPORTING),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show the program's output, and every finding and reason in full.",
            rich_help_panel=_REPORTING,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_REPORTING)
    ] = False,
    baseline: Annotated[Optional[Path], typer.Option(hidden=True)] = None,
    update_baseline: Annotated[bool, typer.Option("--update-baseline", hidden=True)] = False,
) -> None:
    """Check a training run before launch."""
    for given, name in ((baseline, "--baseline"), (update_baseline, "--update-baseline")):
        if given:
            raise not_available(name)
    if device not in ("auto", "cpu"):
        raise Failure(f"There is no device {device!r}.", "--device takes auto or cpu.")
    from trainlint.cli.run import CheckOptions, run_check

    experiments, deep_note = experiments_of(deep)
    options = CheckOptions(
        target=read_target(target or [], context.obj),
        experiments=experiments,
        deep_note=deep_note,
        steps=steps,
        timeout_s=timeout,
        boundary=boundary,
        device=device,
        entry=entry,
        python=python,
        yes=yes,
        save_recording=save_recording,
        recording=recording,
        static=static,
        select=codes_of(select),
        extend_select=codes_of(extend_select) or (),
        ignore=codes_of(ignore) or (),
        fail_on=fail_on,
        exit_zero=exit_zero,
        format=format_,
        output_file=output_file,
        verbose=verbose,
        quiet=quiet,
    )
    raise typer.Exit(run_check(options))


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="CODE|NAME|O17", help="A check's code, name, or catalog name.")],
) -> None:
    """Print the page of a check: what goes wrong, how it is detected, what to do, when it may be wrong."""
    from trainlint.cli.catalog import find_pages
    from trainlint.cli.output import stdout
    from trainlint.report.explain import render_page

    for page in find_pages(name):
        render_page(page, stdout())


@app.command()
def rules(
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the list.")] = "text",
) -> None:
    """List every check: code, name, strongest severity, what it needs."""
    from trainlint.cli.catalog import all_pages
    from trainlint.cli.output import check_format, stdout
    from trainlint.report.explain import render_rules, rules_json

    if check_format(format_) == "json":
        typer.echo(rules_json(all_pages()), nl=False)
    else:
        render_rules(all_pages(), stdout())


@app.command(hidden=True)
def init() -> None:
    """Write [tool.trainlint] for the project (not available yet)."""
    raise Failure(
        "`trainlint init` is not available in this version.",
        'Write it by hand in pyproject.toml: [tool.trainlint] and command = "python train.py --config {config}".',
    )
