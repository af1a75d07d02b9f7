"""What is shown while experiments are made, and what of them stands in the report."""

from __future__ import annotations

import io
import json

from rich.console import Console

from tests.support.build import Run
from tests.support.experiments import curve, falling, overfit, sweep, valley
from trainlint.judge import JudgeOptions, judge
from trainlint.recording import codec
from trainlint.recording.schema import Ending, Experiment, Recording
from trainlint.report.json import render_json
from trainlint.report.progress import Progress
from trainlint.report.text import render_text


def recording(*experiments: Experiment) -> Recording:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", {"weight": (8, 8)}))
    for _ in range(3):
        run.batch().backward().step(adam).zero(adam)
    return run.recording(experiments=experiments, ending=Ending(how="steps"))


def text(run: Recording, *, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=100, color_system=None, force_terminal=False)
    render_text(judge(run, None, None, JudgeOptions()), console)
    stream.flush()
    stream.seek(0)
    return stream.read()


MADE = (
    overfit(curve(falling(2.3, 1.9), "plateau"), curve(falling(2.3, 0.1), "reached", 1e-2)),
    sweep(valley),
)


def test_the_curves_are_drawn() -> None:
    shown = text(recording(*MADE))
    assert "loss of one repeated batch 2.3 → 0.1 in 300 steps at rate 0.01: came near its floor, floor 0" in " ".join(
        shown.split()
    )
    assert "learning-rate range test, loss by rate" in shown
    assert "configured rate 0.001" in shown
    assert "1e-7" in shown
    assert "held still: dropout, weight decay" in shown
    plain = text(recording(*MADE), encoding="ascii")
    assert "range test" in plain


def test_json_holds_every_point() -> None:
    report = json.loads(render_json(judge(recording(*MADE), None, None, JudgeOptions())))
    fitted, swept = report["run"]["experiments"]
    assert [c["rate"] for c in fitted["curves"]] == [1e-3, 1e-2]
    assert len(fitted["curves"][1]["losses"]) == 300
    assert fitted["workable_rate"] == 1e-2
    assert swept["band"][0] < swept["steepest"] <= swept["band"][1]
    assert [p["title"] for p in report["run"]["plots"]][1] == "learning-rate range test, loss by rate"


def test_without_experiments_nothing_is_said_of_them() -> None:
    report = json.loads(render_json(judge(recording(), None, None, JudgeOptions())))
    assert report["run"]["experiments"] is None
    assert report["run"]["plots"] == []
    left_out = text(recording(Experiment("overfit", "left-out", "LBFGS finds its own step sizes")))
    assert "not made: LBFGS finds its own step sizes" in left_out


def test_experiments_are_saved_with_the_recording() -> None:
    run = recording(*MADE)
    assert codec.loads(codec.dumps(run)) == run


def test_progress_counts_each_experiment_anew_and_not_every_step() -> None:
    stream = io.StringIO()
    progress = Progress(Console(file=stream, width=100, force_terminal=False))
    for step in range(3):
        progress.step(0, step, 3)
    progress.note("overfit: up to 300 steps, about 40 s at the watched 0.13 s per step")
    progress.experiment("overfit")
    for step in range(300):
        progress.step(0, step, 300)
    lines = stream.getvalue().splitlines()
    assert sum("of 3 " in line for line in lines) == 3
    assert sum("of 300" in line for line in lines) == 10
    assert any("about 40 s" in line for line in lines)
    shown = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    shown.print(progress)
    assert "━" * 20 in shown.file.getvalue()  # type: ignore[attr-defined]
