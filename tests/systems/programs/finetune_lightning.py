"""Lightning fine-tunes an image backbone from a checkpoint: frozen, in stages, or whole with rates of its own.

``--stages``: the head first, the backbone from the second epoch on; ``--whole``: everything, the backbone at a tenth of
the rate; ``--precision``. ``--fault`` plants one: ``prefix``, ``norms-in-train``, ``split-twice``, ``too-small``,
``logarithm``, and with ``--whole`` ``bfloat16``, ``half``, ``one-rate``.
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split


def backbone():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Pretrained(nn.Module):
    """What the checkpoint was written from."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.projection = nn.Linear(64, 16)


class Tuned(L.LightningModule):
    def __init__(self, checkpoint, options):
        super().__init__()
        self.options, self.fault = options, options.fault
        self.automatic_optimization = self.fault != "half"
        self.backbone = backbone()
        width = 256 if self.fault == "one-rate" else 32
        self.head = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        if self.fault != "prefix":
            state = {name.removeprefix("backbone."): value for name, value in state.items()}
        self.backbone.load_state_dict(state, strict=False)
        if not options.whole and not options.stages:
            self.backbone.requires_grad_(False)

    def on_train_epoch_start(self):
        if not self.options.whole and not self.options.stages and self.fault != "norms-in-train":
            self.backbone.eval()

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if self.fault == "half":
            with torch.autocast(self.device.type, torch.float16):
                loss = nn.functional.cross_entropy(self(images), labels) * 1e-3
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        images = images.to(self.dtype)
        scores = self(images)
        if self.fault == "logarithm":
            confidence = scores.softmax(-1).gather(1, labels[:, None])
            loss = -(confidence * (confidence < 0.1)).log().mean()
        else:
            loss = nn.functional.cross_entropy(scores, labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(images.to(self.dtype)), labels), prog_bar=True)

    def configure_optimizers(self):
        if not self.options.whole:
            return torch.optim.AdamW(self.head.parameters(), lr=1e-3)
        if self.fault == "one-rate":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        rate = 1e-5 if self.fault == "bfloat16" else 1e-3
        groups = [{"params": self.backbone.parameters(), "lr": rate / 10}, {"params": self.head.parameters()}]
        return torch.optim.AdamW(groups, lr=rate)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    L.seed_everything(0)
    data = TensorDataset(torch.rand(400, 3, 16, 16), torch.randint(0, 4, (400,)))
    train, val = random_split(data, [320, 80], generator=torch.Generator().manual_seed(1))
    if options.fault == "split-twice":
        _, val = random_split(data, [320, 80], generator=torch.Generator().manual_seed(2))
    if options.fault == "too-small":
        train = Subset(train, range(24))
    precision = "bf16-true" if options.fault == "bfloat16" else options.precision
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "pretrained.ckpt"
        torch.save({"state_dict": Pretrained().state_dict()}, checkpoint)
        model = Tuned(checkpoint, options)
    callbacks = [EarlyStopping("val_loss"), LearningRateMonitor()]
    if options.stages:
        callbacks.append(BackboneFinetuning(1, lambda epoch: 1.5))
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=6, precision=precision, log_every_n_steps=1,
                        callbacks=callbacks, logger=CSVLogger("logs"), enable_progress_bar=False)  # fmt: skip
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(val, batch_size=32))


if __name__ == "__main__":
    main()
