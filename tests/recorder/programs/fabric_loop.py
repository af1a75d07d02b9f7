"""Lightning Fabric: the program's own loop, logging through Fabric."""

import sys

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger

fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true", loggers=CSVLogger(sys.argv[1]))
fabric.launch()
fabric.seed_everything(3)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = fabric.setup(model, optimizer)
for step in range(2):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3, dtype=torch.bfloat16)).pow(2).mean()
    fabric.backward(loss)
    optimizer.step()
    fabric.log("loss", loss)
    fabric.log_dict({"lr": optimizer.param_groups[0]["lr"]}, step=step)
