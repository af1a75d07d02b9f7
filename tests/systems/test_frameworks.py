"""Real programs on real frameworks: silent when they are right, and the planted fault when one is planted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from systems_support import PROGRAMS, check, processes_mentioning, tree

#: program and its arguments -> the finding at warning or above that must come, alone; ``None``: silence.
CASES: list[tuple[str, str, tuple[str, str] | None]] = [
    ("llama_trainer.py", "", None),
    ("llama_trainer.py", "--lora", None),
    ("llama_trainer.py", "--fault embedding-left-out", ("TL201", "error")),
    ("llama_trainer.py", "--fault undivided", ("TL306", "error")),
    ("llama_trainer.py", "--fault schedule-twice", ("TL402", "error")),
    ("llama_trainer.py", "--fault cut-off", ("TL204", "warning")),
    ("lightning_module.py", "", None),
    ("lightning_module.py", "--manual", None),
    ("lightning_module.py", "--fault head-left-out", ("TL201", "error")),
    ("lightning_module.py", "--fault epoch-cadence", ("TL402", "error")),
    ("lightning_module.py", "--manual --fault undivided", ("TL306", "error")),
    ("lightning_module.py", "--manual --fault zeroed", ("TL303", "error")),
    ("accelerate_loop.py", "", None),
    ("accelerate_loop.py", "--fault plain-backward", ("TL306", "error")),
    ("accelerate_loop.py", "--fault bare-scheduler", ("TL402", "error")),
    ("accelerate_loop.py", "--fault scheduler-first", ("TL401", "warning")),
    ("nano_gpt.py", "", None),
    ("nano_gpt.py", "--compile", None),
    # No loader and no setting names the accumulation: several inputs per step may be meant, so it is not proven.
    ("nano_gpt.py", "--fault undivided", ("TL306", "warning")),
    ("nano_gpt.py", "--compile --fault late-norm-left-out", ("TL201", "error")),
    ("nano_gpt.py", "--fault zero-each-micro-step", ("TL303", "error")),
    ("gan.py", "", None),
    ("gan.py", "--fault generator-zeroed", ("TL303", "error")),
    ("lbfgs.py", "", None),
    ("lbfgs.py", "--fault output-left-out", ("TL201", "error")),
]


@pytest.mark.parametrize(("program", "arguments", "expected"), CASES, ids=lambda v: str(v).replace(" ", "_") or "right")
def test_program(
    frameworks: Path, tmp_path: Path, program: str, arguments: str, expected: tuple[str, str] | None
) -> None:
    result = check([frameworks, PROGRAMS / program, *arguments.split()], tmp_path)
    assert result.strong() == Counter([expected] if expected else []), result.explain()
    assert result.exit_code == (1 if expected and expected[1] == "error" else 0)
    assert not [v for v in result.report["verdicts"] if v["verdict"] == "crashed"], result.explain()
    assert tree(tmp_path) == {}, "something was left behind"


@pytest.mark.parametrize("fault", ["", "head-left-out"])
@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_two_processes(frameworks: Path, tmp_path: Path, launcher: str, fault: str) -> None:
    # A copy of its own, so that whatever is left running can be told from other runs of it.
    folder = tmp_path / "case"
    folder.mkdir()
    program = folder / "ddp.py"
    program.write_text((PROGRAMS / "ddp.py").read_text())
    before = tree(folder)
    start = [frameworks, program, "--spawn"]
    if launcher == "torchrun":
        start = [frameworks, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    result = check([*start, *(["--fault", fault] if fault else [])], folder)
    assert result.strong() == Counter([("TL201", "error")] if fault else []), result.explain()
    assert tree(folder) == before
    assert not processes_mentioning(str(program)), "orphans"
