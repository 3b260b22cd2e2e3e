"""The three networks of a conditional variational autoencoder, in three families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from robustood import rng
from robustood.inputs import check_counts, check_flag, check_shape
from robustood.models import seeded
from robustood.models._residual import activation, convolution

Images = Float[Tensor, "batch channel height width"]
Latents = Float[Tensor, "batch latent"]
Values = Float[Tensor, " batch"]
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)

LOG_VARIANCE = math.log(1e-3), math.log(10)
EDGE = 0.005  # pixels are clamped to [EDGE, 1 - EDGE] before their log-odds are taken


class Diagonal(NamedTuple):
    r"""A normal law with independent coordinates per sample: $\mathcal N(\mu, \mathrm{diag}\,\sigma^2)$.

    Attributes:
        mean: $\mu$ (batch, latent).
        log_variance: $\log \sigma^2$ (batch, latent).
    """

    mean: Tensor
    log_variance: Tensor

    @property
    def scale(self) -> Latents:
        r"""$\sigma = e^{\frac12 \log \sigma^2}$."""
        return (0.5 * self.log_variance).exp()

    def at(self, u: Latents) -> Latents:
        r"""$z = \mu + \sigma \odot u$."""
        return self.mean + self.scale * u

    def whiten(self, z: Latents) -> Latents:
        r"""$u = (z - \mu) / \sigma$."""
        return (z - self.mean) / self.scale


def divergence(q: Diagonal, p: Diagonal) -> Latents:
    r"""$\mathrm{KL}(q_i \,\|\, p_i) = \frac12 (\rho_i^2 - 1 - \log \rho_i^2 + m_i^2)$ per coordinate, in nats.

    $\rho = \sigma_q / \sigma_p$ and $m = (\mu_q - \mu_p) / \sigma_p$.
    """
    log_ratio = q.log_variance - p.log_variance
    return 0.5 * (log_ratio.expm1() - log_ratio + p.whiten(q.mean).square())


class Encoder(nn.Module):
    """From images, concatenated along channels, to a normal law: the prior of x, or the recognition of (x, target).

    A tanh keeps the variance between 0.001 and 10.

    Args:
        body: maps images to features (batch, width).
        width, latent: numbers of features and of latent variables.
    """

    def __init__(self, body: nn.Module, width: int, latent: int):
        super().__init__()
        self.body = body
        self.mean, self.spread = nn.Linear(width, latent), nn.Linear(width, latent)

    def forward(self, *images: Images) -> Diagonal:
        features = self.body(torch.cat(images, 1))
        low, high = LOG_VARIANCE
        share = 0.5 * (1 + self.spread(features).tanh())
        return Diagonal(self.mean(features), low + (high - low) * share)


class ConditionalVAE(nn.Module):
    r"""Perturbed images of x, learned from pairs (Wong and Kolter 2021, section 3).

    The prior $p(z \mid x)$ locates the perturbations of this x, the recognition $q(z \mid x, \tilde x)$
    locates this $\tilde x$, and the decoder maps z to an image with x as the condition. Latent variables
    are given in whitened coordinates, $z = \mu_p(x) + \sigma_p(x) \odot u$, so that
    :class:`robustood.perturbations.Latent` can be a ball around 0.

    Args:
        prior: x to :class:`Diagonal`.
        recognition: x and the perturbed image to :class:`Diagonal`.
        decode: x and z to an image in [0, 1].
        latent: number k of latent variables per sample.
    """

    def __init__(self, prior: nn.Module, recognition: nn.Module, decode: nn.Module, latent: int):
        super().__init__()
        self.prior, self.recognition, self.decode = prior, recognition, decode
        self.latent = latent

    def generate(self, x: Images, u: Latents) -> Images:
        r"""$g(\mu_p(x) + \sigma_p(x) \odot u,\ x)$."""
        return self.decode(x, self.prior(x).at(u))

    def encode(self, x: Images, target: Images) -> Latents:
        r"""The whitened code of a pair, $u = (\mu_q(x, \tilde x) - \mu_p(x)) / \sigma_p(x)$."""
        return self.prior(x).whiten(self.recognition(x, target).mean)

    def forward(
        self, x: Images, target: Images, generator: torch.Generator | None = None
    ) -> tuple[Images, Diagonal, Diagonal]:
        """A reconstruction of the target from one draw of z, with the laws q and p."""
        q = self.recognition(x, target)
        noise = rng.normal(q.mean.detach(), generator)
        return self.decode(x, q.at(noise)), q, self.prior(x)


# --- decoders


def _log_odds(x: Images) -> Images:
    """Log-odds of pixels, kept finite."""
    return x.clamp(EDGE, 1 - EDGE).logit()


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Fully connected layers with ReLU after each."""
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Flatten(), *layers)


class Plain(nn.Module):
    """(x, z) to all pixels at once, by fully connected layers.

    Args:
        shape: (channel, height, width).
        latent, hidden: numbers of latent variables and of units in each of two hidden layers.
        residual: start from x and learn what to add to its log-odds.
    """

    def __init__(self, shape: Sequence[int], latent: int, hidden: int, residual: bool):
        super().__init__()
        pixels = math.prod(shape)
        self.body = _perceptron([pixels + latent, hidden, hidden])
        last = nn.Linear(hidden, pixels)
        self.last, self.residual = _nothing(last) if residual else last, residual

    def forward(self, x: Images, z: Latents) -> Images:
        drawn = self.last(self.body(torch.cat([x.flatten(1), z], 1))).view_as(x)
        return (drawn + _log_odds(x) if self.residual else drawn).sigmoid()


class Basis(nn.Module):
    r"""Log-odds of x plus $\sum_j c_j(z)\, B_j(x)$: pictures computed from x, with weights computed from z.

    The images of a matt object under all distant lights lie near a linear space of nine dimensions (Basri and
    Jacobs 2003), so few pictures suffice for changes of light. The pictures are grey; one more output per
    channel shifts the channels.

    Args:
        shape: (channel, height, width).
        latent, hidden: numbers of latent variables and of units in each hidden layer.
        pictures: number of pictures.
    """

    def __init__(self, shape: Sequence[int], latent: int, hidden: int, pictures: int):
        super().__init__()
        channels, height, width = shape
        self.pictures = nn.Sequential(
            _perceptron([channels * height * width, hidden, hidden]),
            nn.Linear(hidden, pictures * height * width),
            nn.Unflatten(1, (int(pictures), height, width)),
        )
        self.mix = nn.Sequential(nn.Linear(latent, 64), nn.ReLU())
        self.shares, self.shift = nn.Linear(64, pictures), _nothing(nn.Linear(64, channels))

    def forward(self, x: Images, z: Latents) -> Images:
        mixed = self.mix(z)
        added = torch.einsum("bj,bjhw->bhw", self.shares(mixed), self.pictures(x))[:, None]
        return (_log_odds(x) + added + self.shift(mixed)[:, :, None, None]).sigmoid()


class Warp(nn.Module):
    """x resampled under affine maps computed from z, then a small correction (spatial transformers).

    The maps depend on z only and start as the identity; outside the image is 0. The log-odds of the
    first warped image are corrected by two convolutions over all warped images.

    Args:
        channels: of x.
        latent, hidden: numbers of latent variables and of hidden units between z and the maps.
        warps: number of maps; the paper has five, each with its own last layer.
        filters: number of filters of the correction.
    """

    def __init__(self, channels: int, latent: int, hidden: int, warps: int, filters: int):
        super().__init__()
        self.channels, self.warps = channels, warps
        last = _nothing(nn.Linear(hidden, 6 * warps))
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(warps))
        self.maps = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), last)
        self.correction = nn.Sequential(
            nn.Conv2d(channels * warps, filters, 3, padding=1),
            nn.ReLU(),
            _nothing(nn.Conv2d(filters, channels, 3, padding=1)),
        )

    def forward(self, x: Images, z: Latents) -> Images:
        affine = self.maps(z).view(-1, 2, 3)
        copies = x.repeat_interleave(self.warps, 0)
        where = affine_grid(affine, list(copies.shape), align_corners=False)
        warped = grid_sample(copies, where, align_corners=False)
        warped = warped.view(len(x), -1, *x.shape[2:])
        return (_log_odds(warped[:, : self.channels]) + self.correction(warped)).sigmoid()


class Bottleneck(nn.Module):
    """x plus three pre-activated convolutions through a quarter of the channels (He et al. 2016)."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        layers = [(width, inner, 1), (inner, inner, 3), (inner, width, 1)]
        self.residual = nn.Sequential(
            *(m for a, b, size in layers for m in (*activation(a), convolution(a, b, size)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


def _trunk(
    channels: int, width: int, blocks: int, outputs: int, still: bool = False
) -> nn.Sequential:
    """A residual network of constant resolution; if ``still``, it starts as the zero function."""
    last = nn.Conv2d(width, outputs, 3, padding=1)
    return nn.Sequential(
        convolution(channels, width),
        *[Bottleneck(width) for _ in range(blocks)],
        *activation(width),
        _nothing(last) if still else last,
    )


class Painted(nn.Module):
    """z as an additional channel of x, then a residual network of constant resolution.

    Args:
        shape: (channel, height, width).
        latent, width, blocks: numbers of latent variables, of filters and of bottlenecks.
        residual: start from x and learn what to add to its log-odds; the paper does not.
    """

    def __init__(self, shape: Sequence[int], latent: int, width: int, blocks: int, residual: bool):
        super().__init__()
        channels, height, sides = shape
        self.plane = nn.Sequential(
            nn.Linear(latent, height * sides), nn.Unflatten(1, (1, height, sides))
        )
        self.body = _trunk(channels + 1, width, blocks, channels, still=residual)
        self.residual = residual

    def forward(self, x: Images, z: Latents) -> Images:
        drawn = self.body(torch.cat([x, self.plane(z)], 1))
        return (drawn + _log_odds(x) if self.residual else drawn).sigmoid()


def _nothing(layer: _Layer) -> _Layer:
    """The layer, initialised as the zero function."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# --- whole models


def _perceptrons(shape: Sequence[int], latent: int, hidden: int) -> tuple[Encoder, Encoder]:
    """Fully connected prior and recognition networks with two hidden layers."""
    pixels = math.prod(shape)
    prior, recognition = (_perceptron([n * pixels, hidden, hidden]) for n in (1, 2))
    return Encoder(prior, hidden, latent), Encoder(recognition, hidden, latent)


def plain_cvae(
    shape: Sequence[int],
    latent: int = 8,
    hidden: int = 192,
    decoder: int = 384,
    residual: bool = False,
    seed: int = 0,
) -> ConditionalVAE:
    """Fully connected encoders and decoder.

    Args:
        shape: (channel, height, width) of the images.
        latent: number of latent variables.
        hidden, decoder: units in each of two hidden layers of the encoders and of the decoder.
        residual: see :class:`Plain`.
        seed: of the initial weights; the global random state is unchanged.
    """
    shape = check_shape(shape)
    check_counts(latent=latent, hidden=hidden, decoder=decoder)
    check_flag(residual, "residual")
    with seeded(seed):
        encoders = _perceptrons(shape, latent, hidden)
        return ConditionalVAE(*encoders, Plain(shape, latent, decoder, residual), latent)


def basis_cvae(
    shape: Sequence[int],
    latent: int = 8,
    hidden: int = 192,
    decoder: int = 256,
    pictures: int = 9,
    seed: int = 0,
) -> ConditionalVAE:
    """Fully connected encoders and a decoder that mixes pictures of x, for changes of light.

    Args:
        shape: (channel, height, width) of the images.
        latent: number of latent variables.
        hidden, decoder: units in each of two hidden layers of the encoders and of the decoder.
        pictures: see :class:`Basis`.
        seed: of the initial weights; the global random state is unchanged.
    """
    shape = check_shape(shape)
    check_counts(latent=latent, hidden=hidden, decoder=decoder, pictures=pictures)
    with seeded(seed):
        encoders = _perceptrons(shape, latent, hidden)
        return ConditionalVAE(*encoders, Basis(shape, latent, decoder, pictures), latent)


def warp_cvae(
    shape: Sequence[int],
    latent: int = 8,
    hidden: int = 192,
    maps: int = 64,
    warps: int = 1,
    filters: int = 8,
    seed: int = 0,
) -> ConditionalVAE:
    """Fully connected encoders and a spatial transformer, for perturbations that move the image.

    Args:
        shape: (channel, height, width) of the images.
        latent: number of latent variables.
        hidden: units in each of two hidden layers of the encoders.
        maps, warps, filters: of the decoder (:class:`Warp`).
        seed: of the initial weights; the global random state is unchanged.
    """
    shape = check_shape(shape)
    check_counts(latent=latent, hidden=hidden, maps=maps, warps=warps, filters=filters)
    with seeded(seed):
        encoders = _perceptrons(shape, latent, hidden)
        return ConditionalVAE(*encoders, Warp(shape[0], latent, maps, warps, filters), latent)


def residual_cvae(
    shape: Sequence[int] = (3, 32, 32),
    latent: int = 512,
    width: int = 64,
    blocks: int = 4,
    pool: int = 1,
    residual: bool = False,
    seed: int = 0,
) -> ConditionalVAE:
    """Convolutions at constant resolution, the paper's network for CIFAR-10-C (its "rectangle").

    Args:
        shape: (channel, height, width) of the images.
        latent: number of latent variables.
        width, blocks: numbers of filters, a multiple of 4, and of bottlenecks of each trunk.
        pool: side of the squares that are averaged before the heads of the encoders; the paper's 1 costs
            16 x height x width x latent weights per head.
        residual: see :class:`Painted`.
        seed: of the initial weights; the global random state is unchanged.

    Raises:
        ValueError: if width is not a multiple of 4, or pool does not divide height and width.
    """
    shape = check_shape(shape)
    check_counts(latent=latent, width=width, blocks=blocks, pool=pool)
    check_flag(residual, "residual")
    channels, height, sides = shape
    if width % 4 or height % pool or sides % pool:
        raise ValueError(
            f"width must be a multiple of 4, and pool must divide {height} and {sides}, got width = {width} "
            f"and pool = {pool}"
        )
    features = 16 * (height // pool) * (sides // pool)

    def encoder(images: int) -> Encoder:
        seen = nn.Sequential(
            _trunk(images * channels, width, blocks, 16),
            *activation(16),
            nn.AvgPool2d(pool),
            nn.Flatten(),
        )
        return Encoder(seen, features, latent)

    with seeded(seed):
        decode = Painted(shape, latent, width, blocks, residual)
        return ConditionalVAE(encoder(1), encoder(2), decode, latent)
