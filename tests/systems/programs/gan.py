"""A GAN with two optimizers.

``--fault``: ``generator-zeroed`` (cleared between backward and step), ``sigmoid`` (before a loss that has its own),
``generator-cut-off`` (its images are detached in its own turn too).
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
fault = parser.parse_args().fault
torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.randn(2048, 1, 8, 8)), batch_size=32, shuffle=True, drop_last=True)
generator = nn.Sequential(
    nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8))
)
discriminator = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 1))
opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
if fault == "sigmoid":
    discriminator.append(nn.Sigmoid())
criterion = nn.BCEWithLogitsLoss()
for _ in range(3):
    for (real,) in loader:
        n = len(real)
        discriminator.zero_grad()
        criterion(discriminator(real), torch.full((n, 1), 0.9)).backward()
        fake = generator(torch.randn(n, 16))
        criterion(discriminator(fake.detach()), torch.zeros(n, 1)).backward()
        opt_d.step()

        generator.zero_grad()
        shown = fake.detach() if fault == "generator-cut-off" else fake
        criterion(discriminator(shown), torch.ones(n, 1)).backward()
        if fault == "generator-zeroed":
            opt_g.zero_grad()
        opt_g.step()
