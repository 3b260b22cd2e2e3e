r"""The quality of a learned set, the radius it should have, and its theorem, checked on samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool
from scipy.special import gammaincinv
from torch import Tensor

from robustood import rng
from robustood.attacks import maximise
from robustood.generative._learning import Distance, distances
from robustood.generative._networks import (
    ConditionalVAE,
    Diagonal,
    Images,
    Latents,
    Values,
    divergence,
)
from robustood.inputs import (
    check_choice,
    check_count,
    check_images,
    check_instance,
    check_number,
    check_seed,
)
from robustood.models import frozen
from robustood.perturbations import Latent


@dataclass(frozen=True)
class Radii:
    r"""Whitened lengths $\|u\|_2$ of encoded pairs, in standard deviations of the prior.

    Attributes:
        lower, median, upper: the quartiles.
        maximum: the largest; it depends on a single pair and grows with the number of pairs.
        pairs: number of pairs.
    """

    lower: float
    median: float
    upper: float
    maximum: float
    pairs: int


def radii(model: ConditionalVAE, x: Images, target: Images, batch_size: int = 512) -> Radii:
    r"""How large the latent ball must be: $\|(\mu_q(x, \tilde x) - \mu_p(x)) / \sigma_p(x)\|_2$ over pairs.

    Use validation pairs. A set is judged at the maximum, a classifier also at the quartiles (Wong and Kolter
    2021, section 5).

    Args:
        model: trained; used frozen and in eval mode.
        x, target: pairs of images.
        batch_size: pairs encoded at a time; the result does not depend on it.
    """
    _check_pairs(model, x, target)
    batch_size = check_count(batch_size, "batch_size", low=1)
    with frozen(model), torch.no_grad():
        parts = zip(x.split(batch_size), target.split(batch_size), strict=True)
        length = torch.cat([model.encode(*part).norm(dim=1) for part in parts]).double().cpu()
    quartiles = np.quantile(length.numpy(), (0.25, 0.5, 0.75, 1))
    return Radii(*map(float, quartiles), len(x))


def _check_pairs(model: ConditionalVAE, x: Images, target: Images) -> None:
    """Refuse anything but an autoencoder and pairs of images for it."""
    check_instance(model, "model", ConditionalVAE, "a ConditionalVAE, such as plain_cvae(shape)")
    check_images(x)
    check_images(target, "target")
    if x.shape[:1] != target.shape[:1]:
        raise ValueError(f"x and target must have the same length, got {len(x)} and {len(target)}")
    dtype = next(model.parameters(), x).dtype
    for name, images in (("x", x), ("target", target)):
        if images.dtype != dtype:
            raise ValueError(f"{name} is {images.dtype}, the model {dtype}; use {name}.to({dtype})")


@dataclass(frozen=True, kw_only=True)
class Entered(Latent):
    """A latent ball that is searched from given points, projected to the ball first.

    Attributes:
        start: the points (batch, latent).
    """

    start: Tensor

    def initial_points(
        self, x: Images, restarts: int, generator: torch.Generator | None = None
    ) -> Iterator[Latents]:
        yield self.project(x, self.start.clone())


@dataclass(frozen=True)
class SetMetrics:
    """Six measures of a learned set, each with one value per pair (Wong and Kolter 2021, section 5).

    Attributes:
        encoder_error_per_pixel: distance from the target to the image at its code, projected to the ball.
        pgd_error_per_pixel: the least distance that descent from that code finds: the *approximation error*.
        expected_error_per_pixel: mean distance of images drawn from the truncated prior.
        over_error_per_pixel: the largest distance that ascent finds: how far the set reaches.
        reconstruction_per_pixel: distance from the target to the image at a draw from the recognition.
        kl_nats_per_sample: divergence of the recognition from the prior.
    """

    encoder_error_per_pixel: Values
    pgd_error_per_pixel: Values
    expected_error_per_pixel: Values
    over_error_per_pixel: Values
    reconstruction_per_pixel: Values
    kl_nats_per_sample: Values

    def means(self) -> dict[str, float]:
        """The mean of each measure over the pairs."""
        return {name: float(values.double().mean()) for name, values in self.values().items()}

    def values(self) -> dict[str, Tensor]:
        """The measures by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def ordered(self) -> bool:
        """Whether PGD <= encoder error for every pair, and PGD <= expected <= over error on average, as must hold."""
        each = bool((self.pgd_error_per_pixel <= self.encoder_error_per_pixel).all())
        _, least, expected, most, *_ = self.means().values()
        return each and least <= expected <= most + 1e-12


def set_metrics(
    model: ConditionalVAE,
    x: Images,
    target: Images,
    radius: float,
    *,
    distance: Distance = "squared error",
    steps: int = 50,
    samples: int = 5,
    batch_size: int = 512,
    seed: int = 0,
) -> SetMetrics:
    """Measure a learned set on pairs, with the common attack loop.

    Args:
        model: trained; used frozen and in eval mode.
        x, target: test pairs.
        radius: of the latent ball (:func:`radii`).
        distance: per image, averaged over its pixels.
        steps: number of steps of radius / 20, of the descent and of the ascent; the best iterate is kept.
        samples: draws from the prior for the expected error.
        batch_size: pairs measured at a time; all random numbers are drawn beforehand, so the result does
            not depend on it.
        seed: of the draws.

    Returns:
        One value per pair and measure, on the CPU.

    Raises:
        ValueError: for images that are not pairs, or bad settings.
    """
    _check_pairs(model, x, target)
    check_number(radius, "radius", 0)
    check_choice(distance, "distance", ("squared error", "cross-entropy"))
    check_count(steps, "steps")
    check_count(samples, "samples", low=1)
    batch_size = check_count(batch_size, "batch_size", low=1)
    seed = check_seed(seed)
    within, source = Latent(model, radius), rng.generator(x.device, seed)
    drawn = [within.truncated(x, source) for _ in range(samples)]
    random = [
        within.draw(x, source),
        torch.randn(drawn[0].shape, generator=source, device=x.device),
    ]
    tensors = (x, target, *random, *drawn)
    with frozen(model):
        parts = [
            _measure(within, distance, steps, *part)
            for part in zip(*[tensor.split(batch_size) for tensor in tensors], strict=True)
        ]
    return SetMetrics(*[torch.cat(each).cpu() for each in zip(*parts, strict=True)])


def _measure(
    within: Latent,
    distance: Distance,
    steps: int,
    x: Images,
    target: Images,
    start: Latents,
    noise: Latents,
    *drawn: Latents,
) -> list[Values]:
    """The six measures of a batch, in the order of :class:`SetMetrics`."""
    model: ConditionalVAE = within.generator  # ty: ignore[invalid-assignment]
    off = partial(_away, target=target, distance=distance)
    search = partial(maximise, steps=steps, step_size=within.radius / 20)
    entered = partial(Entered, model, within.radius)
    with torch.no_grad():
        p, q = model.prior(x), model.recognition(x, target)
        code = within.project(x, p.whiten(q.mean))
        down = search(lambda v: -off(v), x, entered(start=code))
        up = search(off, x, entered(start=start))
        expected = torch.stack([off(within.apply(x, u)) for u in drawn]).mean(0)
        made = (within.apply(x, code), down, up, model.decode(x, q.at(noise)))
        encoder, pgd, over, reconstruction = map(off, made)
        return [encoder, pgd, expected, over, reconstruction, divergence(q, p).sum(1)]


def _away(made: Images, target: Images, distance: Distance) -> Values:
    """Distance from the target, averaged over pixels."""
    return distances(made, target, distance) / target[0].numel()


# --- the theorem


@dataclass(frozen=True)
class Guarantee:
    r"""What a well-trained autoencoder guarantees per pair, and what was observed (Wong and Kolter 2021, section 4).

    Let $\delta_0 = \mathbb E_q \|g - \tilde x\|^2$, $r$ the radius that contains the mass $1 - \alpha$ of a standard
    normal in k dimensions, $\rho = \sigma_q / \sigma_p$, $m = (\mu_q - \mu_p) / \sigma_p$ and $K_i$ the divergence of
    coordinate i. Then:

    1. some $\|(z - \mu_q) / \sigma_q\| \le r$ has $\|g - \tilde x\|^2 \le \delta_0 / (1 - \alpha)$ (Markov);
    2. all those z have $\|(z - \mu_p) / \sigma_p\| \le B r + \|m\|$ with $B = \max_i \rho_i$;
    3. $m_i^2 \le 2 K_i$ and $\rho_i^2 \le -W_{-1}(-e^{-(2 K_i + 1)})$, as both parts of a divergence are non-negative;
    4. so a ball of radius $\varepsilon = B r + \sqrt{2 \sum_i K_i}$ contains an image that close, with B bounded by the
       $K_i$ alone (**necessary subset**);
    5. $\mathbb E_{p_r} \|g - \tilde x\|^2 \le \delta_0 \sup_{\|u\| \le r} (p / q) / p(\|u\| \le r)$ for the prior
       truncated to the ball of radius r (**sufficient likelihood**).

    This is a statement of soundness. The bounds are loose; choose the radius of a set by measurement (:func:`radii`).

    Attributes:
        bound: $\varepsilon$ of item 4 (batch,), from the $K_i$ alone.
        reach: largest $\|(z - \mu_p) / \sigma_p\|$ among the draws in the ball of item 1.
        allowed: $\delta_0 / (1 - \alpha)$, squared error summed over pixels.
        nearest: smallest squared error among those draws.
        log_likelihood_bound: natural logarithm of the right side of item 5, which can be very large.
        expected: its left side, estimated from draws.
        holds: for each item, the pairs for which it holds.
    """

    bound: Values
    reach: Values
    allowed: Values
    nearest: Values
    log_likelihood_bound: Values
    expected: Values
    holds: dict[str, Bool[Tensor, " batch"]]

    def violations(self) -> dict[str, int]:
        """The number of pairs that violate each item; 0 by the theorem."""
        return {name: int((~kept).sum()) for name, kept in self.holds.items()}


def guarantee(
    model: ConditionalVAE,
    x: Images,
    target: Images,
    *,
    alpha: float = 0.5,
    draws: int = 200,
    seed: int = 0,
) -> Guarantee:
    r"""Check the theorem on pairs, with draws from the recognition and from the truncated prior.

    Args:
        model: any autoencoder, trained or not; used frozen and in eval mode.
        x, target: pairs of images.
        alpha: mass of the recognition outside the ball.
        draws: from each law, per pair. Expectations are means over them, and Markov's inequality holds for
            the draws themselves.
        seed: of the draws.

    Raises:
        ValueError: for images that are not pairs, or bad settings.
    """
    _check_pairs(model, x, target)
    check_number(alpha, "alpha", 0.001, 0.999)
    check_count(draws, "draws", low=1)
    seed = check_seed(seed)
    source = rng.generator(x.device, seed)
    k = model.latent  # the squared length of a normal code is chi-square: 2 Gamma(k / 2)
    r = math.sqrt(2 * gammaincinv(k / 2, 1 - alpha))
    within, normal = Latent(model, r), Latent(model, 1e6)
    with frozen(model), torch.no_grad():
        q, p = model.recognition(x, target), model.prior(x)
        ratio, shift = q.scale / p.scale, p.whiten(q.mean)
        errors, inside, lengths, expected = [], [], [], []
        for _ in range(draws):
            noise = normal.truncated(x, source)
            z = q.at(noise)
            errors.append(distances(model.decode(x, z), target))
            inside.append(noise.norm(dim=1) <= r)
            lengths.append(p.whiten(z).norm(dim=1))
            expected.append(distances(model.decode(x, p.at(within.truncated(x, source))), target))
        error, ok, length = (torch.stack(each) for each in (errors, inside, lengths))
        kl = divergence(q, p).clamp_min(0)
    delta, share = error.mean(0), ok.double().mean(0).clamp_min(1 / draws)
    nearest = error.masked_fill(~ok, math.inf).amin(0)
    reach = length.masked_fill(~ok, 0).amax(0)
    widest = largest_ratio(kl)
    bound = widest.amax(1).sqrt() * r + (2 * kl.sum(1)).sqrt()
    beyond = log_ratio_bound(q, p, r) - math.log(1 - alpha) + delta.log()
    average = torch.stack(expected).mean(0)
    tight = 1 + 1e-4  # tolerance for float32
    holds = {
        "1 near": ~ok.any(0) | (nearest <= tight * delta / share.clamp_max(1 - alpha).to(delta)),
        "2 reach": reach <= tight * (ratio.amax(1) * r + shift.norm(dim=1)),
        "3 shift": (shift.square() <= tight * 2 * kl + 1e-5).all(1),
        "3 ratio": (ratio.square() <= tight * widest + 1e-5).all(1),
        "4 radius": reach <= tight * bound,
        "5 likelihood": average.log() <= beyond + 1e-4,
    }
    return Guarantee(bound, reach, delta / (1 - alpha), nearest, beyond, average, holds)


def largest_ratio(kl: Latents) -> Latents:
    r"""The largest $w = \rho^2$ with $\frac12(w - 1 - \log w) \le K$: $-W_{-1}(-e^{-(2K + 1)})$.

    By Newton's method from above, which does not overshoot on a convex function; $1 + t + t^2 / 2 \le e^t$ with
    $t = 2 \sqrt K$ shows that the initial point is above.
    """
    t = 2 * kl.double().clamp_min(0).sqrt()
    w = 1 + t + t.square() / 2
    for _ in range(40):
        slope = (1 - 1 / w).clamp_min(1e-12)
        w = torch.maximum(w - (w - w.log() - 1 - 2 * kl.double()) / slope, torch.ones_like(w))
    return w.to(kl)


def log_ratio_bound(q: Diagonal, p: Diagonal, radius: float, grid: int = 400) -> Values:
    r"""An upper bound on $\sup_{\|u\| \le \varepsilon} \log p / q$, tight up to the grid of multipliers.

    In whitened coordinates $\log p / q = \sum_i a_i u_i^2 - b_i u_i + c_i$ with $a = \frac12(\rho^{-2} - 1)$, $b =
    m / \rho^2$ and $c = \frac12 m^2 / \rho^2 + \log \rho$. For every $\lambda > \max(0, a_i)$ the quadratic is at
    most $\lambda \varepsilon^2 + \sum_i b_i^2 / (4 (\lambda - a_i)) + c_i$; the smallest of these bounds is its maximum
    over the ball.
    """
    log_rho = 0.5 * (q.log_variance - p.log_variance).double()
    m = p.whiten(q.mean).double()
    inverse = (-2 * log_rho).exp()
    a, b, c = 0.5 * (inverse - 1), m * inverse, 0.5 * m.square() * inverse + log_rho
    floor = a.amax(1).clamp_min(0)
    best = torch.full_like(floor, math.inf)
    for more in torch.logspace(-6, 4, grid, dtype=torch.float64).tolist():
        multiplier = floor + more
        dual = multiplier * radius**2 + (b.square() / (4 * (multiplier[:, None] - a)) + c).sum(1)
        best = torch.minimum(best, dual)
    return best
