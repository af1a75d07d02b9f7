"""TL309 clipping-never-or-always-binds."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.loop.clipping_never_or_always_binds import clipping_never_or_always_binds as check

from tests.checks.judging import findings, only
from tests.support.build import Run
from trainlint.contract import Key, NotApplicable, NotObserved

NET = {"body.weight": (8, 8), "head.weight": (2, 8)}


def clipped(threshold: float, norms: list[float | None], *, method: str = "norm", scaled: bool = False) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", NET))
    for norm in norms:
        fields: dict[str, Any] = {"parameters": (0, 1), "n_tensors": 2, "with_gradient": 2, "scaled": scaled}
        run.batch().backward().clip(threshold, norm, method, **fields).step(adam).zero(adam)
    return run


def test_never_binds() -> None:
    severity, finding = only(check, clipped(10.0, [0.4, 0.3, 0.35]))
    assert severity == "info"
    assert "never binds: threshold 10; the 3 norms that it met: 0.3 to 0.4" in finding.message
    assert "25 times smaller" in finding.message
    assert "near 0.8" in finding.fix


def test_always_binds() -> None:
    severity, finding = only(check, clipped(1e-3, [40.0, 44.0]))
    assert severity == "info"
    assert "binds at every step: threshold 0.001" in finding.message
    assert finding.evidence["binds"] == "always"


@pytest.mark.parametrize("norms", [[0.4, 3.0], [14.0, 24.0], [8.0, 120.0], [0.9, 0.9]])
def test_a_threshold_among_the_norms_passes(norms: list[float | None]) -> None:
    assert not findings(check, clipped(1.0, norms))


def test_the_config_key_is_named() -> None:
    run = clipped(10.0, [0.4, 0.3]).config(clip_norm=10.0)
    finding = only(check, run)[1]
    assert finding.at == Key("training.clip_norm")
    assert "from training.clip_norm" in finding.message


def test_a_default_is_nobodys_choice() -> None:
    run = clipped(1.0, [0.04, 0.03]).framework("transformers", max_grad_norm=1.0)
    assert not findings(check, run)
    assert findings(
        check, clipped(1.0, [0.04, 0.03]).framework("transformers", max_grad_norm=1.0).config(clip_norm=1.0)
    )
    assert findings(check, clipped(5.0, [0.04, 0.03]).framework("transformers", max_grad_norm=5.0))


def test_infinite_thresholds_and_values_are_not_asked() -> None:
    for run in (clipped(float("inf"), [0.4, 0.3]), clipped(1.0, [None, None], method="value")):
        with pytest.raises(NotApplicable):
            findings(check, run)


def test_one_norm_or_scaled_ones_say_nothing() -> None:
    for run in (
        clipped(10.0, [0.4]),
        clipped(1.0, [3e4, 4e4], scaled=True),
        clipped(1.0, [float("nan"), float("inf")]),
    ):
        with pytest.raises(NotObserved):
            findings(check, run)
