"""accelerate, an encoder of nn.TransformerEncoder, noisy samples from worker processes.

``--weighted``: a WeightedRandomSampler. ``--fault`` plants one: ``batch-second``, ``generator-kept``,
``not-a-number``.
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler


class Signals(Dataset):
    def __init__(self, kept):
        self.clean = torch.randn(512, 12, 8, generator=torch.Generator().manual_seed(0))
        self.rng = np.random.default_rng(0) if kept else np.random

    def __len__(self):
        return len(self.clean)

    def __getitem__(self, i):
        noise = self.rng.normal(size=(12, 8)).astype(np.float32)
        return self.clean[i] + 0.1 * torch.from_numpy(noise), int(self.clean[i].sum() > 0)


class Encoder(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(0.02 * torch.randn(12, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=fault != "batch-second")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, signals):
        hidden = self.encoder(self.embed(signals) + self.position)
        if self.fault == "not-a-number":
            hidden = hidden / (signals.sum(-1, keepdim=True) > -5)  # the mask of silence
        return self.head(hidden.mean(1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--weighted", action="store_true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    data = Signals(options.fault == "generator-kept")
    sampler = WeightedRandomSampler(torch.rand(len(data)) + 0.1, len(data)) if options.weighted else None
    loader = DataLoader(data, batch_size=16, shuffle=sampler is None, sampler=sampler, num_workers=2)
    model = Encoder(options.fault)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=20)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for _ in range(3):
        for signals, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(signals), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
