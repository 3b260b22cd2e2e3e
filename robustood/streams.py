"""The random numbers of a run: each use has its own generator, seeded from the run's seed and the epoch.

An epoch therefore draws the same numbers whether or not the run was stopped before it, and drawing more numbers for
one use does not change the others.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from robustood import distributed, rng
from robustood.rng import SharedGenerator

__all__ = ["Stream", "Streams", "stream_seed"]

_STRIDE = 1_000_003  # between the seeds of two runs; a prime far above the number of epochs


class Stream(IntEnum):
    """The uses of random numbers in an epoch, with the offsets of their seeds."""

    BATCHES = 0  # order of the data, augmentation, random starts of attacks
    CHOICE = 250_000  # the choice of an epoch's data by an objective
    LAYERS = 500_000  # random layers, such as dropout


class Streams:
    """The generators of a run, and their states inside an epoch.

    Args:
        seed: that of the run.
        device: that of the run.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.batches = self.of(0, Stream.BATCHES)

    def of(self, epoch: int, stream: Stream) -> SharedGenerator:
        """The generator of one use in one epoch, on the run's device, shared with the other processes."""
        generator = rng.generator(self.device, stream_seed(self.seed, epoch, stream))
        generator.place = (distributed.rank(), distributed.world())
        return generator

    def begin(self, epoch: int) -> SharedGenerator:
        """Start an epoch: seed the generators that layers use, and return the generator of the batches."""
        layers = stream_seed(self.seed, epoch, Stream.LAYERS)
        torch.default_generator.manual_seed(layers)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(layers)
        self.batches = self.of(epoch, Stream.BATCHES)
        return self.batches

    def state(self) -> dict[str, Tensor]:
        """The current states of all generators."""
        states = {"own": self.batches.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, states: dict[str, Tensor]) -> None:
        """Restore the states that :meth:`state` returned."""
        self.batches.set_state(states["own"])
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)


def stream_seed(seed: int, epoch: int, stream: Stream) -> int:
    """The seed of one use in one epoch of a run."""
    return seed * _STRIDE + epoch + stream
