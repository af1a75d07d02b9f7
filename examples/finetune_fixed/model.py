"""Predicts the embedding of a perturbed cell, and its gene expression through an auxiliary decoder."""

import math

import lightning as L
import torch
from torch import nn

LOSSES = {"mse": nn.MSELoss, "smooth_l1": nn.SmoothL1Loss}


class GeneDecoder(nn.Module):
    def __init__(self, embedding_dim, hidden, genes, dropout):
        super().__init__()
        layers, width = [], embedding_dim
        for size in hidden:
            layers += [nn.Linear(width, size), nn.LayerNorm(size), nn.GELU(), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, genes), nn.ReLU())

    def forward(self, embedding):
        return self.layers(embedding)


class PerturbationModel(L.LightningModule):
    """``training``: lr, weight_decay, loss_fn, lr_scheduler, warmup_ratio, min_lr_ratio, max_steps."""

    def __init__(self, model, training, perturbations, genes):
        super().__init__()
        self.save_hyperparameters()
        self.training_settings = training
        width, hidden = model["embedding_dim"], model["hidden_dim"]
        self.residual = model["residual"]
        self.basal_encoder = nn.Linear(width, hidden)
        self.pert_encoder = nn.Embedding(perturbations, hidden)
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, model["dropout"], batch_first=True, norm_first=True)
        self.backbone = nn.TransformerEncoder(layer, model["layers"], enable_nested_tensor=False)
        self.project_out = nn.Linear(hidden, width)
        self.gene_decoder = GeneDecoder(width, model["decoder_hidden"], genes, model["dropout"])
        self.decoder_weight = model["decoder_weight"]
        self.criterion = LOSSES[training["loss_fn"]]()

    def forward(self, control, perturbation):
        tokens = torch.stack([self.basal_encoder(control), self.pert_encoder(perturbation)], dim=1)
        shift = self.project_out(self.backbone(tokens)[:, 0])
        return control + shift if self.residual else shift

    def losses(self, batch):
        embedding = self(batch["control"], batch["perturbation"])
        genes = self.gene_decoder(embedding.detach())
        return self.criterion(embedding, batch["perturbed"]) + self.decoder_weight * self.criterion(
            genes, batch["expression"]
        )

    def training_step(self, batch, batch_idx):
        loss = self.losses(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses(batch))

    def configure_optimizers(self):
        settings = self.training_settings
        optimizer = torch.optim.AdamW(self.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
        if settings["lr_scheduler"] != "cosine":
            return optimizer
        total, floor = settings["max_steps"], settings["min_lr_ratio"]
        warmup = max(1, int(total * settings["warmup_ratio"]))

        def shape(step):
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / (total - warmup))
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
