"""arc-state, unmodified: the fine-tune that silently ignored half of what it was told; then with a fault planted in it.

trainlint runs from this interpreter, ``state`` from its own environment, which knows nothing of trainlint.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from systems_support import PROGRAMS, Checked, check, processes_mentioning, tree

HERE = Path(__file__).parent
TRUTH = json.loads((HERE / "arc_state_truth.json").read_text())

MODEL = [
    "model=state",
    "model.kwargs.cell_set_len=8",
    "model.kwargs.hidden_dim=32",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=64",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=1",
    "model.kwargs.transformer_backbone_kwargs.num_attention_heads=2",
    "model.kwargs.transformer_backbone_kwargs.num_key_value_heads=2",
    "model.kwargs.transformer_backbone_kwargs.head_dim=16",
]
DATA = [
    "data.kwargs.embed_key=X_hvg",
    "data.kwargs.output_space=gene",
    "data.kwargs.pert_col=gene",
    "data.kwargs.cell_type_key=cell_type",
    "data.kwargs.batch_col=gem_group",
    "data.kwargs.control_pert=non-targeting",
    "data.kwargs.num_workers=0",
]
TRAINING = [
    "training.batch_size=6",
    "training.max_steps=40000",
    "training.lr=3e-5",
    "training.weight_decay=1e-3",
    "training.gradient_clip_val=1.0",
    "+training.precision=bf16-mixed",
    "+training.warmup_ratio=0.1",
    "+training.lr_scheduler=cosine",
    "+training.lr_num_cycles=1",
    "+training.min_lr_ratio=0.5",
    "+training.log_lr=true",
    "+training.accumulate_grad_batches=8",
    "use_wandb=false",
]


@pytest.fixture(scope="module")
def screen(arc_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    subprocess.run([arc_state / "bin" / "python", HERE / "make_cells.py", folder], check=True)
    return folder


def command(arc_state: Path, screen: Path, out: Path, *more: str) -> list[str]:
    where = [f"data.kwargs.toml_config_path={screen / 'split.toml'}", f"output_dir={out}", "name=run"]
    return [str(arc_state / "bin" / "state"), "tx", "train", *MODEL, *DATA, *TRAINING, *where, *more]


@pytest.fixture(scope="module")
def earlier_run(arc_state: Path, screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short real run: its config.yaml, checkpoints and metrics."""
    out = tmp_path_factory.mktemp("out")
    short = ["training.max_steps=4", "training.val_freq=2", "training.ckpt_every_n_steps=2"]
    line = command(arc_state, screen, out, *short)
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=out, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "run" / "checkpoints" / "last.ckpt").is_file()
    return out


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def assert_the_known_faults(result: Checked) -> None:
    for key, expected in TRUTH["settings_not_in_effect"].items():
        finding = result.about("TL104", key)
        assert finding["severity"] == "error", result.explain()
        said = json.dumps(finding)
        for word in expected["finding_mentions"]:
            assert word in said, f"{key}: {word!r} is not in {said}"
    for key in TRUTH["settings_in_effect"]:
        assert not [f for f in result.of("TL104") if ((f["location"] or {}).get("key") or "") == f"training.{key}"], key
    (without_gradient,) = result.of("TL204")
    assert without_gradient["severity"] == "warning"
    assert "gene_decoder" in without_gradient["message"]
    assert "14" in without_gradient["message"]
    (rate,) = result.of("TL404")
    assert rate["severity"] == "warning", "log_lr asks for the rate to be logged"
    assert result.exit_code == 1


def test_a_fresh_run_from_the_command_alone(arc_state: Path, screen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = check(command(arc_state, screen, out), tmp_path)
    assert_the_known_faults(result)
    assert not out.exists(), "the output folder is new, so it must be gone again"
    assert not processes_mentioning(str(screen))


def test_the_config_that_state_wrote(arc_state: Path, screen: Path, earlier_run: Path, tmp_path: Path) -> None:
    line = command(arc_state, screen, tmp_path / "out")
    result = check(line, tmp_path, config=earlier_run / "run" / "config.yaml")
    assert_the_known_faults(result)


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_in_the_output_folder_is_lost(
    arc_state: Path, screen: Path, earlier_run: Path, tmp_path: Path, overwrite: bool
) -> None:
    before = tree(earlier_run)
    line = command(arc_state, screen, earlier_run, f"overwrite={str(overwrite).lower()}")
    result = check(line, tmp_path, config=earlier_run / "run" / "config.yaml")
    assert tree(earlier_run) == before
    assert result.of("TL204"), result.explain()
    # Without overwrite Lightning's CSV logger still clears the metrics of the earlier run.
    deleted = {Path(p["target"]).name for p in result.report["prevented"] if p["action"] == "delete"}
    assert deleted, result.report["prevented"]
    if overwrite:
        assert deleted & {"run", "last.ckpt", "checkpoints"}, deleted
    else:
        assert deleted == {"metrics.csv"}, deleted
    assert not processes_mentioning(str(screen))


def test_the_run_card_says_what_really_runs(arc_state: Path, screen: Path, tmp_path: Path) -> None:
    result = check(command(arc_state, screen, tmp_path / "out"), tmp_path)
    card = json.dumps(result.report["run"])
    assert "Adam" in card
    assert "3e-05" in card or "3e-5" in card
    assert "40000" in card or "40,000" in card


#: fault of ``programs/state_fork.py`` and what its launch adds -> the finding that must come beside the known ones.
FORKS: list[tuple[str, tuple[str, ...], tuple[str, str] | None]] = [
    ("none", (), None),
    ("cut-off", (), ("TL302", "error")),
    # With one layer each, the encoders have no dropout that eval mode could switch off.
    ("eval", ("model.kwargs.n_encoder_layers=2", "model.kwargs.n_decoder_layers=2"), ("TL305", "warning")),
    ("gradients-kept", (), ("TL304", "error")),
    ("epoch-cadence", (), ("TL402", "error")),
    ("new-output", (), ("TL203", "error")),
    # With the Trainer's clipping on, a second one that comes too late does nothing.
    ("clip-late", ("training.gradient_clip_val=null",), ("TL308", "error")),
]
#: What is wrong with the launch itself, as ``assert_the_known_faults`` says it.
KNOWN = {"TL101", "TL104", "TL204", "TL404"}


@pytest.mark.parametrize(("fault", "more", "expected"), FORKS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_fork_with_a_fault(
    arc_state: Path, screen: Path, tmp_path: Path, fault: str, more: tuple[str, ...], expected: tuple[str, str] | None
) -> None:
    _, *arguments = command(arc_state, screen, tmp_path / "out", *more)
    python = arc_state / "bin" / "python"
    result = check([python, PROGRAMS / "state_fork.py", "--fault", fault, *arguments], tmp_path)
    planted = Counter({pair: n for pair, n in result.strong().items() if pair[0] not in KNOWN})
    assert planted == Counter([expected] if expected else []), result.explain()
    # The settings stay without effect, whatever else is wrong; but where no gradient arrives at all, TL302 says why.
    assert {f["code"] for f in result.findings} >= KNOWN - ({"TL204"} if fault == "cut-off" else set())
    if expected:
        (finding,) = [f for f in result.of(expected[0]) if f["severity"] == expected[1]]
        if fault in ("eval", "epoch-cadence", "clip-late"):  # the others leave no line of their own in the run
            assert "state_fork.py" in json.dumps(finding)
    assert not (tmp_path / "out").exists()
