"""The questions that a perturbation set answers, and what its kinds share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from robustood.inputs import check_instance, check_number

Inputs = Float[Tensor, "batch *shape"]


@runtime_checkable
class PerturbationSet(Protocol):
    """What an attack needs to know about $S(x)$.

    Attributes:
        differentiable: whether ``apply`` can be followed uphill in ``z``. A finite set cannot: it is
            searched by enumeration.
        finite (optional): whether the starts are members that must all be judged; default: if
            it is not differentiable.
        box (optional): range of valid inputs, None for vectors without one; default (0, 1).
        radius: size of the set in the unit of ``step_size``; the default step is 2.5 radius /
            steps.
    """

    @property
    def differentiable(self) -> bool: ...
    @property
    def radius(self) -> float: ...

    def identity(self, x: Tensor) -> Tensor:
        """The parameter that leaves x as it is."""
        ...

    def initial_points(
        self, x: Tensor, restarts: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield parameters to start from.

        A continuous set yields ``restarts``: the first at random, the second the identity, where a search
        often ends elsewhere, the others at random; for 0, the identity alone. A finite set
        yields all its members, the identity first.
        """
        ...

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The perturbed inputs, differentiable in z where the set is differentiable."""
        ...

    def ascend(self, x: Tensor, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """One step of steepest ascent in the set's own norm, or one a sample (batch,), then projection."""
        ...

    def contains(self, x: Tensor, z: Tensor) -> Tensor:
        """Which parameters are allowed, up to rounding: (batch,) bool."""
        ...


class Drawable(PerturbationSet, Protocol):
    """A set that can be sampled."""

    def draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A parameter of the set drawn at random, one a sample."""
        ...


SUCH_AS = "a perturbation set, such as Linf(8/255)"


def check_set(value: object, name: str, kind: type = PerturbationSet) -> None:
    """Refuse what is no perturbation set."""
    check_instance(value, name, kind, SUCH_AS)


def check_box(box: object) -> None:
    """Refuse what is no range of valid inputs."""
    if box is None:
        return
    if not isinstance(box, tuple) or len(box) != 2:
        raise ValueError(f"box must be a pair (low, high), or None for no range, got {box!r:.80}")
    for end in box:
        check_number(end, "box, end", fix="(0, 1) is that of images")
    if not box[0] < box[1]:
        raise ValueError(f"box must be (low, high) with low < high, got {box!r}")


def norms(z: Inputs) -> Float[Tensor, " batch"]:
    """Euclidean norm of each sample."""
    return z.flatten(1).norm(dim=1)


def per_sample(values: Shaped[Tensor, " batch"], like: Inputs) -> Tensor:
    """Reshape one number per sample so that it broadcasts over ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def sized(step_size: float | Tensor, like: Inputs) -> float | Tensor:
    """A step that broadcasts over ``like``: one number, or one a sample."""
    return per_sample(step_size, like) if isinstance(step_size, Tensor) else step_size


def places(restarts: int) -> list[str]:
    """Where a continuous set is entered: more restarts only add to fewer."""
    return ["random", "identity", *["random"] * (restarts - 2)][:restarts] or ["identity"]


@dataclass(frozen=True)
class Random:
    """Perturb each input by a random member of a set: augmentation, or the partners of pairs.

    Attributes:
        within: a set that can ``draw(x, generator)`` a parameter.
    """

    within: Drawable

    def __post_init__(self) -> None:
        check_set(self.within, "within")
        if not hasattr(self.within, "draw"):
            raise ValueError(
                f"within must be a set that can draw(x, generator), got {type(self.within).__name__}"
            )

    def __call__(self, x: Inputs, generator: torch.Generator | None = None) -> Inputs:
        with torch.no_grad():
            return self.within.apply(x, self.within.draw(x, generator))
