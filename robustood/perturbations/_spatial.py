"""Rotation, translation and scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from robustood import rng
from robustood.inputs import TOLERANCE, check_choice, check_count, check_number, check_several
from robustood.perturbations._base import Inputs, PerturbationSet, sized
from robustood.perturbations._finite import FiniteSubset


@dataclass(frozen=True)
class Spatial(PerturbationSet):
    r"""Rotation, translation and scaling, by resampling the image (Engstrom et al. 2019).

    $z = (z_1, .., z_4) \in [-1, 1]^4$ is in units of the ranges: the angle is $z_1$
    ``rotation``, the shift $(z_2, z_3)$ ``translation`` to the right and down, the scale $1 +
    z_4$ ``scale``. Content moves by the forward map; each output pixel is sampled at its source under
    the inverse map, with bilinear interpolation, so the image is differentiable in z.

    Attributes:
        rotation: largest angle in degrees, counter-clockwise where positive.
        translation: largest shift in pixels along each axis.
        scale: largest relative change of size, below 1.
        fill: what fills the outside of the image: ``"zeros"``, ``"border"`` or ``"reflection"``.

    Raises:
        ValueError: for a negative range, a scale of 1 or more, or an unknown fill.
    """

    rotation: float = 0.0
    translation: float = 0.0
    scale: float = 0.0
    fill: str = "zeros"

    def __post_init__(self) -> None:
        check_number(self.rotation, "rotation", 0, 180, "give the largest angle in degrees")
        check_number(self.translation, "translation", 0, 1e6, "give the largest shift in pixels")
        check_number(self.scale, "scale", 0, 0.99, "give the largest relative change, such as 0.2")
        check_choice(self.fill, "fill", ("zeros", "border", "reflection"))

    @property
    def moving(self) -> list[bool]:
        """Which of the four coordinates have a range."""
        ranges = (self.rotation, self.translation, self.translation, self.scale)
        return [size > 0 for size in ranges]

    def identity(self, x: Inputs) -> Float[Tensor, "batch 4"]:
        return x.new_zeros(len(x), 4)

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Float[Tensor, "batch 4"]:
        """A parameter drawn uniformly from the ranges."""
        return self.project(x, rng.uniform(self.identity(x), generator, -1, 1))

    def apply(self, x: Inputs, z: Float[Tensor, "batch 4"]) -> Inputs:
        height, width = x.shape[-2:]
        angle = z[:, 0] * (self.rotation * torch.pi / 180)
        size = 1 + z[:, 3] * self.scale
        cos, sin = angle.cos() / size, angle.sin() / size
        right, down = z[:, 1] * self.translation, z[:, 2] * self.translation
        # Inverse map in pixels: rotate back, then subtract the shift; axes rescaled to [-1, 1].
        across = torch.stack(
            [cos, -sin * height / width, -(cos * right - sin * down) * 2 / width], 1
        )
        along = torch.stack(
            [sin * width / height, cos, -(sin * right + cos * down) * 2 / height], 1
        )
        where = affine_grid(torch.stack([across, along], 1), list(x.shape), align_corners=False)
        return grid_sample(x, where, padding_mode=self.fill, align_corners=False)

    def ascend(self, x: Inputs, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """Coordinates are in units of their ranges, so the step is the sign of the gradient."""
        return self.project(x, grad.sign().mul_(sized(step_size, z)).add_(z))

    def project(self, x: Inputs, z: Tensor) -> Tensor:
        """Clip to the ranges; works in place."""
        z = z.clamp_(-1, 1)
        for coordinate, moves in enumerate(self.moving):
            if not moves:
                z[:, coordinate] = 0
        return z

    def contains(self, x: Inputs, z: Tensor) -> Bool[Tensor, " batch"]:
        return z.abs().amax(1) <= 1 + TOLERANCE

    def grid(self, points: int | Sequence[int]) -> FiniteSubset:
        """The finite set of a regular grid over the ranges.

        Args:
            points: number of points along each coordinate, one number or four; an odd number
                includes the middle, and a coordinate without a range has one point.
        """
        counts = [points] * 4 if isinstance(points, (int, Integral)) else points
        check_several(counts, "points", "four whole numbers, or one number", 0)
        if len(counts) != 4:
            raise ValueError(f"points must be one number or four, got {len(counts)}: {counts}")
        counts = [check_count(count, "each of points", low=1) for count in counts]
        axes = [
            torch.linspace(-1, 1, n) if n > 1 and moves else torch.zeros(1)
            for n, moves in zip(counts, self.moving, strict=True)
        ]
        return FiniteSubset(self, torch.cartesian_prod(*axes))
