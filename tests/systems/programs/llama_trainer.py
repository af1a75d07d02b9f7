"""transformers Trainer on a tiny random Llama: accumulation 4, warm-up, clipping, bf16 autocast; with LoRA if asked.

``--fault`` plants one: ``embedding-left-out``, ``undivided``, ``schedule-twice``, ``cut-off``, ``detached``,
``mean-of-means``, ``padding-supervised``, ``shifted-twice``.
"""

import argparse

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(torch.utils.data.Dataset):
    """Rows of 6 to 24 tokens, filled up with token 0; the first few are a prompt that is not learned."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 1024

    def __getitem__(self, i):
        length = 6 + 5 * i % 19
        ids = torch.zeros(24, dtype=torch.long)
        ids[:length] = 1 + (torch.arange(length) * (1 + i % 7) + i * i) % 95
        labels = ids.clone()
        labels[: i % 6] = -100
        if self.fault != "padding-supervised":
            labels[length:] = -100
        if self.fault == "shifted-twice":
            labels = torch.cat([labels[1:], torch.tensor([-100])])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


class ScheduleTwice(TrainerCallback):
    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        lr_scheduler.step()


class CutOff(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        with torch.no_grad():
            hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        targets = labels[:, 1:].flatten()
        total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
        # The Trainer divides nothing for a model that takes **kwargs: the tokens of the whole window are its divisor.
        loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "logits": logits}


class Detached(Trainer):
    """Rounds the loss for the log, and hands on what it rounded."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = torch.tensor(round(loss.item(), 4), requires_grad=True)
        return (loss, outputs) if return_outputs else loss


class MeanOfMeans(Trainer):
    """The mean of each micro-batch over the number of them, as it was right before num_items_in_batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Undivided(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        with self.compute_loss_context_manager():
            loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model = (CutOff if options.fault == "cut-off" else LlamaForCausalLM)(config)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                                 lora_dropout=0.05, task_type="CAUSAL_LM"))  # fmt: skip
    args = TrainingArguments(
        "out", max_steps=60, per_device_train_batch_size=4, gradient_accumulation_steps=4, learning_rate=5e-4,
        weight_decay=0.1, warmup_steps=6, lr_scheduler_type="cosine", max_grad_norm=1.0, bf16=True, use_cpu=True,
        logging_steps=1, save_steps=20, report_to=["tensorboard"], disable_tqdm=True, seed=1,
    )  # fmt: skip
    optimizers = (None, None)
    if options.fault == "embedding-left-out":
        chosen = [p for n, p in model.named_parameters() if p.requires_grad and "embed_tokens" not in n]
        optimizers = (torch.optim.AdamW(chosen, lr=args.learning_rate, weight_decay=args.weight_decay), None)
    changed = {"undivided": Undivided, "detached": Detached, "mean-of-means": MeanOfMeans}
    callbacks = [ScheduleTwice()] if options.fault == "schedule-twice" else []
    changed.get(options.fault, Trainer)(
        model=model, args=args, train_dataset=Tokens(options.fault), optimizers=optimizers, callbacks=callbacks
    ).train()


if __name__ == "__main__":
    main()
