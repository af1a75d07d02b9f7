"""The JSON report: the fields that scripts depend on."""

from __future__ import annotations

import dataclasses
import json
import math

import report_samples as samples

from trainlint.report.json import render_json


def test_the_fixed_fields() -> None:
    data = json.loads(render_json(samples.FULL))
    assert data["schema"] == "trainlint.report/1"
    assert data["version"] == "0.1.0"
    assert data["exit_code"] == 1
    fixed = "launch command device model optimizers schedule precision accumulation clipping loss resume logging"
    assert set(fixed.split()) <= set(data["run"])
    assert set(data["verdicts"][0]) == {"code", "name", "verdict", "reason"}
    finding = data["findings"][0]
    assert {"code", "name", "severity", "message", "location", "evidence", "fix", "suppressed"} <= set(finding)
    assert finding["location"] == {"file": "conf/config.yaml", "line": 14, "key": "training.weight_decay"}
    assert finding["evidence"] == {"configured": 0.0005, "observed": [0.0, 0.0]}
    assert data["prevented"][0] == {
        "action": "delete",
        "target": "/data/runs/tahoe/checkpoints",
        "detail": "shutil.rmtree, train.py:31",
    }


def test_a_finding_without_a_place_has_a_null_location() -> None:
    data = json.loads(render_json(samples.FULL))
    assert next(f for f in data["findings"] if f["code"] == "TL404")["location"] is None


def test_suppressed_findings_are_there_with_their_reason() -> None:
    data = json.loads(render_json(samples.FULL))
    assert [f["suppressed"] for f in data["findings"] if f["code"] == "TL205"] == ["the teacher stays frozen"]


def test_what_json_lacks_is_text() -> None:
    odd = samples.finding(evidence={"nan": math.nan, "inf": -math.inf, "set": {2, 1}, "tuple": (1,), "object": object})
    text = render_json(dataclasses.replace(samples.FULL, findings=(odd,)))
    evidence = json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert evidence["findings"][0]["evidence"]["nan"] == "nan"
    assert evidence["findings"][0]["evidence"]["inf"] == "-inf"
    assert evidence["findings"][0]["evidence"]["set"] == [1, 2]
    assert evidence["run"]["schedule"] == {"last_rate": "inf"}


def test_escape_sequences_and_undecodable_bytes_do_not_pass() -> None:
    odd = samples.finding(message="\x1b[31mred\x1b[0m caf\udce9")
    text = render_json(dataclasses.replace(samples.FULL, findings=(odd,)))
    assert json.loads(text)["findings"][0]["message"] == "red caf\\udce9"
    text.encode("utf-8")


def test_same_report_same_text() -> None:
    assert render_json(samples.FULL) == render_json(samples.FULL)


def test_troubles_and_output_of_a_dead_program() -> None:
    data = json.loads(render_json(samples.DIED))
    assert "flash_attn" in data["troubles"][0]
    assert data["program_output"][-1] == "ModuleNotFoundError: No module named 'flash_attn'"
