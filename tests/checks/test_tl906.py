"""TL906: batch norm over few samples."""

from __future__ import annotations

from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.data.tiny_batch_norm import tiny_batch_norm

from tests.support.build import Run, at
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema.samples import NormBatch, Samples


def train(**loader: Any) -> Run:
    run = Run()
    run.optimizer("SGD", run.module("Net", {"weight": (4, 4)}))
    run.loader(**{"batches": 10, "batch_size": 8, "samples": 80, "drop_last": False, "at": at(9), **loader})
    return run.batch().backward().step()


def norm(samples: int, values: int, calls: int = 3, module: str = "body.1") -> NormBatch:
    return NormBatch(0, module, "BatchNorm1d", samples, values, calls)


def test_two_samples() -> None:
    seen = Samples(norms=(norm(2, 2), norm(2, 2, module="body.4")))
    severity, finding = only(tiny_batch_norm, train(), samples=seen)
    assert severity == "warning"
    assert "body.1 and 1 more batch norm" in finding.message and "2 samples" in finding.message


def test_one_large_image() -> None:
    assert only(tiny_batch_norm, train(), samples=Samples(norms=(norm(1, 4096),)))[0] == "info"


@pytest.mark.parametrize(
    "norms",
    [(norm(8, 8),), (norm(256, 256),), (norm(8, 8, calls=9), norm(2, 2, calls=1))],
    ids=["batch", "points", "one short batch"],
)
def test_silent(norms: tuple[NormBatch, ...]) -> None:
    assert not findings(tiny_batch_norm, train(), samples=Samples(norms=norms))


@pytest.mark.parametrize(
    ("loader", "values", "count"),
    [
        ({"samples": 81, "batches": 11}, 8, 1),
        ({"samples": 82, "batches": 11}, 8, 0),
        ({"samples": 81, "batches": 10, "drop_last": True}, 8, 0),
        ({"samples": 81, "batches": 11}, 8 * 49, 0),
    ],
    ids=["single", "two", "dropped", "images"],
)
def test_the_last_batch(loader: dict[str, Any], values: int, count: int) -> None:
    assert len(findings(tiny_batch_norm, train(**loader), samples=Samples(norms=(norm(8, values),)))) == count


def test_without_norms() -> None:
    with pytest.raises(NotApplicable):
        findings(tiny_batch_norm, train(), samples=Samples())
    run = Run()
    run.module("Net", {"weight": (4, 4)}, wrappers=("OptimizedModule",))
    with pytest.raises(NotObserved):
        findings(tiny_batch_norm, run, samples=Samples())
