"""Modules under FSDP2, which swaps their parameters for whole ones around forward and backward."""

from __future__ import annotations

from pathlib import Path

from tests.recorder.watching import watch


def test_the_shards_are_the_modules_parameters(tmp_path: Path) -> None:
    run = watch(
        """
        import tempfile, torch, torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)  # the root stays whole between forward and backward, when modules are looked for
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(9):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        """,
        tmp_path,
    )
    assert run.problems == ()
    held = {i for g in run.optimizers[0].groups for i in g.parameters}
    assert {p.id for p in run.parameters if p.root is not None} == held
    assert sorted(p.name for p in run.parameters) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert len(run.steps) >= 3
    for measurement in run.steps:
        assert all(norm is not None for norm in measurement.gradient_norm)
        assert all(share is not None and share > 0 for share in measurement.changed)
