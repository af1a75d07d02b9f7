"""``--deep`` on real frameworks: a correct program overfits and its rate is in the band; three broken ones do not."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from systems_support import PROGRAMS, Checked, check, tree

FRAMEWORKS = ("plain", "lightning", "transformers", "accelerate")
#: fault -> the findings at warning or above.
FAULTS: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "detached": [("TL301", "error"), ("TL302", "error")],
    "head-left-out": [("TL201", "error"), ("TL301", "error")],
    "rate": [("TL403", "warning")],
}


def experiment(result: Checked, name: str) -> dict[str, Any]:
    (found,) = [e for e in result.report["run"]["experiments"] if e["name"] == name]
    return found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_batch_and_the_range_of_rates(frameworks: Path, tmp_path: Path, framework: str, fault: str) -> None:
    program = PROGRAMS / f"overfit_{framework}.py"
    result = check([frameworks, program, "--fault", fault], tmp_path, options=["--deep"])
    assert result.strong() == Counter(FAULTS[fault]), result.explain()
    assert tree(tmp_path) == {}, "something was left behind"
    fitted, swept = experiment(result, "overfit"), experiment(result, "lr-range")
    assert fitted["outcome"] == swept["outcome"] == "done"
    assert {"dropout", "weight decay"} <= set(fitted["held_still"])
    if fault in ("none", "rate"):
        assert fitted["curves"][-1]["ended"] == "reached", result.explain()
        assert fitted["curves"][-1]["losses"][-1] < 0.15
        begins, ends = swept["band"]
        assert 1e-4 < begins < swept["steepest"] <= ends < 10
        assert (swept["configured_rate"] > begins / 10) == (fault == "none")
    if fault == "detached":
        assert fitted["curves"][0]["ended"] == "constant"
        assert swept["band"] is None


def test_batches_drawn_by_hand_come_again(frameworks: Path, tmp_path: Path) -> None:
    result = check([frameworks, PROGRAMS / "nano_gpt.py"], tmp_path, options=["--deep", "overfit"])
    assert not result.strong(), result.explain()
    fitted = experiment(result, "overfit")
    assert fitted["repeated_by"] == "random"
    assert fitted["different_batches"] == 1, "the random state is put back before each draw"
    curve = fitted["curves"][-1]
    assert curve["losses"][-1] < 0.5 * curve["losses"][0], result.explain()
    assert {v["code"]: v["verdict"] for v in result.report["verdicts"]}["TL301"] == "passed"


def test_networks_that_take_turns_are_left_out(frameworks: Path, tmp_path: Path) -> None:
    result = check([frameworks, PROGRAMS / "gan.py"], tmp_path, options=["--deep"])
    assert not result.strong(), result.explain()
    verdicts = {v["code"]: v for v in result.report["verdicts"]}
    for code in ("TL301", "TL403"):
        assert verdicts[code]["verdict"] == "not-applicable"
        assert "take turns" in verdicts[code]["reason"]


def test_an_experiment_that_dies_leaves_the_report(frameworks: Path, tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    # More steps than the ordinary watch and its boundary make: it dies in the experiments only.
    program.write_text(
        "import torch\n"
        "net = torch.nn.Linear(4, 2)\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "for step in range(1000):\n"
        "    if step == 30:\n"
        "        raise RuntimeError('the disk is full')\n"
        "    loss = torch.nn.functional.mse_loss(net(torch.randn(8, 4)), torch.randn(8, 2))\n"
        "    optimizer.zero_grad()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
    )
    before = tree(tmp_path)
    plain = check([frameworks, program], tmp_path)
    result = check([frameworks, program], tmp_path, options=["--deep"], env=dict(os.environ))
    assert result.exit_code == plain.exit_code == 0
    assert result.strong() == plain.strong()
    assert experiment(result, "overfit")["curves"][0]["reason"] == "RuntimeError: the disk is full"
    assert tree(tmp_path) == before
