"""Real programs on real frameworks: silent when they are right, and the planted fault when one is planted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from systems_support import PROGRAMS, check, processes_mentioning, tree

#: program and its arguments -> the findings at warning or above that must come, and no other.
CASES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("llama_trainer.py", "", []),
    ("llama_trainer.py", "--lora", []),
    ("llama_trainer.py", "--fault embedding-left-out", [("TL201", "error")]),
    # Two things are wrong with it: the divisor, and that micro-batches of 32 and of 65 tokens count alike.
    ("llama_trainer.py", "--fault undivided", [("TL306", "error"), ("TL307", "warning")]),
    ("llama_trainer.py", "--fault mean-of-means", [("TL307", "warning")]),
    ("llama_trainer.py", "--fault schedule-twice", [("TL402", "error")]),
    ("llama_trainer.py", "--fault cut-off", [("TL204", "warning")]),
    ("llama_trainer.py", "--fault detached", [("TL302", "error")]),
    ("llama_trainer.py", "--fault padding-supervised", [("TL504", "error")]),
    ("llama_trainer.py", "--fault shifted-twice", [("TL510", "error")]),
    ("bert_classifier.py", "", []),
    ("bert_classifier.py", "--fault accumulation", [("TL306", "error")]),
    ("bert_classifier.py", "--fault weights-of-classes", [("TL501", "error")]),
    ("bert_classifier.py", "--fault unfrozen-unheld", [("TL201", "error")]),
    ("bert_classifier.py", "--fault eval", [("TL305", "warning")]),
    ("lightning_module.py", "", []),
    ("lightning_module.py", "--manual", []),
    ("lightning_module.py", "--fault head-left-out", [("TL201", "error")]),
    ("lightning_module.py", "--fault epoch-cadence", [("TL402", "error")]),
    ("lightning_module.py", "--fault double-softmax", [("TL501", "error")]),
    ("lightning_module.py", "--fault gradients-kept", [("TL304", "error")]),
    ("lightning_module.py", "--fault validated-in-training", [("TL305", "error")]),
    ("lightning_module.py", "--fault eval-at-epoch-end", [("TL305", "error")]),
    ("lightning_module.py", "--manual --fault undivided", [("TL306", "error")]),
    ("lightning_module.py", "--manual --fault zeroed", [("TL303", "error")]),
    # Of the norms seen none was above the threshold, so nothing would have been clipped yet.
    ("lightning_module.py", "--manual --fault clip-late", [("TL308", "warning")]),
    ("accelerate_loop.py", "", []),
    ("accelerate_loop.py", "--fault plain-backward", [("TL306", "error")]),
    ("accelerate_loop.py", "--fault bare-scheduler", [("TL402", "error")]),
    ("accelerate_loop.py", "--fault scheduler-first", [("TL401", "warning")]),
    ("accelerate_loop.py", "--fault clip-late", [("TL308", "error")]),
    ("accelerate_loop.py", "--fault new-head", [("TL203", "error")]),
    ("accelerate_loop.py", "--fault two-optimizers", [("TL210", "error")]),
    ("nano_gpt.py", "", []),
    ("nano_gpt.py", "--compile", []),
    # No loader and no setting names the accumulation: several inputs per step may be meant, so it is not proven.
    ("nano_gpt.py", "--fault undivided", [("TL306", "warning")]),
    ("nano_gpt.py", "--compile --fault late-norm-left-out", [("TL201", "error")]),
    ("nano_gpt.py", "--fault zero-each-micro-step", [("TL303", "error")]),
    ("nano_gpt.py", "--fault clip-first", [("TL308", "warning")]),
    ("nano_gpt.py", "--fault trained-in-eval", [("TL305", "error")]),
    # In the first steps of a warm-up the model has hardly moved away.
    ("nano_gpt.py", "--fault average-of-itself", [("TL211", "warning")]),
    ("gan.py", "", []),
    ("gan.py", "--fault generator-zeroed", [("TL303", "error")]),
    ("gan.py", "--fault sigmoid", [("TL502", "error")] * 3),
    ("gan.py", "--fault generator-cut-off", [("TL204", "warning")]),
    ("lbfgs.py", "", []),
    ("lbfgs.py", "--fault output-left-out", [("TL201", "error")]),
    ("lbfgs.py", "--fault broadcast", [("TL508", "error")]),
    ("lbfgs.py", "--fault gradients-kept", [("TL304", "error")]),
    ("finetune_lightning.py", "", []),
    ("finetune_lightning.py", "--stages", []),
    ("finetune_lightning.py", "--whole --precision bf16-mixed", []),
    ("finetune_lightning.py", "--fault prefix", [("TL603", "error")]),
    ("finetune_lightning.py", "--fault norms-in-train", [("TL601", "error")]),
    ("finetune_lightning.py", "--fault split-twice", [("TL905", "warning")]),
    ("finetune_lightning.py", "--fault logarithm", [("TL807", "error")]),
    ("finetune_lightning.py", "--whole --fault bfloat16", [("TL208", "error"), ("TL805", "error")]),
    ("finetune_lightning.py", "--whole --fault half", [("TL806", "error")]),
    ("finetune_lightning.py", "--whole --fault one-rate", [("TL602", "warning")]),
    ("finetune_trainer.py", "", []),
    ("finetune_trainer.py", "--checkpointing", []),
    ("finetune_trainer.py", "--full", []),
    ("finetune_trainer.py", "--fault target-names", [("TL604", "warning")]),
    ("finetune_trainer.py", "--fault base-unfrozen", [("TL604", "error")]),
    ("finetune_trainer.py", "--fault head-by-hand", [("TL605", "error")]),
    ("finetune_trainer.py", "--fault reentrant", [("TL606", "error")]),
    ("finetune_trainer.py", "--fault weights-dropped", [("TL908", "warning")]),
    ("finetune_trainer.py", "--full --fault bfloat16", [("TL208", "error"), ("TL805", "error")]),
    ("attention_accelerate.py", "", []),
    ("attention_accelerate.py", "--weighted", []),
    ("attention_accelerate.py", "--fault batch-second", [("TL907", "error")]),
    ("attention_accelerate.py", "--fault generator-kept", [("TL902", "error")]),
    ("attention_accelerate.py", "--fault not-a-number", [("TL807", "error")]),
]


def _name(value: object) -> str:
    if isinstance(value, str):
        return value.replace(" ", "_") or "right"
    return "+".join(code for code, _ in value) or "silent" if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("program", "arguments", "expected"), CASES, ids=_name)
def test_program(
    frameworks: Path, tmp_path: Path, program: str, arguments: str, expected: list[tuple[str, str]]
) -> None:
    result = check([frameworks, PROGRAMS / program, *arguments.split()], tmp_path)
    assert result.strong() == Counter(expected), result.explain()
    assert result.exit_code == (1 if any(severity == "error" for _, severity in expected) else 0)
    assert not [v for v in result.report["verdicts"] if v["verdict"] == "crashed"], result.explain()
    assert tree(tmp_path) == {}, "something was left behind"


@pytest.mark.parametrize("program", ["finetune_lightning.py", "finetune_trainer.py"])
def test_nothing_to_train_on(frameworks: Path, tmp_path: Path, program: str) -> None:
    """Both frameworks end with status 0: their loader drops its only, short batch."""
    result = check([frameworks, PROGRAMS / program, "--fault", "too-small"], tmp_path)
    assert result.strong() == Counter([("TL909", "error")]), result.explain()
    assert "drop_last" in result.of("TL909")[0]["message"]
    assert result.exit_code == 2
    assert tree(tmp_path) == {}, "something was left behind"


@pytest.mark.parametrize("fault", ["", "head-left-out"])
@pytest.mark.parametrize("launcher", ["spawn", "torchrun", "torchrun --sharded"])
def test_two_processes(frameworks: Path, tmp_path: Path, launcher: str, fault: str) -> None:
    # A copy of its own, so that whatever is left running can be told from other runs of it.
    folder = tmp_path / "case"
    folder.mkdir()
    program = folder / "ddp.py"
    program.write_text((PROGRAMS / "ddp.py").read_text())
    before = tree(folder)
    start = [frameworks, program, "--spawn"]
    if launcher != "spawn":
        start = [frameworks, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
        start += launcher.split()[1:]
    result = check([*start, *(["--fault", fault] if fault else [])], folder)
    assert result.strong() == Counter([("TL201", "error")] if fault else []), result.explain()
    assert tree(folder) == before
    assert not processes_mentioning(str(program)), "orphans"
