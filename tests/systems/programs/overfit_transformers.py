"""A small classifier under the transformers Trainer, with evaluation and the best model kept; faults by name."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments


class Rows(Dataset):
    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(inputs))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.fault == "detached":
            loss = loss.detach().requires_grad_()
        return {"loss": loss, "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none", choices=("none", "detached", "head-left-out", "rate"))
    fault = parser.parse_args().fault
    torch.manual_seed(0)
    inputs = torch.randn(1024, 20)
    labels = (inputs @ torch.randn(20, 10)).argmax(1)
    model = Classifier(fault)
    arguments = TrainingArguments(
        "out",
        num_train_epochs=4,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=2e-6 if fault == "rate" else 2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_steps=5,
    )
    more: dict[str, Any] = {}
    if fault == "head-left-out":
        more["optimizers"] = (torch.optim.AdamW(model.body.parameters(), lr=2e-3), None)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Rows(inputs, labels),
        eval_dataset=Rows(inputs[:128], labels[:128]),
        callbacks=[EarlyStoppingCallback(2)],
        **more,
    )
    trainer.train()


if __name__ == "__main__":
    main()
