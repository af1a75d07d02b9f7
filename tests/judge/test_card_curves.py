"""Curves of the card: one for the groups that share it, named by what they hold, folded when there are many."""

from __future__ import annotations

import dataclasses

import pytest
from timelines import cosine, loop, scheduler

from trainlint.judge.card_curves import curves, group_data, group_names
from trainlint.recording.projection import projection
from trainlint.recording.schema import CurvePoint, Optimizer, Parameter, ParamGroup, Plan, Recording

PEAK = 1e-3


def parameter(number: int, name: str, kind: str = "weight") -> Parameter:
    return Parameter(number, name, (4, 4), "float32", "cpu", True, kind=kind, root=0)


def run(groups: list[list[Parameter]], shares: list[float]) -> Recording:
    """A cosine over 100 steps whose rate each group takes a share of."""
    rate = cosine(PEAK, 100)
    points = tuple(CurvePoint(n, tuple(rate(n) * s for s in shares)) for n in range(101))
    made = loop(rate, schedulers=[scheduler(rate, 100, curve=points)], plan=Plan(100, source="x"))
    events = tuple(
        dataclasses.replace(e, rates=tuple(e.rates[0] * s for s in shares)) if e.kind == "step" else e
        for e in made.events
    )
    held = tuple(ParamGroup(i, tuple(p.id for p in group)) for i, group in enumerate(groups))
    return dataclasses.replace(
        made,
        events=events,
        optimizers=(Optimizer(0, "AdamW", groups=held, steps=3),),
        parameters=tuple(p for group in groups for p in group),
    )


def labels(recording: Recording) -> list[str]:
    groups = recording.optimizers[0].groups
    projected = {(0, g.index): projection(recording, 0, g.index) for g in groups}
    return [c.label for c in curves(recording, projected) if c.kind == "projected"]


BODY = [parameter(0, "body.0.weight"), parameter(1, "body.1.weight"), parameter(2, "body.0.bias", "bias")]
HEAD = [parameter(3, "head.weight"), parameter(4, "head.bias", "bias")]


def test_groups_are_named_by_their_modules() -> None:
    assert labels(run([BODY, HEAD], [0.1, 1.0])) == ["group 0: body.*", "group 1: head.*"]


def test_groups_are_named_by_kind_when_they_lie_everywhere() -> None:
    weights = [parameter(i, f"layers.{i}.weight") for i in range(3)]
    biases = [parameter(3 + i, f"layers.{i}.bias", "bias") for i in range(3)]
    norms = [parameter(6 + i, f"layers.{i}.norm.weight", "norm") for i in range(3)]
    assert group_names(
        run([weights, biases + norms], [1, 1]), run([weights, biases + norms], [1, 1]).optimizers[0]
    ) == {
        0: "weights",
        1: "biases and norms",
    }
    assert labels(run([weights, biases + norms], [1.0, 1.0])) == ["all groups"]


def test_many_rates_of_one_course_are_told_by_the_highest_and_the_lowest() -> None:
    layers = [[parameter(i, f"layers.{i}.weight")] for i in range(12)]
    made = run(layers, [0.8 ** (11 - i) for i in range(12)])
    assert labels(made) == [
        "group 11: layers.11.weight",
        "group 0: layers.0.weight (lowest of 12 with this course)",
    ]
    projected = {(0, i): projection(made, 0, i) for i in range(12)}
    data = group_data(made, 0, projected)
    assert [d["group"] for d in data] == list(range(12))
    assert data[11]["end_rate"] == pytest.approx(projected[0, 11].end_rate)
    assert all(d["projected"][0][0] == 1 and d["projected"][-1][0] == 100 for d in data)
    assert data[3]["holds"] == "layers.3.weight"
