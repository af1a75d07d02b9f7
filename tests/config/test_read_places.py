"""Which lines could read a config key."""

from __future__ import annotations

import ast

from trainlint.config.read_places import read_places

SOURCE = """\
import torch
from x import lib
group = 3
train_cfg = cfg["training"]
either = cfg["a"]
either = cfg["b"]
def f(c, train, self):
    c["lr"]; c.get("lr", 1); getattr(c, "lr"); "lr" in c
    torch.lr; lib.sub.lr; group["lr"]; optimizer.param_groups[0]["lr"]; self.lr; trainer.lr; self.trainer.lr
    train_cfg["lr"]; either["lr"]; cfg["optim"].lr; self.cfg.stage.lr; self.hparams.lr; cfg.get("later")["lr"]
    c["lr"] = 3; self.lr = 3; g(lr=3)
    if c["on"]:
        x = c["lr"]
    y = c.on and c.lr
    z = c.lr if c["q"] else 0
"""


def places(text: str) -> list[tuple[int, str, tuple[int, ...]]]:
    found = read_places("t.py", text, ast.parse(text), ["lr"]).get("lr", [])
    assert all(r.at.file == "t.py" for r in found)
    return [(r.at.line, r.section, r.conditions) for r in found]


def test_what_reads_a_config() -> None:
    found = places(SOURCE)
    assert [p for p in found if p[0] == 8] == [(8, "", ())] * 4
    assert not [p for p in found if p[0] in (9, 11)]
    assert [p[1] for p in found if p[0] == 10] == ["training", "", "optim", "stage", "", "later"]
    assert [p for p in found if p[0] > 11] == [(13, "", (12,)), (14, "", (14,)), (15, "", (15,))]


def test_an_object_that_takes_the_whole_config() -> None:
    assert not places("class A:\n    def f(self):\n        return self.lr\n")
    copied = "class A:\n    def f(self, cfg):\n        self.__dict__.update(cfg)\n        return self.lr\n"
    assert places(copied) == [(4, "", ())]
