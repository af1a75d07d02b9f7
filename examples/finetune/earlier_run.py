"""Leave what a fine-tune of last week leaves: ``python earlier_run.py`` fills runs/screen-finetune."""

from pathlib import Path

import torch

run = Path(__file__).parent / "runs" / "screen-finetune"
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
torch.save({"epoch": 31, "global_step": 3600, "state_dict": {"project_out.weight": torch.randn(48, 64)}},
           run / "checkpoints" / "last.ckpt")  # fmt: skip
(run / "version_0").mkdir(exist_ok=True)
(run / "version_0" / "metrics.csv").write_text("step,train_loss\n3598,0.0512\n3599,0.0498\n")
