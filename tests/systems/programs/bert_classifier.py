"""transformers Trainer on a tiny random BERT: sequences of differing length, evaluation every epoch, best model kept.

Its head takes ``**kwargs`` and ignores ``num_items_in_batch`` (transformers 5.23), so the Trainer divides nothing under
accumulation: ``--fault accumulation``. Others: ``weights-of-classes`` (a compute_loss with a double softmax),
``unfrozen-unheld`` (a callback unfreezes what the optimizer never got), ``eval`` (left by a look at predictions).
"""

import argparse

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, n):
        g = torch.Generator().manual_seed(n)
        self.rows = [torch.randint(5, 96, (int(k),), generator=g) for k in torch.randint(6, 20, (n,), generator=g)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": int(self.rows[i][0]) % 3}


def collate(rows):
    ids = nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


class WeightsOfClasses(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([0.5, 1.0, 1.5])
        loss = nn.functional.cross_entropy(outputs.logits.softmax(-1), labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


class Unfreeze(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.bert.requires_grad_(True)


class Look(Trainer):
    """Asks the model for a few predictions before each batch, and forgets to put it back into training mode."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        model.eval()
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2])
        return super().compute_loss(model, inputs, *args, **kwargs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="")
    fault = parser.parse_args().fault
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=32, num_labels=3)  # fmt: skip
    model = BertForSequenceClassification(config)
    if fault == "unfrozen-unheld":
        model.bert.requires_grad_(False)
    args = TrainingArguments(
        "out", num_train_epochs=4, per_device_train_batch_size=8, learning_rate=3e-4, weight_decay=0.01, use_cpu=True,
        gradient_accumulation_steps=4 if fault == "accumulation" else 1, warmup_steps=10, lr_scheduler_type="linear",
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        logging_steps=1, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    callbacks = [EarlyStoppingCallback(2), *([Unfreeze()] if fault == "unfrozen-unheld" else [])]
    trainer_class = {"weights-of-classes": WeightsOfClasses, "eval": Look}.get(fault, Trainer)
    trainer_class(model=model, args=args, data_collator=collate, train_dataset=Sentences(256),
                  eval_dataset=Sentences(64), callbacks=callbacks).train()  # fmt: skip


if __name__ == "__main__":
    main()
