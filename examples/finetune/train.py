"""Fine-tune: ``python train.py [training.lr=1e-4 ...]``."""

import shutil
from pathlib import Path

import hydra
import lightning as L
from data import loaders
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from model import PerturbationModel
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    cfg = OmegaConf.to_container(config, resolve=True)
    run_dir = Path(cfg["output_dir"]) / cfg["name"]
    if run_dir.exists() and cfg["overwrite"]:
        print(f"{run_dir} already exists, overwriting")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml")

    L.seed_everything(cfg["training"]["seed"])
    train, val = loaders(cfg["data"], cfg["model"]["embedding_dim"])
    model = PerturbationModel(
        perturbations=cfg["data"]["perturbations"], genes=cfg["data"]["genes"], **cfg["model"], **cfg["training"]
    )
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=cfg["training"]["max_steps"],
        gradient_clip_val=cfg["training"]["gradient_clip_val"],
        val_check_interval=cfg["training"]["val_interval"],
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=CSVLogger(run_dir, name="", version=0),
        callbacks=[ModelCheckpoint(run_dir / "checkpoints", monitor="val_loss", save_last=True)],
        enable_progress_bar=False,
    )
    trainer.fit(model, train, val)


if __name__ == "__main__":
    main()
