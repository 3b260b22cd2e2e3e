"""How the autoencoder is trained, and how it augments the training of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from robustood import rng
from robustood.data import Batch, Data
from robustood.data._pairs import redrawn
from robustood.generative._networks import Images, Values, divergence
from robustood.inputs import check_choice, check_flag, check_number, check_several
from robustood.models import frozen
from robustood.perturbations import ImageGenerator
from robustood.perturbations._latent import check_maker

Distance = Literal["squared error", "cross-entropy"]


def distances(made: Images, target: Images, distance: Distance = "squared error") -> Values:
    """Squared error, or cross-entropy in nats, per image: a sum over its pixels."""
    if distance == "squared error":
        return (made - target).square().flatten(1).sum(1)
    return binary_cross_entropy(made, target, reduction="none").flatten(1).sum(1)


@dataclass(frozen=True)
class Variational:
    r"""$\frac1B \sum_i \ell(g(x_i, z_i), \tilde x_i) + \beta(t)\, \mathrm{KL}(q_i \,\|\, p_i)$ with $z_i \sim q_i$.

    An objective for :func:`robustood.training.fit`: ``batch.x`` is the condition, ``batch.y`` the perturbed image.
    $\ell$ is summed over the pixels of an image (Wong and Kolter 2021, section 3.2; their code also sums over
    the batch, which only rescales the learning rate). For squared error $\beta$ plays the role of the
    decoder's variance, $s^2 = \beta / 2$.

    Attributes:
        beta: $\beta$ at the end.
        schedule: pairs (share of the run, share of beta), interpolated linearly.
        distance: $\ell$.
        fresh: draw new partners for the inputs at each epoch, if the data can (:func:`robustood.data.redrawn`).
            As an epoch uses each input once, no pair is used twice.

    Raises:
        ValueError: for a negative beta or an unknown distance.
    """

    beta: float = 0.02
    schedule: Sequence[tuple[float, float]] = ((0.05, 0.0), (0.4, 1.0))
    distance: Distance = "squared error"
    fresh: bool = True

    def __post_init__(self) -> None:
        check_number(self.beta, "beta", 0)
        check_choice(self.distance, "distance", ("squared error", "cross-entropy"))
        check_flag(self.fresh, "fresh")
        check_several(self.schedule, "schedule", "pairs (share of the run, share of beta)")
        for pair in self.schedule:
            check_several(pair, "each of schedule", "a share of the run and a share of beta", 2)
        for place, share in self.schedule:
            check_number(place, "each of schedule", 0, 1, "give shares of the run")
            check_number(share, "each of schedule", 0, 1, "give shares of beta")

    def beta_at(self, progress: float) -> float:
        r"""$\beta(t)$ at a share ``progress`` of the run."""
        places, shares = zip(*self.schedule, strict=True)
        return self.beta * float(np.interp(progress, places, shares))

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        made, q, p = model(batch.x, batch.y, batch.generator)
        apart = distances(made, batch.y, self.distance)
        return (apart + self.beta_at(batch.progress) * divergence(q, p).sum(1)).mean()

    def prepare(self, model: nn.Module, data: Data, epoch: int, generator: torch.Generator) -> Data:
        """The data of one epoch, with new partners."""
        return redrawn(data, generator) if self.fresh else data


@dataclass(frozen=True)
class Resampled:
    r"""Augmentation by $g(x, u)$, with $u \sim \mathcal N(0, I)$ not truncated (Wong and Kolter 2021, section 5).

    Attributes:
        generator: such as a trained :class:`ConditionalVAE`, used frozen and in eval mode.
    """

    generator: ImageGenerator

    def __post_init__(self) -> None:
        check_maker(self.generator)

    def __call__(self, x: Images, generator: torch.Generator | None = None) -> Images:
        like = x.new_empty(len(x), self.generator.latent)
        u = rng.normal(like, generator)
        with torch.no_grad(), frozen(self.generator):
            return self.generator.generate(x, u)
