"""Batches: drawn in random order, augmented on the device that holds the data, shared among processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad

from robustood import rng
from robustood.data._base import Batch, Data, pixels
from robustood.inputs import (
    check_count,
    check_flag,
    check_generator,
    check_instance,
)


@dataclass(frozen=True)
class Augment:
    """Random crop after padding with zeros, and horizontal flip: one gather on the images' own device.

    Attributes:
        crop: pixels of padding on each side; 0 for none.
        flip: mirror half of the images.
    """

    crop: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_count(self.crop, "crop")
        check_flag(self.flip, "flip")

    def __call__(
        self, x: Shaped[Tensor, "batch channel height width"], generator: torch.Generator | None
    ) -> Shaped[Tensor, "batch channel height width"]:
        """Crop and flip each image by its own draw."""
        n, channels, height, width = x.shape
        drawn = rng.uniform(torch.empty(n, 3, device=x.device), generator)
        down, right = (drawn[:, :2] * (2 * self.crop + 1)).long().unbind(1)
        across = torch.arange(width, device=x.device).expand(n, -1)
        if self.flip:
            across = torch.where(drawn[:, 2:] < 0.5, across.flip(1), across)
        rows = (torch.arange(height, device=x.device) + down[:, None])[:, None, :, None]
        columns = (across + right[:, None])[:, None, None, :]
        image = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[None, :, None, None]
        return pad(x, [self.crop] * 4)[image, channel, rows, columns]


Change = Callable[[Tensor, torch.Generator], Tensor]


def check_augment(augment: object) -> None:
    """Refuse what cannot be called, and a class that was not instantiated; None means no augmentation."""
    if augment is None:
        return
    if isinstance(augment, type) or not callable(augment):
        raise ValueError(
            f"augment must be called as augment(images, generator), such as Augment(), got {augment!r:.80}"
        )


def draw(
    data: Data,
    batch_size: int,
    outlier_batch_size: int,
    generator: torch.Generator,
    augment: Change | None = None,
) -> Iterator[Batch]:
    """One epoch of full batches in random order, with outliers, which are repeated as often as needed.

    Sizes are totals over all processes; each process gets its own part of every batch.

    Args:
        augment: applied to inputs and outliers, such as :class:`Augment`.
    """
    check_instance(data, "data", Data, "Data(train, val, test, outliers)")
    check_count(batch_size, "batch_size", low=1)
    check_count(outlier_batch_size, "outlier_batch_size")
    check_generator(generator)
    check_augment(augment)
    n, pool, device = len(data.train), len(data.outliers), data.train.x.device
    steps = n // batch_size
    order = torch.randperm(n, generator=generator, device=device)
    rounds = math.ceil(steps * outlier_batch_size / pool) if pool else 0
    shuffled = [torch.randperm(pool, generator=generator, device=device) for _ in range(rounds)]
    others = torch.cat(shuffled) if pool else order[:0]
    rank, world = rng.place(generator)

    def own(indices: Tensor, size: int, step: int) -> Tensor:
        # Strided, so that the first half of each process's part comes from the first half of the batch.
        return indices[step * size :][:size][rank::world]

    def ready(images: Tensor) -> Tensor:
        return pixels(augment(images, generator) if augment else images)

    def inputs(chosen: Tensor) -> Tensor:
        x = data.train.x[chosen]
        if data.compressed is None:
            return x
        lot = rng.uniform(torch.empty(len(x), device=device), generator)
        return torch.where(lot.view(-1, *[1] * (x.ndim - 1)) < 0.5, data.compressed[chosen], x)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            chosen = own(order, batch_size, step)
            x = ready(inputs(chosen))
            outliers = ready(data.outliers[own(others, outlier_batch_size, step)]) if pool else None
            yield Batch(x, pixels(data.train.y[chosen]), outliers, generator)

    return batches()  # the order is drawn now, whenever the first batch is asked for
