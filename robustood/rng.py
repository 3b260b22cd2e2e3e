"""Random draws that do not depend on how many processes share them.

Each process of a run draws the numbers of all samples from the same seed and keeps those of its own samples. A
sample therefore gets the same numbers however the work is divided.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["SharedGenerator", "generator", "integers", "normal", "own_part", "place", "uniform"]

Numbers = Float[Tensor, "batch *shape"]


class SharedGenerator(torch.Generator):
    """The generator of one of several processes that draw the same numbers.

    Attributes:
        place: (rank, number of processes).
    """

    place: tuple[int, int] = (0, 1)


def generator(device: torch.device | str, seed: int) -> SharedGenerator:
    """A seeded generator on a device, whose draws are shared with nobody until it is given a place.

    Each generator on a chosen device is made here. Without a GPU there is none for ``"cuda"``, so
    ``tests/rehearsal`` replaces :class:`SharedGenerator`.
    """
    made = SharedGenerator(device)
    made.manual_seed(seed)
    return made


def place(generator: torch.Generator | None) -> tuple[int, int]:
    """(rank, number of processes) of a generator whose draws are shared; (0, 1) if they are not."""
    return getattr(generator, "place", (0, 1))


def own_part(draw: Callable[[int], Tensor], n: int, generator: torch.Generator | None) -> Tensor:
    """Draw for the samples of all processes and keep those of this process, which has n."""
    rank, world = place(generator)
    return draw(world * n)[rank::world]


def uniform(
    like: Tensor, generator: torch.Generator | None, low: float = 0.0, high: float = 1.0
) -> Numbers:
    """Uniform numbers in [low, high), of the shape, dtype and device of ``like``."""
    new = lambda n: like.new_empty(n, *like.shape[1:]).uniform_(low, high, generator=generator)
    return own_part(new, len(like), generator)


def normal(like: Tensor, generator: torch.Generator | None) -> Numbers:
    """Standard normal numbers, of the shape, dtype and device of ``like``."""
    new = lambda n: like.new_empty(n, *like.shape[1:]).normal_(generator=generator)
    return own_part(new, len(like), generator)


def integers(
    low: int, high: int, like: Tensor, generator: torch.Generator | None
) -> Int[Tensor, " batch"]:
    """A whole number in [low, high) per sample of ``like``, on its device."""

    def new(n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator, device=like.device)

    return own_part(new, len(like), generator)
