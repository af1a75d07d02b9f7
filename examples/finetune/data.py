"""A synthetic perturbation screen: control cells, the perturbation, and the cells after it."""

import torch
from torch.utils.data import DataLoader, Dataset, random_split


class Screen(Dataset):
    def __init__(self, cells, genes, perturbations, embedding_dim, seed, store_raw_expression):
        g = torch.Generator().manual_seed(seed)
        self.control = torch.randn(cells, embedding_dim, generator=g)
        self.perturbation = torch.randint(perturbations, (cells,), generator=g)
        shift = 0.5 * torch.randn(perturbations, embedding_dim, generator=g)
        noise = 0.1 * torch.randn(cells, embedding_dim, generator=g)
        self.perturbed = self.control + shift[self.perturbation] + noise
        loadings = torch.randn(embedding_dim, genes, generator=g) / embedding_dim**0.5
        self.expression = torch.relu(self.perturbed @ loadings + 1.0) if store_raw_expression else None

    def __len__(self):
        return len(self.control)

    def __getitem__(self, i):
        cell = {"control": self.control[i], "perturbation": self.perturbation[i], "perturbed": self.perturbed[i]}
        if self.expression is not None:
            cell["expression"] = self.expression[i]
        return cell


def loaders(cfg, embedding_dim):
    cells = Screen(
        cfg["cells"], cfg["genes"], cfg["perturbations"], embedding_dim, cfg["seed"], cfg["store_raw_expression"]
    )
    train, val = random_split(cells, [0.9, 0.1], generator=torch.Generator().manual_seed(cfg["seed"]))
    return (
        DataLoader(train, batch_size=cfg["batch_size"], shuffle=True, drop_last=True),
        DataLoader(val, batch_size=cfg["batch_size"]),
    )
