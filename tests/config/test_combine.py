"""What the files say and what the run did, in one; names in the source; what the source says of rates."""

from __future__ import annotations

from pathlib import Path

from trainlint.config.combine import combine, same_value
from trainlint.config.load import load_config
from trainlint.config.mentions import find_mentions, is_own_file
from trainlint.config.printing import printing_lines
from trainlint.recording.schema import (
    ConfigFacts,
    ConfigKey,
    ConfigRead,
    Framework,
    Recording,
    RootModule,
    SourceLine,
    Submodule,
)
from trainlint.source.facts import read_source


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------------------------------- combine


def test_values_of_the_run_lines_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "training:\n  lr: 1e-3\n  wd: 0.1\n  steps: 5\nother: 1\n")
    static = load_config(Path(file)).facts
    read = ConfigRead("item", SourceLine("/p/train.py", 3))
    tracked = ConfigFacts(
        files=(file,),
        kind="yaml",
        tracked_by="yaml.load in train.py",
        keys=(
            ConfigKey("training.lr", 0.001, "float", reads=(read,)),
            ConfigKey("training.wd", 0.2, "float", origin="override", reads=()),
            ConfigKey("training.steps", 5, "int", reads=()),
            ConfigKey("added", 1, "int", origin="override", reads=()),
        ),
    )
    facts = combine(static, tracked)
    assert facts is not None
    keys = {k.path: k for k in facts.keys}
    assert keys["training.lr"].at == SourceLine(file, 2), "1e-3 as text is 0.001"
    assert (keys["training.lr"].value, keys["training.lr"].meaning) == (0.001, "learning_rate")
    assert (keys["training.wd"].value, keys["training.wd"].origin, keys["training.wd"].at) == (0.2, "override", None)
    assert keys["other"].reads is None, "the program was never seen to hold it"
    assert keys["added"].at is None
    assert [k.path for k in facts.keys] == ["training.lr", "training.wd", "training.steps", "other", "added"]


def test_the_command_line_alone() -> None:
    facts = combine(None, None, command=["python", "train.py", "--lr", "0.1"])
    assert facts is not None
    assert [(k.path, k.origin, k.reads) for k in facts.keys] == [("lr", "override", None)]
    assert combine(None, None, command=["python", "train.py"]) is None


def test_a_group_choice_is_not_a_key() -> None:
    tracked = ConfigFacts(keys=(ConfigKey("model.size", 3, "int", reads=()),), tracked_by="hydra.main")
    facts = combine(None, tracked, command=["app", "model=large", "model.size=3"])
    assert facts is not None
    assert [(k.path, k.origin) for k in facts.keys] == [("model.size", "override")]


def test_a_flag_named_by_the_whole_path_wins_over_a_file_that_was_not_followed(tmp_path: Path) -> None:
    static = load_config(Path(write(tmp_path, "c.yaml", "trainer:\n  max_epochs: 3\nlr: 1\n"))).facts
    facts = combine(static, None, command=["python", "main.py", "fit", "--trainer.max_epochs=1", "--lr=2"])
    assert facts is not None
    keys = {k.path: k for k in facts.keys}
    assert (keys["trainer.max_epochs"].value, keys["trainer.max_epochs"].origin) == (1, "override")
    assert keys["trainer.max_epochs"].meaning == "epochs"
    assert keys["lr"].value == 1, "a short flag may be another setting"


def test_lines_of_a_hydra_composition(tmp_path: Path) -> None:
    main = write(tmp_path, "conf/config.yaml", "defaults: [optim: adam]\nseed: 1\n")
    group = write(tmp_path, "conf/optim/adam.yaml", "# the optimizer\nlr: 0.1\n")
    everywhere = write(tmp_path, "conf/experiment/big.yaml", "# @package _global_\n\nmodel:\n  width: 8\n")
    tracked = ConfigFacts(
        files=(main, group, everywhere),
        kind="hydra",
        tracked_by="hydra.main",
        keys=tuple(ConfigKey(p, v, "int", reads=()) for p, v in (("seed", 1), ("optim.lr", 0.1), ("model.width", 8))),
    )
    facts = combine(None, tracked)
    assert facts is not None
    assert [(k.at.file, k.at.line) for k in facts.keys if k.at] == [(main, 2), (group, 2), (everywhere, 4)]


def test_printing_a_key_is_no_use_of_it(tmp_path: Path) -> None:
    source = write(tmp_path, "t.py", 'lr = 1\nprint("wd", cfg["wd"])\n')
    reads = (ConfigRead("item", SourceLine(source, 2)),)
    facts = combine(None, ConfigFacts(keys=(ConfigKey("wd", 1, "int", reads=reads),)))
    assert facts is not None
    assert [(r.how, r.by) for r in facts.keys[0].reads or ()] == [("bulk", "print")]


def test_equal_settings() -> None:
    assert same_value("1e-3", 0.001)
    assert same_value((0.9, "1e-3"), (0.9, 0.001))
    assert not same_value(True, 1)
    assert not same_value("a", "b")


# ------------------------------------------------------------------------------------------- mentions


def test_where_a_name_stands(tmp_path: Path) -> None:
    own = write(
        tmp_path,
        "train.py",
        '"""about in_docstring"""\n'
        "from torch.optim import only_imported\n"
        "x = 1  # in_comment\n"
        'cfg["quoted"]; cfg.attribute; f(keyword=1)\n'
        'for s in ("train", "val"):\n    print(cfg[f"{s}_freq"], cfg["lr_" + s])\n',
    )
    library = write(tmp_path, "lib/python3.11/site-packages/torch/a.py", "def f(in_library): pass\n")
    names = ["in_docstring", "only_imported", "in_comment", "quoted", "attribute", "keyword", "val_freq", "lr_train",
             "in_library", "nowhere", "quote"]  # fmt: skip
    found = {m.name: m for m in find_mentions(names, [own, library, str(tmp_path / "gone.py")])}
    assert [n for n in names if not found[n].files] == [
        "in_docstring",
        "only_imported",
        "in_comment",
        "nowhere",
        "quote",
    ]
    assert [n for n in names if found[n].access] == ["quoted", "attribute", "val_freq", "lr_train"]
    assert found["in_library"].own is False


def test_an_attribute_that_an_object_sets_itself_is_no_mention(tmp_path: Path) -> None:
    model = (
        "class Net:\n    def __init__(self, size):\n        self.loss = mse\n        self.size = size\n"
        "    def step(self):\n        return self.loss(self.width, self.depth)\n"
        "    def f(self):\n        self.depth = 1\n"
    )
    own = write(tmp_path, "model.py", model)
    other = write(tmp_path, "other.py", "trainer.depth\n")
    found = {m.name: bool(m.files) for m in find_mentions(["loss", "size", "width", "depth"], [own, other])}
    assert found == {"loss": False, "size": True, "width": True, "depth": True}
    copying = write(tmp_path, "base.py", "for k, v in cfg.items():\n    setattr(self, k, v)\n")
    assert find_mentions(["loss"], [own, copying])[0].files


def test_whose_file_it_is() -> None:
    assert is_own_file("/home/me/project/train.py")
    assert is_own_file("/venv/lib/python3.11/site-packages/state/tx/train.py")
    assert not is_own_file("/venv/lib/python3.11/site-packages/torch/optim/adam.py")
    assert not is_own_file("/usr/lib/python3.11/argparse.py")


def test_statements_that_only_show(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "t.py",
        'print(cfg["a"], f"{cfg.b:.2f}")\n'
        'logger.info("%s",\n            str(cfg.c))\n'
        'print(train(cfg["d"]))\n'
        'lr = cfg["e"]; print(lr)\n'
        'if cfg["f"]:\n    print("yes")\n'
        "console.log(cfg.g)\nwriter.log(cfg.h)\n",
    )
    assert printing_lines(source) == {1, 2, 3, 7, 8}
    assert printing_lines(str(tmp_path / "gone.py")) == frozenset()


# ------------------------------------------------------------------------------------------- source facts

RATES = """\
def schedule(optimizer, lr):
    for g in optimizer.param_groups:
        g["lr"] = lr
        g["weight_decay"] = 0
    for group in groups: group["lr"] *= 0.1
    optimizer.param_groups[0]["lr"] = lr
    optimizer.param_groups[0].update(lr=lr)
    cfg["lr"] = 3
    first = optimizer.param_groups[0]
    first["lr"], x = 1, 2
    print(first["lr"], scheduler.get_last_lr())
    scheduler.step()
"""


def test_rates_assigned_and_read_by_hand(tmp_path: Path) -> None:
    file = write(tmp_path, "t.py", RATES)
    broken = write(tmp_path, "broken.py", 'def f(:\n  g["lr"] = 1')
    facts = read_source([file, broken, str(tmp_path / "gone.py")])
    assert [a.at.line for a in facts.rate_assignments] == [3, 5, 6, 7, 10]
    assert {a.at.function for a in facts.rate_assignments} == {"schedule"}
    assert [at.line for at in facts.rate_reads or ()] == [11]
    assert [at.line for at in facts.step_calls or ()] == [12]
    assert facts.files == (file,)


def test_callbacks_and_models_that_do_not_exist_say_nothing(tmp_path: Path) -> None:
    text = """\
class Idle(pl.Callback):
    def on_train_start(self, trainer, module):
        trainer.optimizers[0].param_groups[0]["lr"] = 1
class Attached(L.Callback):
    def on_train_start(self, trainer, module):
        trainer.optimizers[0].param_groups[0]["lr"] = 2
class Base(L.LightningModule):
    def training_step(self, batch):
        self.opt.param_groups[0]["lr"] = 3
class Other(Base):
    def training_step(self, batch):
        self.opt.param_groups[0]["lr"] = 4
def anywhere(group):
    group["lr"] = 5
class Plain:
    def set(self, group):
        group["lr"] = 6
"""
    file = write(tmp_path, "m.py", text)
    child = write(tmp_path, "child.py", "class Net(Base):\n    pass\n")
    run = Recording(
        frameworks=(Framework("lightning", callbacks=("Attached",)),),
        roots=(RootModule(0, "Net", submodules=(Submodule("l", "Linear", True),)),),
    )
    assert [a.at.line for a in read_source([file, child], run).rate_assignments] == [6, 9, 14, 17]
    assert len(read_source([file, child]).rate_assignments) == 6
