"""Each fault in the ways people write it, and the right program beside it that looks most like it."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_programs import HEAD, said

LOOP = HEAD + "for x, y in loader:\n"


def lines(*body: str) -> str:
    """A loop over batches with these lines."""
    return LOOP + "".join(f"    {line}\n" for line in body)


FORWARD = "loss = F.cross_entropy(model(x), y)"

ORDERS = [
    # (body, expected code and severity)
    (("optimizer.zero_grad()", FORWARD, "loss.backward()", "optimizer.step()"), []),
    ((FORWARD, "loss.backward()", "optimizer.step()", "optimizer.zero_grad()"), []),
    ((FORWARD, "loss.backward()", "optimizer.step()", "model.zero_grad(set_to_none=True)"), []),
    ((FORWARD, "loss.backward()", "optimizer.zero_grad()", "optimizer.step()"), [("TL303", "error")]),
    ((FORWARD, "loss.backward()", "model.zero_grad()", "optimizer.step()"), [("TL303", "error")]),
    (("optimizer.zero_grad()", FORWARD, "optimizer.step()", "loss.backward()"), [("TL303", "error")]),
    ((FORWARD, "optimizer.zero_grad()", "loss.backward()"), [("TL303", "error")]),
    ((FORWARD, "loss.backward()", "optimizer.step()"), [("TL304", "error")]),
    ((FORWARD, "loss.backward()", "optimizer.step()", "for p in model.parameters():", "    p.grad = None"), []),
    ((FORWARD, "loss.backward()", "optimizer.step()", "clear(optimizer)"), []),
    # Something unread holds the loss between clearing and the step: it may call backward.
    (("optimizer.zero_grad()", FORWARD, "run_backward(loss)", "optimizer.step()", "loss.backward()"), []),
    # Gradients are put together by hand.
    (
        (FORWARD, "loss.backward()", "optimizer.zero_grad()", "for p in model.parameters():", "    p.grad = kept[p]",
         "optimizer.step()"),
        [],
    ),
    ((FORWARD, "loss.backward()", "if x.isnan().any():", "    optimizer.zero_grad()", "    continue",
      "optimizer.step()", "optimizer.zero_grad()"), []),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), ORDERS, ids=range(len(ORDERS)))
def test_order(tmp_path: Path, body: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert [(code, severity) for code, severity, _ in said(tmp_path, lines(*body))] == expected


def accumulating(*body: str) -> str:
    return HEAD + "n = 4\nfor i, (x, y) in enumerate(loader):\n" + "".join(f"    {line}\n" for line in body)


END = ("if (i + 1) % n == 0:", "    optimizer.step()", "    optimizer.zero_grad()")
ACCUMULATIONS = [
    ((FORWARD, "loss.backward()", *END), [("TL306", "error")]),
    (("measure = nn.CrossEntropyLoss()", "loss = measure(model(x), y)", "loss.backward()", *END), [("TL306", "error")]),
    ((FORWARD, "loss.backward()", "if (i + 1) % n:", "    continue", "optimizer.step()", "optimizer.zero_grad()"),
     [("TL306", "error")]),
    ((FORWARD, "(loss / n).backward()", *END), []),
    ((FORWARD, "loss = loss / n", "loss.backward()", *END), []),
    ((FORWARD, "loss /= n", "loss.backward()", *END), []),
    ((FORWARD, "loss.backward(gradient=torch.tensor(1 / n))", *END), []),
    (("loss = F.cross_entropy(model(x), y, reduction='sum')", "loss.backward()", *END), []),
    (("loss = compute(model, x, y)", "loss.backward()", *END), []),
    ((FORWARD, "loss.backward()", "if (i + 1) % n == 0:", "    for p in model.parameters():", "        p.grad.div_(n)",
      "    optimizer.step()", "    optimizer.zero_grad()"), []),
    # Every batch is stepped; only logging counts.
    ((FORWARD, "loss.backward()", "optimizer.step()", "optimizer.zero_grad()", "if i % 10 == 0:",
      "    print(loss.item())"), []),
    (("optimizer.zero_grad()", FORWARD, "(loss / n).backward()", "if (i + 1) % n == 0:", "    optimizer.step()"),
     [("TL303", "error")]),
    # The step skips what the backward skips.
    (("optimizer.zero_grad()", FORWARD, "if i % 2 == 0:", "    loss.backward()", "    optimizer.step()"), []),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), ACCUMULATIONS, ids=range(len(ACCUMULATIONS)))
def test_accumulation(tmp_path: Path, body: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert [(code, severity) for code, severity, _ in said(tmp_path, accumulating(*body))] == expected


CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
CLIPS = [
    (("optimizer.zero_grad()", FORWARD, "loss.backward()", CLIP, "optimizer.step()"), []),
    (("optimizer.zero_grad()", FORWARD, "loss.backward()", "optimizer.step()", CLIP), [("TL308", "error")]),
    (("optimizer.zero_grad()", FORWARD, CLIP, "loss.backward()", "optimizer.step()"), [("TL308", "error")]),
    # Measuring only.
    (
        ("optimizer.zero_grad()", FORWARD, "loss.backward()", "optimizer.step()",
         "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float('inf'))"),
        [],
    ),
    # Cleared never: what is clipped after the step is still there at the next (TL304 says so).
    (
        ("optimizer.zero_grad()", FORWARD, "scaler.scale(loss).backward()", CLIP, "scaler.step(optimizer)",
         "scaler.update()"),
        [("TL308", "error")],
    ),
    (
        ("optimizer.zero_grad()", FORWARD, "scaler.scale(loss).backward()", "scaler.unscale_(optimizer)", CLIP,
         "scaler.step(optimizer)", "scaler.update()"),
        [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), CLIPS, ids=range(len(CLIPS)))
def test_clipping(tmp_path: Path, body: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    program = lines(*body).replace("for x, y", "scaler = torch.amp.GradScaler()\nfor x, y")
    assert [(code, severity) for code, severity, _ in said(tmp_path, program)] == expected


def test_clipping_an_exhausted_generator(tmp_path: Path) -> None:
    program = """
    import torch
    from torch import nn
    model = nn.Linear(3, 1)
    parameters = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = torch.optim.SGD({}, lr=0.1)
    for x in loader:
        optimizer.zero_grad()
        model(x).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    """
    assert said(tmp_path, program.format("parameters")) == [("TL308", "error", 10)]
    # A list of it made before is spent by nobody.
    listed = program.replace("parameters = filter(", "parameters = list(filter(").replace(
        "model.parameters())\n", "model.parameters()))\n"
    )
    assert said(tmp_path, listed.format("parameters")) == []


NETWORK = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, classes=3, probabilities=False):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, classes)
        self.end = nn.Softmax(dim=1)
        self.probabilities = probabilities

    def forward(self, x):
        x = self.head(F.relu(self.body(x)))
{returns}
"""
MODEL_LOOP = """
import torch
from torch import nn
from net import Net
model = {model}
criterion = {loss}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    out = model(x)
    loss = criterion(out, y)
    loss.backward()
    optimizer.step()
"""
RETURNS = [
    ("return self.end(x)", "nn.CrossEntropyLoss()", [("TL501", "error")]),
    ("return F.softmax(x, dim=-1)", "nn.CrossEntropyLoss()", [("TL501", "error")]),
    ("return x.softmax(1).squeeze()", "nn.CrossEntropyLoss()", [("TL501", "error")]),
    ("return torch.exp(x) / torch.exp(x).sum(1, keepdim=True)", "nn.CrossEntropyLoss()", [("TL501", "error")]),
    ("return F.log_softmax(x, dim=1)", "nn.CrossEntropyLoss()", []),
    ("return x", "nn.CrossEntropyLoss()", []),
    ("return torch.log(self.end(x))", "nn.CrossEntropyLoss()", []),
    ("return x if self.training else self.end(x)", "nn.CrossEntropyLoss()", []),
    ("if self.probabilities:\n            return self.end(x)\n        return x", "nn.CrossEntropyLoss()", []),
    ("return self.end(x) * 10", "nn.CrossEntropyLoss()", []),
    ("return torch.sigmoid(x)", "nn.CrossEntropyLoss()", [("TL501", "warning")]),
    ("return torch.sigmoid(x)", "nn.BCEWithLogitsLoss()", [("TL502", "error")]),
    ("return torch.sigmoid(x)", "nn.BCELoss()", []),
    ("return x", "nn.BCEWithLogitsLoss()", []),
    ("return F.log_softmax(x, dim=1)", "nn.NLLLoss()", []),
    ("return self.end(x)", "nn.NLLLoss()", [("TL505", "error")]),
    ("return x", "nn.NLLLoss()", [("TL505", "warning")]),
    ("return torch.log(self.end(x) + 1e-8)", "nn.NLLLoss()", []),
    ("return self.end(x)", "nn.KLDivLoss(reduction='batchmean')", [("TL505", "error")]),
]


@pytest.mark.parametrize(("returns", "loss", "expected"), RETURNS, ids=range(len(RETURNS)))
def test_what_reaches_the_loss(tmp_path: Path, returns: str, loss: str, expected: list[tuple[str, str]]) -> None:
    network = NETWORK.format(returns=f"        {returns}")
    program = MODEL_LOOP.format(model="Net()", loss=loss)
    assert [(code, severity) for code, severity, _ in said(tmp_path, program, net=network)] == expected


def test_a_flag_of_the_constructor_decides(tmp_path: Path) -> None:
    network = NETWORK.format(returns="        return self.end(x) if self.probabilities else x")
    for model, expected in (("Net()", []), ("Net(probabilities=True)", ["TL501"])):
        program = MODEL_LOOP.format(model=model, loss="nn.CrossEntropyLoss()")
        assert [code for code, _, _ in said(tmp_path, program, net=network)] == expected


def test_a_loss_that_nothing_is_trained_on_is_left_alone(tmp_path: Path) -> None:
    body = ("optimizer.zero_grad()", FORWARD, "shown = F.nll_loss(model(x).softmax(1), y)", "print(shown)",
            "loss.backward()", "optimizer.step()")  # fmt: skip
    assert said(tmp_path, lines(*body)) == []


DETACHED = [
    ("loss = F.mse_loss(model(x).detach(), y)", "loss.requires_grad_()"),
    ("loss = torch.tensor(F.mse_loss(model(x), y).item(), requires_grad=True)", "pass"),
    ("with torch.no_grad():", "    out = model(x)\n    loss = F.mse_loss(out, y)\n    loss.requires_grad = True"),
    ("loss = F.mse_loss(model(x).data, y)", "loss = torch.autograd.Variable(loss, requires_grad=True)"),
]


@pytest.mark.parametrize("body", DETACHED, ids=range(len(DETACHED)))
def test_detached(tmp_path: Path, body: tuple[str, ...]) -> None:
    body = tuple(line for part in body for line in part.split("\n"))
    found = said(tmp_path, lines("optimizer.zero_grad()", *body, "loss.backward()", "optimizer.step()"))
    assert [(code, severity) for code, severity, _ in found] == [("TL302", "error")]


ATTACHED = [
    "loss = F.mse_loss(model(x), teacher(x).detach())",
    "loss = F.mse_loss(model(x).detach(), other)",
    "loss = F.mse_loss(model(x), y) + 0 * model(x).detach().mean()",
    "x = torch.randn(3, requires_grad=True)\n    loss = (x * model(x).detach()).mean()",
]


@pytest.mark.parametrize("text", ATTACHED, ids=range(len(ATTACHED)))
def test_attached(tmp_path: Path, text: str) -> None:
    assert said(tmp_path, lines("optimizer.zero_grad()", text, "loss.backward()", "optimizer.step()")) == []


SCHEDULED = """
import torch
from torch import nn
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.{}
for epoch in range(3):
{}
    for x in loader:
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
{}
"""
SCHEDULES = [
    ("StepLR(optimizer, 1)", "    scheduler.step()", "", [("TL401", "warning")]),
    ("StepLR(optimizer, 1)", "", "    scheduler.step()", []),
    ("StepLR(optimizer, 1)", "    scheduler.step(epoch)", "", []),
    ("ReduceLROnPlateau(optimizer)", "    scheduler.step(metric)", "", []),
    ("StepLR(optimizer, 1)", "    if epoch:\n        scheduler.step()", "", []),
]


@pytest.mark.parametrize(("scheduler", "top", "bottom", "expected"), SCHEDULES, ids=range(len(SCHEDULES)))
def test_scheduler(tmp_path: Path, scheduler: str, top: str, bottom: str, expected: list[tuple[str, str]]) -> None:
    found = said(tmp_path, SCHEDULED.format(scheduler, top, bottom))
    assert [(code, severity) for code, severity, _ in found] == expected


MODES = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def evaluate():
    {evaluate}
    with torch.no_grad():
        return [model(x) for x in held_out]

{before}
for epoch in range(3):
    {top}
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    evaluate()
"""
MODE_CASES = [
    ("model.eval()", "model.train()", "pass", [("TL305", "error")]),
    ("model.eval()", "pass", "model.train()", []),
    ("model.eval()", "pass", "model.train(mode=True)", []),
    ("pass", "model.train()", "pass", [("TL305", "warning")]),
    ("model.train(False)", "pass", "model.train()", []),
    ("model.eval()", "model.requires_grad_(False)", "pass", []),
]


@pytest.mark.parametrize(("evaluate", "before", "top", "expected"), MODE_CASES, ids=range(len(MODE_CASES)))
def test_modes(tmp_path: Path, evaluate: str, before: str, top: str, expected: list[tuple[str, str]]) -> None:
    found = said(tmp_path, MODES.format(evaluate=evaluate, before=before, top=top))
    assert [(code, severity) for code, severity, _ in found] == expected


HELD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.spare = nn.Linear(8, 3)
        {more}

    def forward(self, x):
        return self.head(self.body(x))

model = Net()
{before}
optimizer = torch.optim.{optimizer}
{after}
for x, y in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
"""
HELDS = [
    ("pass", "pass", "SGD(model.parameters(), lr=1)", "pass", []),
    ("pass", "pass", "SGD(model.body.parameters(), lr=1)", "pass", [("TL201", "error")]),
    ("pass", "pass", "SGD([*model.body.parameters(), *model.head.parameters()], lr=1)", "pass", []),
    ("pass", "groups = [{'params': m.parameters()} for m in (model.body, model.head)]", "SGD(groups)", "pass", []),
    ("pass", "groups = [{'params': model.body.parameters()}]", "SGD(groups)", "pass", [("TL201", "error")]),
    ("pass", "model.head.requires_grad_(False)", "SGD(model.body.parameters(), lr=1)", "pass", []),
    ("pass", "for p in model.head.parameters():\n    p.requires_grad = False", "SGD(model.body.parameters())", "", []),
    ("head = self.head", "pass", "SGD(model.body.parameters())",
     "optimizer.add_param_group({'params': model.head.parameters()})", []),
    ("pass", "pass", "SGD(model.parameters(), lr=1)", "model.head = nn.Linear(8, 5)", [("TL203", "error")]),
    ("pass", "model.head = nn.Linear(8, 5)", "SGD(model.parameters(), lr=1)", "pass", []),
    ("pass", "pass", "SGD(model.parameters(), lr=1)", "model = model.to('cpu')", []),
    ("pass", "pass", "Adam(model.parameters(), lr=1, weight_decay=0.1)", "pass", [("TL206", "warning")]),
    ("pass", "pass", "Adam(model.parameters(), lr=1, weight_decay=1e-5)", "pass", [("TL206", "info")]),
    ("pass", "pass", "AdamW(model.parameters(), lr=1, weight_decay=0.1)", "pass", []),
    ("pass", "pass", "Adam([p for n, p in model.named_parameters() if 'body' in n], lr=1)", "pass", []),
]  # fmt: skip


@pytest.mark.parametrize(("more", "before", "optimizer", "after", "expected"), HELDS, ids=range(len(HELDS)))
def test_what_the_optimizer_holds(
    tmp_path: Path, more: str, before: str, optimizer: str, after: str, expected: list[tuple[str, str]]
) -> None:
    found = said(tmp_path, HELD.format(more=more, before=before, optimizer=optimizer, after=after))
    assert [(code, severity) for code, severity, _ in found] == expected


LISTED = [
    ("self.layers = [nn.Linear(8, 8) for _ in range(3)]", "TL201"),
    ("self.layers = []\n        for _ in range(3):\n            self.layers.append(nn.Linear(8, 8))", "TL201"),
    ("self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])", ""),
    ("layers = [nn.Linear(8, 8) for _ in range(3)]\n        self.layers = nn.ModuleList(layers)", ""),
    ("self.layers = [nn.Linear(8, 8)]\n        self.kept = nn.Sequential(*self.layers)", ""),
    ("self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]\n        for i, layer in enumerate(self.layers):\n"
     "            self.add_module(str(i), layer)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "code"), LISTED, ids=range(len(LISTED)))
def test_layers_in_a_list(tmp_path: Path, layers: str, code: str) -> None:
    program = HELD.format(more=layers, before="pass", optimizer="SGD(model.parameters(), lr=1)", after="pass")
    program = program.replace(
        "return self.head(self.body(x))",
        "x = self.body(x)\n        for layer in self.layers:\n            x = layer(x)\n        return self.head(x)",
    )
    assert [c for c, _, _ in said(tmp_path, program)] == ([code] if code else [])
