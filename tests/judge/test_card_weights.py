"""The run card's row on weights."""

from __future__ import annotations

from tests.support.build import Run
from trainlint.judge.card_weights import weights
from trainlint.recording.schema import Provenance, WeightLoad

NET = {"body.0.weight": (30, 30), "body.0.bias": (30,), "head.weight": (2, 30), "head.bias": (2,)}


def run_of(origin: str | dict[str, str]) -> Run:
    run = Run()
    net = run.module("Net", NET, origin=origin)
    run.batch().backward().step(run.optimizer("AdamW", net))
    return run


def rows(run: Run, *loads: WeightLoad) -> list[str]:
    return [line.observed for line in weights(run.recording(provenance=Provenance(loads)))[0]]


def test_what_came_from_where() -> None:
    run = run_of({"body": "/data/pretrained.pt"})
    load = WeightLoad("/data/pretrained.pt", root=0, matched_tensors=2)
    assert rows(run, load) == ["2 of 4 tensors (94% of weights) from pretrained.pt, 2 fresh: head.*"]
    assert weights(run.recording(provenance=Provenance((load,))))[1] == [
        {
            "class": "Net",
            "tensors": 4,
            "weights": 992,
            "files": {"pretrained.pt": {"tensors": 2, "weights": 930}},
            "fresh_tensors": 2,
            "fresh_weights": 62,
            "resumed": False,
        }
    ]


def test_a_resumed_run() -> None:
    load = WeightLoad("/runs/last.ckpt", root=0, matched_tensors=4, resumed=True)
    assert rows(run_of("/runs/last.ckpt"), load) == ["4 of 4 tensors (100% of weights) from runs/last.ckpt (resumed)"]


def test_a_load_of_which_nothing_arrived() -> None:
    load = WeightLoad("/data/pretrained.pt", root=0)
    assert rows(run_of("fresh"), load) == ["0 of 4 tensors (0% of weights) from pretrained.pt, 4 fresh: everything"]


def test_no_row_without_a_load() -> None:
    assert weights(run_of("fresh").recording()) == ([], [])
    assert rows(run_of("fresh")) == []


def test_a_copy_that_nothing_runs_has_no_row() -> None:
    run = run_of({"body": "/data/pretrained.pt"})
    run.module("Copy", NET, origin="/data/pretrained.pt")
    assert len(rows(run, WeightLoad("/data/pretrained.pt", root=0, matched_tensors=2))) == 1
