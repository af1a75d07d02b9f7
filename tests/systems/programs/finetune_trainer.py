"""transformers Trainer and PEFT on a tiny BERT from disk: adapters, a new head, sample weights, evaluation.

``--checkpointing``; ``--full``: no adapters. ``--fault`` plants one: ``target-names``, ``base-unfrozen``,
``head-by-hand``, ``reentrant``, ``weights-dropped``, ``too-small``, ``same-rows``, and with ``--full`` ``bfloat16``.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainingArguments


class Sentences(torch.utils.data.Dataset):
    def __init__(self, first, count):
        self.rows = range(first, first + count)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        generator = torch.Generator().manual_seed(self.rows[i])
        ids = torch.randint(5, 96, (16,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones(16, dtype=torch.long), "labels": int(ids[0]) % 3,
                "weight": float(1 + i % 2)}  # fmt: skip


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        weight, labels = inputs.pop("weight", None), inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = loss.mean() if weight is None else (loss * weight).sum() / weight.sum()
        return (loss, outputs) if return_outputs else loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    fault = options.fault
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
                        max_position_embeddings=32, num_labels=3)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM(config).save_pretrained(folder)
        dtype = torch.bfloat16 if fault == "bfloat16" else torch.float32
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=dtype)
    model.accepts_loss_kwargs = False  # compute_loss gives the mean of its micro-batch
    if not options.full:
        targets = ["query", "values"] if fault == "target-names" else ["query", "value"]
        if fault == "reentrant":
            model.enable_input_require_grads = lambda: None  # as where a model's embeddings are not found
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0,
                          modules_to_save=None if fault == "head-by-hand" else ["classifier"])  # fmt: skip
        model = get_peft_model(model, lora)
        if fault == "head-by-hand":
            model.base_model.model.classifier.requires_grad_(True)
        if fault == "base-unfrozen":
            model.base_model.model.bert.encoder.requires_grad_(True)
    args = TrainingArguments(
        "out", max_steps=40, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        learning_rate=1e-5 if fault == "bfloat16" else 5e-5, warmup_steps=2, bf16=fault != "bfloat16", use_cpu=True,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, logging_steps=1,
        gradient_checkpointing=options.checkpointing or fault == "reentrant",
        gradient_checkpointing_kwargs={"use_reentrant": fault == "reentrant"},
        remove_unused_columns=fault == "weights-dropped", dataloader_drop_last=True,
        label_names=["labels"], report_to=[], disable_tqdm=True, seed=1,
    )  # fmt: skip
    train = Sentences(0, 12 if fault == "too-small" else 640)
    val = Sentences(600 if fault == "same-rows" else 1000, 100)
    Weighted(model=model, args=args, train_dataset=train, eval_dataset=val).train()


if __name__ == "__main__":
    main()
