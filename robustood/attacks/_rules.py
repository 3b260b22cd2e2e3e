"""The rules by which an attack proposes its next point."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustood.inputs import check_number
from robustood.perturbations import PerturbationSet, per_sample

__all__ = ["APGD", "Ascent", "Propose", "Rule"]

Propose = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rule(ABC):
    """How an attack moves from one point to the next. Your own rule derives from this class.

    Attributes:
        uses_gradient: whether it needs the gradient of the objective; without it, a step is one forward pass.
    """

    uses_gradient: ClassVar[bool] = True

    @abstractmethod
    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        """Start one restart: a function of parameters, values and gradients gives the next parameters."""


@dataclass(frozen=True)
class Ascent(Rule):
    """Projected steepest ascent with a constant step, by default 2.5 radius / steps: the rule of PGD."""

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        size = 2.5 * within.radius / max(steps, 1) if step_size is None else step_size
        return lambda z, value, grad: within.ascend(x, z, grad, size)


@dataclass(frozen=True)
class APGD(Rule):
    r"""Ascent with momentum and a step size that adapts to each sample (Croce and Hein 2020).

    $u = \Pi(z_k + a\,g)$, then $z_{k+1} = \Pi(z_k + \alpha (u - z_k) + (1 - \alpha)(z_k -
    z_{k-1}))$. At checkpoints that become more frequent, where the value rose in at most a
    share $\rho$ of the steps, or where best value and step size have not changed, a sample's $a$ is halved and
    it goes back to its best point (section 3 and algorithm 1). The first step is ``step_size``, by default
    twice the radius. Initial points are those of the set, not on the surface of the ball, and count as a rise.

    Attributes:
        momentum: $\alpha$.
        rising: $\rho$.
    """

    momentum: float = 0.75
    rising: float = 0.75

    def __post_init__(self) -> None:
        check_number(self.momentum, "momentum", 0, 1)
        check_number(self.rising, "rising", 0, 1)

    def checkpoints(self, steps: int) -> set[int]:
        """The steps at which the step size is reconsidered: shares 0.22, 0.41, 0.57, .. of all steps."""
        last, share, found = 0.0, 0.22, set()
        while share < 1:
            found.add(math.ceil(round(share * steps, 6)))
            last, share = share, share + max(share - last - 0.03, 0.06)
        return found

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        size = 2 * within.radius if step_size is None else step_size
        return _APGDRestart(self, x, within, self.checkpoints(steps), size)


class _APGDRestart:
    """One restart of APGD: step sizes, best points and counts per sample."""

    def __init__(
        self, rule: APGD, x: Tensor, within: PerturbationSet, checkpoints: set[int], size: float
    ):
        self.rule, self.x, self.within, self.checkpoints = rule, x, within, checkpoints
        self.step, self.checkpoint = 0, 0
        self.size = x.new_full((len(x),), size)
        self.halved, self.rises = torch.ones_like(self.size).bool(), torch.zeros_like(self.size)
        self.before = self.best = self.best_at_checkpoint = torch.full_like(self.size, -torch.inf)
        self.previous = self.best_z = self.best_grad = torch.empty(0)

    def __call__(self, z: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        self.remember(z, value, grad)
        if self.step in self.checkpoints:
            z, grad = self.reconsider(z, grad)
        ahead = self.within.ascend(self.x, z.clone(), grad.clone(), self.size)
        if self.step:
            share = self.rule.momentum
            mixed = z + share * (ahead - z) + (1 - share) * (z - self.previous)
            ahead = self.within.project(self.x, mixed)
        self.previous, self.step = z, self.step + 1
        return ahead

    def remember(self, z: Tensor, value: Tensor, grad: Tensor) -> None:
        """Count the samples that rose, and keep the points that are the best so far; the first always is."""
        better = value > self.best
        if self.step == 0:
            better, self.previous, self.best_z, self.best_grad = torch.ones_like(better), z, z, grad
        self.rises = self.rises + (value > self.before)
        self.best, self.before = torch.where(better, value, self.best), value
        self.best_z = torch.where(per_sample(better, z), z, self.best_z)
        self.best_grad = torch.where(per_sample(better, grad), grad, self.best_grad)

    def reconsider(self, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Samples that rose too rarely, or not at all with this step size, halve it and go back."""
        rare = self.rises <= self.rule.rising * (self.step - self.checkpoint)
        stuck = rare | (~self.halved & (self.best <= self.best_at_checkpoint))
        self.size = torch.where(stuck, self.size / 2, self.size)
        self.halved, self.best_at_checkpoint = stuck, self.best
        self.checkpoint, self.rises = self.step, torch.zeros_like(self.size)
        back = per_sample(stuck, z)
        return torch.where(back, self.best_z, z), torch.where(back, self.best_grad, grad)
