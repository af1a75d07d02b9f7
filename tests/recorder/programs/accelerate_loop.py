"""A plain accelerate loop: accumulation through `accelerator.accumulate`, a wrapped scheduler, a tracker."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

set_seed(5)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, log_with="tensorboard", project_dir=sys.argv[1])
accelerator.init_trackers("run")
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=2)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for (x,) in loader:
    with accelerator.accumulate(model):
        loss = model(x).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.log({"loss": loss, "lr": scheduler.get_last_lr()[0]}, step=1)
accelerator.end_training()
