"""transformers Trainer on a tiny random Llama: warm-up, accumulation, bf16 autocast on the CPU; LoRA on request."""

import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class MyTrainer(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


transformers.set_seed(3)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        max_position_embeddings=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
)
if "--peft" in sys.argv:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)  # PEFT
rows = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(0, 128, (40, 8))]
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=1e-3,
    warmup_steps=2,
    lr_scheduler_type="cosine",
    weight_decay=0.1,
    bf16=True,
    use_cpu=True,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    seed=11,
    disable_tqdm=True,
    **({"max_steps": 4} if "--max-steps" in sys.argv else {"num_train_epochs": 2}),
)
trainer = MyTrainer(model=model, args=arguments, train_dataset=rows)
trainer.train()  # TRAIN
print("STEPS", trainer.state.global_step, sum(float(p.detach().float().sum()) for p in model.parameters()))
