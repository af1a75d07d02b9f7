"""Verdicts, severities, places, order, suppressions, exit status."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from catalogs import module, one, raises, yields
from hypothesis import given
from hypothesis import strategies as st
from timelines import loop

from trainlint.contract import (
    ConfigFacts,
    Finding,
    Key,
    NotApplicable,
    NotObserved,
    ParameterName,
    Recording,
    SourceFacts,
    SourceLine,
)
from trainlint.judge import JudgeOptions, UsageError, judge
from trainlint.judge.catalog import Catalog, build_catalog
from trainlint.recording.schema import ConfigKey, Ending, Optimizer, Parameter, ParamGroup, Problem
from trainlint.report.model import Report

CWD = Path("/home/user/project")
RUN = dataclasses.replace(loop(lambda n: 1e-3), ending=Ending("steps"))


def report(catalog: Catalog, run: Recording | None = RUN, config: ConfigFacts | None = None, **options) -> Report:
    return judge(run, config, options.pop("source", None), JudgeOptions(catalog=catalog, cwd=CWD, **options))


def verdict(catalog: Catalog, *args, **options) -> tuple[str, str]:
    (found,) = report(catalog, *args, **options).verdicts
    return found.verdict, found.reason


# ------------------------------------------------------------------------------------------------------ verdicts


def test_the_five_verdicts() -> None:
    assert verdict(one(yields())) == ("passed", "")
    assert verdict(one(yields(Finding("bad")))) == ("failed", "")
    assert verdict(one(raises(NotApplicable("no scheduler")))) == ("not-applicable", "no scheduler")
    assert verdict(one(raises(NotObserved("no step; raise --steps")))) == ("not-observed", "no step; raise --steps")
    what, reason = verdict(one(raises(KeyError("lr"))))
    assert what == "crashed"
    assert "KeyError" in reason
    assert "\n" not in reason


def test_without_facts_a_check_is_not_observed() -> None:
    assert verdict(one(yields(Finding("bad"))), None, no_run="--static") == ("not-observed", "--static")
    assert verdict(one(yields(), facts=ConfigFacts)) == ("not-observed", "no config file was given")
    assert verdict(one(yields(), facts=SourceFacts))[0] == "not-observed"
    not_started = Recording(ending=Ending("not-started", error="no such file"))
    assert verdict(one(yields(Finding("bad"))), not_started)[0] == "not-observed"


@pytest.mark.parametrize("body", [yields(), raises(NotApplicable("no scheduler"))])
def test_a_program_that_died_first_clears_nothing(body) -> None:
    died = Recording(ending=Ending("exit", exit_code=1, error="IndexError"))
    assert verdict(one(body), died)[0] == "not-observed"
    assert verdict(one(yields(Finding("bad"))), died)[0] == "failed"
    # What needs no run is judged as ever; a program that only never steps has shown how it trains.
    assert verdict(one(yields(), facts=ConfigFacts), died, ConfigFacts())[0] == "passed"
    assert verdict(one(body), Recording(ending=Ending("backward-cap")))[0] != "not-observed"


def test_findings_before_not_observed_count() -> None:
    got = report(one(raises(NotObserved("the rest"), Finding("bad"))))
    assert [v.verdict for v in got.verdicts] == ["failed"]
    assert [f.message for f in got.findings] == ["bad"]


@pytest.mark.parametrize("body", [lambda _: None, lambda _: iter(["text"]), yields(Finding("x", severity="fatal"))])
def test_a_detector_that_breaks_the_contract_crashes_alone(body) -> None:
    catalog = build_catalog(
        [module("broken", ("TL301", Recording, body)), module("sound", ("TL302", Recording, yields(Finding("bad"))))]
    )
    got = report(catalog)
    assert [v.verdict for v in got.verdicts] == ["crashed", "failed"]
    assert got.exit_code == 2
    assert any("TL301" in t and "TRAINLINT_DEBUG" in t for t in got.troubles)
    assert [f.code for f in got.findings] == ["TL302"]


def test_the_traceback_is_shown_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINLINT_DEBUG", raising=False)
    catalog = one(raises(ZeroDivisionError("x")))
    assert not any("Traceback" in t for t in report(catalog).troubles)
    monkeypatch.setenv("TRAINLINT_DEBUG", "1")
    assert any("Traceback" in t for t in report(catalog).troubles)


def both(static, at_run) -> Catalog:
    return build_catalog([module("two_ways", ("TL303", SourceFacts, static), ("TL303", Recording, at_run))])


@pytest.mark.parametrize(
    ("static", "at_run", "expected", "messages"),
    [
        (yields(Finding("static")), yields(), "passed", []),
        (yields(Finding("static")), yields(Finding("run")), "failed", ["run"]),
        (yields(Finding("static")), raises(NotApplicable("x")), "not-applicable", []),
        (yields(Finding("static")), raises(NotObserved("x")), "failed", ["static"]),
        (yields(Finding("static")), raises(RuntimeError("x")), "crashed", ["static"]),
        (yields(), raises(NotObserved("x")), "not-observed", []),
        (raises(NotApplicable("x")), raises(NotApplicable("y")), "not-applicable", []),
        (raises(RuntimeError("x")), yields(), "passed", []),
    ],
)
def test_the_evidence_of_the_run_wins(static, at_run, expected: str, messages: list[str]) -> None:
    got = report(both(static, at_run), source=SourceFacts())
    assert [v.verdict for v in got.verdicts] == [expected]
    assert [f.message for f in got.findings] == messages


def test_static_evidence_stands_without_a_run() -> None:
    got = report(both(yields(Finding("static")), yields()), None, source=SourceFacts())
    assert [f.message for f in got.findings] == ["static"]
    # Having looked at the source only is no pass.
    assert report(both(yields(), yields()), None, source=SourceFacts()).verdicts[0].verdict == "not-observed"


# ------------------------------------------------------------------------------------------------------ severity


@pytest.mark.parametrize(
    ("check", "own", "expected"),
    [
        ("error", None, "error"),
        ("error", "info", "info"),
        ("warning", "error", "warning"),
        ("info", "error", "info"),
        ("warning", "warning", "warning"),
    ],
)
def test_a_finding_is_never_stronger_than_its_check(check: str, own: str | None, expected: str) -> None:
    got = report(one(yields(Finding("bad", severity=own)), severity=check))
    assert [f.severity for f in got.findings] == [expected]


@pytest.mark.parametrize(
    ("severity", "fail_on", "code"),
    [
        ("error", "error", 1),
        ("warning", "error", 0),
        ("warning", "warning", 1),
        ("info", "warning", 0),
        ("info", "info", 1),
    ],
)
def test_exit_status(severity: str, fail_on: str, code: int) -> None:
    catalog = one(yields(Finding("bad")), severity=severity)
    assert report(catalog, fail_on=fail_on).exit_code == code
    assert report(catalog, fail_on=fail_on, exit_zero=True).exit_code == 0


def test_exit_zero_does_not_hide_that_the_job_failed() -> None:
    assert report(one(raises(RuntimeError("x"))), exit_zero=True).exit_code == 2
    assert report(one(yields()), troubles=("the config cannot be read",), exit_zero=True).exit_code == 2


def test_unknown_words_are_usage_errors() -> None:
    for options in ({"fail_on": "fatal"}, {"select": ("TL999",)}):
        with pytest.raises(UsageError):
            report(one(yields()), **options)


# ------------------------------------------------------------------------------------------------------ places

CONFIG = ConfigFacts(
    files=("conf/config.yaml",),
    keys=(
        ConfigKey("training.lr", 1e-4, "float", SourceLine("/home/user/project/conf/config.yaml", 14)),
        ConfigKey("training.steps", 10, "int", SourceLine("/home/user/project/conf/config.yaml", 12)),
        ConfigKey("seed", 1, "int", origin="override"),
    ),
)
MODEL = dataclasses.replace(
    RUN,
    parameters=(Parameter(1, "head.weight", (2,), "float32", "cpu", True),),
    optimizers=(
        Optimizer(0, "SGD", at=SourceLine("/opt/lib/train.py", 7), groups=(ParamGroup(0, (1,)),)),
        Optimizer(1, "SGD", at=SourceLine("/opt/lib/train.py", 9), groups=(ParamGroup(0, (2,)),)),
    ),
)


@pytest.mark.parametrize(
    ("at", "file", "line", "key"),
    [
        (Key("training.lr"), "conf/config.yaml", 14, "training.lr"),
        (Key("training"), "conf/config.yaml", 12, "training"),
        (Key("seed"), None, None, "seed"),
        (Key("not.there"), None, None, "not.there"),
        (SourceLine("/home/user/project/src/train.py", 3), "src/train.py", 3, None),
        (SourceLine("/home/user/project2/train.py", 3), "/home/user/project2/train.py", 3, None),
        (SourceLine("train.py", 3), "train.py", 3, None),
        (ParameterName("head.*"), "/opt/lib/train.py", 7, None),
    ],
)
def test_places(at, file: str | None, line: int | None, key: str | None) -> None:
    (found,) = report(one(yields(Finding("bad", at=at))), MODEL, CONFIG).findings
    assert found.location is not None
    assert (found.location.file, found.location.line, found.location.key) == (file, line, key)


def test_what_was_followed_in_the_run_is_not_lost_to_facts_from_the_file() -> None:
    def reads(run: Recording):
        assert run.config is not None
        yield Finding(f"reads {run.config.keys[0].reads}", at=Key("training.lr"))

    tracked = ConfigFacts(tracked_by="yaml.load", keys=(ConfigKey("training.lr", 1e-4, "float", reads=()),))
    (found,) = report(one(reads), dataclasses.replace(RUN, config=tracked), CONFIG).findings
    assert found.message == "reads ()"
    assert found.location is not None
    assert (found.location.file, found.location.line) == ("conf/config.yaml", 14)


def test_an_override_points_at_no_file_even_when_the_run_saw_one() -> None:
    given = ConfigFacts(keys=(ConfigKey("lr", 1, "int", origin="override"),))
    (found,) = report(one(yields(Finding("x", at=Key("lr")))), RUN, given).findings
    assert found.location is not None
    assert (found.location.file, found.location.key) == (None, "lr")


def test_no_place_is_invented() -> None:
    # Two optimizers, and neither holds it.
    (found,) = report(one(yields(Finding("bad", at=ParameterName("tail.weight")))), MODEL, CONFIG).findings
    assert found.location is None


def prints(finding: Finding) -> str:
    (found,) = report(one(yields(finding)), MODEL, CONFIG).findings
    return found.fingerprint


def test_fingerprints_outlive_moved_lines_and_new_numbers() -> None:
    here, there = SourceLine("train.py", 3, "fit"), SourceLine("train.py", 30, "fit")
    assert prints(Finding("loss 1.3", at=here, about="loss")) == prints(Finding("loss 2.7", at=there, about="loss"))
    assert prints(Finding("a", at=Key("training.lr"))) != prints(Finding("a", at=Key("training.steps")))
    assert prints(Finding("a", about="x")) != prints(Finding("a", about="y"))
    got = report(one(yields(Finding("a"), Finding("b"), Finding("c"))))
    assert len({f.fingerprint for f in got.findings}) == 3


# ------------------------------------------------------------------------------------------------------ order

FINDINGS = st.lists(
    st.builds(
        Finding,
        message=st.sampled_from(["a", "b"]),
        at=st.sampled_from([None, Key("training.lr"), Key("seed"), SourceLine("a.py", 3), SourceLine("a.py", 20)]),
        severity=st.sampled_from(["error", "warning", "info", None]),
        about=st.sampled_from(["", "x", "y"]),
        evidence=st.sampled_from([{}, {"n": 1}, {"n": 2.5}]),
    ),
    max_size=8,
)


@given(FINDINGS, st.randoms(use_true_random=False))
def test_any_order_in_the_same_order_out(findings: list[Finding], random) -> None:
    shuffled = list(findings)
    random.shuffle(shuffled)
    first, second = (report(one(yields(*f)), MODEL, CONFIG) for f in (findings, shuffled))
    assert first == second
    ranks = [("error", "warning", "info").index(f.severity) for f in first.findings]
    assert ranks == sorted(ranks)
    assert len({f.fingerprint for f in first.findings}) == len(first.findings)


def test_equal_findings_are_told_once() -> None:
    assert len(report(one(yields(Finding("a"), Finding("a")))).findings) == 1


# ------------------------------------------------------------------------------------------------------ suppressions


def suppressed(findings: list[Finding], *tables: dict, **options) -> Report:
    return report(one(yields(*findings)), MODEL, CONFIG, suppress=tables, **options)


def test_a_suppressed_finding_is_shown_with_its_reason_and_does_not_count() -> None:
    got = suppressed([Finding("bad")], {"code": "TL301", "reason": "known, see the paper"})
    assert [f.suppressed for f in got.findings] == ["known, see the paper"]
    assert got.exit_code == 0
    assert not any("suppression" in note for note in got.notes)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"key": "training.lr"}, True),
        ({"key": "training.*"}, True),
        ({"key": "model.*"}, False),
        ({"file": "conf/*.yaml"}, True),
        ({"about": "lr"}, True),
        ({"about": "other"}, False),
        ({"key": "training.lr", "about": "other"}, False),
    ],
)
def test_a_suppression_may_be_narrow(limits: dict[str, str], fits: bool) -> None:
    got = suppressed([Finding("bad", at=Key("training.lr"), about="lr")], {"code": "TL3", "reason": "r", **limits})
    assert (got.findings[0].suppressed is not None) is fits
    assert got.exit_code == (0 if fits else 1)
    assert any("fits no finding" in note for note in got.notes) is not fits


def test_a_suppression_is_not_stale_when_its_check_could_not_look() -> None:
    table = {"code": "TL301", "reason": "r"}
    catalog = one(raises(NotObserved("x")))
    assert not any("fits no finding" in n for n in report(catalog, suppress=(table,)).notes)


@pytest.mark.parametrize(
    "table",
    [
        {"code": "TL301"},
        {"code": "TL301", "reason": "  "},
        {"reason": "r"},
        {"code": "TL999", "reason": "r"},
        {"code": "TL301", "reason": "r", "kei": "x"},
        {"code": "TL301", "reason": "r", "key": 3},
    ],
)
def test_a_suppression_must_say_what_and_why(table: dict) -> None:
    with pytest.raises(UsageError):
        suppressed([], table)


# ------------------------------------------------------------------------------------------------ how the watch went


def ended(how: str, **fields) -> Recording:
    return Recording(ending=Ending(how, **fields))


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (Ending("exit", exit_code=1, error="ValueError: bad shape"), "ValueError: bad shape"),
        (Ending("exit", exit_code=0), "ended by itself"),
        (Ending("timeout", where=SourceLine("train.py", 8)), "train.py:8"),
        (Ending("backward-cap"), "no optimizer stepped"),
        (Ending("killed", signal="SIGKILL"), "memory"),
        (Ending("interrupted"), "Interrupted"),
        (Ending("not-started", error="no such file: python9"), "python9"),
    ],
)
def test_a_run_without_a_step_is_a_trouble(ending: Ending, words: str) -> None:
    got = report(one(raises(NotObserved("no step"))), Recording(ending=ending), exit_zero=True)
    assert got.exit_code == 2
    assert words in "\n".join(got.troubles)


def test_a_program_that_never_steps_is_explained_by_the_check_that_proves_it() -> None:
    got = report(one(yields(Finding("step is never called"))), ended("backward-cap"))
    assert got.exit_code == 1
    assert got.troubles


def test_the_output_of_a_program_that_died_is_kept() -> None:
    run = ended("exit", exit_code=1, last_output=("Traceback ...", "\x1b[31mValueError\x1b[0m"))
    assert report(one(yields()), run).program_output == ("Traceback ...", "ValueError")
    assert report(one(yields())).program_output == ()


def test_a_short_watch_is_judged_and_said() -> None:
    died = dataclasses.replace(RUN, ending=Ending("exit", exit_code=1, error="RuntimeError: x"))
    wanted = dataclasses.replace(died, program=dataclasses.replace(died.program, steps_wanted=5))
    got = report(one(yields()), wanted)
    assert got.exit_code == 0
    assert "3 of 5 wanted optimizer steps" in got.troubles[0]
    over = dataclasses.replace(wanted, ending=Ending("exit", exit_code=0))
    got = report(one(yields()), over)
    assert got.troubles == ()
    assert any("3 of 5" in note for note in got.notes)


def test_what_the_recorder_could_not_do_is_one_line() -> None:
    run = dataclasses.replace(RUN, problems=(Problem("losses", "X"), Problem("clip", "Y")))
    notes = [n for n in report(one(yields()), run).notes if "recorder" in n]
    assert len(notes) == 1
    assert "losses: X" in notes[0]


def test_an_empty_recording_and_no_facts_at_all_are_judged() -> None:
    catalog = one(yields())
    assert report(catalog, Recording()).exit_code == 2
    assert report(catalog, None).exit_code == 0


def test_a_card_that_cannot_be_drawn_costs_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINLINT_DEBUG", raising=False)
    broken = dataclasses.replace(RUN, optimizers=(Optimizer(0, "SGD", groups=None, steps=3),))  # type: ignore[arg-type]
    got = report(one(yields(Finding("bad"))), broken)
    assert [f.message for f in got.findings] == ["bad"]
    assert any("card could not be drawn" in note for note in got.notes)
