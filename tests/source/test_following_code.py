"""How code is followed: names to files, calls into functions and classes, what branches leave behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from source_programs import HEAD, facts, trace, write

from trainlint.recording import codec
from trainlint.recording.schema import Recording, SourceFacts, SourceTrace
from trainlint.source.facts import read_source
from trainlint.source.project import Project, project_root
from trainlint.source.reach import imported_files, project_files, scripts_of


def calls(found: SourceTrace, *kinds: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """(what, line, kinds of blocks) of the calls."""
    out = [(c.what, c.at.line, tuple(found.blocks[b].kind for b in c.path)) for c in found.calls]
    return [c for c in out if c[0] in kinds]


def test_a_function_is_followed_with_its_objects(tmp_path: Path) -> None:
    found = trace(tmp_path, HEAD + """
def update(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()

for x, y in loader:
    update(optimizer, F.cross_entropy(model(x), y))
""")  # fmt: skip
    ordered = calls(found, "loss", "zero_grad", "backward", "step")
    assert [c[0] for c in ordered] == ["loss", "zero_grad", "backward", "step"]
    assert all(c[2] == ("for",) for c in ordered)
    (optimizer,) = [o for o in found.objects if o.kind == "optimizer"]
    assert {c.on for c in found.calls if c.what in ("zero_grad", "step")} == {(optimizer.number,)}
    assert optimizer.class_name == "SGD"
    assert [o.class_name for o in found.objects if o.number in optimizer.of] == ["Sequential"]


def test_conditions_and_early_ends(tmp_path: Path) -> None:
    found = trace(tmp_path, HEAD + """
for i, (x, y) in enumerate(loader):
    loss = F.cross_entropy(model(x), y)
    if loss.isnan():
        continue
    loss.backward()
    if i % 4 == 0:
        optimizer.step()
    else:
        optimizer.zero_grad()
""")  # fmt: skip
    assert calls(found, "backward", "step", "zero_grad") == [
        ("backward", 13, ("for", "unless")),
        ("step", 15, ("for", "unless", "if")),
        ("zero_grad", 17, ("for", "unless", "else")),
    ]
    assert [b.counts for b in found.blocks if b.kind == "if" and b.text.startswith("i %")] == [True]


def test_what_is_always_so_is_no_condition(tmp_path: Path) -> None:
    found = trace(tmp_path, HEAD + """
DEBUG = False
def step(accumulate=False):
    if accumulate:
        optimizer.zero_grad()
    optimizer.step()
while True:
    if DEBUG:
        model.eval()
    step()
""")  # fmt: skip
    assert calls(found, "eval", "zero_grad", "step") == [("step", 13, ("while",))]


def test_branches_join(tmp_path: Path) -> None:
    found = trace(tmp_path, """
import torch
from torch import nn
model = nn.Linear(3, 1)
if fancy():
    optimizer = torch.optim.AdamW(model.parameters())
else:
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
optimizer.step()
""")  # fmt: skip
    stepped = next(c for c in found.calls if c.what == "step").on[0]
    (joined,) = [o for o in found.objects if o.number == stepped]
    assert set(joined.class_name.split(" or ")) == {"AdamW", "SGD"}
    assert len(joined.details["alternatives"]) == 2  # type: ignore[arg-type]


def test_classes_of_other_files_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("from .small import Small as Net\n")
    (tmp_path / "nets" / "small.py").write_text(
        "import torch.nn as N\nclass Small(N.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.end = N.Softmax(-1)\n    def forward(self, x):\n        return self.end(x)\n"
    )
    found = trace(tmp_path, """
import torch
from torch.nn import CrossEntropyLoss
import nets
criterion = CrossEntropyLoss(reduction="sum")
net = nets.Net()
loss = criterion(net(torch.randn(3, 4)), target())
""")  # fmt: skip
    (loss,) = [c for c in found.calls if c.what == "loss"]
    assert (loss.details["function"], loss.details["made_by"], loss.details["reduction"]) == (
        "cross_entropy",
        "softmax",
        "sum",
    )
    assert str(loss.details["made_file"]).endswith("small.py")


def test_a_trainer_class_and_its_base(tmp_path: Path) -> None:
    write(tmp_path, base="""
    class Base:
        def __init__(self, model, optimizer):
            self.model, self.optimizer = model, optimizer
        def fit(self, loader):
            for batch in loader:
                self.step(batch)
    """)  # fmt: skip
    found = trace(tmp_path, HEAD + """
from base import Base
class Trainer(Base):
    def __init__(self, *args):
        super().__init__(*args)
    def step(self, batch):
        self.optimizer.zero_grad()
        self.model(batch).mean().backward()
        self.optimizer.step()
Trainer(model, optimizer).fit(loader)
""")  # fmt: skip
    assert calls(found, "zero_grad", "forward", "backward", "step") == [
        ("zero_grad", 14, ("for",)),
        ("forward", 15, ("for",)),
        ("backward", 15, ("for",)),
        ("step", 16, ("for",)),
    ]


def test_gradients_off(tmp_path: Path) -> None:
    found = trace(tmp_path, HEAD + """
@torch.no_grad()
def look(x):
    return model(x)
look(x)
with torch.inference_mode():
    model(x)
with torch.set_grad_enabled(training):
    model(x)
model(x)
""")  # fmt: skip
    assert [c.details["grad"] for c in found.calls if c.what == "forward"] == [False, False, None, True]


def test_functions_that_nobody_calls_are_followed_by_themselves(tmp_path: Path) -> None:
    script = write(tmp_path, train="""
    def train_one_epoch(model, optimizer, loader):
        for x in loader:
            optimizer.zero_grad()
            loss = model(x).mean()
            loss.backward()
            optimizer.step()
    """)  # fmt: skip
    (found,) = facts(script).traces or ()
    assert found.entry.function == "train_one_epoch"
    assert {o.kind: o.known for o in found.objects} == {"module": False, "optimizer": False}


def test_lightning_hooks(tmp_path: Path) -> None:
    script = write(tmp_path, train="""
    import lightning as L
    import torch
    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
        def training_step(self, batch, i):
            return torch.nn.functional.mse_loss(self.layer(batch), batch)
        def validation_step(self, batch, i):
            self.layer(batch)
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())
    """)  # fmt: skip
    (found,) = [t for t in facts(script).traces or () if t.entry.function == "Net"]
    assert [c[0] for c in calls(found, "built", "loss", "objective")] == ["built", "loss", "objective"]
    assert [c.details["grad"] for c in found.calls if c.what == "forward"] == [True, False]


def test_nothing_breaks_it(tmp_path: Path) -> None:
    programs = {
        "syntax": "def f(:\n    loss.backward()",
        "recursion": "def f(x):\n    x.backward()\n    return f(f(x))\nf(f)",
        "deep": "x = " + "(" * 90 + "1" + ")" * 90 + "\nx.backward()",
        "star": "a, *b = c\n[*d] = e\nf(*g, **h).backward()\n{**i}\n",
        "match": "match x:\n    case [a, *_]:\n        a.backward()\n    case _:\n        pass\n",
        "class": "class A(A, B()):\n    x: int = 1\n    def backward(self): super().backward()\nA().backward()\n",
        "async": "async def f():\n    async for x in y:\n        await x.backward()\n    async with z as w: w.step()\n",
        "walrus": "while (loss := f()): loss.backward()\n",
        "try": "try:\n    x.backward()\nexcept* ValueError:\n    pass\nfinally:\n    y.step()\n",
    }
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
        read_source([str(tmp_path / f"{name}.py")])


def test_long_code_is_given_up_quietly(tmp_path: Path) -> None:
    body = "".join(f"x{i} = f(x{i - 1}).g(h, x{i})\n" for i in range(1, 30_000))
    path = tmp_path / "long.py"
    path.write_text("import torch\n" + body + "loss.backward()\n")
    assert read_source([str(path)]).traces == ()


def test_facts_survive_saving(tmp_path: Path) -> None:
    source = facts(write(tmp_path, train=HEAD + "for x, y in loader:\n    F.cross_entropy(model(x), y).backward()\n"))
    again = codec.loads(codec.dumps(dataclasses.replace(Recording(), source=source))).source
    assert isinstance(again, SourceFacts)
    assert again == source


# ------------------------------------------------------------------------------------------------ which files


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("python", "train.py", "--lr", "1"), "train.py"),
        (("torchrun", "--nproc-per-node", "2", "train.py"), "train.py"),
        (("accelerate", "launch", "train.py"), "train.py"),
        (("python", "-m", "app.train"), "app/train.py"),
        (("app.train:main",), "app/train.py"),
        (("train.py:main",), "train.py"),
        (("python", "gone.py"), None),
        (("my-console-script", "--config", "c.yaml"), None),
    ],
)
def test_the_script_of_a_command(tmp_path: Path, words: tuple[str, ...], expected: str | None) -> None:
    (tmp_path / "app").mkdir()
    for name in ("train.py", "app/train.py"):
        (tmp_path / name).write_text("")
    assert scripts_of(words, tmp_path) == ((str(tmp_path / expected),) if expected else ())


def test_imports_are_followed_within_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    for folder in ("scripts", "src/app/models", "src/other", ".venv/lib"):
        (tmp_path / folder).mkdir(parents=True)
    texts = {
        "scripts/train.py": "import torch, json\nfrom app.models import net\nimport util",
        "scripts/util.py": "import os",
        "src/app/__init__.py": "",
        "src/app/models/__init__.py": "",
        "src/app/models/net.py": "from ..data import load\nfrom . import parts",
        "src/app/models/parts.py": "",
        "src/app/data.py": "import app.models.net",
        "src/other/unused.py": "",
        ".venv/lib/hidden.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = imported_files([str(tmp_path / "scripts" / "train.py")], Project())
    assert {str(Path(f).relative_to(tmp_path)) for f in found} == {
        "scripts/train.py",
        "scripts/util.py",
        "src/app/models/__init__.py",
        "src/app/models/net.py",
        "src/app/models/parts.py",
        "src/app/data.py",
    }
    assert project_root(tmp_path / "src" / "app" / "models") == str(tmp_path)
    own = {str(Path(f).relative_to(tmp_path)) for f in project_files(tmp_path)}
    assert "src/other/unused.py" in own
    assert ".venv/lib/hidden.py" not in own
