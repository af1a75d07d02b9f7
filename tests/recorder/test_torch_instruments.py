"""The torch instruments on small real programs: what is recorded, and that nothing is changed by recording it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the recorder uses the torch of the program it watches")

from recorder.watching import watch

from trainlint.recording.schema import (
    Backward,
    BatchFetched,
    Clip,
    FileEvent,
    Forward,
    LossCall,
    ModeChanged,
    OptimizerStep,
    Recording,
    ScalerEvent,
    SchedulerStep,
    StateLoaded,
    ZeroGrad,
)

HEAD = """
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
def batches():
    while True:
        yield torch.randn(16, 8), torch.randint(0, 4, (16,))
"""


def events(recording: Recording, kind: type) -> list:
    return [e for e in recording.events if isinstance(e, kind)]


def test_plain_loop_with_accumulation_and_schedule(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=10)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=90)
sched = torch.optim.lr_scheduler.SequentialLR(opt, [warm, cosine], milestones=[10])
data = torch.utils.data.TensorDataset(torch.randn(128, 8), torch.randint(0, 4, (128,)))
for i, (x, y) in enumerate(torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)):
    loss = F.cross_entropy(model(x), y) / 2
    loss.backward()
    if i % 2 == 1:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        sched.step()
        opt.zero_grad()
""",
        tmp_path,
    )
    (optimizer,) = run.optimizers
    assert (optimizer.class_name, optimizer.steps) == ("AdamW", 3)
    assert optimizer.groups[0].hyperparameters["weight_decay"] == 0.1
    assert optimizer.groups[0].hyperparameters["initial_lr"] == 1e-3
    assert optimizer.signature_defaults["weight_decay"] == 0.01
    assert run.plan.accumulation == 2
    assert [b.divided_by for b in events(run, Backward)] == [2.0] * 6
    assert {b.micro_loss_reduction for b in events(run, Backward)} == {"mean"}
    for loss, backward in zip(events(run, LossCall), events(run, Backward), strict=True):
        assert backward.value == pytest.approx(loss.value / 2)
    steps = events(run, OptimizerStep)
    assert [s.rates[0] for s in steps] == pytest.approx([1e-4, 1.9e-4, 2.8e-4])
    (scheduler,) = run.schedulers
    assert scheduler.class_name == "SequentialLR"
    assert scheduler.children == ("LinearLR", "CosineAnnealingLR")
    assert scheduler.horizon_calls == 100
    curve = {p.calls: p.rates[0] for p in scheduler.curve}
    assert curve[0] == pytest.approx(1e-4)
    assert curve[10] == pytest.approx(1e-3)
    assert curve[100] == pytest.approx(0.0, abs=1e-9)
    assert [s.initial for s in events(run, SchedulerStep)].count(False) == 3
    clip = events(run, Clip)[0]
    assert (clip.method, clip.threshold, clip.n_tensors) == ("norm", 0.05, 4)
    # Clipping makes the gradient smaller between the last backward and the step, and both norms show it.
    first = run.steps[0]
    assert first.gradient_norm_total == pytest.approx(0.05, rel=1e-3)
    assert first.gradient_norm_after_backward == pytest.approx(clip.total_norm, rel=1e-3)
    assert all(n > 0 for n in first.update_norm)
    assert first.changed == (1.0,) * 4
    (loader,) = run.loaders
    assert (loader.batch_size, loader.batches, loader.samples, loader.shuffle, loader.training) == (
        8,
        16,
        128,
        True,
        True,
    )
    prints = [b.fingerprint for b in events(run, BatchFetched)]
    assert len(set(prints)) == len(prints)
    assert steps[0].at is not None
    assert steps[0].at.file.endswith("program.py")
    assert not run.problems


def test_ends_before_the_next_batch_runs(tmp_path: Path) -> None:
    watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    for i, (x, y) in enumerate(batches()):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        print("after step", i, flush=True)
except:
    print("swallowed", flush=True)
finally:
    print("finally", flush=True)
""",
        tmp_path,
    )
    assert (tmp_path / "output").read_text().splitlines() == ["after step 0", "after step 1", "after step 2"]


def test_closure_gradients_and_repeated_backwards(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.LBFGS(model.parameters(), max_iter=5)
for x, y in batches():
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    opt.step(closure)
""",
        tmp_path,
    )
    steps = events(run, OptimizerStep)
    assert len(steps) == 3
    assert all(s.closure and s.closure_calls >= 1 for s in steps)
    inside = [b for b in events(run, Backward) if steps[0].began < b.seq < steps[0].seq]
    assert len(inside) == steps[0].closure_calls
    assert all(n is not None and n > 0 for n in run.steps[0].gradient_norm)


@pytest.mark.parametrize(("optimizer", "first"), [("SGD(params, lr=0.1)", 0.05), ("LBFGS(params, lr=0.1)", 0.1)])
def test_the_rate_that_a_step_used_after_its_closure_changed_it(tmp_path: Path, optimizer: str, first: float) -> None:
    run = watch(
        HEAD
        + f"""
params = list(model.parameters())
opt = torch.optim.{optimizer}
scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
for x, y in batches():
    called = False
    def closure():
        global called
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if not called:
            scheduler.step()
        called = True
        return loss
    opt.step(closure)
""",
        tmp_path,
    )
    assert [s.rates[0] for s in events(run, OptimizerStep)] == pytest.approx([first, first / 2, first / 4])


def test_scaler_scale_is_taken_out_of_the_divisor(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for x, y in batches():
    opt.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss / 4).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
""",
        tmp_path,
    )
    backward = events(run, Backward)[0]
    assert backward.loss_scale == 65536.0
    assert backward.divided_by == pytest.approx(4.0)
    assert not events(run, Clip)[0].scaled
    calls = [e.call for e in events(run, ScalerEvent)][:4]
    assert calls == ["scale", "unscale", "step", "update"]
    assert events(run, LossCall)[0].autocast == "bfloat16"


def test_skipped_steps_are_counted_and_not_steps(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for i, (x, y) in enumerate(batches()):
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y) * (float("inf") if i == 0 else 1.0)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
""",
        tmp_path,
    )
    (optimizer,) = run.optimizers
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    assert [e.skipped for e in events(run, ScalerEvent) if e.call == "step"] == [True, False, False, False]


@pytest.mark.parametrize("loss", ["F.cross_entropy(model(x), y)", "compiled_loss(model(x), y)"])
def test_compiled_programs_compile_whole(tmp_path: Path, loss: str) -> None:
    run = watch(
        HEAD
        + f"""
model = torch.compile(model, backend="aot_eager", fullgraph=True)
compiled_loss = torch.compile(lambda a, b: F.cross_entropy(a, b), backend="aot_eager", fullgraph=True)
opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
for x, y in batches():
    opt.zero_grad()
    {loss}.backward()
    opt.step()
""",
        tmp_path,
    )
    assert run.optimizers[0].steps == 3, (tmp_path / "output").read_text()
    root = next(r for r in run.roots if "OptimizedModule" in r.wrappers)
    assert root.class_name == "Sequential"
    assert {p.name for p in run.parameters if p.root == root.id} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_scripted_loss_still_compiles(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
@torch.jit.script
def loss(a, b):
    return F.mse_loss(a, b)
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
for x, y in batches():
    opt.zero_grad()
    loss(model(x), torch.ones(16, 4)).backward()
    opt.step()
""",
        tmp_path,
    )
    assert run.optimizers[0].steps == 3, (tmp_path / "output").read_text()


def test_two_optimizers_are_both_watched_to_the_end(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
other = nn.Linear(8, 4)
fast, slow = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
for i, (x, y) in enumerate(batches()):
    fast.zero_grad()
    F.cross_entropy(model(x), y).backward()
    fast.step()
    if i % 4 == 3:
        slow.zero_grad()
        F.cross_entropy(other(x), y).backward()
        slow.step()
""",
        tmp_path,
    )
    assert sorted(o.steps for o in run.optimizers) == [3, 12]


def test_trainable_parameters_nobody_holds(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model
        self.layers = [nn.Linear(4, 4)]
        self.heads = nn.ModuleDict({"held": nn.Linear(4, 4), "left": nn.Linear(4, 4)})
    def forward(self, x):
        return self.heads["left"](self.heads["held"](self.layers[0](self.body(x))))
net = Net()
opt = torch.optim.SGD([*net.body.parameters(), *net.heads["held"].parameters()], lr=0.1)
for x, y in batches():
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
""",
        tmp_path,
    )
    names = {p.id: p.name for p in run.parameters}
    assert run.outsiders is not None
    found = dict(
        zip(run.outsiders.parameters, zip(run.outsiders.gradient_norm, run.outsiders.moved, strict=True), strict=True)
    )
    left = {names[i]: v for i, v in found.items()}
    assert set(left) == {"heads.left.weight", "heads.left.bias", "weight", "bias"}
    assert all(norm > 0 and moved is False for norm, moved in left.values())
    assert [r.unregistered_in for r in run.roots if r.class_name == "Linear"] == ["Net.layers[0]"]


def test_updates_by_hand_are_seen_to_move(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
extra = nn.Parameter(torch.zeros(4))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.extra = model, extra
    def forward(self, x):
        return self.body(x) + self.extra
net = Net()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in batches():
    opt.zero_grad()
    extra.grad = None
    F.cross_entropy(net(x), y).backward()
    opt.step()
    with torch.no_grad():
        extra -= 0.1 * extra.grad
""",
        tmp_path,
    )
    assert run.outsiders is not None
    assert run.outsiders.moved == (True,)


def test_frozen_parameters_that_momentum_still_moves(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for i, (x, y) in enumerate(batches()):
    opt.zero_grad(set_to_none=False)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    if i == 0:
        model[0].requires_grad_(False)
""",
        tmp_path,
    )
    frozen = {p.id for p in run.parameters if p.name.startswith("0.")}
    later = run.steps[1]
    assert set(later.frozen) == frozen
    changed = dict(zip(later.parameters, later.changed, strict=True))
    assert all(changed[i] > 0 for i in frozen)


def test_unmoved_large_tensors_are_proven_bit_identical(tmp_path: Path) -> None:
    run = watch(
        """
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 4)).bfloat16()
with torch.no_grad():
    model[0].weight.fill_(1.0)
opt = torch.optim.SGD(model.parameters(), lr=1e-6)
while True:
    opt.zero_grad()
    F.cross_entropy(model(torch.randn(8, 64).bfloat16()), torch.randint(0, 4, (8,))).backward()
    opt.step()
""",
        tmp_path,
    )
    weight = next(p.id for p in run.parameters if p.name == "0.weight")
    assert run.steps[0].sampled[run.steps[0].parameters.index(weight)] < 64 * 512
    assert weight not in run.steps[0].unchanged_exact
    assert weight in run.steps[1].unchanged_exact


def test_second_moments_in_half_precision_only(tmp_path: Path) -> None:
    loop = """
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
for x, y in batches():
    opt.zero_grad()
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    opt.step()
"""
    (tmp_path / "half").mkdir()
    (tmp_path / "full").mkdir()
    half = watch(HEAD + "model = model.bfloat16()" + loop, tmp_path / "half")
    full = watch(HEAD + loop, tmp_path / "full")
    (moment,) = half.second_moments
    assert moment.dtype == "bfloat16"
    assert moment.eps_rounded == pytest.approx(1e-8, rel=0.01)
    # bfloat16 has 8 significant bits: v * 0.999 rounds back to v for every element.
    assert moment.stuck > 0.9 * (moment.elements - moment.zero)
    assert half.optimizers[0].groups[0].compute_dtype == "bfloat16"
    assert full.second_moments == ()


def test_loads_modes_and_zero_grads(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
torch.save({"model": model.state_dict()}, "start.pt")
loaded = torch.load("start.pt")
model.load_state_dict(loaded["model"])
model.eval()
model.train()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
opt.load_state_dict(opt.state_dict())
for x, y in batches():
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
""",
        tmp_path,
    )
    assert [(e.call, Path(e.path).name) for e in events(run, FileEvent)] == [("save", "start.pt"), ("load", "start.pt")]
    what = [(e.what, e.empty) for e in events(run, StateLoaded)]
    assert what == [("module", False), ("optimizer", True)]
    assert [e.training for e in events(run, ModeChanged)] == [False, True]
    assert [z.had_gradients for z in events(run, ZeroGrad)] == [0, 4, 4, 4]
    assert all(p.origin.endswith("start.pt") for p in run.parameters)
    # Batches come from no DataLoader here: the forward pass shows them.
    assert len({f.fingerprint for f in events(run, Forward)}) == len(events(run, Forward)) >= 2


def test_never_steps(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
for x, y in batches():
    F.cross_entropy(model(x), y).backward()
""",
        tmp_path,
        backward_cap=7,
    )
    assert len(events(run, Backward)) == 7
    assert run.optimizers == ()
    assert all(p.gradient_seen for p in run.parameters)


def test_values_that_are_not_finite_survive_the_json(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in batches():
    opt.zero_grad()
    (F.cross_entropy(model(x), y) * float("nan")).backward()
    opt.step()
""",
        tmp_path,
    )
    assert math.isnan(events(run, Backward)[0].value)
    assert all(math.isnan(n) for n in run.steps[0].gradient_norm)


TRAIN = (
    HEAD
    + """
import hashlib
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=50)
drop = nn.Dropout(0.5)
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 4, (64,)))
for i, (x, y) in zip(range(8), torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)):
    opt.zero_grad()
    F.cross_entropy(drop(model(x)), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    sched.step()
digest = hashlib.sha256()
for p in model.parameters():
    digest.update(p.detach().numpy().tobytes())
for state in opt.state.values():
    digest.update(state["exp_avg_sq"].numpy().tobytes())
print(digest.hexdigest(), torch.rand(1).item(), opt.param_groups[0]["lr"])
"""
)


def test_training_is_bit_identical_under_watch(tmp_path: Path) -> None:
    """Weights, optimizer state, learning rate and random numbers are what they are without the recorder."""
    watch(TRAIN, tmp_path, steps=1000)
    bare = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}, check=True
    )
    assert (tmp_path / "output").read_text() == bare.stdout


def test_backwards_that_reach_new_parameters_are_told_apart(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
opt = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1)
for x, y in batches():
    opt.zero_grad()
    for head in heads:
        F.cross_entropy(head(model(x)), y).backward()
    F.cross_entropy(heads[0](model(x)), y).backward()
    opt.step()
""",
        tmp_path,
    )
    assert [b.new_gradients for b in events(run, Backward)][:6] == [6, 2, 0, 6, 2, 0]


def test_a_group_without_a_rate_keeps_its_place(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
opt = torch.optim.SGD(model.parameters(), lr=0.1)
opt.param_groups[0]["lr"] = None
opt.step = torch.optim.Optimizer.profile_hook_step(lambda self: None).__get__(opt)
while True:
    F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 4, (16,))).backward()
    opt.step()
""",
        tmp_path,
    )
    assert [math.isnan(s.rates[0]) for s in events(run, OptimizerStep)] == [True] * 3


def test_the_steps_of_a_schedule_are_found_to_the_call() -> None:
    """Without a known length the points lie far apart: a StepLR must not be blurred between them."""
    import torch

    from trainlint.recorder import curves

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    points, missing = curves.curve(curves.take(torch.optim.lr_scheduler.StepLR(optimizer, 30)), None, None)
    found = {calls: rates[0] for calls, rates in points}
    assert not missing
    assert len(points) < 1_000
    for edge in (30, 60, 90):
        assert found[edge - 1] == pytest.approx(10 * found[edge])
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 700)]
    joined = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [5])
    found = {calls: rates[0] for calls, rates in curves.curve(curves.take(joined), None, None)[0]}
    assert found[704] == pytest.approx(10 * found[705])


def test_training_in_a_thread_is_watched_and_ended(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
import threading
def train():
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
thread = threading.Thread(target=train)
thread.start()
thread.join()
""",
        tmp_path,
    )
    assert run.optimizers[0].steps == 3


@pytest.mark.parametrize("version", ["99.0", "2.3.1", "0.4.post2"])
def test_a_torch_that_is_not_known_is_noted_and_left_alone(tmp_path: Path, version: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    run = watch("import torch\nprint('went on with', torch.__version__)", tmp_path)
    assert (tmp_path / "output").read_text() == f"went on with {version}\n"
    noted = " ".join(p.error for p in run.problems)
    assert "has no attribute" in noted or "No module named" in noted
    assert ("older than 2.6" in noted) == (version != "99.0")
