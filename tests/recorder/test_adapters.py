"""What is seen of adapters, of saves, and of cuts in a gradient's path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recorder.adapter_layers import alike
from trainlint.recording.schema import Adapters, Recording

LOW_RANK = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class LowRank(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 2)})
for layer in model["layers"]:
    layer[0] = LowRank(layer[0])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(12):
    h = torch.randn(4, 8)
    @FORWARD@
    loss = model["head"](h).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    @AFTER@
"""


def low_rank(folder: Path, forward: str, after: str = "pass") -> tuple[Recording, Adapters, dict[int, str]]:
    run = watch(LOW_RANK.replace("@FORWARD@", forward).replace("@AFTER@", after), folder)
    assert not run.problems
    assert run.adapters is not None
    return run, run.adapters, {p.id: p.name for p in run.parameters}


def test_adapters_written_by_hand_are_known_by_their_shapes(tmp_path: Path) -> None:
    after = """torch.save({"m": model["head"].state_dict(), "o": optimizer.state_dict()}, "x.pt")
    torch.save({"module." + name: p.detach().half() for name, p in model.named_parameters()}, "y.pt")"""
    _, found, names = low_rank(tmp_path, 'for layer in model["layers"]: h = h + layer(h)', after)
    (model,) = found.models
    assert (model.library, model.method) == ("", "low-rank")
    assert [(s.name, s.class_name, len(s.wrapped), len(s.bare)) for s in model.sites] == [("layers", "Linear", 4, 0)]
    assert {names[i] for i in model.adapted_weights} == {f"layers.{i}.0.base.weight" for i in range(4)}
    assert len(model.parameters) == 8
    assert found.cuts == ()
    save, copy = found.saves[:2]
    assert {names[i] for i in save.parameters} == {"head.weight", "head.bias"}
    assert save.optimizer_state
    assert len(copy.parameters) == len(names), "copies are known by their names, with and without a prefix"
    assert not copy.optimizer_state
    assert save.function == "torch.save"
    assert save.path.endswith("x.pt")


def test_reentrant_checkpoints_whose_inputs_need_no_gradient(tmp_path: Path) -> None:
    forward = 'for layer in model["layers"][:2]: h = checkpoint(lambda x, f=layer: layer(x), h, use_reentrant=True)'
    _, found, names = low_rank(tmp_path, forward)
    (cut,) = found.cuts
    assert cut.cause == "checkpoint"
    assert cut.modules == ("layers.0", "layers.1")
    assert cut.calls >= 6
    assert cut.at is not None
    assert {names[i].split(".")[1] for i in cut.parameters} == {"0", "1"}


@pytest.mark.parametrize(
    "forward",
    [
        'h = checkpoint(model["layers"][0], h.requires_grad_(), use_reentrant=True)',
        'h = checkpoint(model["layers"][0], h, use_reentrant=False)',
        'with torch.no_grad(): checkpoint(model["layers"][0], h, use_reentrant=True)',
    ],
)
def test_checkpoints_that_cut_nothing(tmp_path: Path, forward: str) -> None:
    assert not [c for c in low_rank(tmp_path, forward)[1].cuts if c.cause == "checkpoint"]


def test_where_gradients_are_switched_off(tmp_path: Path) -> None:
    forward = """if True:
        with torch.no_grad():
            for layer in model["layers"][:2]:
                h = layer(h)
        h = model["layers"][2](h)
        h = h + model["layers"][3](h).detach()"""
    run, found, names = low_rank(tmp_path, forward)
    off, taken = sorted(found.cuts, key=lambda c: c.cause, reverse=True)
    text = (tmp_path / "program.py").read_text(encoding="utf-8").splitlines()
    assert (off.cause, off.modules) == ("no_grad", ("layers.0", "layers.1"))
    assert off.at is not None
    assert "with torch.no_grad()" in text[off.at.line - 1]
    assert (taken.cause, taken.modules, taken.function) == ("leaves", ("layers.3",), "Tensor.detach")
    assert taken.at is not None
    assert "detach" in text[taken.at.line - 1]
    assert {names[i] for i in taken.parameters} == {"layers.3.0.down.weight", "layers.3.0.up.weight"}
    assert [o.steps for o in run.optimizers] == [3]


def test_nothing_stays_on_the_program(tmp_path: Path) -> None:
    """The hooks and the watched methods of tensors are taken off again, and what is computed is the same."""
    after = """if step == 5:
        hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert not [h for h in hooks if type(h).__module__.endswith("gradient_path")]
        assert not [n for n in ("detach", "numpy", "item") if hasattr(getattr(torch.Tensor, n), "__wrapped__")]
        print("clean", flush=True)"""
    forward = 'h = torch.from_numpy(model["layers"][0](h).detach().numpy())'
    source = LOW_RANK.replace("@FORWARD@", forward).replace("@AFTER@", after)
    run = watch(source, tmp_path, steps=8)
    assert not run.problems
    assert "clean" in (tmp_path / "output").read_text()
    assert run.adapters is not None
    assert [c.function for c in run.adapters.cuts] == ["Tensor.detach"]


def test_compiled_models_are_not_watched_and_not_compiled_again(tmp_path: Path) -> None:
    forward = """fast = globals().setdefault("fast", torch.compile(model["layers"][0], backend="eager"))
    with torch.no_grad(): h = fast(h)"""
    after = """from torch._dynamo.utils import counters
    if step == 2: print("graphs", counters["stats"]["unique_graphs"], flush=True)"""
    _, found, _ = low_rank(tmp_path, forward, after)
    assert found.cuts == ()


PEFT = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

torch.manual_seed(0)
base = BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2,
                                                num_attention_heads=2, intermediate_size=32))
base.bert.pooler.bn = torch.nn.BatchNorm1d(16)
base.bert.pooler.register_forward_hook(lambda m, a, out: m.bn(out))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "values"], modules_to_save=["dense"]))
base.classifier.requires_grad_(True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for step in range(12):
    loss = model(input_ids=torch.randint(0, 40, (4, 6)), labels=torch.randint(0, 2, (4,))).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_a_peft_model_and_what_its_save_would_hold(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = watch(PEFT, tmp_path)
    assert not run.problems
    assert run.adapters is not None
    names = {p.id: p.name for p in run.parameters}
    (model,) = run.adapters.models
    assert (model.library, model.method, model.inference_mode) == ("peft", "LORA", False)
    assert [(t.name, t.matched, t.near) for t in model.targets] == [("query", 2, ()), ("values", 0, ("value",))]
    assert model.modules_to_save == ("dense",)
    assert {s.name: (len(s.wrapped), len(s.bare)) for s in model.sites} == {"query": (2, 0)}
    assert model.saved is not None
    saved = {names[i] for i in model.saved}
    assert not any("classifier" in n for n in saved)
    assert {names[i] for i in (*model.parameters, *model.extra)} == saved
    assert model.drifting_norms == ("base_model.model.bert.pooler.bn",)
    assert (model.looks, model.disabled, model.merged) == (2, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("out_proj", "o_proj", True),
        ("query_proj", "q_proj", True),
        ("values", "value", True),
        ("Q_proj", "q_proj", True),
        ("gate_projs", "gate_proj", True),
        ("x_proj", "up_proj", False),
        ("k_proj", "q_proj", False),
        ("fc1", "fc2", False),
        ("c_attn", "c_fc", False),
        ("query_key_value", "query", False),
        ("proj", "c_proj", False),
    ],
)
def test_names_that_may_be_one_another_misspelt(a: str, b: str, near: bool) -> None:
    assert alike(a, b) is near


BY_HAND = """
import torch
from torch import nn
from torch.nn.utils import parametrize

class Lora(nn.Linear):  # holds everything itself
    def __init__(self, width, rank=2):
        super().__init__(width, width)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, width))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T

class LowRank(nn.Module):
    def __init__(self, width, rank=2):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, width))
        self.b = nn.Parameter(torch.zeros(width, rank))

    def forward(self, weight):
        return weight + self.b @ self.a

torch.manual_seed(0)
own = [Lora(8), nn.Linear(8, 8), nn.Linear(8, 8)]
other = [nn.Linear(8, 8).requires_grad_(False) for _ in range(3)]
parametrize.register_parametrization(other[2], "weight", LowRank(8))
body = nn.ModuleDict({"own": nn.ModuleList(own), "other": nn.ModuleList(other)})
squeeze = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
model = nn.ModuleDict({"body": body, "squeeze": squeeze})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(12):
    h = torch.randn(4, 8)
    for layer in [*own, *other, squeeze]:
        h = layer(h)
    loss = h.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_other_ways_to_write_adapters_by_hand(tmp_path: Path) -> None:
    run = watch(BY_HAND, tmp_path)
    assert not run.problems
    assert run.adapters is not None
    (model,) = run.adapters.models
    names = {p.id: p.name for p in run.parameters}
    assert {s.name: (s.wrapped, s.bare) for s in model.sites} == {
        "own": (("body.own.0",), ("body.own.1", "body.own.2")),
        "other": (("body.other.2",), ("body.other.0", "body.other.1")),
    }
    assert len(model.parameters) == 4
    assert not any("squeeze" in names[i] for i in model.parameters)
    assert not model.named, "one of them is not called an adapter by anything"
