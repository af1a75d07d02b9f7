"""A recording survives the way to JSON and back, whatever it holds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainlint.recording import SCHEMA, Recording, RecordingError, dumps, load, loads, save
from trainlint.recording.schema import (
    EVENT_TYPES,
    Backward,
    ConfigFacts,
    ConfigKey,
    CurvePoint,
    Ending,
    Event,
    OptimizerStep,
    ParamGroup,
    Scheduler,
    SourceLine,
    StepMeasurement,
)

HEAD = '{"schema": "' + SCHEMA + '"'

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = scalars | st.lists(scalars, max_size=4).map(tuple)
lines = st.builds(SourceLine, file=st.text(), line=st.integers(0, 10**6), function=st.text())
hyper = st.dictionaries(st.text(), values, max_size=4)
groups = st.builds(
    ParamGroup, index=st.integers(0), parameters=st.lists(st.integers(0)).map(tuple), hyperparameters=hyper
)
keys = st.builds(ConfigKey, path=st.text(), value=values, type=st.text(), at=st.none() | lines)
finite = st.floats(allow_nan=False)
backwards = st.builds(
    Backward,
    seq=st.integers(0),
    time_s=finite,
    value=st.none() | finite,
    divided_by=st.none() | finite,
    at=st.none() | lines,
)
steps = st.builds(
    OptimizerStep, seq=st.integers(0), time_s=finite, optimizer=st.integers(0), index=st.integers(0),
    rates=st.lists(finite).map(tuple),
)  # fmt: skip
measures = st.builds(
    StepMeasurement, optimizer=st.integers(0), index=st.integers(0),
    gradient_norm=st.lists(st.none() | finite).map(tuple),
)  # fmt: skip
curves = st.builds(CurvePoint, calls=st.integers(0), rates=st.lists(finite).map(tuple))
schedulers = st.builds(
    Scheduler, id=st.integers(0), class_name=st.text(), optimizer=st.none() | st.integers(0), settings=hyper,
    curve=st.lists(curves, max_size=3).map(tuple),
)  # fmt: skip
recordings = st.builds(
    Recording,
    ending=st.builds(
        Ending, how=st.text(), exit_code=st.none() | st.integers(), traceback=st.lists(st.text()).map(tuple)
    ),
    config=st.none() | st.builds(ConfigFacts, keys=st.lists(keys, max_size=4).map(tuple)),
    schedulers=st.lists(schedulers, max_size=2).map(tuple),
    events=st.lists(backwards | steps, max_size=5).map(tuple),
    steps=st.lists(measures, max_size=3).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(recordings)
def test_round_trip(recording: Recording) -> None:
    text = dumps(recording)
    assert loads(text) == recording
    assert dumps(loads(text)) == text


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_are_valid_json(value: float) -> None:
    recording = Recording(events=(Backward(seq=1, time_s=0.0, value=value),))
    json.loads(dumps(recording), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (event,) = loads(dumps(recording)).events
    assert isinstance(event, Backward)
    assert event.value is not None
    assert repr(event.value) == repr(value)


def test_every_event_class_is_in_the_union_and_the_table() -> None:
    assert set(get_args(Event)) == set(EVENT_TYPES.values())
    for kind, cls in EVENT_TYPES.items():
        assert cls.kind == kind  # type: ignore[attr-defined]
        event: Any = cls(**_smallest(cls))
        assert loads(dumps(Recording(events=(event,)))).events == (event,)


def _smallest(cls: type) -> dict[str, Any]:
    """Values for the fields that have no default."""
    hints = get_type_hints(cls)
    samples = {int: 1, float: 0.5, str: "x", bool: True}
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            hint = hints[f.name]
            out[f.name] = (
                samples[hint] if hint in samples else next((samples[a] for a in get_args(hint) if a in samples), None)
            )
    return out


def test_file_round_trip(tmp_path: Path) -> None:
    recording = Recording(ending=Ending(how="steps"))
    save(recording, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == recording


def test_a_newer_minor_version_with_unknown_fields_is_read() -> None:
    data = json.loads(dumps(Recording(ending=Ending(how="exit", exit_code=3))))
    data["added_later"] = [1]
    data["ending"]["mood"] = "calm"
    assert loads(json.dumps(data)).ending == Ending(how="exit", exit_code=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[1, 2]", "not a trainlint recording"),
        ('{"a": 1}', "not a trainlint recording"),
        ('{"schema": "trainlint.recording/9"}', f"reads {SCHEMA}"),
        (HEAD + ', "ending": 3}', "expected an object for Ending"),
        (HEAD + ', "ending": {}}', "incomplete Ending"),
        (HEAD + ', "events": [{"kind": "party"}]}', "unknown event kind 'party'"),
        (HEAD + ', "events": 7}', "not a valid Recording"),
    ],
)
def test_what_is_not_a_recording_says_so(text: str, says: str) -> None:
    with pytest.raises(RecordingError, match=says):
        loads(text)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecordingError, match="not UTF-8"):
        load(path)
