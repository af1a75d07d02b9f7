"""A Lightning module, automatic or manual optimization, logging its rate.

``--fault``: ``head-left-out``, ``epoch-cadence``, ``double-softmax``, ``gradients-kept``, ``validated-in-training``,
``eval-at-epoch-end``; with ``--manual``: ``undivided``, ``zeroed``, ``clip-late``.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, manual, fault):
        super().__init__()
        self.automatic_optimization = not manual
        self.fault = fault
        self.body = nn.Sequential(nn.Linear(12, 48), nn.LayerNorm(48), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(48, 3)
        self.every = 4

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.head(self.body(x))
        loss = nn.functional.cross_entropy(scores.softmax(-1) if self.fault == "double-softmax" else scores, y)
        self.log("train_loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss if self.fault == "undivided" else loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            if self.fault != "clip-late":
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            if self.fault == "zeroed":
                optimizer.zero_grad()
            optimizer.step()
            if self.fault == "clip-late":
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.body(x)), y))

    def optimizer_zero_grad(self, *args):
        if self.fault != "gradients-kept":
            super().optimizer_zero_grad(*args)

    def on_validation_model_eval(self):
        if self.fault != "validated-in-training":
            super().on_validation_model_eval()

    def on_train_epoch_end(self):
        if self.fault == "eval-at-epoch-end":
            self.eval()  # a look at some predictions
            with torch.no_grad():
                self.head(self.body(torch.zeros(1, 12)))

    def configure_optimizers(self):
        held = self.body if self.fault == "head-left-out" else self
        optimizer = torch.optim.AdamW(held.parameters(), lr=2e-3, weight_decay=0.01)
        total = self.trainer.estimated_stepping_batches
        total = int(total if self.automatic_optimization else total // self.every)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
        interval = "epoch" if self.fault == "epoch-cadence" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    L.seed_everything(0)
    x = torch.randn(640, 12)
    data = TensorDataset(x, x[:, :3].argmax(1))
    automatic = {} if options.manual else {"accumulate_grad_batches": 4, "gradient_clip_val": 1.0}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=4, precision="bf16-mixed", log_every_n_steps=1,
                        logger=CSVLogger("logs"), callbacks=[LearningRateMonitor("step")], enable_progress_bar=False,
                        **automatic)  # fmt: skip
    loader = DataLoader(data, batch_size=16, shuffle=True)
    trainer.fit(Net(options.manual, options.fault), loader, DataLoader(data, batch_size=64))
