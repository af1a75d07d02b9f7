"""One sample replaced by another: whose outputs change, and which module and function is the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.schema import Mixing

HEAD = """
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0)
"""
TRAIN = """
net = Net()
opt = torch.optim.SGD(net.parameters(), 1e-3)
x = torch.randn(64, 9, 6)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.mean((1, 2))), batch_size=16)
for a, b in data:
    out = net(a)
    loss = F.mse_loss(out[0] if isinstance(out, tuple) else out, b)
    opt.zero_grad(); loss.backward(); opt.step()
"""


def mixing(body: str, folder: Path) -> Mixing:
    run = watch(HEAD + body + TRAIN, folder, boundary=False)
    assert run.replay is not None, run.problems
    assert not run.problems
    assert len(run.replay.mixing) == 1, run.replay
    return run.replay.mixing[0]


APART = {
    "batch norm, dropout, lstm over the sequence": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.drop, self.out = nn.LSTM(6, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 1)
    def forward(self, x):
        return self.out(self.drop(self.norm(self.rnn(x.transpose(0, 1))[0].mean(0)))).squeeze(-1)
""",
    "positions folded into the batch and back": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8 * 9, 1)
    def forward(self, x):
        h = torch.tanh(self.a(x.reshape(-1, 6)))
        return self.b(h.view(x.shape[0], -1)).squeeze(-1)
""",
    "sorted by length and back": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 1)
    def forward(self, x):
        order = x[:, 0, 0].argsort()
        h = self.rnn(x[order])[0].mean(1)
        return self.out(h[order.argsort()]).squeeze(-1)
""",
}


@pytest.mark.parametrize("name", APART)
def test_samples_stay_apart(name: str, tmp_path: Path) -> None:
    found = mixing(APART[name], tmp_path)
    assert found.outcome == "apart", found


def test_lstm_over_the_batch(tmp_path: Path) -> None:
    found = mixing(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 8), nn.Linear(8, 1)
    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1)).squeeze(-1)
""",
        tmp_path,
    )
    assert (found.outcome, found.module, found.class_name, found.batch_first) == ("mixed", "rnn", "LSTM", False)
    assert found.given == (found.samples, 9, 6)
    assert not found.apart


def test_a_view_that_should_have_been_a_transpose(tmp_path: Path) -> None:
    found = mixing(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)
    def forward(self, x):
        h = x.reshape(x.shape[1], x.shape[0], 6).mean(0)
        return self.out(h).squeeze(-1)
""",
        tmp_path,
    )
    assert found.outcome == "mixed"
    assert found.function == "mean"


def test_a_mean_of_the_batch_that_is_taken_off(tmp_path: Path) -> None:
    found = mixing(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(54, 10), nn.Linear(10, 1)
    def forward(self, x):
        h = self.a(x.flatten(1))
        h = h - h.mean(dim=0)
        return self.out(h).squeeze(-1)
""",
        tmp_path,
    )
    assert (found.outcome, found.module, found.function) == ("mixed", "", "sub")
    assert found.at is not None
    assert found.at.line > 5


def test_random_numbers_beside_what_mixes(tmp_path: Path) -> None:
    found = mixing(
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(54, 10), nn.Linear(10, 1)
    def forward(self, x):
        h = self.a(x.flatten(1)) + 0.1 * torch.randn(len(x), 10)
        return self.out(h.softmax(0)).squeeze(-1)
""",
        tmp_path,
    )
    assert (found.outcome, found.function) == ("mixed", "softmax")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        ("return self.out(x).mean(), x.mean()", "no output"),
        ("return self.out(x).mean((1, 2)) + torch.rand(()).item() * 0 + next(noise)", "when it is repeated"),
        ("return 0 * self.out(x).mean((1, 2))", "do not depend"),
        ("return self.out(x).flatten(1) @ self.out(x).flatten(1).T, x.mean()", "scores between samples"),
        ("x = x + 0.3 * x[torch.randperm(len(x))]; return self.out(x).mean((1, 2))", "draws at random which"),
    ],
)
def test_what_cannot_be_judged_is_said(forward: str, reason: str, tmp_path: Path) -> None:
    found = mixing(
        f"""
noise = iter(torch.linspace(0, 1, 1000))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)
    def forward(self, x):
        {forward}
""",
        tmp_path,
    )
    assert found.outcome == "left-out"
    assert reason in found.reason
