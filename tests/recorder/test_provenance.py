"""Where parameters came from, and what each load amounts to: many models in one program, one per way of loading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.schema import Recording, WeightLoad

PROGRAM = """
    import copy, os
    import torch
    from torch import nn

    class Base(nn.Module):
        def __init__(self, classes=5):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 24))
            self.head = nn.Linear(24, classes)

        def forward(self, x):
            return self.head(self.body(x.to(self.head.weight.dtype))).float()

    made = []

    def model(name, **fields):
        made.append(type(name, (Base,), {})(**fields))
        return made[-1]

    torch.manual_seed(0)
    for name in "abcdefghijklmn":
        torch.save({"model": Base().state_dict(), "step": 7}, f"{name}.pt")
    read = lambda name: torch.load(f"{name}.pt", mmap=True)["model"]
    fits = lambda state, net: {k: v for k, v in state.items()
                               if k in net.state_dict() and v.shape == net.state_dict()[k].shape}

    net = model("Strict"); net.load_state_dict(read("a"))
    net = model("HandFiltered", classes=3); net.load_state_dict(fits(read("b"), net), strict=False)
    net = model("Prefixed"); net.load_state_dict({f"module.{k}": v for k, v in read("c").items()}, strict=False)
    torch.save({f"module.{k}": v for k, v in Base().state_dict().items()}, "filtered.pt")
    net = model("FilteredAway")
    own = net.state_dict(); own.update(fits(torch.load("filtered.pt"), net)); net.load_state_dict(own)
    torch.save({f"module.{k}": v for k, v in Base(classes=6).state_dict().items()}, "half1.pt")
    torch.save({f"module.{k}": v for k, v in Base(classes=6).state_dict().items()}, "half2.pt")
    net = model("Mixture", classes=6); one, two = torch.load("half1.pt"), torch.load("half2.pt")
    net.load_state_dict({k[7:]: (one[k] - two[k]) / 2 for k in one}, strict=False)
    net = model("Interpolated", classes=7); state = dict(read("n"))
    state["head.weight"] = nn.functional.interpolate(state["head.weight"].t()[None], size=7)[0].t()
    del state["head.bias"]; net.load_state_dict(state, strict=False)
    net = model("Copied", classes=3)
    with torch.no_grad():
        for k, v in read("d").items():
            if not k.startswith("head"):
                net.state_dict()[k].copy_(v)
    net = model("Inner", classes=3)
    net.body.load_state_dict({k[5:]: v for k, v in read("e").items() if k.startswith("body.")})
    net = model("Assigned"); net.load_state_dict(read("f"), assign=True)
    net = model("Half").bfloat16(); net.load_state_dict(read("g"))
    torch.save({k: v.t().contiguous() if v.ndim == 2 else v for k, v in Base().state_dict().items()}, "flipped.pt")
    net = model("Flipped")
    with torch.no_grad():
        for k, v in torch.load("flipped.pt").items():
            net.get_parameter(k).copy_(v.t() if v.ndim == 2 else v)
    net = model("Overwritten"); net.load_state_dict(read("h"))
    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    net = model("Averaged"); net.load_state_dict(read("i"))
    with torch.no_grad():
        for k, v in read("j").items():
            net.get_parameter(k).add_(v).div_(2)
    net = model("Compiled"); wrapped = torch.compile(net, backend="eager")
    wrapped.load_state_dict(read("k"), strict=False)
    net = model("Wider", classes=3); net.load_state_dict(fits(read("l"), net), strict=False)
    with torch.no_grad():
        net.head = nn.Linear(24, 9); net.head.weight[:5].copy_(read("l")["head.weight"])
    net = model("Fetched"); os.makedirs("hub", exist_ok=True); os.replace("m.pt", "hub/m.pt")
    net.load_state_dict(torch.hub.load_state_dict_from_url("file:///nowhere/m.pt", model_dir="hub")["model"])
    net = model("Fresh")
    net = model("Target"); net.load_state_dict(made[0].state_dict())
    net = Base()
    state = torch.optim.AdamW(net.parameters()).state_dict()
    state["state"] = {i: {"step": torch.tensor(9.0), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
                      for i, p in enumerate(net.parameters())}
    torch.save({"model": net.state_dict(), "optimizer": state}, "run.pt")
    saved = torch.load("run.pt")
    net = model("Resumed"); net.load_state_dict(saved["model"])
    torch.save({"x": torch.randn(500, 12), "y": torch.randint(0, 3, (500,))}, "data.pt")
    data = torch.load("data.pt")
    written = model("Written"); torch.save(written.state_dict(), "written.pt"); torch.load("written.pt")

    optimizer = torch.optim.AdamW(net.parameters()); optimizer.load_state_dict(saved["optimizer"])
    others = torch.optim.SGD([p for m in made if m is not net for p in m.parameters()], lr=1e-3)
    for step in range(6):
        x, y = data["x"][:16], data["y"][:16]
        loss = sum(nn.functional.cross_entropy(m(x), y) for m in made)
        optimizer.zero_grad(); others.zero_grad()
        loss.backward()
        optimizer.step(); others.step()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    recording = watch(PROGRAM, tmp_path_factory.mktemp("provenance"), boundary=False)
    assert recording.steps, "the program made no step"
    assert not recording.problems
    return recording


def origins(run: Recording, model: str) -> dict[str, str]:
    root = next(r.id for r in run.roots if r.class_name == model)
    return {p.name: Path(p.origin).name for p in run.parameters if p.root == root}


def load_of(run: Recording, model: str) -> WeightLoad:
    assert run.provenance is not None
    root = next(r.id for r in run.roots if r.class_name == model)
    found = [load for load in run.provenance.loads if load.root == root and load.how != "read"]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("model", "file"),
    [("Strict", "a.pt"), ("Assigned", "f.pt"), ("Half", "g.pt"), ("Flipped", "flipped.pt"), ("Fetched", "m.pt"),
     ("Averaged", "i.pt"), ("Target", "a.pt")],
)  # fmt: skip
def test_every_parameter_is_from_the_file(run: Recording, model: str, file: str) -> None:
    assert set(origins(run, model).values()) == {file}


@pytest.mark.parametrize(("model", "file"), [("HandFiltered", "b.pt"), ("Copied", "d.pt"), ("Inner", "e.pt")])
def test_the_head_is_fresh(run: Recording, model: str, file: str) -> None:
    found = origins(run, model)
    assert {n for n, o in found.items() if o == "fresh"} == {"head.weight", "head.bias"}
    # The norm's weights are ones and zeros: known by their neighbours.
    assert found["body.1.weight"] == file


@pytest.mark.parametrize("model", ["Fresh", "Prefixed", "FilteredAway", "Written", "Compiled"])
def test_nothing_arrived(run: Recording, model: str) -> None:
    assert set(origins(run, model).values()) == {"fresh"}


def test_what_matched_and_what_did_not(run: Recording) -> None:
    load = load_of(run, "HandFiltered")
    assert (load.how, load.strict, load.part) == ("load_state_dict", False, "model")
    assert (load.matched_tensors, load.model_tensors, load.fresh_tensors) == (6, 8, 2)
    assert (load.matched_weights, load.model_weights) == (12 * 24 + 24 + 48 + 24 * 24 + 24, 960 + 24 * 3 + 3)
    assert (load.file_tensors, load.arrived_tensors, load.left_tensors) == (8, 6, 2)
    assert [(m.name, m.shape, m.file_shape) for m in load.mismatched] == [
        ("head.weight", (3, 24), (5, 24)),
        ("head.bias", (3,), (5,)),
    ]
    assert load.at is not None and "HandFiltered" in Path(load.at.file).read_text().splitlines()[load.at.line - 1]


def test_names_that_differ(run: Recording) -> None:
    load = load_of(run, "Prefixed")
    assert (load.how, load.matched_tensors, load.arrived_tensors, load.fresh_tensors) == ("load_state_dict", 0, 0, 8)
    load = load_of(run, "Compiled")
    assert (load.wrapper, load.matched_tensors, load.passed_over) == ("_orig_mod.", 0, ())


def test_a_file_that_was_filtered_to_nothing(run: Recording) -> None:
    load = load_of(run, "FilteredAway")
    assert (load.how, load.left_tensors, load.fresh_tensors) == ("filtered", 8, 8)


def test_inside_a_module(run: Recording) -> None:
    load = load_of(run, "Inner")
    assert (load.module, load.class_name, load.matched_tensors, load.model_tensors) == ("body", "Sequential", 6, 6)
    assert load_of(run, "Copied").how == "copy"


def test_set_anew_after_the_load(run: Recording) -> None:
    load = load_of(run, "Overwritten")
    assert load.overwritten_tensors == 6  # the norm's two are what they were
    assert load.overwritten_weights > 0.9 * load.model_weights
    assert load_of(run, "Averaged").overwritten_tensors == 0


def test_rows_that_were_added(run: Recording) -> None:
    found = origins(run, "Wider")
    assert found["head.weight"] == "l.pt" and found["head.bias"] == "fresh"


def test_values_that_were_worked_on(run: Recording) -> None:
    assert run.provenance is not None
    root = next(r.id for r in run.roots if r.class_name == "Mixture")
    assert not any(load.root == root for load in run.provenance.loads)
    assert origins(run, "Interpolated")["head.weight"] == "n.pt"
    assert origins(run, "Interpolated")["head.bias"] == "fresh"


def test_a_resumed_run(run: Recording) -> None:
    assert load_of(run, "Resumed").resumed
    assert not load_of(run, "Strict").resumed


def test_a_file_of_data_is_no_load(run: Recording) -> None:
    assert run.provenance is not None
    assert any(f.endswith("data.pt") for f in run.provenance.files_read)
    assert not any(load.path.endswith("data.pt") for load in run.provenance.loads)
