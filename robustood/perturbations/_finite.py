"""Sets that are searched by enumeration, and the composition of two sets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustood import rng
from robustood.corruptions import NAMES, corrupt
from robustood.inputs import TOLERANCE, check_choice, check_count, check_number, check_several
from robustood.perturbations._base import Inputs, PerturbationSet, check_set


class FiniteSet(PerturbationSet):
    """A set of finitely many members, which are all judged; it has no gradient."""

    radius = 0.0
    differentiable = False

    def ascend(self, x: Inputs, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        return z


@dataclass(frozen=True)
class FiniteSubset(FiniteSet):
    """A finite part of another set: the identity and some other members.

    Attributes:
        parent: the set that the parameters belong to.
        points: the parameters (members, ...), shared by all samples.
    """

    parent: PerturbationSet
    points: Tensor

    @property
    def box(self) -> tuple[float, float] | None:
        return self.parent.box

    def identity(self, x: Inputs) -> Tensor:
        return self.parent.identity(x)

    def members(self, x: Inputs) -> Tensor:
        """The identity of one sample, then the points: (1 + members, ...)."""
        return torch.cat([self.identity(x[:1]), self.points.to(x)])

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Tensor:
        """One of the members, the identity among them."""
        members = self.members(x)
        return members[rng.integers(0, len(members), x, generator)]

    def initial_points(
        self, x: Inputs, restarts: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Every member, whatever the number of restarts."""
        yield self.identity(x)
        for point in self.points.to(x):
            yield point.expand(len(x), *point.shape).clone()

    def apply(self, x: Inputs, z: Tensor) -> Inputs:
        return self.parent.apply(x, z)

    def contains(self, x: Inputs, z: Tensor) -> Bool[Tensor, " batch"]:
        return (
            torch.cdist(z.flatten(1), self.members(x).flatten(1), p=torch.inf).amin(1) <= TOLERANCE
        )


@dataclass(frozen=True)
class Corruption(FiniteSet):
    """The clean image and its common corruptions (Hendrycks and Dietterich 2019): a finite set.

    A parameter is $z = (c, s, r)$: the corruption's place in ``names`` counted from 1, or 0 for the
    clean image; the severity; and the seed of the sample's noise.

    Attributes:
        names: which of the 19 corruptions of :mod:`robustood.corruptions`.
        severities: which of 1 to 5.

    Raises:
        ValueError: for an unknown name or severity, or an empty list.
    """

    names: Sequence[str] = NAMES
    severities: Sequence[int] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        check_several(self.names, "names", "corruptions")
        check_several(self.severities, "severities", "whole numbers from 1 to 5")
        for name in self.names:
            check_choice(name, "each of names", NAMES)
        for severity in self.severities:
            check_count(severity, "each of severities", low=1)
            check_number(severity, "each of severities", 1, 5, "severities are 1, 2, 3, 4 and 5")

    def identity(self, x: Inputs) -> Float[Tensor, "batch 3"]:
        return torch.zeros(len(x), 3, device=x.device)  # float32 also for half-precision images

    def initial_points(
        self, x: Inputs, restarts: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "batch 3"]]:
        """The clean image, then every corruption at every severity, each with its own noise."""
        z = self.identity(x)
        yield z
        for place, severity in itertools.product(range(len(self.names)), self.severities):
            seeds = rng.integers(0, 2**24, x, generator)  # exact in float32
            where = torch.tensor([place + 1, severity], device=x.device).expand(len(x), 2)
            yield torch.cat([where, seeds[:, None]], 1).to(z)

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Float[Tensor, "batch 3"]:
        """A corruption and a severity drawn uniformly, never the clean image."""
        place = 1 + rng.integers(0, len(self.names), x, generator)
        severity = torch.tensor(self.severities, device=x.device)[
            rng.integers(0, len(self.severities), x, generator)
        ]
        return torch.stack([place, severity, rng.integers(0, 2**24, x, generator)], 1).to(
            self.identity(x)
        )

    def apply(self, x: Inputs, z: Float[Tensor, "batch 3"]) -> Inputs:
        moved = x.detach().clone()
        kinds = z[:, :2].long()
        for place, severity in kinds.unique(dim=0).tolist():
            if place:
                chosen = (kinds == kinds.new_tensor([place, severity])).all(1)
                seeds = z[chosen, 2].long()
                moved[chosen] = corrupt(moved[chosen], self.names[place - 1], severity, seeds)
        return moved

    def contains(self, x: Inputs, z: Tensor) -> Bool[Tensor, " batch"]:
        severities = z.new_tensor([float(s) for s in self.severities])
        named = (z[:, 0] >= 1) & (z[:, 0] <= len(self.names)) & (z[:, 0] == z[:, 0].round())
        return (z[:, 0] == 0) | (named & torch.isin(z[:, 1], severities))


@dataclass(frozen=True)
class Compose(PerturbationSet):
    r"""One set, then another around its result: $\{b(a(x, z_a), z_b)\}$.

    The parameters of both are flattened and concatenated in one tensor. A finite first set is searched
    exhaustively, each member with every initial point of the second; two sets with random initial points
    are both drawn anew each time. Gradients reach the first set through the second, so the composition
    is differentiable if the second set is.

    Attributes:
        first, second: any two sets.
    """

    first: PerturbationSet
    second: PerturbationSet

    def __post_init__(self) -> None:
        check_set(self.first, "first")
        check_set(self.second, "second")

    @property
    def differentiable(self) -> bool:
        return self.second.differentiable

    @property
    def finite(self) -> bool:
        """Whether one of the two has members that must all be judged."""
        return self.first.finite or self.second.finite

    @property
    def box(self) -> tuple[float, float] | None:
        return self.first.box

    def identity(self, x: Inputs) -> Float[Tensor, "batch numbers"]:
        return torch.cat([self.first.identity(x).flatten(1), self.second.identity(x).flatten(1)], 1)

    def initial_points(
        self, x: Inputs, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "batch numbers"]]:
        each = min(restarts, 1) if self.first.differentiable else restarts
        for z in self.first.initial_points(x, restarts, generator):
            for further in self.second.initial_points(self.first.apply(x, z), each, generator):
                yield torch.cat([z.flatten(1), further.flatten(1)], 1)

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Tensor:
        """A draw from the first set, then one from the second around its result."""
        a = self.first.draw(x, generator)
        b = self.second.draw(self.first.apply(x, a), generator)
        return torch.cat([a.flatten(1), b.flatten(1)], 1)

    def split(self, x: Inputs, z: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters of each set."""
        a, b = self.first.identity(x), self.second.identity(x)
        width = a[0].numel()
        return z[:, :width].reshape(a.shape), z[:, width:].reshape(b.shape)

    def apply(self, x: Inputs, z: Float[Tensor, "batch numbers"]) -> Inputs:
        a, b = self.split(x, z)
        return self.second.apply(self.first.apply(x, a), b)

    def ascend(self, x: Inputs, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """Each part steps by ``step_size`` times its own radius."""
        a, b = self.split(x, z)
        grad_a, grad_b = (part.clone() for part in self.split(x, grad))
        if self.first.differentiable:
            a = self.first.ascend(x, a, grad_a, step_size * self.first.radius)
        moved = self.first.apply(x, a)
        b = self.second.ascend(moved, b, grad_b, step_size * self.second.radius)
        return torch.cat([a.flatten(1), b.flatten(1)], 1)

    def contains(self, x: Inputs, z: Tensor) -> Bool[Tensor, " batch"]:
        a, b = self.split(x, z)
        return self.first.contains(x, a) & self.second.contains(self.first.apply(x, a), b)
