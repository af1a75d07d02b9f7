"""What a whole `trainlint check` costs beside the bare program that makes the same optimizer steps.

    python benchmarks/whole_check.py

The bare program leaves by ``os._exit`` right after its third step; the check starts the same program, watches three
steps, ends it, judges and reports. Runs take turns; the median of the paired differences and ratios is printed. The
promise: check <= 1.3 x bare + 1 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import os, sys
import torch, torch.nn as nn
{framework}
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
model = nn.TransformerEncoder(layer, 6)
opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
for i in range(1000):
    opt.zero_grad()
    model(torch.randn(16, 64, 256)).pow(2).mean().backward()
    opt.step()
    if i == 2 and len(sys.argv) > 1:
        os._exit(0)
"""


def seconds(command: list[str], folder: str) -> float:
    began = time.perf_counter()
    env = {**os.environ, "TRAINLINT_STATE_DIR": os.path.join(folder, "state")}
    done = subprocess.run(command, cwd=folder, capture_output=True, env=env)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr.decode())
    return time.perf_counter() - began


def main() -> None:
    for name, framework in (("torch only", ""), ("with lightning", "import lightning")):
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "train.py"
            program.write_text(PROGRAM.format(framework=framework), encoding="utf-8")
            bare_command = [sys.executable, str(program), "stop"]
            check_command = [sys.executable, "-m", "trainlint", "check", "--", sys.executable, str(program)]
            seconds(bare_command, folder)
            seconds(check_command, folder)
            pairs = [(seconds(bare_command, folder), seconds(check_command, folder)) for _ in range(7)]
        bare = statistics.median(b for b, _ in pairs)
        check = statistics.median(c for _, c in pairs)
        over = statistics.median(c - 1.3 * b for b, c in pairs)
        print(
            f"{name}: bare {bare:.2f} s, check {check:.2f} s, x{statistics.median(c / b for b, c in pairs):.2f}; "
            f"check - 1.3 x bare = {over:+.2f} s (promise: at most +1 s)"
        )


if __name__ == "__main__":
    main()
