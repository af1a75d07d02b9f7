"""Following the live config in a program of its own: what is seen, and that nothing changes for the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[2] / "src" / "trainlint" / "recorder" / "bootstrap"

CONFIG = """\
model: {hidden: 8, dropout: 0.1}
training:
  lr: 1e-3
  weight_decay: 0.01
  betas: [0.9, 0.95]
  stages: [{steps: 1}, {steps: 2}]
seed: 3
"""


class Seen:
    """The last ``config`` line of a program, by key."""

    def __init__(self, payload: Mapping[str, Any], output: str) -> None:
        self.payload = payload
        self.output = output
        self.keys = {k["path"]: k for k in payload["keys"]}
        self.missing = {m["path"]: m["default"] for m in payload["missing"]}

    def how(self, path: str) -> set[str]:
        reads = self.keys[path]["reads"]
        return {r["by"] or r["how"] for r in reads}

    @property
    def never(self) -> set[str]:
        return {p for p, k in self.keys.items() if k["reads"] == []}

    @property
    def by_key(self) -> set[str]:
        return {p for p, k in self.keys.items() if any(r["how"] != "bulk" for r in k["reads"] or ())}


def watch(folder: Path, program: str, *args: str, config: str | None = CONFIG, name: str = "c.yaml") -> Seen:
    run = folder / "run"
    (run / "stream").mkdir(parents=True)
    (run / "scratch").mkdir()
    if config is not None:
        (folder / name).write_text(config)
    (folder / "train.py").write_text(program)
    env = {
        **os.environ,
        "PYTHONPATH": str(BOOTSTRAP),
        "TRAINLINT_RUN_DIR": str(run),
        "TRAINLINT_SUPERVISOR": str(os.getpid()),
        "TRAINLINT_CONFIGS": str(folder / name) if config is not None else "",
        "TRAINLINT_STEPS": "1000",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "train.py", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    last: dict[str, Any] = {"keys": [], "missing": []}
    for stream in (run / "stream").glob("*.jsonl"):
        for line in stream.read_text().splitlines():
            tag, payload = json.loads(line)
            assert tag != "problem", payload
            if tag == "config":
                last = payload
    return Seen(last, done.stdout)


LOADERS = {
    "yaml": ("c.yaml", "import yaml; cfg = yaml.safe_load(open('c.yaml'))"),
    "yaml text": ("c.yaml", "import yaml; cfg = yaml.load(open('c.yaml').read(), Loader=yaml.FullLoader)"),
    "omegaconf": ("c.yaml", "from omegaconf import OmegaConf; cfg = OmegaConf.load('c.yaml')"),
    "omegaconf of a dict": (
        "c.yaml", "import yaml; from omegaconf import OmegaConf; cfg = OmegaConf.create(yaml.safe_load(open('c.yaml')))"
    ),
    "to_container": (
        "c.yaml", "from omegaconf import OmegaConf as O; cfg = O.to_container(O.load('c.yaml'), resolve=True)"
    ),
    "json": ("c.json", "import json; cfg = json.load(open('c.json'))"),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_reads_through_every_kind_of_config(tmp_path: Path, loader: str) -> None:
    name, load = LOADERS[loader]
    text = CONFIG
    if name.endswith(".json"):
        import yaml

        text = json.dumps(yaml.safe_load(CONFIG))
    body = """
lr = float(cfg["training"]["lr"])
betas = cfg["training"].get("betas")
for stage in cfg["training"]["stages"]:
    stage["steps"]
warm = cfg["training"].get("warmup", 5)
if "accum" in cfg["training"]: raise SystemExit(1)
def build(hidden, **rest): return hidden
build(**cfg["model"])
"""
    seen = watch(tmp_path, load + body, config=text, name=name)
    assert seen.by_key == {"training.lr", "training.betas", "training.stages[0].steps", "training.stages[1].steps"}
    assert seen.how("model.hidden") == {"**"}
    assert seen.never == {"training.weight_decay", "seed"}
    assert seen.missing == {"training.warmup": 5, "training.accum": None}
    at = seen.keys["training.lr"]["reads"][0]["at"]
    assert (Path(at["file"]).name, at["line"]) == ("train.py", 2)
    assert Path(seen.payload["files"][0]).name == name


def test_taking_everything_is_no_use(tmp_path: Path) -> None:
    program = """
import yaml, json, copy, dataclasses, pickle
cfg = yaml.safe_load(open("c.yaml"))
json.dumps(cfg); yaml.safe_dump(cfg); yaml.dump(cfg); pickle.dumps(cfg); print(cfg)
for k, v in cfg["model"].items(): pass
for k in cfg["training"]: cfg["training"][k]
{**cfg["model"]}; dict(cfg["model"]); cfg["model"] | {}; {}.update(cfg["model"])
@dataclasses.dataclass
class Run: cfg: dict
assert type(dataclasses.asdict(Run(cfg))["cfg"]) is dict
later = copy.deepcopy(cfg)
later["training"]["betas"]
"""
    seen = watch(tmp_path, program)
    assert seen.by_key == {"training.betas"}, "a copy stays followed"
    assert not seen.never
    assert {"json.dump", "yaml.dump", "pickle", "items()", "**", "|"} <= seen.how("model.hidden")
    assert "a loop over the section" in seen.how("training.weight_decay")


BEHAVES = """
import yaml, json, copy, pickle, collections, types, sys
def plain():
    return {"a": {"b": 1, "c": [1, {"d": 2}], "e": {}}, "f": None}
cfg = yaml.safe_load(open("c.yaml"))
want = plain()
assert cfg == want and want == cfg and not cfg != want
assert type(cfg) == dict and type(cfg) in (dict, list) and isinstance(cfg, dict) and type(cfg).__name__ == "dict"
assert repr(cfg) == repr(want) and str(cfg) == str(want) and f"{cfg}" == f"{want}"
assert json.dumps(cfg, sort_keys=True) == json.dumps(want, sort_keys=True)
assert yaml.safe_dump(cfg) == yaml.safe_dump(want) and yaml.dump(cfg) == yaml.dump(want)
assert yaml.dump(cfg, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)) == yaml.safe_dump(want)
back = pickle.loads(pickle.dumps(cfg))
assert type(back) is dict and type(back["a"]) is dict and back == want
assert copy.deepcopy(cfg) == want and copy.copy(cfg) == want and cfg.copy() == want
assert list(cfg) == list(want) and list(reversed(cfg)) == list(reversed(want)) and len(cfg) == 2
assert list(cfg.items()) == list(want.items()) and list(cfg.values()) == list(want.values())
assert cfg | {"x": 1} == want | {"x": 1} and {"x": 1} | cfg == {"x": 1} | want
assert {**cfg} == want and dict(cfg) == want and (lambda **k: k)(**cfg) == want
assert bool(cfg) and "a" in cfg and "z" not in cfg and cfg.get("z", 7) == 7 and cfg.get("f", 7) is None
assert cfg["a"]["c"][1]["d"] == 2 and type(cfg["a"]["c"]) is list
assert collections.ChainMap(cfg)["a"] == want["a"] and types.MappingProxyType(cfg)["f"] is None
try: cfg["z"]
except KeyError as e: assert e.args == ("z",)
else: raise AssertionError
match cfg:
    case {"a": {"b": n}}: assert n == 1
    case _: raise AssertionError
try: hash(cfg)
except TypeError: pass
else: raise AssertionError
try: cfg.x = 1
except AttributeError: pass
else: raise AssertionError
for d in (cfg, want):
    d["new"] = d.pop("f", 0); d.setdefault("a", {})["b"] = 9; d.setdefault("k", 3); d.update(y=2); del d["y"]
    assert d.pop("gone", None) is None
    d |= {"w": 1}
assert cfg == want, (cfg, want)
assert type(type(cfg)(cfg)) is dict
assert "%(k)s" % cfg == "3" and "{k}".format(**cfg) == "3"
assert cfg.popitem() == want.popitem() and cfg == want
cfg.clear(); assert cfg == {}
"""


def test_a_followed_dict_behaves_as_a_dict(tmp_path: Path) -> None:
    watch(tmp_path, BEHAVES, config="a: {b: 1, c: [1, {d: 2}], e: {}}\nf: null\n")


def test_a_program_that_asks_for_the_exact_type_is_left_alone(tmp_path: Path) -> None:
    program = """
import yaml
cfg = yaml.safe_load(open("c.yaml"))
assert type(cfg) is dict and type(cfg["model"]) is dict
"""
    seen = watch(tmp_path, program)
    assert seen.payload["tracked_by"] == ""
    assert all(k["reads"] is None for k in seen.keys.values())


def test_one_value_under_two_names(tmp_path: Path) -> None:
    aliased = watch(
        tmp_path, 'import yaml; cfg = yaml.safe_load(open("c.yaml")); cfg["b"]["x"]', config="a: &k {x: 1}\nb: *k\n"
    )
    assert aliased.by_key == {"a.x", "b.x"}


def test_what_an_interpolation_reads(tmp_path: Path) -> None:
    program = 'from omegaconf import OmegaConf; cfg = OmegaConf.load("c.yaml"); cfg.m.size; dict(cfg.m)'
    seen = watch(tmp_path, program, config="width: 8\nunused: 2\nm: {size: '${width}', r: '${.size}'}\n")
    assert {"width", "m.size"} <= seen.by_key
    assert seen.never == {"unused"}


def test_omegaconf_behaves(tmp_path: Path) -> None:
    program = """
import yaml, pickle, copy
from omegaconf import OmegaConf, DictConfig, errors
data = yaml.safe_load(open("c.yaml"))
cfg = OmegaConf.create(data)
assert isinstance(cfg, DictConfig) and cfg == OmegaConf.create({**data, "seed": 3})
assert DictConfig(data["model"]).hidden == 8
merged = OmegaConf.merge({"seed": 1, "extra": 2}, cfg, OmegaConf.from_dotlist(["training.lr=5"]))
assert merged.training.lr == 5 and merged.extra == 2
OmegaConf.set_struct(merged, True)
try: merged.nope
except errors.ConfigAttributeError: pass
else: raise AssertionError
assert merged.get("nope", 1) == 1 if not OmegaConf.is_struct(merged) else True
assert pickle.loads(pickle.dumps(merged)) == merged and copy.deepcopy(merged) == merged
assert OmegaConf.to_yaml(merged) == OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(merged)))
assert OmegaConf.select(merged, "training.weight_decay") == 0.01
assert OmegaConf.select(merged, "a.b", default=4) == 4
"""
    seen = watch(tmp_path, program)
    assert seen.keys["training.lr"]["origin"] == "override"
    assert seen.keys["extra"]["origin"] == "default"
    assert {"training.lr", "training.weight_decay", "extra"} <= seen.by_key
    assert "training.stages[0].steps" not in seen.by_key


HYDRA = """
import hydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
@hydra.main(version_base=None, config_path="conf", config_name="main")
def main(cfg):
    OmegaConf.to_yaml(cfg)
    print(cfg.seed, instantiate(cfg.opt), cfg.get("late", 4))
main()
"""


def test_a_hydra_app(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "opt").mkdir(parents=True)
    (conf / "main.yaml").write_text("defaults: [opt: od, _self_]\nseed: 1\ndead: 3\nlr: 0.1\n")
    (conf / "opt" / "od.yaml").write_text("_target_: collections.OrderedDict\nlr: ${lr}\nwd: 0.1\n")
    seen = watch(tmp_path, HYDRA, "opt.wd=0.3", "+extra=5", "hydra.run.dir=.", config=None)
    assert seen.by_key == {"opt._target_", "opt.lr", "opt.wd", "lr", "seed"}
    assert {p for p, k in seen.keys.items() if k["origin"] == "override"} == {"opt.wd", "extra"}
    assert seen.how("dead") == {"OmegaConf.to_yaml"}
    assert [Path(f).name for f in seen.payload["files"]] == ["main.yaml", "od.yaml"]
    assert seen.missing == {"late": 4}


ARGPARSE = """
import argparse, copy, pickle
p = argparse.ArgumentParser()
p.add_argument("--lr", type=float, default=1e-3)
p.add_argument("--wd", type=float, default=0.0)
p.add_argument("--unused", default=3)
sub = p.add_subparsers(dest="command")
t = sub.add_parser("train"); t.add_argument("--epochs", type=int, default=3)
args = p.parse_args()
assert isinstance(args, argparse.Namespace) and repr(args).startswith("Namespace(") and "lr" in args
assert type(pickle.loads(pickle.dumps(args))) is argparse.Namespace
print(args.lr, args.epochs)
assert args == argparse.Namespace(lr=3.0, wd=0.0, unused=3, command="train", epochs=4)
args.new = 1; assert args.new == 1; del args.new
assert getattr(args, "nothing", 7) == 7
"""


def test_argparse(tmp_path: Path) -> None:
    seen = watch(tmp_path, ARGPARSE, "--lr", "3", "train", "--epochs=4", config=None)
    assert {"lr", "epochs"} <= seen.by_key
    assert "unused" not in seen.by_key
    assert {p for p, k in seen.keys.items() if k["origin"] == "override"} == {"lr", "epochs"}
    assert "nothing" in seen.missing


def test_a_file_that_sets_the_defaults_of_a_parser(tmp_path: Path) -> None:
    program = """
import argparse, yaml
p = argparse.ArgumentParser(); p.add_argument("--lr", type=float); p.add_argument("--dead", type=int)
p.set_defaults(**yaml.safe_load(open("c.yaml")))
args = p.parse_args()
args.lr
"""
    seen = watch(tmp_path, program, config="lr: 0.1\ndead: 3\n")
    assert seen.by_key == {"lr"}, "reading args.lr reads the file's lr"
    assert seen.keys["lr"]["origin"] == "file"


def test_a_config_that_stands_on_the_programs_own_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 0.1\nrest: 2\n")
    program = 'import sys, yaml; cfg = yaml.safe_load(open(sys.argv[1])); cfg["lr"]'
    seen = watch(tmp_path, program, "mine.yaml", config=None)
    assert seen.by_key == {"lr"}
    assert seen.never == {"rest"}


def test_secrets_do_not_reach_the_stream(tmp_path: Path) -> None:
    program = 'import yaml; cfg = yaml.safe_load(open("c.yaml")); cfg["wandb"]["api_key"]'
    seen = watch(tmp_path, program, config="wandb: {api_key: s3cr3t-value}\n")
    assert seen.keys["wandb.api_key"]["value"] == "<secret>"
    streams = "".join(p.read_text() for p in (tmp_path / "run" / "stream").glob("*.jsonl"))
    assert "s3cr3t-value" not in streams


COMPILED = """
import argparse, torch, yaml
p = argparse.ArgumentParser(); p.add_argument("--k", type=float, default=2.0)
class Net(torch.nn.Module):
    def __init__(self, cfg, args):
        super().__init__()
        self.cfg, self.args, self.l = cfg, args, torch.nn.Linear(2, 2)
    def forward(self, x):
        return self.l(x) * self.cfg["model"]["hidden"] * self.args.k * self.cfg["training"].get("zz", 1.0)
cfg, args = yaml.safe_load(open("c.yaml")), p.parse_args()
net, x = Net(cfg, args), torch.ones(1, 2)
want = net(x)
assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), want)
assert type(args) is argparse.Namespace
torch.save({"hyper": cfg}, "w.pt"); assert torch.load("w.pt", weights_only=True)["hyper"] == cfg
cfg["training"]["lr"]
"""


def test_compiled_code_meets_ordinary_objects(tmp_path: Path) -> None:
    seen = watch(tmp_path, COMPILED)
    assert "compiled code" in seen.how("training.lr"), "what is read after that is not known, so nothing is unread"
    assert not seen.never
