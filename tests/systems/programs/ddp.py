"""Two processes on gloo, DistributedDataParallel or ``--sharded`` (FSDP2); torchrun or ``--spawn`` starts them.

``--fault``: ``head-left-out``.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def train(fault, sharded):
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    bare = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    if sharded:
        fully_shard(bare[2], mesh=init_device_mesh("cpu", (2,)))
        model = fully_shard(bare, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = DistributedDataParallel(bare)
    held = bare[0] if fault == "head-left-out" else model
    optimizer = torch.optim.AdamW(held.parameters(), lr=1e-3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def worker(rank, fault, sharded, init=None, world=None):
    if init is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    train(fault, sharded)
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "finished")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--spawn", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    if options.spawn:
        with tempfile.TemporaryDirectory() as folder:
            init = f"file://{folder}/rendezvous"
            torch.multiprocessing.spawn(worker, (options.fault, options.sharded, init, 2), nprocs=2)
    else:
        worker(int(os.environ["RANK"]), options.fault, options.sharded)
