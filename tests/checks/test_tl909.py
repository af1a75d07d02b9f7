"""TL909: loaders without batches, and what drop_last drops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.data.loader_yields_nothing_or_little import loader_yields_nothing_or_little as check

from tests.support.build import Run, at
from trainlint.contract import NotApplicable
from trainlint.recording.schema import Ending, Program
from trainlint.recording.schema.samples import LoaderPass, Samples

ENDED = Ending(how="exit", exit_code=0)
EMPTY: dict[str, Any] = {"batches": 0, "samples": 48, "batch_size": 64, "drop_last": True, "at": at(9)}


def loader(run: Run, *, training: bool = True, **fields: Any) -> int:
    number = run.loader(**fields)
    run.loaders[number] = dataclasses.replace(run.loaders[number], training=training)
    return number


def test_nothing_was_trained() -> None:
    run = Run()
    loader(run, training=False, **EMPTY)
    severity, finding = only(check, run, ending=ENDED)
    assert severity == "error"
    assert (
        "48 samples" in finding.message and "batch of 64" in finding.message and "No optimizer step" in finding.message
    )


@pytest.mark.parametrize("how", [{"how": "timeout"}, {"how": "exit", "exit_code": 1, "error": "ValueError: x"}])
def test_a_program_that_ended_otherwise(how: dict[str, Any]) -> None:
    run = Run()
    loader(run, training=False, **EMPTY)
    assert only(check, run, ending=Ending(**how))[0] == "warning"


def test_an_empty_evaluation() -> None:
    run = Run()
    run.optimizer("SGD", run.module("Net", {"weight": (4, 4)}))
    loader(run, batches=10)
    loader(run, training=False, **EMPTY)
    run.batch().backward().step()
    assert only(check, run, ending=Ending(how="steps"))[0] == "warning"


def test_a_stream_that_ends_at_once() -> None:
    run = Run()
    loader(run, training=False, batches=None, samples=None)
    over = Samples(passes=(LoaderPass(0, 0, 1, exhausted=True),))
    assert only(check, run, ending=ENDED, samples=over)[0] == "error"
    going_on = Samples(passes=(LoaderPass(0, 0, 1),))
    assert not findings(check, run, ending=ENDED, samples=going_on)


@pytest.mark.parametrize(
    ("fields", "severity"),
    [
        ({"samples": 60, "batch_size": 32, "batches": 1, "shuffle": False}, "warning"),
        ({"samples": 60, "batch_size": 32, "batches": 1, "shuffle": True}, "info"),
        ({"samples": 250, "batch_size": 16, "batches": 15, "shuffle": False}, None),
        ({"samples": 60, "batch_size": 32, "batches": 2, "shuffle": False, "drop_last": False}, None),
        # A sampler that deals out a part of the data.
        ({"samples": 1000, "batch_size": 32, "batches": 3, "shuffle": False}, None),
    ],
)
def test_what_drop_last_drops(fields: dict[str, Any], severity: str | None) -> None:
    run = Run()
    run.optimizer("SGD", run.module("Net", {"weight": (4, 4)}))
    loader(run, **{"drop_last": True, "at": at(9), **fields})
    run.batch().backward().step()
    assert [s for s, _ in findings(check, run)] == ([severity] if severity else [])
    assert not findings(check, run, program=Program(world_size=2))


def test_without_loaders() -> None:
    with pytest.raises(NotApplicable):
        findings(check, Run())


def test_an_evaluation_before_the_training_that_never_was() -> None:
    run = Run()
    run.optimizer("SGD", run.module("Net", {"weight": (4, 4)}))
    validation = loader(run, training=False, batches=2)
    loader(run, training=False, **EMPTY)
    run.batch(loader=validation)
    severity, finding = only(check, run, ending=ENDED)
    assert severity == "error" and "no optimizer step" in finding.message.lower()
    run.optimizers.clear()
    assert only(check, run, ending=ENDED)[0] == "warning"
