"""A network and a batch on which attacks of several libraries are compared pixel by pixel."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def exact():
    """Convolutions with batch normalisation whose statistics have moved, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 12 * 12, 10),
        ).double()  # fmt: skip
        for _ in range(20):
            model(torch.rand(64, 3, 12, 12, dtype=torch.float64))
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(64, 3, 12, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 10, (64,), generator=generator)
