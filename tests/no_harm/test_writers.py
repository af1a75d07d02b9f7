"""Writers outside Python, and trackers."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_acts import furnish
from watching import World, snapshot

pytest.importorskip("torch", reason="the writers of torch are what is tested")


def test_checkpoints_of_torch(world: World) -> None:
    """An output folder is deleted, made again and filled by C++ writers; old files are overwritten in place."""
    furnish(world)
    world.file("model.pt", b"old weights")
    world.file("script.pt", b"old script")
    world.file("model.safetensors", b"old tensors")
    before = snapshot(world.project)
    outcome = world.watch(
        """
        import os, pathlib, shutil, torch
        shutil.rmtree("out")
        os.makedirs("out")
        state = {"w": torch.arange(10)}
        for path in ("out/ckpt.pt", pathlib.Path("model.pt"), "fresh.pt", "fresh.pt"):
            torch.save(state, path)
            assert torch.load(path)["w"].equal(state["w"])
        torch.save(state, "legacy.pt", _use_new_zipfile_serialization=False)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
        torch.jit.load("script.pt")
        torch.save(state, "link")
        assert os.path.islink("link")
        try:
            import safetensors.torch as st
        except ImportError:
            pass
        else:
            st.save_file({"w": torch.ones(3)}, "model.safetensors")
            st.save_file({"w": torch.ones(3)}, "new.safetensors")
            assert st.load_file("model.safetensors")["w"].sum() == 3
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.problems() == []
    assert {("overwrite", p) for p in ("model.pt", "script.pt", "a.txt")} | {("delete", "out")} <= world.prevented()
    assert world.close().problems == ()
    assert snapshot(world.project) == before


def test_data_loader_workers(world: World) -> None:
    furnish(world)
    before = snapshot(world.project)
    outcome = world.watch(
        """
        import torch
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, i):
                open("a.txt", "a").write(str(i))
                open(f"cache-{i}", "w").close()
                return torch.ones(3)
        if __name__ == "__main__":
            for batch in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2): pass
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.close().problems == ()
    assert snapshot(world.project) == before


def test_large_memory_map_is_copy_on_write(world: World) -> None:
    pytest.importorskip("numpy")
    big = world.project / "train.bin"
    with open(big, "wb") as f:
        f.truncate(65 << 20)
    before = snapshot(world.project)
    outcome = world.watch(
        """
        import numpy as np
        data = np.memmap("train.bin", dtype=np.uint16)
        data[:4] = 7
        assert data[:4].sum() == 28
        new = np.memmap("new.bin", dtype=np.uint8, mode="w+", shape=(65 << 20,))
        new[:] = 1
        new.flush()
        again = np.memmap("new.bin", dtype=np.uint8)
        again[:2] = 3
        again.flush()
        assert np.fromfile("new.bin", dtype=np.uint8, count=2).sum() == 6
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.prevented() == set()
    world.close()
    assert snapshot(world.project) == before


def test_hub_is_not_written_to(world: World) -> None:
    pytest.importorskip("huggingface_hub", reason="its upload functions are what is tested")
    outcome = world.watch(
        """
        import huggingface_hub as hub
        url = hub.create_repo("someone/model", private=True, exist_ok=True)
        assert url.repo_id == "someone/model"
        api = hub.HfApi(token="hf_x", endpoint="http://127.0.0.1:1")
        assert api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="someone/model").commit_url
        assert api.upload_folder(folder_path=".", repo_id="someone/model", run_as_future=True).result().oid
        api.delete_repo("someone/model")
        from huggingface_hub import upload_folder
        upload_folder(folder_path=".", repo_id="someone/other")
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.prevented() == {("upload", "hub: someone/model"), ("upload", "hub: someone/other")}


FAKES = {
    "wandb": "def init(project=None, mode=None, **kw): return mode\ndef login(**kw): raise SystemExit('logged in')\n",
    "mlflow": "uri = None\ndef set_tracking_uri(u):\n    global uri; uri = u\n",
    "neptune": "def init_run(mode='async', **kw): return mode\n",
    "swanlab": "def init(mode='cloud', **kw): return mode\n",
}


def test_trackers_stay_off_when_asked_to_be_on(world: World, tmp_path: Path) -> None:
    """The libraries' own modes are forced, whatever the program passes."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name, source in FAKES.items():
        (libraries / f"{name}.py").write_text(source)
    outcome = world.watch(
        f"""
        import sys
        sys.path.insert(0, {str(libraries)!r})
        import wandb, mlflow, neptune, swanlab
        wandb.login(key="secret")
        print(wandb.init(project="p", mode="online"))
        mlflow.set_tracking_uri("http://user:secret@tracking:5000")
        print(mlflow.uri.startswith("file:"))
        print(neptune.init_run(mode="async"), swanlab.init())
        """
    )
    assert outcome.out.splitlines() == ["disabled", "True", "debug disabled"], outcome.err
    assert {action for action, _ in world.prevented()} == {"tracker"}
    assert {target for _, target in world.prevented()} >= {"wandb", "mlflow", "neptune", "swanlab"}
    for stream in (world.run.path / "stream").glob("*.jsonl"):
        assert "secret" not in stream.read_text()


def test_tokenizers_and_exported_programs(world: World) -> None:
    pytest.importorskip("tokenizers", reason="its Rust writer is what is tested")
    world.file("tokenizer.json", "{}")
    world.file("exported.pt2", "old")
    world.file("trace.json", "old")
    before = snapshot(world.project)
    outcome = world.watch(
        """
        import tokenizers, torch
        tokenizers.Tokenizer(tokenizers.models.BPE()).save("tokenizer.json")
        tokenizers.Tokenizer(tokenizers.models.BPE()).save("new.json", pretty=True)
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, "exported.pt2")
        torch.export.save(program, "new.pt2")
        with torch.profiler.profile() as profile:
            torch.ones(2) + 1
        profile.export_chrome_trace("trace.json")
        store = torch.distributed.FileStore("rendezvous", 1)
        store.set("a", "b")
        """
    )
    assert outcome.code == 0, outcome.err
    assert world.close().problems == ()
    assert snapshot(world.project) == before
