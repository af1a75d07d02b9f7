"""A small classifier under accelerate, with accumulation and evaluation after each epoch; faults by name."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
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
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    inputs = torch.randn(1024, 20)
    targets = (inputs @ torch.randn(20, 10)).argmax(1)
    model = Classifier()
    trained = model.body.parameters() if fault == "head-left-out" else model.parameters()
    optimizer = torch.optim.AdamW(trained, lr=2e-6 if fault == "rate" else 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    validation = DataLoader(TensorDataset(inputs[:256], targets[:256]), batch_size=32)
    model, optimizer, loader, validation, schedule = accelerator.prepare(model, optimizer, loader, validation, schedule)
    for _ in range(2):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                if fault == "detached":
                    loss = loss.detach().requires_grad_()
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            for x, y in validation:
                accelerator.gather_for_metrics((model(x).argmax(1), y))


if __name__ == "__main__":
    main()
