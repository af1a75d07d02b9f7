"""The scaler of FSDP, which replaces most of GradScaler's methods with its own."""

from __future__ import annotations

from pathlib import Path

from tests.recorder.watching import watch
from trainlint.recording.schema import ScalerEvent


def test_its_calls_are_seen(tmp_path: Path) -> None:
    run = watch(
        """
        import tempfile, torch, torch.distributed as dist
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = ShardedGradScaler(device="cpu", init_scale=16.0)
        for _ in range(9):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        """,
        tmp_path,
    )
    events = [e for e in run.events if isinstance(e, ScalerEvent)]
    assert [e.call for e in events[:4]] == ["scale", "unscale", "step", "update"]
    assert {e.class_name for e in events} == {"ShardedGradScaler"}
    assert events[0].scale == 16.0
    assert not any(e.skipped for e in events)
