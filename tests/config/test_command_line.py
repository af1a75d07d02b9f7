"""Settings on a launch command."""

from __future__ import annotations

import pytest

from trainlint.config.command_line import command_line_keys


def given(command: str) -> dict[str, object]:
    return {k.path: k.value for k in command_line_keys(command.split())}


def test_hydra_overrides() -> None:
    found = given("state tx train model=large training.lr=3e-5 +training.lr_scheduler=cosine ++seed=7 hydra.run.dir=.")
    assert found == {"model": "large", "training.lr": 3e-5, "training.lr_scheduler": "cosine", "seed": 7}
    meanings = {
        k.path: k.meaning for k in command_line_keys(["app", "training.lr=3e-5", "+training.lr_scheduler=cosine"])
    }
    assert meanings == {"training.lr": "learning_rate", "training.lr_scheduler": "schedule"}


def test_flags() -> None:
    found = given("python train.py --learning-rate 3e-4 --betas 0.9 0.95 --no-amp --wd=0.1 --verbose --out /x --lr -1")
    assert found == {
        "learning_rate": 3e-4, "betas": (0.9, 0.95), "amp": False, "wd": 0.1, "verbose": True, "out": "/x", "lr": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node 2 train.py --lr 0.1",
        "accelerate launch --mixed_precision bf16 train.py --lr 0.1",
        "python -m torch.distributed.run --nproc_per_node 2 train.py --lr 0.1",
        "python -u -m package.train --lr 0.1",
        "env CUDA_VISIBLE_DEVICES=0 python train.py --lr 0.1",
        "python train.py --lr 0.5 --lr 0.1",
    ],
)
def test_only_the_programs_own_words_count(command: str) -> None:
    assert given(command) == {"lr": 0.1}


def test_secrets_on_the_command_line() -> None:
    (key,) = command_line_keys(["python", "train.py", "--api-key", "abc123"])
    assert (key.value, key.secret) == ("<secret>", True)


def test_nothing_given() -> None:
    assert command_line_keys([]) == ()
    assert command_line_keys(["python", "train.py"]) == ()
