"""Lightning, automatic optimization: accumulation, a per-step scheduler, LearningRateMonitor, a CSV logger."""

import sys

import torch

if "--old-name" in sys.argv:
    import pytorch_lightning as pl
else:
    import lightning.pytorch as pl

PACKAGE = pl.__name__


class Regressor(pl.LightningModule):
    def __init__(self, interval):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.interval = interval

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("train_loss", loss)  # LOG
        self.log_dict({"constant": 2.5, "half": torch.tensor(0.5)})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "frequency": 1, "name": "cosine"},
        }


def main():
    pl.seed_everything(7)  # SEED
    data = torch.utils.data.TensorDataset(torch.randn(22, 4), torch.randn(22, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    callbacks = [pl.callbacks.LearningRateMonitor()]
    if "--changing" in sys.argv:
        callbacks.append(pl.callbacks.GradientAccumulationScheduler({0: 4, 1: 2}))
    trainer = pl.Trainer(
        max_epochs=3,
        accumulate_grad_batches=1 if "--changing" in sys.argv else 4,
        gradient_clip_val=0.5,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=1,
        logger=pl.loggers.CSVLogger(sys.argv[1]),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=sys.argv[1],
    )
    trainer.fit(Regressor("epoch" if "--epoch" in sys.argv else "step"), loader, loader)  # FIT
    print("STEPS", trainer.global_step, round(trainer.optimizers[0].param_groups[0]["lr"], 9))


main()
