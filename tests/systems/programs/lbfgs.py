"""LBFGS with a closure.

``--fault``: ``output-left-out`` of the optimizer, ``broadcast`` (targets of another shape), ``gradients-kept``.
"""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
fault = parser.parse_args().fault
torch.manual_seed(0)
x = torch.linspace(-3, 3, 200).unsqueeze(1)
y = torch.sin(2 * x) * torch.exp(-x.square() / 4)
if fault == "broadcast":
    y = y.squeeze(1)
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
held = model[:4] if fault == "output-left-out" else model
optimizer = torch.optim.LBFGS(held.parameters(), lr=1, max_iter=8, history_size=20, line_search_fn="strong_wolfe")


def closure():
    if fault != "gradients-kept":
        optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y) + 1e-6 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    return loss


for step in range(20):
    print(step, float(optimizer.step(closure)))
