"""A model with dropout that trains in a blink, as a module that a test can start and kill."""

import itertools
import os
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from minblip2.data.progress import forgiving_output
from minblip2.training.loop import TrainConfig, train

CONFIG = TrainConfig(steps=60, batch_size=16, learning_rate=1e-2, warmup=5, checkpoint_every=12, precision="float32")


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    image_ids: torch.Tensor

    def to(self, device):
        return Pair(self.x.to(device), self.y.to(device), self.image_ids)


class Numbers:
    """Points of y = sum(x) in order, `batch_size` at a time: a batch is a function of its number."""

    def __init__(self, batch_size=16):
        self.batch_size = batch_size

    def iterate(self, start=0):
        for number in itertools.count(start):
            time.sleep(float(os.environ.get("TINY_TRAINING_PAUSE", 0)))
            ids = torch.arange(self.batch_size) + number * self.batch_size
            x = torch.sin(torch.stack([ids * 0.7, ids * 1.3, ids * 2.1], dim=1))
            yield Pair(x, x.sum(dim=1, keepdim=True), ids)


class Toy(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


def toy_losses(model, batch):
    return {"loss": (model(batch.x) - batch.y).square().mean()}


if __name__ == "__main__":
    forgiving_output()
    torch.manual_seed(0)
    train(Toy(), toy_losses, Numbers(), CONFIG, sys.argv[1])
