"""Lightning, manual optimization with two optimizers; the program steps its scheduler."""

import sys

import lightning.pytorch as pl
import torch


class TwoParts(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        for optimizer in self.optimizers():
            loss = self.second(self.first(x)).pow(2).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.lr_schedulers().step()
        self.logger.experiment.add_scalar("by_hand", 1.5, batch_idx)
        self.logger.log_metrics({"direct": 3.5}, step=batch_idx)

    def configure_optimizers(self):
        first = torch.optim.SGD(self.first.parameters(), lr=0.1)
        second = torch.optim.SGD(self.second.parameters(), lr=0.1)
        return [first, second], [{"scheduler": torch.optim.lr_scheduler.StepLR(first, 2), "interval": "step"}]


data = torch.utils.data.TensorDataset(torch.randn(8, 4))
trainer = pl.Trainer(
    max_epochs=2,
    accelerator="cpu",
    devices=1,
    logger=pl.loggers.TensorBoardLogger(sys.argv[1]),
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=sys.argv[1],
)
trainer.fit(TwoParts(), torch.utils.data.DataLoader(data, batch_size=2))
