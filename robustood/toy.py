"""The toy distribution of Tsipras et al. (2019), in closed form.

One feature is right with probability ``p`` and hard to move; ``d`` others are each nearly useless, strong together,
and easy to move.  Everything here is exact: the accuracy of any linear classifier under attack, the bound of Theorem
2.1, the best trade-off that any classifier can reach, and the linear program that confirms it without using the
formulas.

Closed forms are float64 NumPy; samples are torch tensors.  The adversary moves every coordinate by at most ``eps``.
There is no box, since the features are not pixels.  A point on the boundary is an error, so the adversary wins ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import linprog, minimize_scalar
from scipy.sparse import coo_array, hstack, kron, vstack
from scipy.special import logit, ndtr
from torch import Tensor
from torch.nn.functional import softplus

from robustood import inputs

__all__ = [
    "GaussianOutliers", "Phi", "TsiprasDistribution", "Values", "adversarial_linear",
    "adversarial_svm", "frontier_lp", "phi", "population_hinge",
]  # fmt: skip

Values = np.ndarray | float  # a number for a number, an array for an array
Phi = ndtr  # the standard normal distribution function, written as in the formulas


def phi(x: ArrayLike) -> Values:
    """Standard normal density."""
    return np.exp(-0.5 * np.square(inputs.reals(x, "x"))) / np.sqrt(2 * np.pi)


@dataclass(frozen=True)
class TsiprasDistribution:
    """A label y = ±1 (fair coin), one robust feature and d weak ones (Tsipras et al., section 2.1).

    ``x[0] = y`` with probability ``p`` and ``-y`` otherwise; ``x[1:]`` are iid N(eta * y, 1).

    Args:
        p: reliability of the robust feature, in [0.5, 1).
        d: number of weak features, at least 1.
        eta: mean of a weak feature under y = +1, positive.  Interesting near 3 / sqrt(d).

    Raises:
        ValueError: if an argument is out of range.
    """

    p: float
    d: int
    eta: float

    def __post_init__(self) -> None:
        fix = "p is how often x1 agrees with y; if it is below 0.5, flip the sign of x1"
        inputs.check_number(self.p, "p", 0.5, np.nextafter(1, 0), fix)
        inputs.check_count(self.d, "d", 1)
        inputs.check_number(
            self.eta, "eta", 1e-12, 1e12, "give a positive mean such as 3 / sqrt(d)"
        )

    def sample(self, n: int, seed: int) -> tuple[Float[Tensor, "n features"], Int[Tensor, " n"]]:
        """Draw n points: x is float32 (n, d + 1), y is int64 in {-1, +1}."""
        inputs.check_count(n, "n", 1)
        generator = torch.Generator().manual_seed(inputs.check_seed(seed))
        y = 2 * torch.randint(2, (n,), generator=generator) - 1
        agrees = 2 * (torch.rand(n, generator=generator) < self.p) - 1
        weak = torch.randn(n, self.d, generator=generator) + self.eta * y[:, None]
        return torch.cat([(y * agrees)[:, None].float(), weak], dim=1), y

    def linear_accuracy(self, w: ArrayLike, eps: float, bias: float = 0.0) -> float:
        """Exact accuracy of sign(w @ x + bias) when each coordinate may move by eps.

        The worst margin is Gaussian given x1, because the attack costs exactly ``eps * |w|_1``.
        Without weak weights there is no noise, and each normal probability is the indicator
        of "margin > 0"; a zero margin is an error.

        Args:
            w: d + 1 weights, the robust feature first.
            eps: budget in feature units, >= 0; 0 gives the standard accuracy.
        """
        _check_budget(eps)
        inputs.check_number(bias, "bias", fix="a threshold, in the unit of w @ x")
        w = inputs.numbers(w, "w")
        if w.shape != (self.d + 1,) or not np.isfinite(w).all():
            raise ValueError(
                f"w must be d + 1 = {self.d + 1} finite weights, x1 first, got shape {w.shape}"
            )
        noise = np.linalg.norm(w[1:])
        drift = self.eta * w[1:].sum() - eps * np.abs(w).sum()

        def right(margin: float) -> float:
            return Phi(margin / noise) if noise > 0 else float(margin > 0)

        lucky = [self.p * right(drift + w[0] + c) for c in (bias, -bias)]
        unlucky = [(1 - self.p) * right(drift - w[0] + c) for c in (bias, -bias)]
        return float(sum(lucky + unlucky) / 2)

    def averaging_accuracy(self, eps: float = 0.0) -> float:
        """Accuracy of the sign of the mean weak feature: Phi(sqrt(d) (eta - eps))."""
        return float(Phi(self.shift(eps)))

    def shift(self, eps: float = 0.0) -> float:
        """Mean of y * g after the attack has moved every weak feature: sqrt(d) (eta - eps)."""
        _check_budget(eps)
        return float(np.sqrt(self.d) * (self.eta - eps))

    def symmetric_accuracy(self, t: ArrayLike, eps: float = 0.0) -> Values:
        """Accuracy under eps of sign(t x1 + g), g = sum(x[1:]) / sqrt(d), for t in [0, inf].

        Every linear classifier with equal positive weak weights c is of this form, with
        t = w1 / (c sqrt(d)).  t = inf stands for sign(x1).
        """
        t, shift = _inside(t, "t", np.inf), self.shift(eps)
        finite = np.where(np.isinf(t), 0.0, t)
        accuracy = self.p * Phi(shift + finite * (1 - eps))
        accuracy = accuracy + (1 - self.p) * Phi(shift - finite * (1 + eps))
        return np.where(np.isinf(t), self.p * (eps < 1), accuracy)[()]

    def best_linear(self, eps: float) -> tuple[float, float]:
        """Ratio t and robust accuracy of the best linear classifier without bias.

        For eps >= eta every weak weight does harm, and sign(x1) is best.
        """
        _check_budget(eps)
        if eps >= self.eta:
            return np.inf, float(self.symmetric_accuracy(np.inf, eps))
        angle = _least(lambda a: -self.symmetric_accuracy(np.tan(a), eps), 0.0, np.pi / 2 - 1e-9)
        t = float(np.tan(angle))
        reached = [(float(self.symmetric_accuracy(r, eps)), r) for r in (t, np.inf)]
        accuracy, t = max(reached)
        return t, accuracy

    def bound(self, delta: ArrayLike) -> Values:
        """Theorem 2.1: with standard accuracy >= 1 - delta, robust accuracy is at most p / (1 - p) * delta.

        Holds for eps >= 2 eta.  Above delta = 1 - p it exceeds p, which no classifier does.
        """
        return self.p / (1 - self.p) * _inside(delta, "delta", 1)

    def threshold(self, eps: float = 0.0) -> float:
        """The t for which sign(t sign(x1) + g) has the best accuracy under eps.

        Zero once eps >= 1 can erase x1; inf, that is sign(x1), for eta <= eps < 1.
        """
        shift = self.shift(eps)
        if eps >= 1:
            return 0.0
        return float(logit(self.p) / (2 * shift)) if shift > 0 else np.inf

    def optimal_robust_accuracy(self, eps: float) -> float:
        """Best accuracy under eps of any classifier; eps = 0 gives the Bayes accuracy."""
        shift, t = self.shift(eps), self.threshold(eps)
        if eps >= 1:
            return float(Phi(max(shift, 0.0)))
        return self.p if np.isinf(t) else float(self._rounded(t, shift))

    def frontier(self, t: ArrayLike, eps: float | None = None) -> tuple[Values, Values]:
        """Standard and robust accuracy of sign(t sign(x1) + g), t in [0, inf], eps < 1.

        At eps = 2 eta, the default, t in [threshold(0), inf] traces the exact Pareto frontier over
        all classifiers.  At another eps the pairs are attained but may be dominated: beyond 2 eta, by
        a coin toss between the two ends (see `frontier_lp`).
        """
        eps = 2 * self.eta if eps is None else eps
        shift = self.shift(eps)
        _check_below_one(eps)
        t = _inside(t, "t", np.inf)
        return self._rounded(t, self.shift(0.0)), self._rounded(t, shift)

    def gap(self, t: ArrayLike) -> Values:
        """Exact distance from the frontier at eps = 2 eta up to the bound of Theorem 2.1."""
        odds = (2 * self.p - 1) / (1 - self.p)
        return odds * Phi(-_inside(t, "t", np.inf) - self.shift(0.0))

    def answer(self, x: Float[Tensor, "n features"], t: float) -> Float[Tensor, " n"]:
        """The frontier's classifier at points: sign(t sign(x1) + g); t = inf is sign(x1)."""
        inputs.check_values(x, box=None)
        if x.ndim != 2 or x.shape[1] != self.d + 1:
            raise ValueError(
                f"x must have d + 1 = {self.d + 1} features, got {tuple(x.shape)}; use sample(n, seed)"
            )
        inputs.check_number(t, "t", 0, np.inf, "inf stands for sign(x1)")
        if np.isinf(t):
            return x[:, 0].sign()
        return (t * x[:, 0].sign() + x[:, 1:].sum(1) / self.d**0.5).sign()

    def _rounded(self, t: Values, shift: float) -> Values:
        return self.p * Phi(shift + t) + (1 - self.p) * Phi(shift - t)


def _check_budget(eps: float) -> None:
    inputs.check_number(eps, "eps", 0, 1e12, "give a budget in the unit of the features")


def _check_below_one(eps: float) -> None:
    fix = "from 1 on, x1 can be erased and there is no trade-off (2 eta needs eta < 0.5)"
    inputs.check_number(eps, "eps", 0, np.nextafter(1, 0), fix)


def _inside(values: ArrayLike, name: str, high: float) -> np.ndarray:
    values = inputs.numbers(values, name)
    if values.size == 0 or not ((values >= 0) & (values <= high)).all():
        raise ValueError(f"{name} must lie in [0, {high:g}], got {values}; clip or drop the rest")
    return values


def _check_dist(dist: TsiprasDistribution) -> None:
    inputs.check_instance(dist, "dist", TsiprasDistribution, "a TsiprasDistribution(p, d, eta)")


def _least(f: Callable[[Values], Values], low: float, high: float) -> float:
    """Minimise f on an interval: the best of a fine grid, then Brent's method around it."""
    grid = np.linspace(low, high, 401)
    values = np.asarray(f(grid))
    i = int(np.argmin(values))
    bracket = (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
    found = minimize_scalar(f, bounds=bracket, method="bounded", options={"xatol": 1e-10})
    return float(found.x if found.fun < values[i] else grid[i])


def population_hinge(dist: TsiprasDistribution, w1: Values, s: Values, eps: float) -> Values:
    """E max(0, 1 - worst margin) of w = (w1, s / sqrt(d), ..., s / sqrt(d)), s >= 0.

    Given x1 the worst margin is N(m, s^2), and E max(0, 1 - m - s xi) is elementary.
    """
    _check_dist(dist)
    w1, s = inputs.reals(w1, "w1"), _inside(s, "s", np.finfo(float).max)
    noise = np.maximum(s, 1e-100)  # gives the limit of the formula at s = 0

    def hinge(m: Values) -> Values:
        return (1 - m) * Phi((1 - m) / noise) + s * phi((1 - m) / noise)

    drift = s * dist.shift(eps) - eps * np.abs(w1)
    return dist.p * hinge(drift + w1) + (1 - dist.p) * hinge(drift - w1)


def adversarial_svm(dist: TsiprasDistribution, eps: float = 0.0) -> Float[np.ndarray, " features"]:
    """Unit-norm weights with the smallest population adversarial hinge loss (Theorem 2.2).

    eps = 0 is the standard SVM.  Equal weak weights are optimal: the regularised loss is strictly
    convex and unchanged by permuting the weak features.
    """
    _check_dist(dist)
    _check_budget(eps)
    angle = _least(lambda a: population_hinge(dist, np.sin(a), np.cos(a), eps), 0.0, np.pi / 2)
    w1, s = np.sin(angle), np.cos(angle)
    if population_hinge(dist, 1.0, 0.0, eps) <= population_hinge(dist, w1, s, eps) + 1e-12:
        w1, s = 1.0, 0.0
    return np.concatenate([[w1], np.full(dist.d, s / np.sqrt(dist.d))])


def adversarial_linear(
    x: Float[Tensor, "n features"],
    y: Int[Tensor, " n"],
    eps: float,
    *,
    loss: str = "hinge",
    steps: int = 1500,
    lr: float = 0.01,
) -> Float[Tensor, " features"]:
    """Train linear weights on n points against the exact worst case, with full batches, from zero.

    No inner attack is needed: the worst margin of a linear model is ``y w @ x - eps |w|_1``.

    Args:
        y: labels in {-1, +1}.
        loss: "hinge", max(0, 1 - margin), or "logistic", log(1 + exp(-margin)).
    """
    losses = {"hinge": lambda margin: (1 - margin).clamp(min=0), "logistic": lambda m: softplus(-m)}
    inputs.check_choice(loss, "loss", tuple(losses))
    inputs.check_values(x, box=None)
    inputs.check_instance(y, "y", Tensor, "a tensor of labels -1 and +1")
    if x.ndim != 2 or y.shape != x.shape[:1] or not ((y == 1) | (y == -1)).all():
        raise ValueError(
            f"y must hold one label -1 or +1 per row of x {tuple(x.shape)}, got shape "
            f"{tuple(y.shape)} with values {y.unique()[:4].tolist()}; map classes 0 and 1 by 2 * y - 1"
        )
    _check_budget(eps)
    inputs.check_count(steps, "steps")
    inputs.check_number(lr, "lr", 0, 1e6, "a learning rate, such as 0.01")
    x = x.detach()
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([w], lr=lr)
    signed = x * y[:, None]
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        worst = signed @ w - eps * w.abs().sum()
        (w.grad,) = torch.autograd.grad(losses[loss](worst).mean(), w)
        optimiser.step()
    return w.detach()


def frontier_lp(
    dist: TsiprasDistribution, eps: float, deltas: ArrayLike, bins: int = 129
) -> Float[np.ndarray, " deltas"]:
    """Best robust accuracy given standard accuracy >= 1 - delta, over all randomised classifiers.

    Uses none of the formulas above.  The sum g is cut into bins; variables are the probability of
    answering +1 for each sign of x1 and bin, and the probability of being right under every attack
    for each label, sign and bin.  The latter is at most the probability of the right answer
    in every bin that the attack reaches.  Exact up to the width of a bin; eps < 1.

    Returns:
        One robust accuracy per delta; nan where no classifier has that standard accuracy.
    """
    _check_dist(dist)
    _check_below_one(eps)
    inputs.check_count(bins, "bins", 3)
    deltas = np.atleast_1d(_inside(deltas, "deltas", 1))
    mass, steps = _bin_masses(dist, eps, bins)
    here, there = np.nonzero(np.abs(np.subtract.outer(range(bins), range(bins))) <= steps)
    pairs, one = np.arange(len(here)), np.ones(len(here))
    own = coo_array((one, (pairs, here)), (len(here), bins))
    near = coo_array((one, (pairs, there)), (len(here), bins))
    answers = kron([[-1, 0], [0, -1], [1, 0], [0, 1]], near)  # right <= answer or 1 - answer
    gain = mass[: 2 * bins] - mass[2 * bins :]  # standard accuracy = gain @ answer + 1/2
    standard = np.concatenate([-gain, np.zeros(4 * bins)])
    constraints = vstack([hstack([answers, kron(np.eye(4), own)]), coo_array(standard[None])])
    limits = np.repeat([0.0, 0.0, 1.0, 1.0], len(here))
    value = np.concatenate([np.zeros(2 * bins), -mass])
    best = []
    for delta in deltas:
        limit = np.append(limits, delta - 0.5)
        solution = linprog(value, constraints.tocsr(), limit, bounds=(0, 1), method="highs")
        best.append(-solution.fun if solution.success else np.nan)
    return np.array(best)


def _bin_masses(dist: TsiprasDistribution, eps: float, bins: int) -> tuple[np.ndarray, int]:
    """Mass of (y, sign x1) = ++, +-, -+, -- over the bins of g, and the reach of the attack in bins."""
    centre, reach = dist.shift(), np.sqrt(dist.d) * eps
    width = 2 * (centre + 5) / bins
    steps = max(1, round(reach / width)) if eps > 0 else 0
    edges = (reach / steps if steps else width) * (np.arange(bins + 1) - bins / 2)
    edges[[0, -1]] = -np.inf, np.inf
    up, down = np.diff(Phi(edges - centre)) / 2, np.diff(Phi(edges + centre)) / 2
    return np.concatenate(
        [dist.p * up, (1 - dist.p) * up, (1 - dist.p) * down, dist.p * down]
    ), steps


@dataclass(frozen=True)
class GaussianOutliers:
    r"""Which outliers a linear detector should be trained on, in closed form (after Chen et al. 2021, section 5).

    In-distribution inputs are $N(\mu, \sigma^2 I_d)$ with $\mu = (1, .., 1)$; test outliers $N(-\mu + v,
    \sigma^2 I_d)$ with any $\|v\|_2 \le \nu$, moved by at most ``eps`` per coordinate. The detector accepts where
    $\theta^\top x > 0$. The pool of auxiliary outliers contains a share ``rho`` of informative ones from
    $N(-\mu, \sigma^2 I)$; the others, far away, come from $N(-a \mu + b u, \sigma^2 I)$ with a unit vector u
    orthogonal to $\mu$. The paper proves bounds for such a model; this version is exact.

    Args:
        d: dimensions.
        sigma: standard deviation of every coordinate.
        eps: attack on outliers, per coordinate.
        nu: how far the mean of the test outliers may move.
        rho: share of informative outliers in the pool.
        a, b: position of the others, along -mu and orthogonal to it.

    Raises:
        ValueError: if an argument is out of range.
    """

    d: int = 1000
    sigma: float = 10.0
    eps: float = 0.5
    nu: float = 2.0
    rho: float = 0.25
    a: float = 3.0
    b: float = 100.0

    def __post_init__(self) -> None:
        inputs.check_count(self.d, "d", 2)
        inputs.check_number(self.sigma, "sigma", 1e-9)
        inputs.check_number(self.rho, "rho", 0, 1)
        for name in ("a", "eps", "nu", "b"):
            inputs.check_number(getattr(self, name), name, 0)

    @property
    def mu(self) -> Float[np.ndarray, " d"]:
        """Mean of the in-distribution inputs."""
        return np.ones(self.d)

    @property
    def u(self) -> Float[np.ndarray, " d"]:
        """Direction of the far outliers: a fixed Gaussian draw, made orthogonal to mu."""
        drawn = np.random.default_rng(0).standard_normal(self.d)
        drawn -= drawn.mean()
        return drawn / np.linalg.norm(drawn)

    def fnr(self, theta: Float[np.ndarray, " d"]) -> float:
        r"""Share of in-distribution inputs rejected: $\Phi(-\theta^\top\mu / \sigma\|\theta\|_2)$."""
        theta = self._weights(theta)
        return float(Phi(-theta.sum() / (self.sigma * np.linalg.norm(theta))))

    def robust_fpr(self, theta: Float[np.ndarray, " d"]) -> float:
        r"""Largest share of attacked outliers accepted, over all allowed v:

        $\Phi\big((-\theta^\top\mu + \nu\|\theta\|_2 + \varepsilon\|\theta\|_1) / \sigma\|\theta\|_2\big)$.
        The worst v lies along $\theta$, the worst perturbation is $\varepsilon\,\mathrm{sgn}\,\theta$.
        """
        theta = self._weights(theta)
        size = np.linalg.norm(theta)
        reach = self.nu * size + self.eps * np.abs(theta).sum()
        return float(Phi((-theta.sum() + reach) / (self.sigma * size)))

    def _weights(self, theta: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        theta = inputs.reals(theta, "theta")
        if theta.shape != (self.d,) or not theta.any():
            raise ValueError(
                f"theta must be d = {self.d} weights, not all 0, got shape {theta.shape}"
            )
        return theta

    def limit_cosine(self) -> float:
        r"""$\cos(\theta_\infty, \mu) < 1$ of the estimate in the limit of many random outliers from the pool.

        $\theta_\infty \propto (\rho + (1 - \rho) a) \mu - (1 - \rho) b u$.
        """
        along = (self.rho + (1 - self.rho) * self.a) * np.sqrt(self.d)
        return float(along / np.hypot(along, (1 - self.rho) * self.b))

    def limit_fnr(self) -> float:
        """The share of in-distribution inputs rejected in that limit."""
        return float(Phi(-self.limit_cosine() * np.sqrt(self.d) / self.sigma))

    def inside(self, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n d"]:
        """In-distribution inputs."""
        _check_draw(n, rng)
        return self.mu + self.sigma * rng.standard_normal((n, self.d))

    def pool(
        self, n: int, rng: np.random.Generator, contamination: float = 0.0
    ) -> tuple[Float[np.ndarray, "n d"], np.ndarray]:
        """Auxiliary outliers (n, d) and the kind of each: 0 informative, 1 far, 2 in-distribution.

        Args:
            contamination: share of in-distribution samples, which replace far ones.
        """
        _check_draw(n, rng)
        inputs.check_number(contamination, "contamination", 0, 1 - self.rho)
        shares = [self.rho, 1 - self.rho - contamination, contamination]
        kind = rng.choice(3, n, p=shares)
        centres = np.stack([-self.mu, -self.a * self.mu + self.b * self.u, self.mu])
        return centres[kind] + self.sigma * rng.standard_normal((n, self.d)), kind

    @staticmethod
    def estimate(
        inside: Float[np.ndarray, "n d"], outliers: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, " d"]:
        r"""The pooled estimate $\theta = (\sum_i x_i - \sum_j \tilde x_j) / (n + m)$."""
        inside, outliers = inputs.reals(inside, "inside", 2), inputs.reals(outliers, "outliers", 2)
        return (inside.sum(0) - outliers.sum(0)) / (len(inside) + len(outliers))

    @staticmethod
    def hardest(
        inside: Float[np.ndarray, "n d"], pool: Float[np.ndarray, "m d"], n: int, q: float
    ) -> Int[np.ndarray, " n_kept"]:
        r"""The mining rule: ranks qN to qN + n of the pool by $\bar x^\top \tilde x$, most similar first."""
        inside, pool = inputs.reals(inside, "inside", 2), inputs.reals(pool, "pool", 2)
        inputs.check_count(n, "n", 1)
        inputs.check_number(q, "q", 0, 1, "a share of the pool")
        order = np.argsort(-(pool @ inside.mean(0)), kind="stable")
        return order[int(q * len(pool)) :][:n]


def _check_draw(n: int, rng: np.random.Generator) -> None:
    inputs.check_count(n, "n", 1)
    inputs.check_instance(rng, "rng", np.random.Generator, "np.random.default_rng(seed)")
