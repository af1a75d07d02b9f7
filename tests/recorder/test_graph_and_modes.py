"""What is seen of the graph behind a loss, and of train and eval mode."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the recorder uses the torch of the program it watches")

from recorder.watching import watch

from trainlint.recording.evaluations import evaluations
from trainlint.recording.schema import Backward, DropoutCall, ModeChanged, ModeState, Recording

HEAD = """
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
def step():
    F.cross_entropy(model(x), y).backward()
    opt.step()
"""


def backwards(run: Recording) -> list[Backward]:
    return [e for e in run.events if isinstance(e, Backward)]


def test_where_backwards_lead(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
from torch.utils.checkpoint import checkpoint
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, g):
        return 2 * g
loss = F.cross_entropy(model(x), y)
loss.backward()
torch.tensor(loss.item(), requires_grad=True).backward()
image = x.clone().requires_grad_()
image.square().sum().backward()
Twice.apply(image).sum().backward()
checkpoint(lambda z: model(z).sum(), image, use_reentrant=True).backward()
with torch.inference_mode():
    lost = model(x).sum()
try:
    lost.backward()
except RuntimeError:
    pass
step(); step(); step()
""",
        tmp_path,
    )
    whole, leaf, only_input, custom, hidden, refused = backwards(run)[:6]
    assert whole.reaches_parameters is True
    assert (leaf.reaches_parameters, leaf.grad_fn, leaf.leaves, leaf.gradients_changed) == (False, None, 1, 0)
    assert (only_input.reaches_parameters, only_input.leaves, only_input.gradients_changed) == (False, 1, 0)
    assert (custom.reaches_parameters, custom.hidden, custom.gradients_changed) == (None, "TwiceBackward", 0)
    assert (hidden.reaches_parameters, hidden.hidden) == (None, "CheckpointFunctionBackward")
    assert hidden.gradients_changed == 4
    assert (refused.requires_grad, refused.inference) == (False, True)
    assert "does not require grad" in (refused.raised or "")
    assert [b.reaches_parameters for b in backwards(run)[6:]] == [True] * 3
    assert not run.problems


def test_tensors_that_an_optimizer_holds_are_parameters(tmp_path: Path) -> None:
    run = watch(
        """
import torch
image = torch.rand(3, 8, 8, requires_grad=True)
opt = torch.optim.Adam([image], lr=0.1)
for _ in range(5):
    opt.zero_grad()
    (image - 0.5).square().mean().backward()
    opt.step()
""",
        tmp_path,
    )
    assert [b.reaches_parameters for b in backwards(run)] == [True] * 3


def test_a_compiled_model_is_followed(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
compiled = torch.compile(model, backend="aot_eager")
for _ in range(5):
    opt.zero_grad()
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
""",
        tmp_path,
    )
    assert [b.reaches_parameters for b in backwards(run)] == [True] * 3


def test_modes_at_each_backward_and_who_set_them(tmp_path: Path) -> None:
    run = watch(
        """
import torch, torch.nn as nn, torch.nn.functional as F
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.25)
        self.other = nn.Dropout(0.0)
    def forward(self, x):
        return self.drop(self.norm(x))
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self
model = nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 4))
model.train()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
def step():
    opt.zero_grad()
    F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 4, (16,))).backward()
    opt.step()
step()
step()
model.eval()
step()
""",
        tmp_path,
    )
    (root,) = run.roots
    assert [(m.name, m.effect, m.p) for m in root.mode_sensitive] == [
        ("1.norm", "norm", None),
        ("1.drop", "dropout", 0.25),
    ]
    states = [e for e in run.events if isinstance(e, ModeState)]
    first, last = states
    assert (first.when, first.training, first.in_eval, first.n_train) == ("backward", True, ("1.norm",), 1)
    assert [(c.how, c.on, c.modules, c.at and c.at.line) for c in first.calls] == [
        ("override", "Sequential", ("1.norm",), 15)
    ]
    assert first.batches_tracked == 0
    assert (last.training, last.in_eval) == (False, ("1.norm", "1.drop"))
    assert [(c.how, c.modules) for c in last.calls] == [("program", ("1.norm", "1.drop"))]
    assert not run.problems


def test_a_library_that_leaves_eval_mode_behind(tmp_path: Path) -> None:
    run = watch(
        HEAD.replace("nn.ReLU()", "nn.Dropout(0.1)")
        + """
code = compile("def load(model): return model.eval()", torch.__file__, "exec")
space = {"__name__": "torch.hub"}
exec(code, space)
space["load"](model)
step()
model.train()
step()
model.eval()
step()
""",
        tmp_path,
    )
    library, trains, program = [e for e in run.events if isinstance(e, ModeState)]
    (call,) = library.calls
    assert (call.how, call.on, call.modules) == ("library", "Sequential", ("1",))
    assert call.at is not None
    assert call.at.file.endswith("program.py")
    assert (trains.calls, trains.in_eval) == ((), ())
    assert [c.how for c in program.calls] == ["program"]
    assert any(isinstance(e, ModeChanged) and e.seq == program.calls[0].seq for e in run.events)


def test_dropout_at_work_in_an_evaluation(tmp_path: Path) -> None:
    run = watch(
        """
import torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
    def forward(self, x):
        return F.dropout(self.drop(self.norm(self.body(x))), 0.2)
model = Net()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(24, 4), torch.randn(24, 4))
for a, b in DataLoader(data, batch_size=8):
    opt.zero_grad()
    F.mse_loss(model(a), b).backward()
    opt.step()
    model.norm.eval()
    with torch.no_grad():
        for c, d in DataLoader(data, batch_size=12):
            F.mse_loss(model(c), d)
    model.norm.train()
""",
        tmp_path,
    )
    calls = [e for e in run.events if isinstance(e, DropoutCall) and not e.grad_enabled]
    assert [(c.module, c.p, c.active, c.by_default, c.owner_training) for c in calls[:2]] == [
        ("drop", 0.5, True, False, True),
        ("", 0.2, True, True, True),
    ]
    assert calls[1].at is not None
    assert calls[1].at.line == 9
    (first, second) = evaluations(run)[:2]
    assert (first.batches, second.batches) == (2, 2)
    assert [s.batches_tracked for s in first.modes(run.roots[0].id)] == [1]
    assert [s.in_eval for s in first.modes(run.roots[0].id)] == [("norm",)]


def test_scripted_dropout_still_compiles(tmp_path: Path) -> None:
    run = watch(
        HEAD
        + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(8, 4)
    def forward(self, x):
        return self.out(F.dropout(self.drop(x), 0.2, self.training))
scripted = torch.jit.script(Net())
traced = torch.fx.symbolic_trace(Net())
compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
for net in (scripted, traced, compiled):
    F.cross_entropy(net(x), y).backward()
step(); step(); step()
""",
        tmp_path,
    )
    assert run.optimizers[0].steps == 3
    assert not run.problems


def test_a_backward_under_a_counter_of_operations(tmp_path: Path) -> None:
    """A Python number behind the loss is a tensor there that no operation takes."""
    run = watch(
        HEAD
        + """
from torch.utils.flop_counter import FlopCounterMode
for _ in range(3):
    with FlopCounterMode(display=False):
        (F.mse_loss(model(x), torch.zeros(16, 4)) * 0.25).backward()
    opt.step()
""",
        tmp_path,
    )
    assert not run.problems
    assert [b.divided_by for b in backwards(run)][:3] == pytest.approx([4.0] * 3)
