"""A Lightning module with validation, early stopping, a plateau schedule and few steps; faults by name."""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x)), y)
        self.log("train_loss", loss)
        return loss.detach().requires_grad_() if self.fault == "detached" else loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.body(x)), y))

    def configure_optimizers(self) -> Any:
        trained = self.body.parameters() if self.fault == "head-left-out" else self.parameters()
        optimizer = torch.optim.AdamW(trained, lr=2e-6 if self.fault == "rate" else 2e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none", choices=("none", "detached", "head-left-out", "rate"))
    fault = parser.parse_args().fault
    pl.seed_everything(0)
    inputs = torch.randn(1024, 20)
    targets = (inputs @ torch.randn(20, 10)).argmax(1)
    trainer = pl.Trainer(
        max_epochs=3,
        max_steps=70,
        accelerator="cpu",
        logger=CSVLogger("logs"),
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[EarlyStopping("val_loss"), ModelCheckpoint("logs", monitor="val_loss"), LearningRateMonitor()],
    )
    trainer.fit(
        Classifier(fault),
        DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True),
        DataLoader(TensorDataset(inputs[:256], targets[:256]), batch_size=32),
    )


if __name__ == "__main__":
    main()
