"""Whether ``**section`` stays in the program's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainlint.config.handed_on import OwnCode

TRAIN = """\
import torch
from model import Net, Base as Other
from helpers import build, wrap
net = Net(
    **cfg)
build(**cfg)
wrap(**cfg)
torch.optim.AdamW(**cfg)
Other(**cfg)
every = {**cfg}
Unknown(**cfg)
"""
MODEL = """\
class Base(nn.Module):
    def __init__(self, width, **kwargs):
        super().__init__()
        self.width = kwargs.get("width", 1) if "width" in kwargs else kwargs["w"]
class Net(Base):
    def __init__(self, **kwargs):
        super().__init__(3, **kwargs)
"""
HELPERS = """\
def build(a, b):
    pass
def wrap(**settings):
    return {}
"""


def kept(folder: Path, line: int, **changed: str) -> bool:
    files = []
    for name, text in {"train": TRAIN, "model": MODEL, "helpers": HELPERS, **changed}.items():
        (folder / f"{name}.py").write_text(text)
        files.append(str(folder / f"{name}.py"))
    return OwnCode(files).keeps(str(folder / "train.py"), line)


def test_the_programs_own_constructors_and_functions(tmp_path: Path) -> None:
    assert [line for line in range(1, 13) if kept(tmp_path, line)] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "body",
    [
        "return torch.optim.AdamW(p, **settings)",
        "self.settings = settings",
        "for k, v in settings.items():\n        setattr(self, k, v)",
        "return Config(settings)",
        "self.__dict__.update(locals())",
        "return settings[name]",
    ],
)
def test_what_may_hand_them_on(tmp_path: Path, body: str) -> None:
    helpers = f"def build(a, b):\n    pass\ndef wrap(**settings):\n    {body}\n"
    assert not kept(tmp_path, 7, helpers=helpers)


def test_a_base_that_is_a_librarys(tmp_path: Path) -> None:
    assert not kept(tmp_path, 4, model=MODEL.replace("class Base(nn.Module)", "class Base(PreTrainedModel)").replace(
        "super().__init__()", "super().__init__(**kwargs)"))  # fmt: skip
    assert kept(tmp_path, 4, model=MODEL.replace("super().__init__()", "super().__init__(**kwargs)"))
    assert not kept(tmp_path, 4, other="class Net:\n    pass\n"), "two definitions of the name"
