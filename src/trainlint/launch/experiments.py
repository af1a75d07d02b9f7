"""Makes the experiments of ``--deep``: the program again, each time in a child and a folder of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trainlint.launch.journal import RestoreResult, RunFolder
from trainlint.launch.model import Launch, LaunchError, Progress, Watched, WatchOptions
from trainlint.launch.supervisor import watch
from trainlint.recording.describe import place
from trainlint.recording.experiment_lines import Told, read
from trainlint.recording.experiment_plan import NOT_TRAINED, Plan, next_rate, plan, seconds, step_seconds
from trainlint.recording.overfitting import causes
from trainlint.recording.schema import Experiment, ExperimentCurve, Recording

#: What the child's ending means where the experiment did not end it.
_ENDINGS = {"exit": "program-ended", "timeout": "timeout", "interrupted": "interrupted", "not-started": "not-started"}


class ExperimentProgress(Progress, Protocol):
    """What is told while experiments are made."""

    def experiment(self, title: str) -> None:
        """Another experiment begins; steps are counted anew."""

    def note(self, text: str) -> None:
        """Something to know, on a line of its own."""


@dataclass(frozen=True)
class Made:
    """The experiments, and what could not be undone after them."""

    experiments: tuple[Experiment, ...]
    problems: tuple[str, ...] = ()


def make_experiments(
    run: Recording, names: Sequence[str], launch: Launch, options: WatchOptions, progress: ExperimentProgress
) -> Made:
    """Make the named experiments on the run that was watched.

    Nothing that happens to them is raised: an experiment that fails says why in its ``reason``. After Ctrl-C the rest
    is left out.
    """
    plans = [plan(run, name) for name in names]
    for wanted in plans:
        if not wanted.reason:
            progress.note(_cost(run, wanted))
    experiments: list[Experiment] = []
    problems: list[str] = []
    interrupted = run.ending.how == "interrupted"
    for wanted in plans:
        if wanted.reason or interrupted:
            reason = wanted.reason or "interrupted"
            outcome = "failed" if reason == NOT_TRAINED else "left-out"
            experiments.append(Experiment(wanted.name, outcome, reason))
            continue
        made, restored = _Maker(launch, options, progress, explained=bool(causes(run))).make(wanted)
        experiments.append(made)
        problems += [problem for result in restored for problem in result.problems]
        interrupted = any(curve.ended == "interrupted" for curve in made.curves)
    return Made(tuple(experiments), tuple(problems))


def _cost(run: Recording, wanted: Plan) -> str:
    """``overfit: up to 300 steps, about 40 s at the watched 0.13 s per step``."""
    each, whole = step_seconds(run), seconds(run, wanted.steps)
    text = f"{wanted.name}: up to {wanted.steps} steps"
    if each is None or whole is None:
        return text
    start = run.program.time_to_first_step_s
    began = f" and {start:.0f} s to start" if start is not None and start >= 1 else ""
    more = "; more than once where the first rate does not do" if wanted.name == "overfit" else ""
    return f"{text}, about {_time(whole)} at the watched {each:.2g} s per step{began}{more}"


def _time(spent: float) -> str:
    return f"{spent:.0f} s" if spent < 120 else f"{spent / 60:.0f} min"


class _Maker:
    def __init__(self, launch: Launch, options: WatchOptions, progress: ExperimentProgress, *, explained: bool) -> None:
        #: The watched steps show why a batch will not be learned: another rate would tell no more.
        self.explained = explained
        self.launch = launch
        self.options = options
        self.progress = progress

    def make(self, wanted: Plan) -> tuple[Experiment, list[RestoreResult]]:
        began = time.monotonic()
        curves: list[ExperimentCurve] = []
        told = Told()
        restored: list[RestoreResult] = []
        while True:
            at = f" at rate {wanted.rate:.3g}" if wanted.rate is not None and curves else ""
            self.progress.experiment(f"{wanted.name}{at}")
            curve, now, result = self._start(wanted)
            restored.append(result)
            curves.append(curve)
            if now.points or not told.points:
                told = now
            again = wanted.name == "overfit" and not _unrepeated(now) and not self.explained
            floor = now.loss.floor if now.loss is not None and now.loss.alone else None
            rate = next_rate(curves, floor) if again else None
            if rate is None:
                break
            wanted = wanted.at(rate)
        points = max(len(c.points) for c in curves)
        experiment = Experiment(
            wanted.name,
            "done" if points else "failed",
            "" if points else (curves[-1].reason or "no optimizer step was made"),
            duration_s=round(time.monotonic() - began, 3),
            steps_wanted=wanted.steps,
            curves=tuple(curves),
            held_still=told.held_still,
            repeated_by=told.repeated_by,
            different_batches=told.different_batches,
            loss=told.loss,
            optimizer=wanted.optimizer,
            configured_rate=wanted.configured_rate,
            program_rate=told.program_rate,
        )
        return experiment, restored

    def _start(self, wanted: Plan) -> tuple[ExperimentCurve, Told, RestoreResult]:
        """Start the program once more and follow it to the end of the experiment."""
        payload = {
            "name": wanted.name,
            "steps": wanted.steps,
            "peaks": {str(number): rates for number, rates in wanted.peaks},
            "loaders": wanted.loaders,
            "rate": wanted.rate,
            "low": wanted.low,
            "high": wanted.high,
        }
        options = dataclasses.replace(
            self.options, steps=wanted.steps, boundary=False, experiment=json.dumps(payload), configs=()
        )
        began = time.monotonic()
        try:
            folder = RunFolder()
        except OSError as error:
            why = f"there is no place for the run's files: {error}"
            return ExperimentCurve("not-started", wanted.rate, reason=why), Told(), RestoreResult()
        seen: Watched | None = None
        told, why = Told(), ""
        try:
            seen = watch(self.launch, options, folder, self.progress)
            told = read(folder.path)
        except LaunchError as error:
            why = error.message
        finally:
            restored = folder.close()
        ended, reason = _ending(told, seen, why)
        curve = ExperimentCurve(
            ended,
            wanted.rate if wanted.name == "overfit" else None,
            told.points,
            seen.redact(reason) if seen is not None else reason,
            round(time.monotonic() - began, 3),
        )
        return curve, told, restored


def _unrepeated(told: Told) -> bool:
    """The same batch did not come again: another rate would tell no more."""
    return told.different_batches is not None and told.different_batches > 1


def _ending(told: Told, seen: Watched | None, why: str) -> tuple[str, str]:
    if told.ended:
        return told.ended, told.reason
    if seen is None:
        return "not-started", why
    ending = seen.ending
    if ending.how == "timeout":
        where = f"; the program was at {place(ending.where)}" if ending.where is not None else ""
        return "timeout", f"it was not over within the time limit{where}"
    if ending.how == "exit" and not ending.exit_code:
        return "program-ended", f"the program came to its own end after {len(told.points)} optimizer steps"
    if ending.how in _ENDINGS and ending.how != "exit":
        return _ENDINGS[ending.how], ending.error or ""
    return "died", ending.error or f"the program ended with exit code {ending.exit_code}"
