"""The interface of a perturbation set, and functions that its kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from robustood.inputs import check_instance, check_number

Inputs = Float[Tensor, "batch *shape"]


class PerturbationSet(ABC):
    """What an attack needs to know about $S(x)$.

    Your own set derives from this class and defines ``identity``, ``draw``, ``apply``, ``ascend`` and ``contains``.

    Attributes:
        radius: size of the set in the unit of ``step_size``; the default step is 2.5 radius / steps.
        box: range of valid inputs, None for vectors without one.
        differentiable: whether ``apply`` has a gradient in ``z``. A finite set has none: it is
            searched by enumeration.
    """

    radius: float = 1.0
    box: tuple[float, float] | None = (0, 1)
    differentiable: bool = True

    @property
    def finite(self) -> bool:
        """Whether the initial points are members that must all be judged."""
        return not self.differentiable

    @abstractmethod
    def identity(self, x: Inputs) -> Tensor:
        """The parameter that leaves x unchanged."""

    @abstractmethod
    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Tensor:
        """One parameter per sample, drawn at random from the set."""

    def initial_points(
        self, x: Inputs, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield parameters to start from, one per restart; a larger number extends a smaller one.

        The first is random, the second the identity, the others random; for 0 restarts, the identity only. A
        finite set yields all its members, the identity first.
        """
        for place in range(max(restarts, 1)):
            random = place != 1 and restarts
            yield self.draw(x, generator) if random else self.identity(x)

    @abstractmethod
    def apply(self, x: Inputs, z: Tensor) -> Inputs:
        """The perturbed inputs, differentiable in z where the set is differentiable."""

    @abstractmethod
    def ascend(self, x: Inputs, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """Take one step of steepest ascent in the set's own norm, then project.

        Args:
            step_size: one number, or one per sample (batch,).
        """

    def project(self, x: Inputs, z: Tensor) -> Tensor:
        """The nearest allowed parameter; may work in place. By default a step of length zero."""
        return self.ascend(x, z, torch.zeros_like(z), 0.0)

    @abstractmethod
    def contains(self, x: Inputs, z: Tensor) -> Bool[Tensor, " batch"]:
        """Which parameters are allowed, up to rounding."""


_SUCH_AS = "a perturbation set, such as Linf(8/255)"


def check_set(value: object, name: str, kind: type = PerturbationSet) -> None:
    """Refuse anything but a perturbation set."""
    check_instance(value, name, kind, _SUCH_AS)


def check_box(box: object) -> None:
    """Refuse anything but a range (low, high) or None."""
    if box is None:
        return
    if not isinstance(box, tuple) or len(box) != 2:
        raise ValueError(f"box must be a tuple (low, high), or None for no range, got {box!r:.80}")
    for end in box:
        check_number(end, "each end of box", fix="write (0, 1) for images")
    if not box[0] < box[1]:
        raise ValueError(f"box must be (low, high) with low < high, got {box!r}")


def norms(z: Inputs) -> Float[Tensor, " batch"]:
    """Euclidean norm of each sample."""
    return z.flatten(1).norm(dim=1)


def per_sample(values: Shaped[Tensor, " batch"], like: Inputs) -> Tensor:
    """Reshape one number per sample so that it broadcasts over ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def sized(step_size: float | Tensor, like: Inputs) -> float | Tensor:
    """A step size that broadcasts over ``like``: one number, or one per sample."""
    return per_sample(step_size, like) if isinstance(step_size, Tensor) else step_size


@dataclass(frozen=True)
class Random:
    """Perturb each input by a random member of a set: augmentation, or the partners of pairs.

    Attributes:
        within: the set, such as ``Spatial(30, 1)``.
    """

    within: PerturbationSet

    def __post_init__(self) -> None:
        check_set(self.within, "within")

    def __call__(self, x: Inputs, generator: torch.Generator | None = None) -> Inputs:
        with torch.no_grad():
            return self.within.apply(x, self.within.draw(x, generator))
