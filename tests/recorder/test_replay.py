"""The extra forward at the end of the watch: what it sees, what it must not do, when it is left out."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.recorder.watching import watch
from trainlint.recording.schema import Recording, ReplayedForward

#: Takes the replay out of the instruments before torch is imported.
WITHOUT = """
import sys
def _without():
    import importlib
    package = next(n for n in sys.modules if n.endswith("recorder") and "trainlint" in n)
    parts = importlib.import_module(package + ".torch_instruments")
    parts.PARTS = tuple(p for p in parts.PARTS if p != "replay")
_without()
"""

#: Prints a digest of everything that training depends on after every step.
DIGEST = """
import hashlib, random
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0); random.seed(0); np.random.seed(0)

def digest(net, opt):
    h = hashlib.sha256()
    for t in [*net.parameters(), *net.buffers(), torch.get_rng_state()]:
        h.update(t.detach().cpu().numpy().tobytes())
    for state in opt.state.values():
        for v in state.values():
            h.update(v.cpu().numpy().tobytes() if isinstance(v, torch.Tensor) else repr(v).encode())
    h.update(repr(random.getstate()).encode()); h.update(np.random.get_state()[1].tobytes())
    h.update(repr([m.training for m in net.modules()]).encode())
    return h.hexdigest()[:16]

def train(net, opt, shape, forward=None, inner=None):
    x, y = torch.randn(64, *shape), torch.randint(0, 5, (64,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    for epoch in range(2):
        for a, b in data:
            loss = F.cross_entropy((forward or net)(a), b)
            opt.zero_grad(); loss.backward(); opt.step()
            own = (inner or net)
            own = getattr(own, "_orig_mod", own)
            seen = getattr(own, "calls", None), getattr(own, "seen", None)
            print("STEP", digest(own, opt), float(loss), *seen, flush=True)
"""

NOISY = """
COUNT = 0
LOG = []
class Net(nn.Module):
    made = 0
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.spectral = nn.utils.spectral_norm(nn.Linear(8 * 16, 16))
        self.old = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.book = nn.Parameter(torch.randn(4, 16), requires_grad=False)
        self.head = nn.Linear(16, 5)
        self.register_buffer("average", torch.zeros(16))
        self.calls, self.seen, self.history = 0, [], {}
        self.rng = np.random.default_rng(3)
        self.generator = torch.Generator().manual_seed(5)
        self.own = random.Random(4)
    def forward(self, x):
        global COUNT
        COUNT += 1; Net.made += 1; self.calls += 1
        LOG.append(COUNT)
        self.history[self.calls] = COUNT
        self.seen = [*self.seen, (COUNT, Net.made, len(LOG), len(self.history))]
        h = F.dropout(F.relu(self.norm(self.conv(x))), 0.3, self.training).flatten(1)
        h = self.old(self.spectral(h))
        h = h + 0.01 * (random.random() + np.random.rand() + self.rng.random() + self.own.random())
        h = h + 0.01 * torch.randn(h.shape, generator=self.generator)
        self.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.average = self.average + 0
        self.book.data.mul_(0.99).add_(0.01 * h.detach()[:4])
        self.last = h.detach()
        self.made_anew = nn.Parameter(h.detach()[0], requires_grad=False)
        print("forward of the program")
        return self.head(h + self.book.mean(0))
net = Net()
opt = torch.optim.AdamW(net.parameters(), 1e-3)
train(net, opt, (1, 6, 6))
"""

COMPILED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)
    def forward(self, x):
        return self.b(F.dropout(F.relu(self.norm(self.a(x))), 0.5, self.training))
net = Net()
opt = torch.optim.AdamW(net.parameters(), 1e-3)
"""

COUNT_COMPILES = """
import torch._dynamo.utils as u, atexit
_original = digest
def digest(*a):
    return _original(*a) + " " + str(u.counters["stats"])
"""

PROGRAMS = {
    "noisy": NOISY,
    "compiled": COMPILED + COUNT_COMPILES + "train(torch.compile(net, backend='aot_eager'), opt, (6,), inner=net)",
    "compiled-in-place": COMPILED + COUNT_COMPILES + "net.compile(backend='aot_eager'); train(net, opt, (6,))",
    "autocast": COMPILED
    + """
def forward(a):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(a)
train(net, opt, (6,), forward=forward)
""",
}


def replayed(run: Recording) -> ReplayedForward:
    assert run.replay is not None, run.problems
    assert len(run.replay.forwards) == 1, run.replay.forwards
    return run.replay.forwards[0]


def steps(folder: Path) -> list[str]:
    return [line for line in (folder / "output").read_text().splitlines() if line.startswith("STEP")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_training_goes_on_bit_by_bit_as_without(name: str, tmp_path: Path) -> None:
    program = DIGEST + PROGRAMS[name]
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    run = watch(program, tmp_path / "with")
    assert replayed(run).outcome == "replayed", run.replay
    assert run.boundary is not None and run.boundary.outcome == "crossed"
    assert watch(WITHOUT + program, tmp_path / "without").replay is None
    found = steps(tmp_path / "with")
    assert len(found) >= 5
    assert found == steps(tmp_path / "without")
    assert (tmp_path / "with" / "output").read_text().count("forward of the program") in (0, len(found))
    assert not run.problems


def left_out(body: str, folder: Path) -> str:
    run = watch(DIGEST + textwrap.dedent(body), folder)
    about = replayed(run)
    assert about.outcome == "left-out"
    assert run.boundary is not None and run.boundary.outcome == "crossed"
    return about.reason


def test_a_forward_that_raises_the_second_time_is_left_out(tmp_path: Path) -> None:
    reason = left_out(
        """
        class Net(nn.Linear):
            calls = 0
            def forward(self, x):
                Net.calls += 1
                if Net.calls == 4 and not torch.is_grad_enabled():
                    raise KeyError("again")
                return super().forward(x)
        net = Net(6, 5)
        train(net, torch.optim.SGD(net.parameters(), 0.1), (6,))
        """,
        tmp_path,
    )
    assert "KeyError" in reason
    assert "KeyError" not in (tmp_path / "output").read_text()


def test_inputs_that_were_written_to_are_recognised(tmp_path: Path) -> None:
    reason = left_out(
        """
        net = nn.Linear(6, 5)
        last = []
        def forward(a):
            last[:] = [a]
            return net(a)
        opt = torch.optim.SGD(net.parameters(), 0.1)
        step = opt.step
        def stepping():
            last[0].zero_()
            return step()
        opt.step = stepping
        train(net, opt, (6,), forward=forward)
        """,
        tmp_path,
    )
    assert "in place" in reason


def test_an_iterator_is_not_consumed_twice(tmp_path: Path) -> None:
    reason = left_out(
        """
        class Net(nn.Linear):
            def forward(self, rows):
                return super().forward(torch.stack(list(rows)))
        net = Net(6, 5)
        train(net, torch.optim.SGD(net.parameters(), 0.1), (6,), forward=lambda a: net(row for row in a))
        """,
        tmp_path,
    )
    assert "generator" in reason


def test_a_forward_with_a_backward_in_it_is_left_out(tmp_path: Path) -> None:
    reason = left_out(
        """
        class Net(nn.Linear):
            def forward(self, x):
                with torch.enable_grad():
                    super().forward(x).pow(2).mean().backward()
                return super().forward(x)
        net = Net(6, 5)
        train(net, torch.optim.SGD(net.parameters(), 0.1), (6,))
        """,
        tmp_path,
    )
    assert "backward" in reason


def test_a_module_that_is_never_called_is_seen_through_its_parts(tmp_path: Path) -> None:
    run = watch(
        DIGEST
        + textwrap.dedent(
            """
            class System(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.parts = nn.ModuleDict({"net": nn.Linear(6, 5)})
                def training_step(self, a):
                    return self.parts["net"](a)
            system = System()
            train(system, torch.optim.SGD(system.parameters(), 0.1), (6,), forward=system.training_step)
            """
        ),
        tmp_path,
    )
    about = replayed(run)
    assert (about.name, about.outcome, about.samples) == ("System.parts.net", "replayed", 8)


def test_no_hook_stays(tmp_path: Path) -> None:
    watch(
        DIGEST
        + textwrap.dedent(
            """
            net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
            old = digest
            def digest(net, opt):
                return f"{[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]}"
            train(net, torch.optim.SGD(net.parameters(), 0.1), (6,))
            """
        ),
        tmp_path,
    )
    assert "[0, 0, 0]" in steps(tmp_path)[-1]
