"""Fine-tune: ``python train.py [training.lr=1e-4 ...]``."""

import shutil
from pathlib import Path

import hydra
import lightning as L
from data import loaders
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from model import PerturbationModel
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    cfg = OmegaConf.to_container(config, resolve=True)
    settings = cfg["training"]
    run_dir = Path(cfg["output_dir"]) / cfg["name"]
    if run_dir.exists() and cfg["overwrite"]:
        print(f"{run_dir} already exists, overwriting")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml")

    L.seed_everything(settings["seed"])
    train, val = loaders(cfg["data"], cfg["model"]["embedding_dim"])
    model = PerturbationModel(cfg["model"], settings, cfg["data"]["perturbations"], cfg["data"]["genes"])
    callbacks = [ModelCheckpoint(run_dir / "checkpoints", monitor="val_loss", save_last=True)]
    if settings["log_lr"]:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=settings["max_steps"],
        accumulate_grad_batches=settings["accumulate_grad_batches"],
        precision=settings["precision"],
        gradient_clip_val=settings["gradient_clip_val"],
        val_check_interval=settings["val_interval"],
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=CSVLogger(run_dir, name="", version=0),
        callbacks=callbacks,
        enable_progress_bar=False,
    )
    trainer.fit(model, train, val)


if __name__ == "__main__":
    main()
