"""An accelerate loop with accumulation, clipping and a prepared scheduler.

``--fault``: ``plain-backward`` (not divided), ``bare-scheduler`` (not prepared), ``scheduler-first``, ``clip-late``,
``new-head`` (after the optimizer was built), ``two-optimizers`` (that both hold the head).
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="")
    fault = parser.parse_args().fault
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
    set_seed(3)
    x = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    if fault == "new-head":
        model[3] = nn.Linear(64, 4)
    second = None
    if fault == "two-optimizers":
        second = accelerator.prepare(torch.optim.SGD(model[3].parameters(), lr=1e-2))
    epochs = 3
    updates = epochs * len(loader) // accelerator.gradient_accumulation_steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if fault != "bare-scheduler":
        scheduler = accelerator.prepare(scheduler)
    for _ in range(epochs):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                if fault == "plain-backward":
                    loss.backward()
                else:
                    accelerator.backward(loss)
                if accelerator.sync_gradients and fault != "clip-late":
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                if fault == "scheduler-first":
                    scheduler.step()
                optimizer.step()
                if second is not None:
                    second.step()
                if accelerator.sync_gradients and fault == "clip-late":
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                if fault != "scheduler-first":
                    scheduler.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
