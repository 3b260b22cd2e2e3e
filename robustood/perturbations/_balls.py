"""Norm balls in pixel space."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustood import rng
from robustood.inputs import TOLERANCE, check_number
from robustood.perturbations._base import (
    Inputs,
    PerturbationSet,
    check_box,
    norms,
    per_sample,
    sized,
)


@dataclass(frozen=True)
class Ball(PerturbationSet):
    """What the norm balls share: $z = \\delta$, $\\mathrm{apply}(x, \\delta) = x + \\delta$.

    Attributes:
        eps: radius in pixels (write ``8/255``), at least 0.
        box: range of valid inputs, or ``None`` for vectors without one.

    Raises:
        ValueError: if eps is negative, NaN or infinite, or the box is empty.
    """

    eps: float
    box: tuple[float, float] | None = (0, 1)

    def __post_init__(self) -> None:
        check_number(self.eps, "eps", 0, 1e6, "give a radius of at least 0, such as 8/255")
        check_box(self.box)

    @property
    def radius(self) -> float:
        return self.eps

    def scaled(self, factor: float) -> Ball:
        """The same set with ``factor`` times the radius."""
        check_number(factor, "factor", 0, 1e12)
        return replace(self, eps=factor * self.eps)

    def identity(self, x: Inputs) -> Inputs:
        return torch.zeros_like(x)

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Inputs:
        """A parameter drawn uniformly from the ball, then clipped to the box."""
        return self.project(x, self.uniform(x, generator))

    def apply(self, x: Inputs, z: Inputs) -> Inputs:
        return x + z

    def project(self, x: Inputs, z: Inputs) -> Inputs:
        """Ball first, then box, whose clipping moves towards x, so the norm cannot grow. Works in place."""
        z = self.shrink(z)
        return z if self.box is None else z.add_(x).clamp_(*self.box).sub_(x)

    def contains(self, x: Inputs, z: Inputs) -> Bool[Tensor, " batch"]:
        fits = self.norm(z) <= self.eps + TOLERANCE
        if self.box is None:
            return fits
        moved = (x + z).flatten(1)
        low, high = self.box
        return fits & (moved.amin(1) >= low - TOLERANCE) & (moved.amax(1) <= high + TOLERANCE)

    @abstractmethod
    def ascend(self, x: Inputs, z: Inputs, grad: Inputs, step_size: float | Tensor) -> Inputs:
        """One step of steepest ascent in the ball's norm, then projection."""

    @abstractmethod
    def uniform(self, x: Inputs, generator: torch.Generator | None) -> Inputs:
        """A perturbation drawn uniformly from the ball."""

    @abstractmethod
    def shrink(self, z: Inputs) -> Inputs:
        """The nearest point of the ball; works in place."""

    @abstractmethod
    def norm(self, z: Inputs) -> Float[Tensor, " batch"]:
        """Norm of each perturbation."""


class Linf(Ball):
    r"""$\{\delta : \max_i |\delta_i| \le \varepsilon\}$; steepest ascent is the sign.

    Raises:
        ValueError: also if eps is wider than the box, as when 8 is written for 8/255.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box is not None and self.eps > self.box[1] - self.box[0]:
            raise ValueError(
                f"eps is {self.eps:g}, wider than the box {self.box}; for a radius in grey levels write "
                f"{self.eps:g}/255, for vectors that are not pixels box=None"
            )

    def uniform(self, x: Inputs, generator: torch.Generator | None) -> Inputs:
        """Uniform in the cube."""
        return rng.uniform(x, generator, -self.eps, self.eps)

    def shrink(self, z: Inputs) -> Inputs:
        return z.clamp_(-self.eps, self.eps)

    def norm(self, z: Inputs) -> Float[Tensor, " batch"]:
        return z.flatten(1).abs().amax(1)

    def ascend(self, x: Inputs, z: Inputs, grad: Inputs, step_size: float | Tensor) -> Inputs:
        return self.project(x, grad.sign().mul_(sized(step_size, x)).add_(z))


def as_set(within: PerturbationSet | float) -> PerturbationSet:
    """A perturbation set, or a number as the radius of :class:`Linf`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(within, Real) and not isinstance(within, bool):
        return Linf(float(within))
    if isinstance(within, type) or not isinstance(within, PerturbationSet):
        raise ValueError(
            f"within must be a number or a perturbation set such as Linf(8/255), got {within!r}"
        )
    return within


class L2(Ball):
    r"""$\{\delta : \|\delta\|_2 \le \varepsilon\}$; steepest ascent is the unit gradient."""

    def uniform(self, x: Inputs, generator: torch.Generator | None) -> Inputs:
        """Uniform in the ball: a Gaussian direction with radius eps U^(1/n)."""
        direction = rng.normal(x, generator)
        u = rng.uniform(x.flatten(1)[:, 0], generator)
        length = self.eps * u ** (1 / x[0].numel()) / norms(direction).clamp_min(1e-12)
        return direction.mul_(per_sample(length, x))

    def shrink(self, z: Inputs) -> Inputs:
        return z.mul_(per_sample((self.eps / norms(z).clamp_min(1e-12)).clamp_max(1), z))

    def norm(self, z: Inputs) -> Float[Tensor, " batch"]:
        return norms(z)

    def ascend(self, x: Inputs, z: Inputs, grad: Inputs, step_size: float | Tensor) -> Inputs:
        grad = grad.nan_to_num(0.0, 0.0, 0.0)  # one dead pixel must not move all the others
        # Divide by the largest entry first, or the squares of tiny gradients underflow to zero.
        largest = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad.div_(per_sample(largest, grad))
        length = step_size / norms(grad).clamp_min(1)  # 1 or more now, or 0
        return self.project(x, grad.mul_(per_sample(length, grad)).add_(z))
