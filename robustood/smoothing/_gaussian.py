r"""Randomised smoothing of a vote or of a score, over any set with Euclidean parameters.

A perturbation set makes inputs from parameters, $\mathrm{apply}(x, z)$. The smoothed network at $z$ aggregates
the outputs for $\mathrm{apply}(x, z + \nu)$, $\nu \sim \mathcal N(0, \sigma^2 I)$. Whatever the network and
the set are, the probability $p$ of a class, or the mean $p$ of a score in [0, 1], satisfies

$$\Phi(\Phi^{-1}(p) - r / \sigma) \;\le\; p' \;\le\; \Phi(\Phi^{-1}(p) + r / \sigma)$$

if the parameters have moved by at most r in the Euclidean norm (Cohen et al. 2019, theorem 1 and its
proof; Salman et al. 2019). For :class:`~robustood.perturbations.L2` the parameters are the changes of pixels.
For a learned set they are a latent code: then the certificate is about x *as the condition*, not about an
image whose x is unknown, nor about images that the set cannot generate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import betainc, betaincinv, ndtri
from torch import Tensor, nn
from torch.nn.functional import one_hot

from robustood import inputs, rng
from robustood.inputs import check_count, check_labels, check_number, check_values, checked_inputs
from robustood.metrics import Estimate, auroc, confidence_interval, proportion
from robustood.models import declared_outputs, frozen, read, reading
from robustood.perturbations import Inputs, Linf, PerturbationSet, as_set

Model = Callable[[Tensor], Tensor]
Labels = Int[Tensor, " batch"]
Values = Float[Tensor, " batch"]
ABSTAIN = -1


@dataclass(frozen=True)
class Noise:
    r"""$x \mapsto \mathrm{apply}(x, z + \nu)$ with $\nu \sim \mathcal N(0, \sigma^2 I)$.

    The noise of smoothing; as the ``augment`` of :func:`robustood.training.fit` it trains a network for smoothing.
    Noisy images may leave [0, 1]: the noise belongs to the smoothed network, not to the adversary.

    Attributes:
        within: a set with Euclidean parameters, such as ``L2(eps)``.
        sigma: standard deviation, in the unit of the set's radius.

    Raises:
        ValueError: for a negative sigma, an ``Linf`` ball or a finite set.
    """

    within: PerturbationSet
    sigma: float

    def __post_init__(self) -> None:
        check_number(self.sigma, "sigma", 0, 1e6)
        object.__setattr__(self, "within", as_set(self.within))
        if isinstance(self.within, Linf) or self.within.finite:
            raise ValueError(
                f"within must have Euclidean parameters, such as L2(0.5), got {self.within!r}; "
                "Gaussian noise certifies no other norm"
            )

    def __call__(
        self, x: Inputs, generator: torch.Generator | None = None, z: Tensor | None = None
    ) -> Tensor:
        """One noisy copy of each input, around the parameters z (default: those of x itself)."""
        z = self.within.identity(x) if z is None else z
        nu = rng.normal(z, generator)
        return self.within.apply(x, z + self.sigma * nu)

    def total(
        self,
        f: Model,
        x: Inputs,
        n: int,
        z: Tensor | None,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Sum of f over n noisy copies of each input, ``batch_size`` copies at a time: (batch, ...)."""
        x = checked_inputs(x, self.within.box)
        n, batch_size = check_count(n, "n", low=1), check_count(batch_size, "batch_size", low=1)
        inputs.check_generator(generator)
        if z is not None:
            check_values(z, None, "at")
            identity = self.within.identity(x)
            if z.shape != identity.shape or z.dtype != identity.dtype:
                raise ValueError(
                    f"at must hold one parameter per input, {identity.dtype} of shape {tuple(identity.shape)}, got "
                    f"{z.dtype} of shape {tuple(z.shape)}"
                )
            z = z.detach()
        generator = generator or rng.generator(x.device, 0)
        z, sums = self.within.identity(x) if z is None else z, []
        for part, centre in zip(x.split(batch_size), z.split(batch_size), strict=True):
            most, sum_ = max(1, batch_size // len(part)), torch.zeros(())
            for done in range(0, n, most):
                copies = min(most, n - done)
                many = [v.repeat(copies, *[1] * (v.ndim - 1)) for v in (part, centre)]
                values = f(self(many[0], generator, many[1]))
                sum_ = sum_.to(values) + values.unflatten(0, (copies, len(part))).sum(0)
            sums.append(sum_)
        return torch.cat(sums)


# --- votes


@torch.no_grad()
def votes(
    model: Model,
    x: Inputs,
    within: PerturbationSet,
    *,
    sigma: float,
    n: int,
    at: Tensor | None = None,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch outputs"]:
    """How often each output is the largest among n noisy copies of each input.

    Args:
        model: inputs to outputs (batch, outputs).
        x: inputs (batch, ...), in the set's box.
        within: whose parameters the noise is added to.
        sigma: standard deviation of the noise.
        n: number of copies.
        at: parameters of the smoothed point (batch, ...); default: those of x itself.
        batch_size: copies per forward pass.
        generator: source of the noise; default: a new one with seed 0.
    """

    def ballots(v: Tensor) -> Tensor:
        outputs = logits(v)
        return one_hot(outputs.argmax(1), outputs.shape[1])

    inputs.check_model(model)
    with frozen(model), reading(model) as logits:
        return Noise(within, sigma).total(ballots, x, n, at, batch_size, generator)


@dataclass(frozen=True)
class CertifiedVote:
    """The prediction of the smoothed classifier, and the radius for which it is certified.

    Attributes:
        label: (batch,) the class, or ``ABSTAIN``.
        radius: (batch,) the vote is the same for all parameters closer than this; 0 if it abstains.
        p: (batch,) lower confidence bound on the probability of the class under noise.
    """

    label: Labels
    radius: Values
    p: Values


def certify(
    model: Model,
    x: Inputs,
    within: PerturbationSet,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    at: Tensor | None = None,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> CertifiedVote:
    r"""Class and radius $R = \sigma\,\Phi^{-1}(\underline{p_A})$ of each input (Cohen et al. 2019, section 3.2.2).

    ``n0`` draws select the class, ``n`` new ones estimate its probability, since the selecting draws would
    be biased in favour of the class. If the bound does not exceed one half, the classifier abstains.

    Args:
        alpha: probability, for each input, that its certificate is wrong.
        model, x, within, sigma, at, batch_size, generator: as in :func:`votes`. The radius of the set is
            not used.

    Raises:
        ValueError: for inputs outside the set's box, or bad settings, before any work.
    """
    _check_alpha(alpha)
    inputs.check_model(model)
    inputs.check_generator(generator)
    x = checked_inputs(x, Noise(within, sigma).within.box)
    check_count(n0, "n0", low=1)
    _check_draws(n, alpha)
    generator = generator or rng.generator(x.device, 0)
    how = {"sigma": sigma, "at": at, "batch_size": batch_size, "generator": generator}
    label = votes(model, x, within, n=n0, **how).argmax(1)
    hits = votes(model, x, within, n=n, **how).gather(1, label[:, None])[:, 0]
    p = lower_bound(hits, n, alpha)
    sure = p > 0.5
    radius = torch.where(sure, sigma * torch.special.ndtri(p.clamp_min(0.5)), 0)
    return CertifiedVote(label.masked_fill(~sure, ABSTAIN), radius, p)


def predict(
    model: Model,
    x: Inputs,
    within: PerturbationSet,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    at: Tensor | None = None,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> Labels:
    """The vote where it is significant, else ``ABSTAIN`` (Cohen et al. 2019, section 3.2.1).

    Significant: if the two leading classes were equally likely, such a lead would have a probability of at
    most alpha (two-sided binomial test). So the returned class differs from that of the smoothed classifier
    with a probability of at most alpha. Arguments as in :func:`certify`.
    """
    _check_alpha(alpha)
    counts = votes(
        model, x, within, sigma=sigma, n=n, at=at, batch_size=batch_size, generator=generator
    )
    lead = counts.topk(2, dim=1)
    first, second = lead.values.cpu().numpy().T
    p_value = 2 * betainc(first, second + 1, 0.5)  # twice the binomial tail from ``first`` on
    unsure = torch.from_numpy(p_value > alpha).to(counts.device)
    return lead.indices[:, 0].masked_fill(unsure, ABSTAIN)


def certified_accuracy(
    found: CertifiedVote, y: Labels, radii: Sequence[float], confidence: float = 0.95
) -> list[Estimate]:
    """Share of inputs whose certified class is right and whose radius exceeds r, for each r.

    A lower bound on the accuracy of the smoothed classifier under any attack of norm r. The intervals cover
    the sampling of the inputs.
    """
    inputs.check_instance(found, "found", CertifiedVote, "what certify(..) returns")
    _check_radii(radii)
    check_labels(y, found.label)
    right = found.label == y
    return [
        proportion(int((right & (found.radius > radius)).sum()), len(y), confidence)
        for radius in radii
    ]


def sigma_for(radius: float, n: int = 10_000, alpha: float = 0.001) -> float:
    r"""The smallest noise with which n draws can certify a radius: $r / \Phi^{-1}(\alpha^{1/n})$.

    $\alpha^{1/n}$ is the confidence bound if all n draws agree, the largest possible with n draws.

    >>> print(f"{sigma_for(2.69):.2f} {sigma_for(17.0, n=1000):.1f}")
    0.84 6.9
    """
    check_number(radius, "radius", 0, 1e6)
    _check_alpha(alpha)
    _check_draws(n, alpha)
    return radius / float(ndtri(alpha ** (1 / n)))


def lower_bound(hits: Int[Tensor, " batch"], n: int, alpha: float) -> Values:
    r"""One-sided Clopper-Pearson bound $\mathrm{BetaInv}(\alpha;\, k,\, n - k + 1)$, in float64.

    The probability under which k or more hits among n occur with probability alpha: the lower end of a
    two-sided interval at level $1 - 2 \alpha$ (Clopper and Pearson 1934).

    >>> print(f"{lower_bound(torch.tensor([10_000]), 10_000, 0.001).item():.8f}")
    0.99930946
    """
    n = check_count(n, "n", low=1)
    _check_alpha(alpha)
    whole = isinstance(hits, Tensor) and hits.ndim == 1 and hits.dtype in (torch.int64, torch.int32)
    if not whole or not len(hits) or hits.min() < 0 or hits.max() > n:
        raise ValueError(
            f"hits must be a tensor of whole numbers from 0 to n = {n}, got {hits!r:.80}"
        )
    k = hits.cpu().numpy()
    # Without hits the bound is 0; the formula needs a positive first parameter.
    ends = np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, alpha), 0.0)
    return torch.from_numpy(ends).to(hits.device)


# --- scores


@dataclass(frozen=True)
class CertifiedScore:
    r"""Bounds on the smoothed score $\bar s = \mathbb E\, s(\mathrm{apply}(x, z + \nu))$ of each input.

    Attributes:
        mean: (batch,) over the draws.
        low, high: (batch,) confidence bounds on $\bar s$ at the unperturbed parameters.
        sigma: standard deviation of the noise.
    """

    mean: Values
    low: Values
    high: Values
    sigma: float

    def lower(self, radius: float) -> Values:
        r"""$\Phi(\Phi^{-1}(\mathrm{low}) - r / \sigma)$: no attack of norm r brings $\bar s$ below it."""
        check_number(radius, "radius", 0)
        return self.moved(self.low, -radius)

    def upper(self, radius: float) -> Values:
        r"""$\Phi(\Phi^{-1}(\mathrm{high}) + r / \sigma)$: no attack of norm r brings $\bar s$ above it."""
        check_number(radius, "radius", 0)
        return self.moved(self.high, radius)

    def moved(self, p: Values, by: float) -> Values:
        return torch.special.ndtr(torch.special.ndtri(p) + by / self.sigma)


@torch.no_grad()
def certified_score(
    score: Model,
    x: Inputs,
    within: PerturbationSet,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    at: Tensor | None = None,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> CertifiedScore:
    """Bound the smoothed score of each input from n draws.

    Args:
        score: inputs to values in [0, 1], higher for more in-distribution, such as ``lambda v: 1 +
            RejectClass(model).paper_score(v)``; a module is put in eval mode for the call.
        alpha: probability, for each input and each of its two bounds, that the bound is wrong. For one
            statement about many inputs together, divide by their number.
        x, within, sigma, n, at, batch_size, generator: as in :func:`votes`.

    Raises:
        ValueError: for a score outside [0, 1], and as :func:`certify`.
    """
    _check_alpha(alpha)
    check_number(sigma, "sigma", 1e-9, 1e6)
    inputs.check_callable(score, "score", "score(x)")

    def checked(v: Tensor) -> Tensor:
        values = score(v)
        if not isinstance(values, Tensor) or values.shape != (len(v),):
            seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"score must return a tensor with one value per input, shape ({len(v)},), got {seen}"
            )
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"score must lie in [0, 1], got values in [{low:.3g}, {high:.3g}]; map it there by a monotone function "
                "that is known in advance, such as the sigmoid"
            )
        return values.double()

    with frozen(score):
        mean = Noise(within, sigma).total(checked, x, n, at, batch_size, generator) / n
    mean = mean.clamp(0, 1)
    low, high = mean_bound(mean, n, alpha), 1 - mean_bound(1 - mean, n, alpha)
    return CertifiedScore(mean, low, high, sigma)


def mean_bound(mean: Values, n: int, alpha: float) -> Values:
    r"""Lower confidence bound on the mean of a variable in [0, 1], from the mean of n draws.

    The smallest q with $n\,\mathrm{kl}(\hat s, q) \le \log \frac1\alpha$, where $\mathrm{kl}(p, q) = p \log\frac pq +
    (1 - p)\log\frac{1 - p}{1 - q}$. Valid for every n and every law on [0, 1], because $\Pr[\hat s \ge t] \le
    e^{-n\,\mathrm{kl}(t, q)}$ for a mean q < t (Hoeffding 1963, theorem 1). If all draws are 1 it is
    $\alpha^{1/n}$, the Clopper-Pearson bound; otherwise it is slightly looser. The scores of a good detector lie
    at the ends, where bounds of width $1 / \sqrt n$ are useless.

    >>> print(f"{mean_bound(torch.ones(1).double(), 1000, 0.001).item():.6f} {0.001 ** (1 / 1000):.6f}")
    0.993116 0.993116
    """
    check_values(mean, name="mean")
    check_count(n, "n", low=1)
    _check_alpha(alpha)
    mean = mean.detach()
    low, high = torch.zeros_like(mean), mean.clone()
    for _ in range(60):
        q = (low + high) / 2
        divergence = torch.xlogy(mean, mean / q) + torch.xlogy(1 - mean, (1 - mean) / (1 - q))
        outside = n * divergence > math.log(1 / alpha)
        low, high = torch.where(outside, q, low), torch.where(outside, high, q)
    return low


def guaranteed_auroc(
    lower: Callable[[float], Tensor],
    upper: Callable[[float], Tensor],
    radii: Sequence[float],
    confidence: float = 0.95,
) -> list[Estimate]:
    """AUROC of lower bounds on in-distribution scores against upper bounds on outlier scores, for each radius.

    No attack of that radius on both sides brings the AUROC on these inputs below it. The intervals cover
    the sampling of the inputs.

    Args:
        lower: maps a radius to lower bounds on the in-distribution scores, such as :meth:`CertifiedScore.lower`.
        upper: maps a radius to upper bounds on the outlier scores.
    """
    inputs.check_callable(lower, "lower", "lower(radius)")
    inputs.check_callable(upper, "upper", "upper(radius)")
    _check_radii(radii)
    return [
        confidence_interval(auroc, lower(radius), upper(radius), confidence=confidence)
        for radius in radii
    ]


class Smoothed(nn.Module):
    r"""The smoothed network as a module that attacks and detectors accept.

    Its outputs are $\log \frac1m \sum_j \mathrm{softmax}(f(\mathrm{apply}(x, z + \nu_j)))$. The draws $\nu_j$ are the
    same at each call, so it is a deterministic function with a gradient. An adaptive attack maximises this
    mean instead of the network's loss at x (Salman et al. 2019). It only approximates the smoothed
    network: judge the inputs that were found with new draws.

    Args:
        model: the network to smooth.
        within, sigma: as in :func:`votes`.
        draws: number m of copies.
        seed: of the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        within: PerturbationSet,
        sigma: float,
        draws: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        inputs.check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
        draws, seed = check_count(draws, "draws", low=1), inputs.check_seed(seed)
        self.model, self.noise, self.draws, self.seed = model, Noise(within, sigma), draws, seed
        self.classes, self.reject = declared_outputs(model)

    def forward(self, x: Inputs, z: Tensor | None = None) -> Float[Tensor, "batch outputs"]:
        """Log-probabilities at the parameters z (default: those of x itself)."""
        within, m = self.noise.within, self.draws
        z = within.identity(x) if z is None else z
        generator = rng.generator(x.device, self.seed)
        nu = torch.randn(m, *z.shape[1:], dtype=z.dtype, device=z.device, generator=generator)
        around = (z[:, None] + self.noise.sigma * nu).flatten(0, 1)
        log_p = read(self.model, within.apply(x.repeat_interleave(m, 0), around)).log_softmax(1)
        return log_p.unflatten(0, (len(x), m)).logsumexp(1) - math.log(m)


def _check_draws(n: int, alpha: float) -> None:
    """Refuse so few draws that nothing could be certified even if all agreed."""
    check_count(n, "n", low=1)
    if alpha ** (1 / n) <= 0.5:
        fewest = math.floor(math.log2(1 / alpha)) + 1
        raise ValueError(
            f"n must be at least {fewest} to certify anything at alpha {alpha:g}, got {n}"
        )


def _check_radii(radii: Sequence[float]) -> None:
    """Refuse radii below 0."""
    inputs.check_several(radii, "radii", "radii of at least 0")
    if (inputs.reals(radii, "radii") < 0).any():
        raise ValueError(f"radii must be at least 0, got {list(radii)}")


def _check_alpha(alpha: float) -> None:
    """Refuse an error probability outside (0, 1/4]."""
    check_number(alpha, "alpha", 1e-12, 0.25, "write 0.001 for one wrong bound in a thousand")
