"""Reports built by hand, for the tests of the renderers."""

from __future__ import annotations

import math

from trainlint.report.model import (
    CardLine,
    Curve,
    Location,
    PreventedAct,
    Report,
    ReportFinding,
    RunCard,
    Verdict,
)


def cosine(peak: float, warmup: int, total: int, points: int = 200) -> tuple[tuple[int, float], ...]:
    out = []
    for i in range(points + 1):
        step = round(total * i / points)
        if step < warmup:
            out.append((step, peak * step / warmup))
        else:
            out.append((step, peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))))
    return tuple(out)


def finding(
    code: str = "TL104",
    name: str = "setting-not-in-effect",
    severity: str = "error",
    message: str = "",
    key: str | None = "training.weight_decay",
    file: str | None = "conf/config.yaml",
    line: int | None = 14,
    evidence: dict[str, object] | None = None,
    fix: str = "",
    suppressed: str | None = None,
) -> ReportFinding:
    location = Location(file, line, key) if file or key else None
    return ReportFinding(
        code=code,
        name=name,
        severity=severity,
        message=message
        or "The config asks for weight decay 0.0005; the optimizer that steps (Adam) has 0 in both groups.",
        location=location,
        evidence={"configured": 0.0005, "observed": [0.0, 0.0]} if evidence is None else evidence,
        fix=fix or "Pass `weight_decay` to the optimizer, or remove the key from the config.",
        fingerprint=f"{code}:{key}",
        suppressed=suppressed,
    )


CARD = RunCard(
    sections={
        "launch": (
            CardLine("launch", "the command after `--`"),
            CardLine("command", "python examples/finetune/train.py --config conf/config.yaml trainer.max_epochs=40"),
        ),
        "device": (CardLine("device", "cpu, 1 process"),),
        "model": (CardLine("model", "StateTransition: 12.3M parameters, 12.1M trainable"),),
        "optimizers": (
            CardLine("optimizer", "Adam, 2 groups, model.py:88"),
            CardLine("learning rate", "3e-05, constant", "3e-05", agrees=True),
            CardLine("weight decay", "0", "0.0005", agrees=False, note="training.weight_decay, conf/config.yaml:14"),
        ),
        "schedule": (CardLine("schedule", "none", "cosine, warm-up 0.1, minimum 0.01", agrees=False),),
        "length": (CardLine("length", "40,000 optimizer steps", "40,000", agrees=True),),
        "batches": (CardLine("batch size", "8", "8", agrees=True),),
        "accumulation": (CardLine("accumulation", "1 backward per step", "8", agrees=False),),
        "clipping": (CardLine("clipping", "norm 10 (Lightning)", "10", agrees=True),),
        "precision": (CardLine("precision", "32-true", "bf16-mixed", agrees=False),),
        "loss": (CardLine("loss", "samples_loss(energy), 1.273 at the first step"),),
        "resume": (CardLine("resume", "nothing loaded"),),
        "logging": (CardLine("logging", "CSVLogger: train_loss; no learning rate"),),
    },
    curves=(
        Curve("all groups", ((1, 3e-05), (2, 3e-05), (3, 3e-05)), "observed"),
        Curve("all groups", ((0, 3e-05), (40000, 3e-05)), "projected"),
        Curve("all groups", cosine(3e-05, 4000, 40000), "configured", "training.lr_scheduler"),
    ),
    data={"device": "cpu", "command": ["python", "train.py"], "schedule": {"last_rate": math.inf}},
)

VERDICTS = (
    Verdict("TL101", "unused-config-key", "failed"),
    Verdict("TL104", "setting-not-in-effect", "failed"),
    *(Verdict(f"TL20{i}", f"check-{i}", "passed") for i in range(1, 6)),
    Verdict("TL401", "scheduler-before-optimizer", "not-applicable", "the program uses no scheduler"),
    Verdict(
        "TL402",
        "scheduler-cadence",
        "not-observed",
        "no scheduler step was seen in 3 optimizer steps; --steps 20 would let it be",
    ),
)

FINDINGS = (
    finding(),
    finding(
        "TL104",
        message="The config asks for a cosine schedule (`training.lr_scheduler`); no scheduler is ever stepped and the "
        "rate is 3e-05 in every watched step.\n\nWithout it the run ends at 3e-05 where 3e-07 was meant.",
        key="training.lr_scheduler",
        line=17,
        fix="Return the scheduler from `configure_optimizers`, or remove the key.",
    ),
    finding(
        "TL204",
        "params-without-gradient",
        "warning",
        "14 tensors of `gene_decoder` (1.2M parameters, 9.8% of the model) are trainable and held by the optimizer; "
        "no gradient reached them in 3 backwards.",
        key=None,
        file="/home/me/.venv/lib/python3.11/site-packages/state/tx/models/state_transition.py",
        line=211,
        evidence={
            "backwards": 3,
            "tensors": [f"gene_decoder.decoder.{i}.weight" for i in range(14)],
            "share": 0.0981234,
        },
        fix="Freeze them with `requires_grad_(False)`, or use their output in the loss.",
    ),
    *(
        finding(
            "TL101",
            "unused-config-key",
            "warning",
            f"Nothing read `training.key_{i}`; its name stands nowhere in the 212 loaded source files.",
            key=f"training.key_{i}",
            line=20 + i,
            fix="Remove the key, or check its spelling against what the program reads.",
        )
        for i in range(17)
    ),
    finding("TL404", "lr-not-logged", "info", "No logged value follows the learning rate.", key=None, file=None),
    finding("TL205", "params-unmoved", "error", suppressed="the teacher stays frozen"),
)

PREVENTED = (
    PreventedAct("delete", "/data/runs/tahoe/checkpoints", "shutil.rmtree, train.py:31"),
    *(PreventedAct("overwrite", f"/data/runs/tahoe/step={i}.ckpt", "torch.save") for i in range(9)),
    PreventedAct("tracker", "wandb", "switched to disabled"),
)

FULL = Report(
    version="0.1.0",
    card=CARD,
    verdicts=VERDICTS,
    findings=FINDINGS,
    prevented=PREVENTED,
    exit_code=1,
    notes=("3 optimizer steps watched; the end of the first epoch was not reached.",),
    created_files=12,
)

DIED = Report(
    version="0.1.0",
    card=RunCard(sections={"launch": (CardLine("command", "python train.py"),)}),
    verdicts=(
        *(Verdict(f"TL20{i}", f"check-{i}", "not-observed", "the program died before a step") for i in range(5)),
        Verdict("TL205", "params-unmoved", "crashed", "KeyError: 'lr' in params_unmoved.py:12"),
    ),
    findings=(),
    prevented=(),
    exit_code=2,
    troubles=(
        "The program died before its first optimizer step: ModuleNotFoundError: No module named 'flash_attn'.\n\n"
        "Run it by itself to see the whole output: python train.py",
    ),
    program_output=(
        "\x1b[31mloading\x1b[0m 10%\rloading 100%",
        "Traceback (most recent call last):",
        '  File "/home/me/train.py", line 3, in <module>',
        "    import flash_attn",
        "ModuleNotFoundError: No module named 'flash_attn'",
    ),
)

EMPTY = Report(version="0.1.0", card=RunCard(), verdicts=(), findings=(), prevented=(), exit_code=0)
