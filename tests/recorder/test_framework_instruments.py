"""The framework instruments, on real small programs run as watched children."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trainlint.recorder.settings as recorder_settings
from trainlint.recorder.settings import Settings

pytestmark = pytest.mark.systems

PROGRAMS = Path(__file__).parent / "programs"
BOOTSTRAP = Path(recorder_settings.__file__).parent / "bootstrap"


@dataclass(frozen=True)
class Watched:
    lines: list[tuple[str, dict[str, Any]]]
    output: str

    def framework(self, name: str) -> dict[str, Any]:
        """The last line of that framework: it wins."""
        return [payload for tag, payload in self.lines if tag == "framework" and payload["name"] == name][-1]

    def plan(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for tag, payload in self.lines:
            if tag == "plan":
                merged.update(payload)
        return merged

    def extent(self) -> tuple[Any, ...]:
        """(optimizer steps, epochs, batches per epoch, accumulation)"""
        plan = self.plan()
        return tuple(plan.get(name) for name in ("optimizer_steps", "epochs", "batches_per_epoch", "accumulation"))

    def schedulers(self) -> list[dict[str, Any]]:
        return [payload for tag, payload in self.lines if tag == "scheduler_config"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [payload for tag, payload in self.lines if tag == "event" and payload["kind"] == kind]

    def logged(self, by: str, name: str | None = None) -> list[dict[str, Any]]:
        return [e for e in self.events("logged") if e["by"] == by and name in (None, e["name"])]

    def problems(self) -> list[str]:
        """What went wrong in these instruments (others may be missing or have their own tests)."""
        ours = ("Lightning", "Trainers", "Adapters", "Accelerators", "Loggers", "Seeds", "instrumenting")
        return [str(p) for tag, p in self.lines if tag == "problem" and str(p["where"]).startswith(ours)]


def run(program: str, folder: Path, *arguments: str, watched: bool = True) -> Watched:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRAINLINT_")}
    environment.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    run_dir = folder / "run"
    if watched:
        (run_dir / "stream").mkdir(parents=True)
        settings = Settings(
            run_dir=str(run_dir), run_id="test", supervisor=os.getpid(), steps=10_000, started=time.time()
        )
        environment.update(settings.to_environment(), PYTHONPATH=str(BOOTSTRAP))
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), str(folder / "out"), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    streams = sorted((run_dir / "stream").glob("*.jsonl")) if watched else []
    lines = [tuple(json.loads(line)) for stream in streams for line in stream.read_text().splitlines()]
    return Watched(lines, done.stdout)


def line_with(program: str, text: str) -> int:
    return next(i for i, line in enumerate((PROGRAMS / program).read_text().splitlines(), 1) if text in line)


@pytest.fixture(scope="module")
def automatic(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    pytest.importorskip("lightning")
    return run("lightning_automatic.py", tmp_path_factory.mktemp("automatic"))


class TestLightning:
    def test_trainer_and_plan(self, automatic: Watched) -> None:
        assert automatic.problems() == []
        lightning = automatic.framework("lightning")
        assert lightning["class_name"] == "Regressor"
        assert lightning["at"]["line"] == line_with("lightning_automatic.py", "# FIT")
        assert lightning["settings"]["accumulate_grad_batches"] == 4
        assert lightning["settings"]["gradient_clip_val"] == 0.5
        assert lightning["settings"]["automatic_optimization"] is True
        assert lightning["settings"]["num_training_batches"] == 11
        assert "LearningRateMonitor" in lightning["callbacks"]
        assert lightning["loggers"] == ["CSVLogger"]
        # 11 batches by 4 are 3 steps, the last of 3 batches; 3 epochs.
        assert automatic.extent() == (9, 3, 11, 4)
        assert automatic.plan()["source"] == "lightning Trainer.estimated_stepping_batches"
        assert "STEPS 9 " in automatic.output

    def test_scheduler_interval(self, automatic: Watched, tmp_path: Path) -> None:
        (config,) = automatic.schedulers()
        assert (config["interval"], config["frequency"], config["name"]) == ("step", 1, "cosine")
        (config,) = run("lightning_automatic.py", tmp_path, "--epoch").schedulers()
        assert config["interval"] == "epoch"

    def test_accumulation_that_changes(self, tmp_path: Path) -> None:
        pytest.importorskip("lightning")
        changing = run("lightning_automatic.py", tmp_path, "--changing")
        # 3 steps in the first epoch (by 4), 6 in the two others (by 2); Lightning's own estimate would be 33.
        assert changing.extent() == (15, 3, 11, 4)
        assert "STEPS 15 " in changing.output

    def test_values_at_each_stage(self, automatic: Watched) -> None:
        by_module = automatic.logged("lightning.log", "train_loss")
        assert len(by_module) == 33
        assert all(isinstance(e["value"], float) for e in by_module)
        assert by_module[0]["at"]["line"] == line_with("lightning_automatic.py", "# LOG")
        assert by_module[0]["at"]["function"].endswith("training_step")
        assert {e["value"] for e in automatic.logged("lightning.log", "half")} == {0.5}
        assert automatic.logged("lightning.CSVLogger", "train_loss")
        # LearningRateMonitor hands its values to the logger only.
        rates = automatic.logged("lightning.CSVLogger", "cosine")
        assert rates[0]["value"] == 0.01
        assert not automatic.logged("lightning.log", "cosine")
        assert not automatic.logged("csv")

    def test_seeds(self, automatic: Watched) -> None:
        seeds = {e["function"]: e for e in automatic.events("seed")}
        assert {"lightning.seed_everything", "random.seed", "numpy.random.seed", "torch.manual_seed"} <= set(seeds)
        assert {e["seed"] for e in seeds.values()} == {7}
        assert seeds["lightning.seed_everything"]["at"]["line"] == line_with("lightning_automatic.py", "# SEED")

    def test_same_run_as_unwatched(self, automatic: Watched, tmp_path: Path) -> None:
        assert run("lightning_automatic.py", tmp_path, watched=False).output == automatic.output

    def test_old_package_name(self, tmp_path: Path) -> None:
        pytest.importorskip("pytorch_lightning")
        old = run("lightning_automatic.py", tmp_path, "--old-name")
        assert old.problems() == []
        assert old.framework("lightning")["version"]
        assert old.plan()["optimizer_steps"] == 9
        assert old.logged("lightning.log", "train_loss")
        assert old.logged("lightning.CSVLogger", "cosine")
        assert old.events("seed")[0]["function"] == "lightning.seed_everything"

    def test_manual_optimization(self, tmp_path: Path) -> None:
        pytest.importorskip("lightning")
        manual = run("lightning_manual.py", tmp_path)
        assert manual.problems() == []
        assert manual.framework("lightning")["settings"]["automatic_optimization"] is False
        # How often the program steps is its own affair.
        assert manual.extent() == (None, 2, 4, None)
        (config,) = manual.schedulers()
        assert config["interval"] is None
        assert manual.logged("tensorboard.add_scalar", "by_hand")
        assert manual.logged("lightning.TensorBoardLogger", "direct")

    def test_fabric(self, tmp_path: Path) -> None:
        pytest.importorskip("lightning")
        fabric = run("fabric_loop.py", tmp_path)
        assert fabric.problems() == []
        assert fabric.framework("fabric")["settings"]["precision"] == "bf16-true"
        assert [e["value"] for e in fabric.logged("fabric.log", "lr")] == [0.1, 0.1]
        assert len(fabric.logged("fabric.log", "loss")) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    pytest.importorskip("transformers")
    return run("transformers_trainer.py", tmp_path_factory.mktemp("transformers"))


class TestTransformers:
    def test_trainer_and_plan(self, trained: Watched) -> None:
        assert trained.problems() == []
        transformers = trained.framework("transformers")
        assert transformers["class_name"] == "MyTrainer"
        assert transformers["at"]["line"] == line_with("transformers_trainer.py", "# TRAIN")
        settings = transformers["settings"]
        assert settings["learning_rate"] == 1e-3
        assert settings["lr_scheduler_type"] == "cosine"
        assert settings["warmup_steps"] == 2
        assert settings["bf16"] is True
        assert settings["model_accepts_loss_kwargs"] is True
        assert settings["overridden"] == [], "MyTrainer.compute_loss calls super()"
        assert "output_dir" not in settings
        assert trained.extent() == (10, 2, 20, 4)
        assert "STEPS 10 " in trained.output
        (config,) = trained.schedulers()
        assert (config["interval"], config["frequency"]) == ("step", 1)

    def test_accelerator_inside(self, trained: Watched) -> None:
        assert trained.framework("accelerate")["settings"]["inside"] == "transformers"

    def test_logged(self, trained: Watched) -> None:
        rates = trained.logged("transformers.log", "learning_rate")
        assert [e["step"] for e in rates] == list(range(1, 11))
        assert rates[2]["value"] == pytest.approx(1e-3)
        seeds = [e["seed"] for e in trained.events("seed") if e["function"] == "transformers.set_seed"]
        assert seeds == [3, 11]

    def test_same_run_as_unwatched(self, trained: Watched, tmp_path: Path) -> None:
        unwatched = run("transformers_trainer.py", tmp_path, watched=False)
        assert unwatched.output.splitlines()[-1] == trained.output.splitlines()[-1]

    def test_peft_and_max_steps(self, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        adapted = run("transformers_trainer.py", tmp_path, "--peft", "--max-steps")
        assert adapted.problems() == []
        peft = adapted.framework("peft")
        assert peft["class_name"] == "PeftModelForCausalLM"
        assert peft["settings"]["r"] == 4
        assert peft["settings"]["target_modules"] == ["q_proj", "v_proj"]
        assert peft["settings"]["modules_to_save"] == ["lm_head"]
        assert peft["settings"]["targeted_modules"] == 4
        assert peft["at"]["line"] == line_with("transformers_trainer.py", "# PEFT")
        assert adapted.plan()["optimizer_steps"] == 4
        assert adapted.plan()["epochs"] == pytest.approx(0.8)


class TestAccelerate:
    def test_loop(self, tmp_path: Path) -> None:
        pytest.importorskip("accelerate")
        loop = run("accelerate_loop.py", tmp_path)
        assert loop.problems() == []
        accelerate = loop.framework("accelerate")
        assert accelerate["settings"]["gradient_accumulation_steps"] == 2
        assert "inside" not in accelerate["settings"]
        assert accelerate["loggers"] == ["tensorboard"]
        assert loop.plan()["accumulation"] == 2
        (config,) = loop.schedulers()
        assert config["wrapper"] == "accelerate"
        assert config["steps_per_call"] == 1
        assert config["interval"] is None
        rates = loop.logged("accelerate.log", "lr")
        assert len(rates) == 8
        assert len(loop.logged("tensorboard.add_scalar", "lr")) == 8
        assert rates[0]["at"]["line"] == line_with("accelerate_loop.py", "accelerator.log(")


class TestPlainLoop:
    def test_files_and_seeds(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        plain = run("plain_loop_with_files.py", tmp_path / "watched")
        assert plain.problems() == []
        assert [e["value"] for e in plain.logged("csv", "lr")] == [0.1] * 3
        # Text rounded by formatting is no measured value.
        assert [e["value"] for e in plain.logged("csv", "loss")] == [None] * 3
        assert len(plain.logged("json", "line_loss")) == 3
        assert [e["step"] for e in plain.logged("tensorboard.add_scalar", "board_loss")] == [0, 1, 2]
        assert {e["name"] for e in plain.logged("tensorboard.add_scalars")} == {"group/a", "group/b"}
        # A config or a data file written before training is not a metric.
        assert not [e for e in plain.events("logged") if e["name"] in ("config_lr", "data_row")]
        seeds = [(e["function"], e["seed"]) for e in plain.events("seed")]
        assert seeds == [("random.seed", 1), ("numpy.random.seed", 2), ("torch.manual_seed", 3)]
        unwatched = run("plain_loop_with_files.py", tmp_path / "unwatched", watched=False)
        assert unwatched.output == plain.output
