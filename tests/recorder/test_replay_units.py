"""What activation functions leave of the units before them, and which operation makes what is not finite."""

from __future__ import annotations

from pathlib import Path

from tests.recorder.watching import watch
from trainlint.recording.schema import Recording

HEAD = """
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
"""
TRAIN = """
net = Net()
opt = torch.optim.SGD(net.parameters(), 1e-4)
x = torch.randn(48, 3, 6, 6)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.mean((1, 2, 3))), batch_size=12)
for a, b in data:
    loss = F.mse_loss(net(a).squeeze(-1), b)
    opt.zero_grad(); loss.backward(); opt.step()
"""


def watched(body: str, folder: Path, train: str = TRAIN) -> Recording:
    run = watch(HEAD + body + train, folder, boundary=False)
    assert run.replay is not None, run.problems
    assert not run.problems
    return run


def test_channels_features_functions_modules_and_in_place(tmp_path: Path) -> None:
    run = watched(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.act = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.norm.bias[:3] = -20
            self.a.bias[:5], self.a.bias[5:] = -50, 10
            self.b.bias[:7] = 50
            self.b.bias[7:9] = -50
    def forward(self, x):
        h = F.relu(self.norm(self.conv(x))).mean((2, 3))
        h = self.act(self.a(h))
        h = self.b(h).tanh()
        scores = torch.relu(h @ h.T)
        return self.c(torch.sigmoid(h)) + 0 * scores.sum()
""",
        tmp_path,
    )
    assert run.replay is not None
    uses = {(u.function, u.layer): u for u in run.replay.units}
    assert set(uses) == {("relu", "conv"), ("relu", "a"), ("tanh", "b")} | ({("sigmoid", "b")} & set(uses))
    conv, a, b = uses["relu", "conv"], uses["relu", "a"], uses["tanh", "b"]
    assert (conv.units, conv.dead, conv.values, conv.samples) == (8, 3, 12 * 16, 12)
    assert (a.units, a.dead, a.fan_in, a.layer_class, a.module) == (16, 5, 8, "Linear", "act")
    assert b.dead == 9
    assert conv.at is not None
    names = {p.id: p.name for p in run.parameters}
    assert names[conv.weight or 0] == "conv.weight"


def test_a_unit_that_fires_in_one_of_several_calls_is_alive(tmp_path: Path) -> None:
    run = watched(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(108, 8), nn.Linear(8, 1)
    def forward(self, x):
        x = x.flatten(1)
        return self.c(F.relu(self.a(x)) + F.relu(self.a(-x)))
""",
        tmp_path,
    )
    assert run.replay is not None
    (found,) = run.replay.units
    assert (found.values, found.dead) == (24, 0)


def test_distributions_of_weights_gradients_and_activations(tmp_path: Path) -> None:
    run = watched(
        "Net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.GELU(), nn.Linear(8, 1))\n", tmp_path
    )
    assert run.replay is not None
    kinds = {(d.what, d.name): d for d in run.replay.distributions}
    weight = kinds["weight", "1.weight"]
    assert weight.shape == (8, 108)
    assert sum(weight.counts) <= weight.elements
    assert weight.minimum is not None
    assert weight.maximum is not None
    assert -0.1 < weight.minimum < weight.maximum < 0.1
    assert ("gradient", "3.bias") in kinds
    assert kinds["activation", "2"].spread is not None


def test_the_operation_that_makes_a_nan_in_the_first_step(tmp_path: Path) -> None:
    run = watched(
        """
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(108, 4)
    def forward(self, x):
        h = self.a(x.flatten(1)).clamp_min(0)
        masked = h.masked_fill(h == 0, float("-inf")).exp()
        return masked * h.log()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.c = Gate(), nn.Linear(4, 1)
    def forward(self, x):
        return self.c(self.gate(x))
""",
        tmp_path,
    )
    assert run.replay is not None
    first = run.replay.non_finite[0]
    assert (first.when, first.steps, first.weights, first.outputs_finite) == ("before-step", 0, (), False)
    assert first.producer is not None
    assert (first.producer.function, first.producer.kind, first.producer.module) == ("mul", "nan", "gate")
    assert first.source is not None
    assert (first.source.function, first.source.kind) == ("log", "inf")
    assert first.source.at is not None
    last = run.replay.non_finite[-1]
    assert last.when == "replay"
    assert set(last.weights) == {"gate.a.weight", "gate.a.bias", "c.weight", "c.bias"}


def test_a_loss_made_inside_the_step(tmp_path: Path) -> None:
    """The closure's loss is looked at before the step uses its gradients."""
    run = watched(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(108, 1)
    def forward(self, x):
        return self.a(x.flatten(1)).clamp_min(0).log()
""",
        tmp_path,
        TRAIN.replace("opt.zero_grad(); loss.backward(); opt.step()", "pass").replace(
            "    loss =",
            """
    def closure():
        opt.zero_grad()
        loss = F.mse_loss(net(a).squeeze(-1), b)
        loss.backward()
        return loss
    opt.step(closure)
    loss =""",
        ),
    )
    assert run.replay is not None
    first = run.replay.non_finite[0]
    assert (first.when, first.steps, first.weights) == ("before-step", 0, ())
    assert first.producer is not None and first.producer.function == "log"


def test_a_batch_with_nan(tmp_path: Path) -> None:
    run = watched(
        "Net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 1))\n",
        tmp_path,
        TRAIN.replace("data =", "x[3, 0, 0, 0] = float('nan')\ndata ="),
    )
    assert run.replay is not None
    assert run.replay.non_finite[0].inputs == ("input 0",)
    assert not run.replay.non_finite[0].outputs_finite


def test_rows_that_are_copies(tmp_path: Path) -> None:
    run = watched(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(108, 8), nn.Linear(8, 1)
        nn.init.constant_(self.a.weight, 0.01); nn.init.zeros_(self.a.bias); nn.init.ones_(self.b.weight)
    def forward(self, x):
        return self.b(F.gelu(self.a(x.flatten(1))))
""",
        tmp_path,
    )
    assert run.replay is not None
    kinds = {(d.what, d.name): d for d in run.replay.distributions}
    assert kinds["weight", "a.weight"].identical_rows is True
    assert kinds["gradient", "a.weight"].identical_rows is True
    assert kinds["weight", "b.weight"].identical_rows is None
