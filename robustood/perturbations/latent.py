"""A learned set: a ball of latent variables, seen through a generator."""

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
from robustood.perturbations.balls import L2
from robustood.perturbations.base import Inputs, PerturbationSet, check_box, norms

Latents = Float[Tensor, "batch latent"]


@runtime_checkable
class ImageGenerator(Protocol):
    """What makes an image of a condition and a latent variable.

    Attributes:
        latent: the number k of latent variables of one sample.
    """

    @property
    def latent(self) -> int: ...

    def generate(self, x: Tensor, u: Tensor) -> Tensor:
        """The image at whitened latent variables u (batch, k), with x as the condition."""
        ...


def check_maker(generator: object) -> None:
    """Refuse what makes no images of latent variables."""
    such_as = "a network that must have generate(x, u) and latent, such as a ConditionalVAE"
    check_instance(generator, "generator", ImageGenerator, such_as)


@dataclass(frozen=True)
class Latent(PerturbationSet):
    r"""$\{g(x, u) : \|u\|_2 \le \varepsilon\}$ with a learned generator $g$ (Wong and Kolter 2021, section 2).

    For a conditional variational autoencoder $g(x, u)$ decodes $z = \mu(x) + \sigma(x) \odot u$, so
    $\|u\|_2$ is the Mahalanobis distance of z from the prior. The generator is used as it is: frozen, in
    eval mode, and the gradient reaches u alone. The centre $u = 0$ is the identity parameter; it gives
    the generator's best copy of x, not x itself.

    Attributes:
        generator: such as :class:`robustood.generative.ConditionalVAE`.
        radius: $\varepsilon$, in standard deviations of the prior; take it from data
            (:func:`robustood.generative.radii`).
        box: range of valid inputs, None for vectors without one.

    Raises:
        ValueError: for a negative radius, or what is no generator.
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
        """The latent ball: rows of u, of length at most the radius."""
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
        """The nearest row in the ball; overwrites z."""
        return self.ball.shrink(z)

    def contains(self, x: Inputs, z: Latents) -> Bool[Tensor, " batch"]:
        return norms(z) <= self.radius * (1 + TOLERANCE) + TOLERANCE

    def draw(self, x: Inputs, generator: torch.Generator | None = None) -> Latents:
        """A uniform direction, a length uniform in [0, radius]."""
        return self.directed(x, self.radius * self.shares(x, generator), generator)

    def truncated(self, x: Inputs, generator: torch.Generator | None = None) -> Latents:
        r"""A standard normal truncated to the ball, the density of the probabilistic set.

        The direction is uniform and $\|u\|^2$ is chi-square below $\varepsilon^2$, by its inverse
        distribution function. Where that underflows, $\varepsilon^2 \ll k$ and nearly all mass lies at the
        surface: there $\|u\| = \varepsilon\, U^{1 / (k - \varepsilon^2)}$ to first order in the depth.
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
        """Numbers uniform in [0, 1], one a sample."""
        first = x.flatten(1)[:, 0]
        return rng.uniform(first, generator)

    def directed(
        self, x: Inputs, length: Float[Tensor, " batch"], generator: torch.Generator | None
    ) -> Latents:
        """Rows of these lengths in uniform directions."""
        way = rng.normal(self.identity(x), generator)
        return way * (length / norms(way).clamp_min(1e-12))[:, None]
