r"""What the adversary may change: a perturbation set $S(x) = \{\mathrm{apply}(x, z) : z \in Z\}$.

A set is described by parameters ``z`` (batch first) and answers five questions: where to start,
what image a parameter makes, which way is up, whether a parameter is allowed, and which
parameter changes nothing. Every attack in this package is written against these answers and
knows nothing else about the set.

For the norm balls $z = \delta$ is the perturbation itself, in pixels, and the box $[0, 1]$ of
valid images is part of the set (Madry et al. 2018, eq. 2.1 and section 2.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from robustood.inputs import TOLERANCE, check_number

Batch = Float[Tensor, "batch *shape"]


@runtime_checkable
class PerturbationSet(Protocol):
    """What an attack needs to know about $S(x)$.

    Attributes:
        ascendable: whether ``apply`` can be followed uphill in ``z``. A finite set cannot: it is
            searched by enumeration.
        radius: size of the set in the unit of ``step_size``; the default step is 2.5 radius /
            steps.
    """

    @property
    def ascendable(self) -> bool: ...
    @property
    def radius(self) -> float: ...

    def null(self, x: Tensor) -> Tensor:
        """The parameter that leaves x as it is."""
        ...

    def starts(
        self, x: Tensor, restarts: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield ``restarts`` random parameters; 0: the null one; finite: all members, null first."""
        ...

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The perturbed inputs, differentiable in z where the set is ascendable."""
        ...

    def ascend(self, x: Tensor, z: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """One steepest ascent step in the set's own norm, then projection; may overwrite grad."""
        ...

    def contains(self, x: Tensor, z: Tensor) -> Tensor:
        """Which parameters are allowed, up to rounding: (batch,) bool."""
        ...


def norms(z: Batch) -> Float[Tensor, " batch"]:
    """Euclidean norm of each sample."""
    return z.flatten(1).norm(dim=1)


def per_sample(values: Shaped[Tensor, " batch"], like: Batch) -> Tensor:
    """Reshape one number per sample so that it broadcasts over ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Ball(ABC):
    """Common part of the norm balls: $z = \\delta$, $\\mathrm{apply}(x, \\delta) = x + \\delta$.

    Attributes:
        eps: radius in pixels (write ``8/255``), at least 0.
        box: range of valid inputs, or ``None`` for vectors without one.

    Raises:
        ValueError: if eps is negative, NaN or infinite, or the box is empty.
    """

    eps: float
    box: tuple[float, float] | None = (0, 1)
    ascendable = True

    def __post_init__(self) -> None:
        check_number(self.eps, "eps", 0, 1e6, "give a radius of at least 0, such as 8/255")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box must be (low, high) with low < high, got {self.box!r}")

    @property
    def radius(self) -> float:
        return self.eps

    def scaled(self, factor: float) -> Ball:
        """The same set with ``factor`` times the radius."""
        return replace(self, eps=factor * self.eps)

    def null(self, x: Batch) -> Batch:
        return torch.zeros_like(x)

    def starts(
        self, x: Batch, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        if restarts == 0:
            yield self.null(x)
        for _ in range(restarts):
            yield self.project(x, self.draw(x, generator))

    def apply(self, x: Batch, z: Batch) -> Batch:
        return x + z

    def project(self, x: Batch, z: Batch) -> Batch:
        """Ball first, then box, whose clip moves towards x: the norm cannot grow. Overwrites z."""
        z = self.shrink(z)
        return z if self.box is None else z.add_(x).clamp_(*self.box).sub_(x)

    def contains(self, x: Batch, z: Batch) -> Bool[Tensor, " batch"]:
        fits = self.norm(z) <= self.eps + TOLERANCE
        if self.box is None:
            return fits
        moved = (x + z).flatten(1)
        low, high = self.box
        return fits & (moved.amin(1) >= low - TOLERANCE) & (moved.amax(1) <= high + TOLERANCE)

    @abstractmethod
    def draw(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """A parameter drawn uniformly from the ball."""

    @abstractmethod
    def shrink(self, z: Batch) -> Batch:
        """The nearest point of the ball; overwrites z."""

    @abstractmethod
    def norm(self, z: Batch) -> Float[Tensor, " batch"]:
        """Size of each perturbation."""


class Linf(Ball):
    r"""$\{\delta : \max_i |\delta_i| \le \varepsilon\}$; steepest ascent is the sign."""

    def draw(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """Uniform in the cube."""
        return torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)

    def shrink(self, z: Batch) -> Batch:
        return z.clamp_(-self.eps, self.eps)

    def norm(self, z: Batch) -> Float[Tensor, " batch"]:
        return z.flatten(1).abs().amax(1)

    def ascend(self, x: Batch, z: Batch, grad: Batch, step_size: float) -> Batch:
        return self.project(x, grad.sign_().mul_(step_size).add_(z))


class L2(Ball):
    r"""$\{\delta : \|\delta\|_2 \le \varepsilon\}$; steepest ascent is the unit gradient."""

    def draw(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """Uniform in the ball: a Gaussian direction with radius eps U^(1/n)."""
        direction = torch.empty_like(x).normal_(generator=generator)
        u = torch.empty_like(x.flatten(1)[:, 0]).uniform_(generator=generator)
        length = self.eps * u ** (1 / x[0].numel()) / norms(direction).clamp_min(1e-12)
        return direction.mul_(per_sample(length, x))

    def shrink(self, z: Batch) -> Batch:
        return z.mul_(per_sample((self.eps / norms(z).clamp_min(1e-12)).clamp_max(1), z))

    def norm(self, z: Batch) -> Float[Tensor, " batch"]:
        return norms(z)

    def ascend(self, x: Batch, z: Batch, grad: Batch, step_size: float) -> Batch:
        # Divide by the largest entry first: the squares of tiny gradients underflow to zero.
        largest = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad.div_(per_sample(largest, grad))
        length = step_size / norms(grad).clamp_min(1e-12)
        return self.project(x, grad.mul_(per_sample(length, grad)).add_(z))
