"""A classifier in a plain loop, with dropout, augmentation, decay and a schedule that ends; faults by name."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none", choices=("none", "detached", "head-left-out", "rate"))
    fault = parser.parse_args().fault
    torch.manual_seed(0)
    inputs = torch.randn(1024, 20)
    targets = (inputs @ torch.randn(20, 10)).argmax(1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    validation = DataLoader(TensorDataset(inputs[:256], targets[:256]), batch_size=32)
    model = Classifier()
    trained = model.body.parameters() if fault == "head-left-out" else model.parameters()
    optimizer = torch.optim.AdamW(trained, lr=2e-6 if fault == "rate" else 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=64)
    for _ in range(2):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
            if fault == "detached":
                loss = loss.detach().requires_grad_()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in validation)
        print(f"accuracy {correct / 256:.3f}")


if __name__ == "__main__":
    main()
