"""Reading a timeline: which backwards belong to which optimizer step."""

from __future__ import annotations

from tests.support.build import Run
from trainlint.recording.timeline import accumulation


def test_optimizers_that_take_turns() -> None:
    run = Run()
    generator = run.optimizer("Adam", run.module("G", {"w": (8, 8)}))
    critic = run.optimizer("Adam", run.module("D", {"w": (8, 8)}))
    for _ in range(3):
        for _ in range(2):
            run.batch().backward().backward().step(critic).zero(critic)
        run.backward().step(generator).zero(generator)
    seen = run.recording()
    assert [accumulation(seen, o) for o in (generator, critic)] == [1, 2]


def test_optimizers_of_one_loss() -> None:
    run = Run()
    body = run.optimizer("Adam", run.module("Body", {"w": (8, 8)}))
    head = run.optimizer("SGD", run.module("Head", {"w": (8, 8)}))
    for _ in range(3):
        run.batch().backward().batch().backward().step(body).step(head).zero(body).zero(head)
    seen = run.recording()
    assert [accumulation(seen, o) for o in (body, head)] == [2, 2]
