"""Random search: a rule that needs values only, for scores without a useful gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustood import rng
from robustood.attacks._rules import Propose, Rule
from robustood.inputs import check_generator, check_number
from robustood.perturbations import Ball, Linf, PerturbationSet, norms, per_sample

__all__ = ["Square"]

# Shares of the search at which the squares halve their area (Andriushchenko et al. 2020, section 3.2).
HALVED_AT = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Square(Rule):
    r"""Random search with squares (Andriushchenko et al. 2020), by values of the objective alone.

    The best point so far changes inside a random square; what raises the objective stays. In ``Linf`` the square
    takes the value $\pm\varepsilon$ per channel, as in the paper (algorithm 2). In ``L2`` a square of length
    $\varepsilon \sqrt s$ is added, where $s$ is its share of the pixels, and the sum is projected, which is simpler
    than algorithm 3. Vectors change in a random subset of their coordinates.

    Attributes:
        share: of the pixels that the first squares cover.
        generator: of the squares, on the device of the inputs; default: a new one with seed 0 for each restart.

    Raises:
        ValueError: for a share outside (0, 1], and at the start for a set that is no norm ball.
    """

    share: float = 0.8
    generator: torch.Generator | None = None
    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.share, "share", 1e-9, 1)
        check_generator(self.generator)

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        if not isinstance(within, Ball):
            raise ValueError(f"Square searches norm balls such as Linf(8/255), got {within!r}")
        return _SquareRestart(self, x, within, steps)


class _SquareRestart:
    """One restart: the best point and value of each sample."""

    def __init__(self, rule: Square, x: Tensor, within: Ball, steps: int):
        self.rule, self.x, self.within, self.steps = rule, x, within, max(steps, 1)
        self.generator = rule.generator or rng.generator(x.device, 0)
        self.step, self.z = 0, torch.zeros_like(x)
        self.best = x.new_full((len(x),), -torch.inf)

    def __call__(self, z: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        better = value > self.best if self.step else torch.ones_like(value, dtype=torch.bool)
        self.z = torch.where(per_sample(better, z), z, self.z)
        self.best = torch.where(better, value, self.best)
        self.step += 1
        return self.within.project(self.x, self.changed(self.window()))

    def share(self) -> float:
        """Of the pixels that this step's squares cover."""
        return self.rule.share / 2 ** sum(self.step >= share * self.steps for share in HALVED_AT)

    def window(self) -> Tensor:
        """A random square per image, or a random subset of the coordinates of a vector."""
        if self.x.ndim != 4:
            return rng.uniform(self.x, self.generator) < self.share()
        height, width = self.x.shape[2:]
        side = max(1, round((self.share() * height * width) ** 0.5))
        corner = rng.uniform(self.x.new_empty(len(self.x), 2), self.generator)
        inside = []
        for place, (axis, size) in enumerate(((2, height), (3, width))):
            reach = min(side, size)
            first = (corner[:, place] * (size - reach + 1)).floor().view(-1, 1, 1, 1)
            at = torch.arange(size, device=self.x.device)
            at = at.view([-1 if each == axis else 1 for each in range(4)])
            inside.append((at >= first) & (at < first + reach))
        return inside[0] & inside[1]

    def changed(self, window: Tensor) -> Tensor:
        """The best point with other values inside the window."""
        signs = rng.uniform(self.x[:, :, :1, :1] if self.x.ndim == 4 else self.x, self.generator)
        signs = 2.0 * (signs < 0.5).to(self.x) - 1
        if isinstance(self.within, Linf):
            return torch.where(window, self.within.eps * signs, self.z)
        bump = window * signs
        length = self.within.eps * self.share() ** 0.5
        return self.z + bump * per_sample(length / norms(bump).clamp_min(1e-12), bump)
