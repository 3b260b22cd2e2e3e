r"""What the adversary may change: a perturbation set $S(x) = \{\mathrm{apply}(x, z) : z \in Z\}$.

A set is described by parameters ``z`` (batch first) and answers five questions: where to start,
what image a parameter makes, which way is up, whether a parameter is allowed, and which
parameter changes nothing. Every attack in this package is written against these answers and
knows nothing else about the set.

For the norm balls $z = \delta$ is the perturbation itself, in pixels, and the box $[0, 1]$ of
valid images is part of the set (Madry et al. 2018, eq. 2.1 and section 2.2).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from robustood.corruptions import NAMES, corrupt
from robustood.data import drawn, each
from robustood.inputs import TOLERANCE, check_choice, check_count, check_number

Batch = Float[Tensor, "batch *shape"]


@runtime_checkable
class PerturbationSet(Protocol):
    """What an attack needs to know about $S(x)$.

    Attributes:
        ascendable: whether ``apply`` can be followed uphill in ``z``. A finite set cannot: it is
            searched by enumeration.
        finite (optional): whether the starts are members that must all be judged; default: if
            it is not ascendable.
        box (optional): range of valid inputs, None for vectors without one; default (0, 1).
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
        """Yield parameters to start from.

        A continuous set yields ``restarts``: the first at random, the second the null one, where a search
        often ends elsewhere, the others at random; for 0, the null one alone. A finite set
        yields all its members, the null one first.
        """
        ...

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The perturbed inputs, differentiable in z where the set is ascendable."""
        ...

    def ascend(self, x: Tensor, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """One step of steepest ascent in the set's own norm, or one a sample (batch,), then projection."""
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


def sized(step_size: float | Tensor, like: Batch) -> float | Tensor:
    """A step that broadcasts over ``like``: one number, or one a sample."""
    return per_sample(step_size, like) if isinstance(step_size, Tensor) else step_size


def places(restarts: int) -> list[str]:
    """Where a continuous set is entered: more restarts only add to fewer."""
    return ["random", "null", *["random"] * (restarts - 2)][:restarts] or ["null"]


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
        for place in places(restarts):
            yield self.project(x, self.draw(x, generator)) if place == "random" else self.null(x)

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
    def ascend(self, x: Batch, z: Batch, grad: Batch, step_size: float | Tensor) -> Batch:
        """One steepest ascent step in the ball's norm, then projection."""

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
        return drawn(x, lambda z: z.uniform_(-self.eps, self.eps, generator=generator), generator)

    def shrink(self, z: Batch) -> Batch:
        return z.clamp_(-self.eps, self.eps)

    def norm(self, z: Batch) -> Float[Tensor, " batch"]:
        return z.flatten(1).abs().amax(1)

    def ascend(self, x: Batch, z: Batch, grad: Batch, step_size: float | Tensor) -> Batch:
        return self.project(x, grad.sign().mul_(sized(step_size, x)).add_(z))


class L2(Ball):
    r"""$\{\delta : \|\delta\|_2 \le \varepsilon\}$; steepest ascent is the unit gradient."""

    def draw(self, x: Batch, generator: torch.Generator | None) -> Batch:
        """Uniform in the ball: a Gaussian direction with radius eps U^(1/n)."""
        direction = drawn(x, lambda z: z.normal_(generator=generator), generator)
        u = drawn(x.flatten(1)[:, 0], lambda u: u.uniform_(generator=generator), generator)
        length = self.eps * u ** (1 / x[0].numel()) / norms(direction).clamp_min(1e-12)
        return direction.mul_(per_sample(length, x))

    def shrink(self, z: Batch) -> Batch:
        return z.mul_(per_sample((self.eps / norms(z).clamp_min(1e-12)).clamp_max(1), z))

    def norm(self, z: Batch) -> Float[Tensor, " batch"]:
        return norms(z)

    def ascend(self, x: Batch, z: Batch, grad: Batch, step_size: float | Tensor) -> Batch:
        grad = grad.nan_to_num(0.0, 0.0, 0.0)  # one dead pixel must not move all the others
        # Divide by the largest entry first: the squares of tiny gradients underflow to zero.
        largest = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad.div_(per_sample(largest, grad))
        length = step_size / norms(grad).clamp_min(1e-12)
        return self.project(x, grad.mul_(per_sample(length, grad)).add_(z))


@dataclass(frozen=True)
class Spatial:
    r"""Rotation, shift and change of size, by resampling the image (Engstrom et al. 2019).

    $z = (z_1, .., z_4) \in [-1, 1]^4$ counts in units of the ranges: the angle is $z_1$
    ``rotation``, the shift $(z_2, z_3)$ ``translation`` to the right and down, the size $1 +
    z_4$ ``scale``. Content moves by the forward map; each output pixel looks up its source by
    the inverse, with bilinear interpolation, so the image is differentiable in z.

    Attributes:
        rotation: largest angle in degrees, counter-clockwise where positive.
        translation: largest shift in pixels along each axis.
        scale: largest relative change of size, below 1.
        fill: what lies outside the image: ``"zeros"``, ``"border"`` or ``"reflection"``.

    Raises:
        ValueError: for a negative range, a scale of 1 or more, or an unknown fill.
    """

    rotation: float = 0.0
    translation: float = 0.0
    scale: float = 0.0
    fill: str = "zeros"
    ascendable = True
    radius = 1.0

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

    def null(self, x: Batch) -> Float[Tensor, "batch 4"]:
        return x.new_zeros(len(x), 4)

    def starts(
        self, x: Batch, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "batch 4"]]:
        """Uniform in the ranges."""
        for place in places(restarts):
            z = self.null(x)
            if place == "random":
                z = drawn(z, lambda z: z.uniform_(-1, 1, generator=generator), generator)
            yield self.project(x, z)

    def apply(self, x: Batch, z: Float[Tensor, "batch 4"]) -> Batch:
        height, width = x.shape[-2:]
        angle = z[:, 0] * (self.rotation * torch.pi / 180)
        size = 1 + z[:, 3] * self.scale
        cos, sin = angle.cos() / size, angle.sin() / size
        right, down = z[:, 1] * self.translation, z[:, 2] * self.translation
        # Inverse map in pixels: turn back, then subtract the shift; axes rescaled to [-1, 1].
        across = torch.stack(
            [cos, -sin * height / width, -(cos * right - sin * down) * 2 / width], 1
        )
        along = torch.stack(
            [sin * width / height, cos, -(sin * right + cos * down) * 2 / height], 1
        )
        where = affine_grid(torch.stack([across, along], 1), list(x.shape), align_corners=False)
        return grid_sample(x, where, padding_mode=self.fill, align_corners=False)

    def ascend(self, x: Batch, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """Coordinates count in units of their ranges, so the step is the sign of the gradient."""
        return self.project(x, grad.sign().mul_(sized(step_size, z)).add_(z))

    def project(self, x: Batch, z: Tensor) -> Tensor:
        """Clip to the ranges; overwrites z."""
        z = z.clamp_(-1, 1)
        for coordinate, moves in enumerate(self.moving):
            if not moves:
                z[:, coordinate] = 0
        return z

    def contains(self, x: Batch, z: Tensor) -> Bool[Tensor, " batch"]:
        return z.abs().amax(1) <= 1 + TOLERANCE

    def grid(self, points: int | Sequence[int]) -> Members:
        """The finite set of a regular grid over the ranges.

        Args:
            points: how many along each coordinate (odd, so that the middle is there), one
                number or four; a coordinate without a range has one.
        """
        counts = [points] * 4 if isinstance(points, int) else list(points)
        if len(counts) != 4:
            raise ValueError(f"points must be one number or four, got {len(counts)}: {counts}")
        for count in counts:
            check_count(count, "points", low=1)
        axes = [
            torch.linspace(-1, 1, n) if n > 1 and moves else torch.zeros(1)
            for n, moves in zip(counts, self.moving, strict=True)
        ]
        return Members(self, torch.cartesian_prod(*axes))


@dataclass(frozen=True)
class Members:
    """A finite part of another set: its starts are all its members, the null one first.

    Attributes:
        parent: the set that makes images of parameters.
        points: the parameters (members, ...), shared by all samples.
    """

    parent: PerturbationSet
    points: Tensor
    ascendable = False
    radius = 0.0

    @property
    def box(self) -> tuple[float, float] | None:
        return getattr(self.parent, "box", (0, 1))

    def null(self, x: Batch) -> Tensor:
        return self.parent.null(x)

    def starts(
        self, x: Batch, restarts: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Every member, whatever the number of restarts."""
        yield self.null(x)
        for point in self.points.to(x):
            yield point.expand(len(x), *point.shape).clone()

    def apply(self, x: Batch, z: Tensor) -> Batch:
        return self.parent.apply(x, z)

    def ascend(self, x: Batch, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        return z

    def contains(self, x: Batch, z: Tensor) -> Bool[Tensor, " batch"]:
        points = torch.cat([self.null(x[:1]), self.points.to(x)]).flatten(1)
        return torch.cdist(z.flatten(1), points, p=torch.inf).amin(1) <= TOLERANCE


@dataclass(frozen=True)
class Corruption:
    """The clean image and its common corruptions (Hendrycks and Dietterich 2019), a finite set.

    A parameter is $z = (c, s, r)$: 0 for the clean image or the corruption's place in ``names``
    from 1, the severity, and the seed of the sample's own noise.

    Attributes:
        names: which of the 19 corruptions of :mod:`robustood.corruptions`.
        severities: which of 1 to 5.

    Raises:
        ValueError: for an unknown name or severity, or none at all.
    """

    names: Sequence[str] = NAMES
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    ascendable = False
    radius = 0.0

    def __post_init__(self) -> None:
        check_count(len(self.names), "number of names", low=1)
        check_count(len(self.severities), "number of severities", low=1)
        for name in self.names:
            check_choice(name, "name", NAMES)
        for severity in self.severities:
            check_count(severity, "severity", low=1)
            check_number(severity, "severity", 1, 5, "severities are 1, 2, 3, 4 and 5")

    def null(self, x: Batch) -> Float[Tensor, "batch 3"]:
        return torch.zeros(len(x), 3, device=x.device)  # float32 also for half-precision images

    def starts(
        self, x: Batch, restarts: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "batch 3"]]:
        """The clean image, then every corruption at every severity, each with its own noise."""
        z = self.null(x)
        yield z
        for place, severity in itertools.product(range(len(self.names)), self.severities):
            # Seeds below 2^24 are exact in float32.
            lot = lambda n: torch.randint(2**24, (n,), generator=generator, device=x.device)  # noqa
            seeds = each(lot, len(x), generator)
            where = torch.tensor([place + 1, severity], device=x.device).expand(len(x), 2)
            yield torch.cat([where, seeds[:, None]], 1).to(z)

    def apply(self, x: Batch, z: Float[Tensor, "batch 3"]) -> Batch:
        moved = x.detach().clone()
        kinds = z[:, :2].long()
        for place, severity in kinds.unique(dim=0).tolist():
            if place:
                chosen = (kinds == kinds.new_tensor([place, severity])).all(1)
                seeds = z[chosen, 2].long()
                moved[chosen] = corrupt(moved[chosen], self.names[place - 1], severity, seeds)
        return moved

    def ascend(self, x: Batch, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        return z

    def contains(self, x: Batch, z: Tensor) -> Bool[Tensor, " batch"]:
        severities = z.new_tensor([float(s) for s in self.severities])
        named = (z[:, 0] >= 1) & (z[:, 0] <= len(self.names)) & (z[:, 0] == z[:, 0].round())
        return (z[:, 0] == 0) | (named & torch.isin(z[:, 1], severities))


@dataclass(frozen=True)
class Then:
    r"""First one set, then another around its result: $\{b(a(x, z_a), z_b)\}$.

    The parameters stand side by side, flattened, in one tensor. A finite first set is searched
    through all its members, each with every start of the second; two sets with random starts
    draw both anew each time. Gradients reach the first set through the second, so the pair is
    ascendable if the second is.

    Attributes:
        first, second: any two sets.
    """

    first: PerturbationSet
    second: PerturbationSet
    radius = 1.0

    @property
    def ascendable(self) -> bool:
        return self.second.ascendable

    @property
    def finite(self) -> bool:
        """One of the two has members that must all be judged."""
        return any(getattr(s, "finite", not s.ascendable) for s in (self.first, self.second))

    @property
    def box(self) -> tuple[float, float] | None:
        return getattr(self.first, "box", (0, 1))

    def null(self, x: Batch) -> Float[Tensor, "batch numbers"]:
        return torch.cat([self.first.null(x).flatten(1), self.second.null(x).flatten(1)], 1)

    def starts(
        self, x: Batch, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Float[Tensor, "batch numbers"]]:
        each = min(restarts, 1) if self.first.ascendable else restarts
        for z in self.first.starts(x, restarts, generator):
            for further in self.second.starts(self.first.apply(x, z), each, generator):
                yield torch.cat([z.flatten(1), further.flatten(1)], 1)

    def split(self, x: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """The two sets' own parameters."""
        a, b = self.first.null(x), self.second.null(x)
        width = a[0].numel()
        return z[:, :width].reshape(a.shape), z[:, width:].reshape(b.shape)

    def apply(self, x: Batch, z: Float[Tensor, "batch numbers"]) -> Batch:
        a, b = self.split(x, z)
        return self.second.apply(self.first.apply(x, a), b)

    def ascend(self, x: Batch, z: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """Each part steps by ``step_size`` times its own radius."""
        a, b = self.split(x, z)
        grad_a, grad_b = (part.clone() for part in self.split(x, grad))
        if self.first.ascendable:
            a = self.first.ascend(x, a, grad_a, step_size * self.first.radius)
        moved = self.first.apply(x, a)
        b = self.second.ascend(moved, b, grad_b, step_size * self.second.radius)
        return torch.cat([a.flatten(1), b.flatten(1)], 1)

    def contains(self, x: Batch, z: Tensor) -> Bool[Tensor, " batch"]:
        a, b = self.split(x, z)
        return self.first.contains(x, a) & self.second.contains(self.first.apply(x, a), b)
