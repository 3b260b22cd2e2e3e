"""A learned set: the image of a latent ball under a generator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from scipy.special import gammainc, gammaincinv
from torch import Tensor

from robustood import rng
from robustood.inputs import TOLERANCE, check_instance, check_number
from robustood.models import frozen
from robustood.perturbations._balls import L2
from robustood.perturbations._base import Inputs, PerturbationSet, check_box, norms

Latents = Float[Tensor, "batch latent"]


@runtime_checkable
class ImageGenerator(Protocol):
    """What turns a condition and latent variables into an image.

    Attributes:
        latent: number k of latent variables per sample.
    """

    @property
    def latent(self) -> int: ...

    def generate(self, x: Tensor, u: Tensor) -> Tensor:
        """The image at whitened latent variables u (batch, k), with x as the condition."""
        ...


def check_maker(generator: object) -> None:
    """Refuse anything but an image generator."""
    such_as = "a network with generate(x, u) and latent, such as a ConditionalVAE"
    check_instance(generator, "generator", ImageGenerator, such_as)


@dataclass(frozen=True)
class Latent(PerturbationSet):
    r"""$\{g(x, u) : \|u\|_2 \le \varepsilon\}$ with a learned generator $g$ (Wong and Kolter 2021, section 2).

    For a conditional variational autoencoder $g(x, u)$ decodes $z = \mu(x) + \sigma(x) \odot u$, so
    $\|u\|_2$ is the Mahalanobis distance of z from the mean of the prior. The generator is used frozen and in
    eval mode, and the gradient is taken in u only. The centre $u = 0$ is the identity parameter; it yields
    the generator's best copy of x, not x itself.

    Attributes:
        generator: such as :class:`robustood.generative.ConditionalVAE`.
        radius: $\varepsilon$, in standard deviations of the prior; estimate it from data
            (:func:`robustood.generative.radii`).
        box: range of valid inputs, None for vectors without one.

    Raises:
        ValueError: for a negative radius, or anything but a generator.
    """

    generator: ImageGenerator = field(repr=False)
    radius: float
    box: tuple[float, float] | None = (0, 1)

    def __post_init__(self) -> None:
        check_number(self.radius, "radius", 0, 1e6, "give it in standard deviations of the prior")
        check_maker(self.generator)
        check_box(self.box)

    @property
    def ball(self) -> L2:
        """The latent ball: rows of u with norm at most the radius."""
        return L2(self.radius, box=None)

    def scaled(self, factor: float) -> Latent:
        """The same set with ``factor`` times the radius."""
        check_number(factor, "factor", 0, 1e12)
        return replace(self, radius=factor * self.radius)

    def identity(self, x: Inputs) -> Latents:
        return x.new_zeros(len(x), self.generator.latent)

    def apply(self, x: Inputs, z: Latents) -> Inputs:
        with frozen(self.generator):
            return self.generator.generate(x.clone(), z.clone())

    def ascend(self, x: Inputs, z: Latents, grad: Latents, step_size: float | Tensor) -> Latents:
        """A step along the unit gradient of each row, then back into the ball, row by row."""
        return self.ball.ascend(z, z, grad, step_size)

    def project(self, x: Inputs, z: Latents) -> Latents:
        """The nearest point of the ball for each row; works in place."""
        return self.ball.shrink(z)

    def contains(self, x: Inputs, z: Latents) -> Bool[Tensor, " batch"]:
        return norms(z) <= self.radius * (1 + TOLERANCE) + TOLERANCE

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Latents:
        """A uniform direction and a length uniform in [0, radius]."""
        return self.directed(x, self.radius * self.shares(x, generator), generator)

    def truncated(self, x: Inputs, generator: torch.Generator | None = None) -> Latents:
        r"""A draw from the standard normal truncated to the ball, the law of the probabilistic set.

        The direction is uniform, and $\|u\|^2$ is chi-square truncated at $\varepsilon^2$, by its inverse
        distribution function. Where that underflows, $\varepsilon^2 \ll k$ and nearly all mass lies near the
        surface: then $\|u\| = \varepsilon\, U^{1 / (k - \varepsilon^2)}$ to first order in the depth.
        """
        k, share = self.generator.latent, self.shares(x, generator)
        below = gammainc(k / 2, self.radius**2 / 2)
        if below > 1e-290:
            halves = gammaincinv(k / 2, share.double().cpu().numpy() * below)
            length = torch.as_tensor(2 * halves).sqrt().to(share)
        else:
            length = self.radius * share ** (1 / (k - self.radius**2))
        return self.directed(x, length.clamp_max(self.radius), generator)

    def shares(self, x: Inputs, generator: torch.Generator | None) -> Float[Tensor, " batch"]:
        """One uniform number in [0, 1) per sample."""
        return rng.uniform(x.flatten(1)[:, 0], generator)

    def directed(
        self, x: Inputs, length: Float[Tensor, " batch"], generator: torch.Generator | None
    ) -> Latents:
        """Vectors of given lengths in uniform directions."""
        way = rng.normal(self.identity(x), generator)
        return way * (length / norms(way).clamp_min(1e-12))[:, None]
