"""Which key names which setting, and which only looks like it."""

from __future__ import annotations

import pytest

from trainlint.config.meanings import meaning_of


@pytest.mark.parametrize(
    ("path", "value", "meaning"),
    [
        ("lr", 1e-3, "learning_rate"),
        ("training.lr", "1e-4", "learning_rate"),
        ("optimizer.init_args.lr", 0.1, "learning_rate"),
        ("model.init_args.optimizer.params.lr", 0.1, "learning_rate"),
        ("trainer_config.learning-rate", 0.1, "learning_rate"),
        ("optim.weight_decay", 0.1, "weight_decay"),
        ("training.betas", (0.9, 0.95), "betas"),
        ("adam_beta2", 0.95, "beta2"),
        ("optimizer.eps", 1e-8, "eps"),
        ("optimizer.params.eps", "1e-6", "eps"),
        ("sgd.momentum", 0.9, "momentum"),
        ("training.lr_scheduler", "cosine", "schedule"),
        ("scheduler.name", "cosine", "schedule"),
        ("lr_scheduler._target_", "torch.optim.lr_scheduler.OneCycleLR", "schedule"),
        ("training.warmup_ratio", 0.1, "warmup_ratio"),
        ("trainer.precision", "bf16-mixed", "precision"),
        ("trainer.precision", 16, "precision"),
        ("bf16", True, "bf16"),
        ("trainer.accumulate_grad_batches", 8, "accumulation"),
        ("gradient_accumulation_steps", 4, "accumulation"),
        ("training.grad_clip", 1.0, "clip_norm"),
        ("data.batch_size", 32, "batch_size"),
        ("data.init_args.batch_size", 32, "batch_size"),
        ("trainer.max_steps", 100, "max_steps"),
        ("seed_everything", 1, "seed"),
        ("training.log_lr", True, "log_lr"),
        # The same words, about something else.
        ("discriminator.lr", 0.1, ""),
        ("model.layer_norm.eps", 1e-5, ""),
        ("model.eps", 1e-5, ""),
        ("eps", 0.1, ""),
        ("model.batch_norm.momentum", 0.1, ""),
        ("ema.momentum", 0.99, ""),
        ("eval.batch_size", 8, ""),
        ("eval_batch_size", 8, ""),
        ("test_dataloader.batch_size", 8, ""),
        ("noise_scheduler.name", "ddpm", ""),
        ("diffusion.scheduler.type", "linear", ""),
        ("augmentation.seed", 3, ""),
        ("data.name", "cosine", ""),
        ("ppo.epochs", 4, ""),
        # The right words with values that cannot be compared.
        ("lr", "auto", ""),
        ("lr", True, ""),
        ("training.lr_scheduler", "${sched}", ""),
        ("trainer.max_steps", -1, ""),
        ("warmup_ratio", 500, ""),
        ("accumulate_grad_batches", 2.5, ""),
        ("precision", "highest", ""),
        ("", 1, ""),
    ],
)
def test_meaning(path: str, value: object, meaning: str) -> None:
    assert meaning_of(path, value) == meaning
