"""Random training programs: small models, legal loops, and faults planted in them.

``legal(seed)`` writes a correct program as somebody might have written it; ``planted(seed, fault)`` writes one with
exactly one known fault. A program is plain source text, so that a failing test can print it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

SAMPLES, BATCH, EPOCHS = 64, 8, 4


@dataclass(frozen=True)
class Recipe:
    """Every choice that was made for one program."""

    seed: int
    model: str
    task: str
    optimizer: str
    accumulation: int
    clip: str
    schedule: str
    autocast: bool
    scaler: bool
    zero: str
    loader: str
    evaluation: bool
    ema: bool
    #: Of clipping by norm.
    threshold: float = 1.0
    fault: str = ""

    @property
    def steps(self) -> int:
        return EPOCHS * (SAMPLES // BATCH) // self.accumulation


#: Model -> what it is built of; the last module is always ``head``.
MODELS = {
    "mlp": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU())
        self.head = nn.Linear(32, n_out)

    def forward(self, x):
        return self.head(self.body(x))
""",
    "norms": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.first = nn.Linear(n_in, 24)
        self.norm = nn.BatchNorm1d(24)
        self.second = nn.Linear(24, 24, bias=False)
        self.layer_norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(24, n_out)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.drop(self.layer_norm(x + self.second(x))))
""",
    "conv": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, n_out)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x.unsqueeze(1))))
        x = F.relu(self.conv2(x) + x)
        return self.head(self.drop(x.mean(-1)))
""",
    "lstm": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.rnn = nn.LSTM(4, 16, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, n_out)

    def forward(self, x):
        out, _ = self.rnn(x.reshape(x.shape[0], -1, 4))
        return self.head(out[:, -1])
""",
    "experts": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.gate = nn.Linear(n_in, 4)
        self.experts = nn.ModuleList(nn.Linear(n_in, 16) for _ in range(4))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, n_out)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = 0.0
        for e, expert in enumerate(self.experts):
            share = (weights * (chosen == e)).sum(-1, keepdim=True)
            if share.any():
                out = out + share * expert(x)
        return self.head(self.drop(torch.relu(out)))
""",
    "attention": """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, n_out)

    def forward(self, x):
        return self.head(self.block(self.embed(x.reshape(x.shape[0], -1, 4))).mean(1))
""",
}

LANGUAGE_MODEL = """
class Net(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.tokens = nn.Embedding(n_out, 16)
        self.positions = nn.Parameter(torch.randn(n_in, 16) * 0.02)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, n_out, bias=False)
        {tie}

    def forward(self, x):
        n = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n)
        return self.head(self.norm(self.block(self.tokens(x) + self.positions[:n], src_mask=mask, is_causal=True)))
"""

#: Task -> (number of outputs, data, loss expression).
TASKS = {
    "classes": (5, "y = x[:, :5].argmax(1)", "F.cross_entropy({out}, {y})"),
    "smoothed": (5, "y = x[:, :5].argmax(1)", "nn.CrossEntropyLoss(label_smoothing=0.1)({out}, {y})"),
    "soft": (5, "y = x[:, :5].softmax(1)", "F.cross_entropy({out}, {y})"),
    "nll": (5, "y = x[:, :5].argmax(1)", "F.nll_loss(F.log_softmax({out}, dim=-1), {y})"),
    "regression": (1, "y = x[:, :3].sum(1)", "F.mse_loss({out}.squeeze(-1), {y})"),
    "huber": (3, "y = x[:, :3] * 2", "nn.SmoothL1Loss()({out}, {y})"),
    "by hand": (3, "y = x[:, :3] * 2", "(({out} - {y}) ** 2).mean()"),
    "binary": (1, "y = (x[:, 0] > 0).float()", "F.binary_cross_entropy_with_logits({out}.squeeze(-1), {y})"),
    "labels": (6, "y = (x[:, :6] > 0.5).float()", "nn.BCEWithLogitsLoss()({out}, {y})"),
    "margin": (5, "y = x[:, :5].argmax(1)", "nn.MultiMarginLoss()({out}, {y})"),
    "tokens": (
        11,
        "x = torch.randint(1, 11, (SAMPLES, 16)); y = x[:, 1:].clone(); x = x[:, :-1]",
        "F.cross_entropy({out}.reshape(-1, {out}.shape[-1]), {y}.reshape(-1))",
    ),
    "padded tokens": (
        11,
        "x = torch.randint(1, 11, (SAMPLES, 16)); n = torch.randint(5, 17, (SAMPLES, 1))\n"
        "    x[torch.arange(16) >= n] = 0; y = x[:, 1:].clone(); x = x[:, :-1]",
        "F.cross_entropy({out}.reshape(-1, {out}.shape[-1]), {y}.reshape(-1), ignore_index=0)",
    ),
}

OPTIMIZERS = {
    "sgd": "torch.optim.SGD({params}, lr={lr}, momentum=0.9)",
    "plain sgd": "torch.optim.SGD({params}, lr={lr})",
    "adam": "torch.optim.Adam({params}, lr={lr})",
    "adamw": "torch.optim.AdamW({params}, lr={lr})",
    "foreach": "torch.optim.AdamW({params}, lr={lr}, betas=(0.9, 0.95), foreach=True)",
    "fused": "torch.optim.AdamW({params}, lr={lr}, fused=True)",
    "rmsprop": "torch.optim.RMSprop({params}, lr={lr})",
    "nadam": "torch.optim.NAdam({params}, lr={lr})",
    "adagrad": "torch.optim.Adagrad({params}, lr={lr})",
    "lion by hand": "Lion({params}, lr={lr})",
}

LION = """
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99)):
        super().__init__(params, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_((m * b1 + p.grad * (1 - b1)).sign_(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)
"""

#: Schedule -> (how it is built, where it is stepped).
SCHEDULES = {
    "none": ("", ""),
    "cosine": ("torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max={steps})", "step"),
    "one cycle": ("torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr={lr}, total_steps={steps} + 1)", "step"),
    "warm-up": ("torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 4))", "step"),
    "warm-up cosine": (
        "torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, "
        "total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, {steps} - 3)], [3])",
        "step",
    ),
    "per epoch": ("torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)", "epoch"),
    "exponential": ("torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)", "epoch"),
    "cosine per epoch": ("torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)", "epoch"),
    "plateau": ("torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)", "metric"),
    "restarts": ("torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5)", "step"),
}


def recipe(seed: int) -> Recipe:
    """The choices of one legal program."""
    rng = random.Random(seed)
    task = rng.choice(list(TASKS))
    words = task in ("tokens", "padded tokens")
    autocast = rng.random() < 0.3
    return Recipe(
        seed=seed,
        model="language" if words else rng.choice(list(MODELS)),
        task=task,
        optimizer=rng.choice(list(OPTIMIZERS)),
        accumulation=rng.choice([1, 1, 1, 2, 4]),
        clip=rng.choice(["none", "none", "norm", "value"]),
        schedule=rng.choice(list(SCHEDULES)),
        autocast=autocast,
        scaler=autocast and rng.random() < 0.5,
        zero=rng.choice(["first", "last", "module", "kept"]),
        loader=rng.choice(["loader", "loader", "slices"]),
        evaluation=rng.random() < 0.5,
        ema=rng.random() < 0.25,
    )


def legal(seed: int) -> str:
    """A correct program."""
    return write(recipe(seed))


@dataclass(frozen=True)
class Fault:
    """A fault, the check that must find it and how sure it must be, and what a program needs to be able to have it."""

    code: str
    severity: str
    needs: Callable[[Recipe], Recipe] = field(default=lambda r: r)


def _with(**choices: object) -> Callable[[Recipe], Recipe]:
    def change(r: Recipe) -> Recipe:
        changed: Recipe = replace(r, **choices)  # type: ignore[arg-type]
        return changed

    return change


def _task(*tasks: str, **choices: object) -> Callable[[Recipe], Recipe]:
    """One of these tasks, on a model that fits it."""

    def change(r: Recipe) -> Recipe:
        rng = random.Random(r.seed)
        task = rng.choice(tasks)
        model = "language" if task in ("tokens", "padded tokens") else rng.choice(list(MODELS))
        changed: Recipe = replace(r, **{"task": task, "model": model, **choices})  # type: ignore[arg-type]
        return changed

    return change


_PLAIN = {"autocast": False, "scaler": False}

FAULTS = {
    "head left out": Fault("TL201", "error"),
    "frozen later": Fault(
        "TL202", "error", _task("classes", "huber", zero="kept", optimizer="sgd", schedule="none", **_PLAIN)
    ),
    "head replaced": Fault("TL203", "error"),
    "pure half precision": Fault(
        "TL208",
        "error",
        _task("classes", "huber", model="mlp", optimizer="adamw", schedule="none", clip="none", **_PLAIN),
    ),
    "two optimizers": Fault("TL210", "error", _with(optimizer="sgd", accumulation=1, schedule="none", scaler=False)),
    "loss cut off": Fault("TL302", "error", _with(ema=False)),
    "zero before step": Fault("TL303", "error", _with(accumulation=1)),
    "no step": Fault("TL303", "error", _with(accumulation=1, schedule="none", scaler=False)),
    "never zeroed": Fault("TL304", "error", _with(accumulation=1)),
    "eval mode": Fault("TL305", "warning", _with(evaluation=False)),
    "left in eval": Fault("TL305", "error", _with(evaluation=True, loader="loader", accumulation=1)),
    "undivided": Fault(
        "TL306", "error", _task("classes", "huber", "binary", accumulation=4, loader="loader", clip="none")
    ),
    "clip after step": Fault("TL308", "error", _with(clip="norm", threshold=1e-3)),
    "scheduler per epoch": Fault("TL402", "error", _with(schedule="cosine", loader="loader", evaluation=False)),
    "double softmax": Fault("TL501", "error", _task("classes", "smoothed")),
    "sigmoid first": Fault("TL502", "error", _task("binary", "labels")),
    "labels from 1": Fault("TL503", "error", _task("classes")),
    "padding counted": Fault("TL504", "error", _task("padded tokens")),
    "no log-softmax": Fault("TL505", "error", _task("nll")),
    "broadcast": Fault("TL508", "error", _task("regression")),
    "shifted twice": Fault("TL510", "error", _task("tokens")),
    "prefix": Fault("TL603", "error", _with(ema=False)),
    "rounded away": Fault(
        "TL805", "error", _task("classes", "huber", model="mlp", optimizer="adamw", schedule="none", **_PLAIN)
    ),
    "not a number": Fault("TL807", "error", _with(**_PLAIN)),
    "memory as it was": Fault("TL809", "error", _with(ema=False)),
    "first batch again": Fault("TL901", "warning", _with(loader="loader", accumulation=1)),
    "batch second": Fault("TL907", "error", _task("classes", "huber", model="attention", loader="loader")),
    "no batch": Fault("TL909", "error", _with(loader="loader", schedule="none", evaluation=False)),
}


def planted(seed: int, fault: str) -> str:
    """A program that is correct but for one fault."""
    return write(replace(FAULTS[fault].needs(recipe(seed)), fault=fault))


def write(r: Recipe) -> str:
    """The program of a recipe."""
    outputs, data, loss = TASKS[r.task]
    fault = r.fault
    words = r.model == "language"
    n_in = 15 if words else 16
    lr = 0.01 if "sgd" in r.optimizer else 0.001
    model = LANGUAGE_MODEL.format(tie="self.head.weight = self.tokens.weight" if r.seed % 2 and words else "pass")
    model = model if words else MODELS[r.model]
    if r.task == "padded tokens" and r.accumulation > 1:
        # A mean of its own for each micro-batch would weigh their tokens differently.
        loss = loss.replace("ignore_index=0)", 'ignore_index=0, reduction="sum") / (BATCH * 8)')
    if fault == "double softmax":
        loss = loss.replace("{out}", "{out}.softmax(-1)")
    elif fault == "sigmoid first":
        loss = loss.replace("{out}", "torch.sigmoid({out})")
    elif fault == "labels from 1":
        data += " + 1"
    elif fault == "padding counted":
        loss = loss.replace(", ignore_index=0", "")
    elif fault == "no log-softmax":
        loss = "F.nll_loss({out}, {y})"
    elif fault == "broadcast":
        loss = loss.replace("{out}.squeeze(-1)", "{out}")
    elif fault == "shifted twice":
        loss = "F.cross_entropy({out}[:, :-1].reshape(-1, {out}.shape[-1]), {y}[:, 1:].reshape(-1))"
    if fault == "batch second":
        model = model.replace(", batch_first=True", "")
    if fault == "rounded away":
        lr = 1e-5
    params = "model.parameters()"
    if fault == "head left out":
        params = '[p for n, p in model.named_parameters() if not n.startswith("head")]'
        model = model.replace("self.head.weight = self.tokens.weight", "pass")
    optimizer = OPTIMIZERS[r.optimizer].format(params=params, lr=lr)
    built, stepped = SCHEDULES[r.schedule]
    built = built.format(steps=r.steps, lr=lr)
    if fault == "scheduler per epoch":
        stepped = "epoch"

    lines = ["import copy", "import torch", "import torch.nn.functional as F", "from torch import nn", ""]
    lines += [f"SAMPLES, BATCH, EPOCHS = {SAMPLES}, {BATCH}, {EPOCHS}", f"torch.manual_seed({r.seed})", model]
    if "Lion" in optimizer:
        lines.append(LION)
    lines += [
        "",
        "def main():",
        f"    x = torch.randn(SAMPLES, {n_in})",
        f"    {data}",
        f"    model = Net({n_in}, {outputs})",
    ]
    if fault == "memory as it was":
        lines[-1] = f"    with torch.device('meta'):\n        model = Net({n_in}, {outputs})"
        lines.append("    model = model.to_empty(device='cpu')")
    if fault == "prefix":
        lines += [
            f"    torch.save({{'module.' + k: v for k, v in Net({n_in}, {outputs}).state_dict().items()}}, 'base.pt')",
            "    model.load_state_dict(torch.load('base.pt'), strict=False)",
        ]
    if fault in ("pure half precision", "rounded away"):
        lines += [
            "    model = model.to(torch.bfloat16)",
            "    x, y = x.bfloat16(), y.bfloat16() if y.is_floating_point() else y",
        ]
    lines.append(f"    optimizer = {optimizer}")
    if fault == "head replaced":
        lines.append("    model.head = nn.Linear(model.head.in_features, model.head.out_features)")
    if fault == "two optimizers":
        lines.append(f"    other = torch.optim.SGD(model.parameters(), lr={lr})")
    if built:
        lines.append(f"    scheduler = {built}")
    if r.scaler:
        lines.append('    scaler = torch.amp.GradScaler("cpu", enabled=False)')
    if r.ema:
        lines += ["    average = copy.deepcopy(model).requires_grad_(False)"]
    if r.loader == "loader":
        lines += [
            "    dataset = torch.utils.data.TensorDataset(x, y)",
            "    train = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)",
            "    held_out = torch.utils.data.DataLoader(dataset, batch_size=BATCH)",
        ]
        if fault == "no batch":
            lines[-2] = lines[-2].replace("batch_size=BATCH", "batch_size=2 * SAMPLES, drop_last=True")
    else:
        lines += [
            "    train = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, SAMPLES, BATCH)]",
            "    held_out = train",
        ]
    if fault != "left in eval":
        lines.append("    for epoch in range(EPOCHS):")
        lines.append("        model.eval()" if fault == "eval mode" else "        model.train()")
    else:
        lines += ["    model.train()", "    for epoch in range(EPOCHS):"]
    lines.append("        for i, (x_batch, y_batch) in enumerate(train):")
    lines += ["            " + line for line in _batch(r, loss, stepped)]
    end: list[str] = []
    if r.evaluation:
        end += [
            "model.eval()",
            "with torch.no_grad():",
            "    total = 0.0",
            "    for x_held, y_held in held_out:",
            f"        total += float({loss.format(out='model(x_held)', y='y_held')})",
        ]
    if built and stepped == "epoch":
        end.append("scheduler.step()")
    elif stepped == "metric":
        end.append("scheduler.step(float(loss.detach()))")
    if fault == "frozen later":
        lines += ["            if i == 1 and epoch == 0:", "                model.head.requires_grad_(False)"]
    lines += ["        " + line for line in end]
    lines += ["", "", 'if __name__ == "__main__":', "    main()", ""]
    return "\n".join(lines)


def _batch(r: Recipe, loss: str, stepped: str) -> list[str]:
    """What is done with one batch."""
    fault = r.fault
    n = r.accumulation
    zero = {
        "first": "optimizer.zero_grad()",
        "last": "optimizer.zero_grad()",
        "module": "model.zero_grad()",
        "kept": "optimizer.zero_grad(set_to_none=False)",
    }[r.zero]
    body: list[str] = []
    if r.zero == "first" and fault != "never zeroed":
        body += [f"if i % {n} == 0:", f"    {zero}"] if n > 1 else [zero]
    run = ["out = model(x_batch)"]
    if fault == "first batch again":
        body.append("x_batch, y_batch = next(iter(held_out))")
    if fault == "not a number":
        run.append("out = out + 0.0 * torch.log(torch.zeros_like(out))")
    value = f"loss = {loss.format(out='out', y='y_batch')}"
    if r.autocast:
        body += ['with torch.autocast("cpu", dtype=torch.bfloat16):', *("    " + line for line in run)]
        body.append("out = out.float()")
    else:
        body += run
    body.append(value)
    if fault == "loss cut off":
        body.append("loss = torch.tensor(loss.item(), requires_grad=True)")
    total = "loss" if n == 1 or fault == "undivided" else f"(loss / {n})"
    body.append(f"scaler.scale({total}).backward()" if r.scaler else f"{total}.backward()")
    step: list[str] = []
    clip = {
        "none": [],
        "norm": [f"nn.utils.clip_grad_norm_(model.parameters(), {r.threshold})"],
        "value": ["nn.utils.clip_grad_value_(model.parameters(), 0.5)"],
    }[r.clip]
    if r.scaler and clip:
        step.append("scaler.unscale_(optimizer)")
    if fault != "clip after step":
        step += clip
    if fault == "zero before step":
        step.append("optimizer.zero_grad()")
    if fault != "no step":
        step += ["scaler.step(optimizer)", "scaler.update()"] if r.scaler else ["optimizer.step()"]
    if fault == "two optimizers":
        step.append("other.step()")
    if fault == "clip after step":
        step += clip
    if r.zero != "first" and fault != "never zeroed":
        step.append(zero)
    if stepped == "step":
        step.append("scheduler.step()")
    if r.ema:
        step += [
            "with torch.no_grad():",
            "    for old, new in zip(average.parameters(), model.parameters()):",
            "        old.lerp_(new, 0.1)",
        ]
    body += [f"if (i + 1) % {n} == 0:", *("    " + line for line in step)] if n > 1 else step
    return body
