"""Legal random programs give no finding at warning or above; a fault planted in one is found, by its own check.

Programs are reproducible: ``random_programs.legal(seed)``, ``random_programs.planted(seed, fault)``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import random_programs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from fixture_cases import Case, Outcome, check

#: Seeds of the ordinary test run, and how many more the long one has.
FEW, MANY = 12, 150
LEGAL = [pytest.param(s, marks=[pytest.mark.systems] if s >= FEW else []) for s in range(MANY)]
PLANTED = [
    pytest.param(seed, fault, marks=[pytest.mark.systems] if seed else [], id=f"{fault}-{seed}")
    for fault in random_programs.FAULTS
    for seed in range(4)
]


class Judged:
    """Programs judged in the background, two at a time, in the order in which they are asked for."""

    def __init__(self, pool: ThreadPoolExecutor, sources: list[str]) -> None:
        self._outcomes: dict[str, Future[Outcome]] = {s: pool.submit(self._judge, s) for s in sources}

    @staticmethod
    def _judge(source: str) -> Outcome:
        with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as copy:
            program = Path(there) / "train.py"
            program.write_text(source, encoding="utf-8")
            return check(Case(program, program.name), Path(copy))

    def of(self, source: str) -> Outcome:
        return self._outcomes[source].result()


@pytest.fixture(scope="module")
def judged(request: pytest.FixtureRequest) -> Iterator[Judged]:
    asked = [i.callspec.params for i in request.session.items if "judged" in getattr(i, "fixturenames", ())]  # type: ignore[attr-defined]
    sources = [
        random_programs.planted(p["seed"], p["fault"]) if "fault" in p else random_programs.legal(p["seed"])
        for p in asked
    ]
    pool = ThreadPoolExecutor(max_workers=int(os.environ.get("TRAINLINT_FIXTURE_WORKERS", "2")))
    try:
        yield Judged(pool, list(dict.fromkeys(sources)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.mark.parametrize("seed", LEGAL)
def test_a_legal_program_gives_nothing_at_warning_or_above(seed: int, judged: Judged) -> None:
    source = random_programs.legal(seed)
    outcome = judged.of(source)
    loud = {code for code, severity in outcome.findings if severity != "info"}
    assert outcome.report is not None and not loud, f"{outcome.explain()}\n{source}"
    assert outcome.exit_code == 0, f"{outcome.explain()}\n{source}"


@pytest.mark.parametrize(("seed", "fault"), PLANTED)
def test_a_planted_fault_is_found(seed: int, fault: str, judged: Judged) -> None:
    source = random_programs.planted(seed, fault)
    outcome = judged.of(source)
    wanted = random_programs.FAULTS[fault]
    assert outcome.findings[wanted.code, wanted.severity], f"{outcome.explain()}\n{source}"
    assert outcome.exit_code in ((0,) if wanted.severity == "warning" else (1, 2)), outcome.explain()
