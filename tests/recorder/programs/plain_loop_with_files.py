"""No framework: a CSV file, JSON lines and TensorBoard written by hand; seeds at the top and in the data set."""

import csv
import io
import json
import random
import sys

import numpy
import torch
from torch.utils.tensorboard import SummaryWriter

random.seed(1)
numpy.random.seed(2)
torch.manual_seed(3)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        random.seed(index)
        return torch.randn(3)


def main():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    json.dumps({"config_lr": 8.0})
    csv.DictWriter(io.StringIO(), ["data_row"]).writerow({"data_row": 7})
    writer = csv.DictWriter(io.StringIO(), ["step", "lr", "loss"])
    board = SummaryWriter(sys.argv[1])
    for step, x in enumerate(torch.utils.data.DataLoader(Noisy(), batch_size=4, num_workers=1)):
        loss = model(x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.writerow({"step": step, "lr": optimizer.param_groups[0]["lr"], "loss": f"{loss.item():.3f}"})
        json.dumps({"step": step, "line_loss": loss.item()})
        board.add_scalar("board_loss", loss, global_step=step)
        board.add_scalars("group", {"a": 1, "b": 2.0}, step)
    print("WEIGHTS", float(model.weight.sum()), random.random(), numpy.random.rand())


if __name__ == "__main__":
    main()
