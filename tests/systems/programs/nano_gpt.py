"""In the manner of nanoGPT: rates by hand through param_groups, no scheduler object, batches without a DataLoader.

An average of the weights is kept and evaluated now and then.

``--fault``: ``undivided``, ``late-norm-left-out``, ``zero-each-micro-step``, ``clip-first``, ``average-of-itself``
(averaged with its own weights), ``trained-in-eval`` (the estimate of the loss leaves eval mode).
"""

import argparse
import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
parser.add_argument("--compile", action="store_true")
options = parser.parse_args()

learning_rate, min_lr, warmup_iters, max_iters = 6e-4, 6e-5, 20, 200
batch_size, block_size, gradient_accumulation_steps = 8, 32, 4
torch.manual_seed(1337)
data = (np.arange(8192) * 11 % 65).astype(np.uint16)


def get_batch():
    ix = torch.randint(len(data) - block_size - 1, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix])
    return x, y


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.attn(self.ln_1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, vocab=65, width=48, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(block_size, width)
        self.h = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def update_average():
    source = average if options.fault == "average-of-itself" else model
    with torch.no_grad():
        for kept, now in zip(average.parameters(), source.parameters(), strict=True):
            kept.lerp_(now, 0.05)


@torch.no_grad()
def estimate_loss():
    average.eval()
    if options.fault == "trained-in-eval":
        model.eval()
    return sum(average(*get_batch())[1].item() for _ in range(2)) / 2


model = GPT()
average = copy.deepcopy(model).requires_grad_(False)
held = {n: p for n, p in model.named_parameters() if options.fault != "late-norm-left-out" or "ln_f" not in n}
groups = [{"params": [p for p in held.values() if p.dim() >= 2], "weight_decay": 0.1},
          {"params": [p for p in held.values() if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
if options.compile:
    model = torch.compile(model, backend="aot_eager")
X, Y = get_batch()
for iter_num in range(max_iters + 1):
    if iter_num % 50 == 0:
        print(f"iter {iter_num}: loss of the average {estimate_loss():.4f}")
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    if options.fault == "clip-first":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for _ in range(gradient_accumulation_steps):
        if options.fault == "zero-each-micro-step":
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(X, Y)
            if options.fault != "undivided":
                loss = loss / gradient_accumulation_steps
        X, Y = get_batch()
        loss.backward()
    if options.fault != "clip-first":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    update_average()
