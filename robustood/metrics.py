"""A number and how sure we are of it."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest

from robustood.inputs import check_confidence, check_count


@dataclass(frozen=True)
class Estimate:
    """A measured rate with its confidence interval.

    Attributes:
        value: the point estimate.
        low, high: ends of the interval.
        n: number of samples behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Rate with the exact (Clopper-Pearson) binomial interval.

    The interval covers the true rate with probability at least ``confidence``, whatever the rate
    (Clopper and Pearson 1934).

    Raises:
        ValueError: if n < 1, successes is not in 0 .. n, or confidence is not in [0.5, 1).

    >>> print(proportion(95, 100))
    0.950 [0.887, 0.984]
    """
    check_count(n, "n", low=1)
    check_count(successes, "successes")
    if successes > n:
        raise ValueError(f"successes must be at most n = {n}, got {successes}")
    check_confidence(confidence)
    interval = binomtest(successes, n).proportion_ci(confidence, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)
