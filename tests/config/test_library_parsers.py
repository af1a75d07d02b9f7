"""Configs that a library's own parser reads: which keys become arguments and which are dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_config_access import HYDRA, watch

ARGUMENTS = """
from dataclasses import dataclass, field
@dataclass
class Arguments:
    lr: float = 0.1
    wd: float = 0.0
    extra: dict = field(default_factory=dict)
@dataclass
class More:
    size: int = 1
"""


def test_trl_drops_what_no_option_is_named_after(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="its parser is what is followed")
    program = f"""
from trl import TrlParser
{ARGUMENTS}
a, b, _ = TrlParser((Arguments, More)).parse_args_and_config(return_remaining_strings=True)
assert (a.lr, a.wd, b.size) == (0.5, 0.3, 4)
"""
    config = "lr: 0.5\nwieght_decay: 0.1\nsize: 4\nwd: 0.2\ntraining: {foo: 1}\n"
    seen = watch(tmp_path, program, "--config", "c.yaml", "--wd", "0.3", config=config)
    assert seen.never == {"wieght_decay", "training.foo"}
    assert {"lr", "size"} <= seen.by_key
    assert seen.how("size") == {"TrlParser"}
    assert (seen.keys["wd"]["value"], seen.keys["wd"]["origin"]) == (0.3, "override")
    assert seen.keys["lr"]["origin"] == "file"


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_transformers_drops_what_it_is_allowed_to(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers", reason="its parser is what is followed")
    program = f"""
from transformers import HfArgumentParser
{ARGUMENTS}
parser = HfArgumentParser((Arguments, More))
a, b = parser.parse_{name[2:]}_file("{name}", allow_extra_keys=True)
assert (a.lr, a.extra, b.size) == (0.5, {{"k": 1}}, 4)
"""
    config = '{"lr": 0.5, "extra": {"k": 1}, "size": 4, "lost": 2}'
    seen = watch(tmp_path, program, config=config, name=name)
    assert seen.never == {"lost"}
    assert seen.by_key == {"lr", "extra.k", "size"}


def test_a_dict_of_the_users_own_may_be_read_by_others(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="its parser is what is followed")
    program = f"""
from transformers import HfArgumentParser
{ARGUMENTS}
given = dict(line.split(": ") for line in open("c.yaml").read().splitlines())
HfArgumentParser(Arguments).parse_dict({{"lr": 0.5, **given}}, allow_extra_keys=True)
print(given["mine"])
"""
    seen = watch(tmp_path, program, config="mine: 3\nwd: 0.2")
    assert set(seen.keys) == {"lr", "wd"}
    assert not seen.never


def test_the_primary_config_of_a_hydra_app_is_no_config_of_its_own(tmp_path: Path) -> None:
    """Read by Hydra, its text is a part: values of other groups come in, interpolations are resolved later."""
    (tmp_path / "conf" / "opt").mkdir(parents=True)
    config = "defaults: [opt: od, _self_]\nseed: 1\nlr: 0.1\nroot: out\n"
    (tmp_path / "conf" / "opt" / "od.yaml").write_text(
        "_target_: collections.OrderedDict\nlr: ${lr}\nwhere: ${root}/x\n"
    )
    seen = watch(tmp_path, HYDRA, "hydra.run.dir=.", config=config, name="conf/main.yaml")
    assert seen.payload["tracked_by"] == "hydra.main"
    assert {"opt.lr", "opt.where", "seed"} <= seen.by_key
    assert (seen.keys["opt.where"]["value"], seen.keys["opt.where"]["origin"]) == ("out/x", "file")
