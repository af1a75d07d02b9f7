"""Predicts the embedding of a perturbed cell, and its gene expression through an auxiliary decoder."""

import lightning as L
import torch
from torch import nn


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
    def __init__(self, embedding_dim, hidden_dim, perturbations, genes, lr=1e-4, **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        dropout = kwargs.get("dropout", 0.1)
        self.residual = kwargs.get("residual", False)
        self.basal_encoder = nn.Linear(embedding_dim, hidden_dim)
        self.pert_encoder = nn.Embedding(perturbations, hidden_dim)
        layer = nn.TransformerEncoderLayer(hidden_dim, 4, 2 * hidden_dim, dropout, batch_first=True, norm_first=True)
        self.backbone = nn.TransformerEncoder(layer, kwargs.get("layers", 1), enable_nested_tensor=False)
        self.project_out = nn.Linear(hidden_dim, embedding_dim)
        self.gene_decoder = GeneDecoder(embedding_dim, kwargs.get("decoder_hidden", [128]), genes, dropout)
        self.decoder_weight = kwargs.get("decoder_weight", 1.0)
        self.criterion = nn.SmoothL1Loss()

    def forward(self, control, perturbation):
        tokens = torch.stack([self.basal_encoder(control), self.pert_encoder(perturbation)], dim=1)
        shift = self.project_out(self.backbone(tokens)[:, 0])
        return control + shift if self.residual else shift

    def losses(self, batch):
        embedding = self(batch["control"], batch["perturbation"])
        loss = self.criterion(embedding, batch["perturbed"])
        if "expression" in batch:
            genes = self.gene_decoder(embedding.detach())
            loss = loss + self.decoder_weight * self.criterion(genes, batch["expression"])
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.losses(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses(batch))

    def configure_optimizers(self):
        modules = [self.basal_encoder, self.pert_encoder, self.backbone, self.gene_decoder]
        return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=self.lr)
