"""The text report: what must be readable, where, and what must never reach a terminal."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
import report_samples as samples
from rich.console import Console

from trainlint.report.model import CardLine, Curve, Location, Report, RunCard, Verdict
from trainlint.report.text import render_text


def shown(report: Report, width: int = 80, encoding: str = "utf-8", verbose: bool = False, **options: object) -> str:
    """What a stream of this encoding receives; strict, so that a character it lacks raises."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    render_text(report, Console(file=stream, width=width, **options), verbose=verbose)  # type: ignore[arg-type]
    return raw.getvalue().decode(encoding)


def with_findings(*findings: object) -> Report:
    return dataclasses.replace(samples.EMPTY, findings=tuple(findings))  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("report", [samples.FULL, samples.DIED, samples.EMPTY], ids=["full", "died", "empty"])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_the_console(report: Report, width: int, encoding: str, verbose: bool) -> None:
    for line in shown(report, width, encoding, verbose).splitlines():
        assert len(line) <= width, line


def test_the_card_opens_the_report_and_the_worst_comes_first() -> None:
    text = shown(samples.FULL)
    order = [
        "this run",
        "weight decay",
        "learning rate by optimizer step",
        "error TL104",
        "warning TL204",
        "info TL404",
    ]
    places = [text.index(part) for part in [*order, "9 checks: 5 passed"]]
    assert places == sorted(places)


def test_a_disagreement_reads_without_colour() -> None:
    lines = shown(samples.FULL).splitlines()
    decay = next(line for line in lines if "weight decay" in line)
    assert decay.startswith(" ≠ ")
    assert re.search(r"0\s+≠\s+0\.0005", decay)
    rate = next(line for line in lines if "learning rate " in line)
    assert not rate.startswith(" ≠")
    assert re.search(r"3e-05, constant\s+=\s+3e-05", rate)


def test_a_log_without_colour_has_no_escape_sequence() -> None:
    assert "\x1b" not in shown(samples.FULL)


def test_colour_when_forced_and_not_when_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;31m" in shown(samples.FULL, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3[1-7]", shown(samples.FULL, force_terminal=True))


def test_numbers_and_paths_are_not_broken() -> None:
    for width in (80, 100, 200):
        text = shown(samples.FULL, width)
        for whole in ("conf/config.yaml:14", "training.weight_decay", "0.09812", "/data/runs/tahoe/checkpoints"):
            assert whole in text, (width, whole)


def test_a_path_longer_than_the_line_keeps_its_end() -> None:
    place = Location("/very/long/" + "x" * 60 + "/models/" + "y" * 10 + "/transition.py", 211)
    finding = dataclasses.replace(samples.finding(), location=place)
    assert "…/models/yyyyyyyyyy/transition.py:211" in shown(with_findings(finding), 60)


def test_findings_of_one_check_that_say_the_same_are_told_once() -> None:
    text = shown(samples.FULL)
    assert text.count("Nothing read") == 1
    assert "17 findings" in text
    for i in range(17):
        assert f"training.key_{i}:{20 + i}" in text


def test_findings_of_one_check_that_differ_keep_their_message() -> None:
    what = ("is read and overwritten", "is never read", "goes into **kwargs", "is read by a dump only", "is unknown")
    text = shown(with_findings(*(samples.finding(message=f"The key {w}.", key=f"k{i}") for i, w in enumerate(what))))
    for i, words in enumerate(what):
        assert words in text
        assert f"k{i}" in text


def test_verbose_shows_each_finding_in_full() -> None:
    assert shown(samples.FULL, verbose=True).count("Nothing read") == 17


def test_a_finding_fits_on_one_screen() -> None:
    huge = samples.finding(
        message="word " * 3000, evidence={f"key{i}": list(range(500)) for i in range(200)}, fix="do this " * 900
    )
    text = shown(with_findings(huge))
    assert len(text.splitlines()) < 45
    assert "--verbose" in text


def test_user_strings_cannot_talk_to_the_terminal() -> None:
    nasty = "\x1b]0;title\x07\x1b[2J[bold]not markup[/bold] [link=x]\x9b31m \u202egnp.exe\x00"
    report = dataclasses.replace(
        samples.DIED,
        card=RunCard({nasty: (CardLine(nasty, nasty, nasty, False, nasty),)}, (Curve(nasty, ((0, 1.0),), "observed"),)),
        verdicts=(Verdict("TL101", nasty, "not-observed", nasty),),
        findings=(samples.finding(message=nasty, key=nasty, file=nasty, fix=nasty, evidence={nasty: nasty}),),
        prevented=samples.PREVENTED[:0],
        troubles=(nasty,),
        notes=(nasty,),
        program_output=(nasty,),
    )
    text = shown(report, 120)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "[bold]not markup[/bold]" in text
    assert "title" not in text


def test_undecodable_bytes_in_a_path_are_shown_escaped() -> None:
    assert "caf\\udce9.yaml" in shown(with_findings(samples.finding(file="caf\udce9.yaml")))


def test_a_progress_bar_keeps_what_was_drawn_last() -> None:
    text = shown(samples.DIED)
    assert "loading 100%" in text
    assert "10%\r" not in text
    assert "│ loading 100%" in text


def test_a_dead_program_is_told_first_with_its_traceback() -> None:
    text = shown(samples.DIED)
    assert text.startswith("✗ The program died")
    assert text.index("No module named 'flash_attn'") < text.index("this run")
    assert '│   File "/home/me/train.py", line 3' in text


def test_reasons_of_what_was_not_seen_are_given_once() -> None:
    text = shown(samples.DIED, 200)
    assert text.count("the program died before a step") == 1
    assert "TL200 TL201 TL202 TL203 TL204: the program died" in text
    assert "TL205: KeyError" in text


def test_coverage_line_of_a_clean_run() -> None:
    report = dataclasses.replace(samples.EMPTY, verdicts=(Verdict("TL101", "unused-config-key", "passed"),))
    assert shown(report) == "1 check: 1 passed\nNo findings.\n"


def test_suppressed_findings_are_counted_and_told_on_demand() -> None:
    assert "1 suppressed (TL205)" in shown(samples.FULL)
    assert "the teacher stays frozen" not in shown(samples.FULL)
    assert "the teacher stays frozen" in shown(samples.FULL, verbose=True)


# ------------------------------------------------------------------------------------------------ the curve


def plot(*curves: Curve, width: int = 60, encoding: str = "utf-8") -> list[str]:
    report = dataclasses.replace(samples.EMPTY, card=RunCard({}, tuple(curves)))
    text = shown(report, width, encoding).splitlines()
    start = next(i for i, line in enumerate(text) if "learning rate by" in line) + 1
    return text[start : text.index("", start)]


def test_the_curve_spans_the_planned_run() -> None:
    lines = plot(Curve("group 0", samples.cosine(3e-4, 100, 1000), "projected"))
    assert lines[0].strip().startswith("0.0003 ┤")
    assert any(line.strip().startswith("0 ┤") for line in lines)
    axis = next(line for line in lines if "└" in line)
    assert axis.rstrip().endswith("1,000")
    assert " 500 " in axis
    assert "0 → 0.0003 at step 100 → 0" in lines[-1]


def test_the_curve_in_ascii_falls_and_rises_where_it_should() -> None:
    lines = plot(Curve("all", ((0, 0.0), (50, 1.0), (100, 0.0)), "projected"), encoding="ascii")
    rows = [line.split("|", 1)[1] for line in lines if "|" in line]
    assert rows[0].index("*") == pytest.approx(len(rows[-1].rstrip()) / 2, abs=4)
    assert rows[-1].lstrip().startswith("*")
    assert all(character < "\x80" for line in lines for character in line)


def test_several_groups_are_told_apart_without_colour() -> None:
    lines = plot(
        Curve("backbone", ((0, 1e-5), (100, 1e-5)), "projected"),
        Curve("head", ((0, 1e-3), (100, 1e-3)), "projected"),
    )
    assert lines[0].endswith("B")
    assert any(line.endswith("A") for line in lines[1:8])
    assert any("A ─  backbone, projected: constant at 1e-5" in line for line in lines)
    assert any("B ─  head, projected: constant at 0.001" in line for line in lines)


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0, 0.0),),
        ((0, 0.0), (1, 0.0)),
        ((5, 1e-3),),
        ((0, float("nan")), (1, float("inf"))),
        ((0, -1.0), (10, 1.0)),
        ((0, 1e-30), (10**9, 1e30)),
        tuple((i, float(i % 2)) for i in range(5000)),
    ],
)
@pytest.mark.parametrize("kind", ["observed", "projected", "configured"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_odd_curves_are_drawn_or_left_out(points: tuple[tuple[int, float], ...], kind: str, encoding: str) -> None:
    for line in plot(Curve("g", points, kind), encoding=encoding, width=50):
        assert len(line) <= 50


def test_a_rate_of_zero_has_no_invented_scale() -> None:
    lines = plot(Curve("all", ((1, 0.0), (3, 0.0)), "observed"))
    assert [line.split("┤")[0].strip() for line in lines if "┤" in line] == ["0"]


def test_watched_steps_alone_are_not_called_the_planned_run() -> None:
    report = dataclasses.replace(samples.EMPTY, card=RunCard({}, (Curve("all", ((1, 0.1), (3, 0.1)), "observed"),)))
    assert "learning rate by optimizer step, in the watched steps" in shown(report)
    assert "in the watched steps" not in shown(samples.FULL)


def test_a_note_that_holds_for_all_curves_is_said_once() -> None:
    lines = plot(*(Curve(f"group {i}", ((0, 1.0 + i), (9, 1.0)), "projected", "called once") for i in range(3)))
    assert sum("called once" in line for line in lines) == 1


def test_too_many_groups_are_counted() -> None:
    lines = plot(*(Curve(f"group {i}", ((0, 1.0 + i), (9, 1.0)), "projected") for i in range(9)))
    assert "and 3 more, not drawn" in lines[-1]
