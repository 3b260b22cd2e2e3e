"""The average of a model's weights over its training."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """Exponential moving average of everything that is a float in a model's state.

    The decay grows with the number t of updates, min(decay, (1 + t) / (10 + t)), so that the random
    initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.tensors = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if value.is_floating_point()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model by 1 - decay."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        state = model.state_dict()
        for name, mean in self.tensors.items():
            mean.lerp_(state[name], 1 - decay)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Swap the model's floats with the average's; twice is the identity."""
        state = model.state_dict()
        for name, mean in self.tensors.items():
            kept = state[name].clone()
            state[name].copy_(mean)
            mean.copy_(kept)


class Averaged:
    """Context in which a model wears its average, if there is one."""

    def __init__(self, model: nn.Module, mean: Average | None):
        self.model, self.mean = model, mean

    def __enter__(self) -> None:
        if self.mean:
            self.mean.exchange(self.model)

    def __exit__(self, *_: object) -> None:
        self.__enter__()
