r"""How well a score separates two sets, with what confidence.

A score is higher for more in-distribution inputs; ``x`` is accepted if ``score >= threshold``.
With in-distribution scores $a_1, \dots, a_n$ and outlier scores $b_1, \dots, b_m$,

$$\mathrm{AUROC} = \frac{1}{nm} \sum_{i,j} \mathbf 1\{a_i > b_j\} + \tfrac12 \mathbf 1\{a_i = b_j\}.$$

Everything here depends only on the order of the scores, so a strictly increasing map changes
nothing, and plus or minus infinity are valid scores. Ties get half credit. All sums are computed in
float64. Where the two sides are not interchangeable, ``positive="in"`` or ``positive="out"`` is
required. Arguments ``scores_in`` and ``scores_out`` are one-dimensional: lists, arrays or tensors.

Raises ``ValueError`` for an empty side, NaN, more than one axis, and rates outside [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import betaincinv, expit, logit, ndtri
from torch import Tensor

from robustood.inputs import (
    check_callable,
    check_choice,
    check_confidence,
    check_count,
    check_number,
    check_seed,
    check_several,
    numbers,
)

__all__ = [
    "Estimate", "Metric", "Scores", "Side", "acceptance", "as_printed", "aupr", "auroc",
    "confidence_interval", "detection_error", "fpr_at_tpr", "paired_difference", "proportion",
    "roc", "threshold_at_tpr", "tie_rate",
]  # fmt: skip

Scores = ArrayLike | Tensor
Metric = Callable[..., float]
Side = Literal["in", "out"]


@dataclass(frozen=True)
class Estimate:
    """A measured rate with its confidence interval.

    Attributes:
        value: the point estimate.
        low, high: ends of the interval.
        n: number of samples.
    """

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        """Such as ``f"{estimate:.2f}"``; per cent by ``".1%"``, without the sign."""
        parts = (format(x, spec or ".3f").rstrip("%") for x in (self.value, self.low, self.high))
        return "{} [{}, {}]".format(*parts)

    def __str__(self) -> str:
        return format(self)


def proportion(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Rate with the exact (Clopper-Pearson) binomial interval.

    The interval covers the true rate with probability at least ``confidence``, whatever the rate
    (Clopper and Pearson 1934). Its ends are quantiles of beta distributions.

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
    k, tail = successes, (1 - confidence) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Estimate(k / n, low, high, n)


def auroc(scores_in: Scores, scores_out: Scores) -> float:
    """Probability that an in-distribution input scores higher than an outlier, ties counting 1/2.

    The same number is the area under the ROC curve and, up to the factor 1/(nm), the statistic of
    Mann and Whitney (1947). Swapping the sides gives 1 - AUROC.

    >>> auroc([2, 3, 3], [1, 3])  # of six pairs 3 won, 2 tied, 1 lost
    0.6666666666666666
    """
    a, b = _both(scores_in, scores_out)
    lower, not_higher = _below(a, b)
    return float((lower.sum() + not_higher.sum()) / (2 * a.size * b.size))


def tie_rate(scores_in: Scores, scores_out: Scores) -> float:
    """Share of pairs (in-distribution, outlier) with equal scores. If it is above 0, ask how ties were counted.

    >>> tie_rate([1.0, 1.0, 0.7], [1.0, 0.2])
    0.3333333333333333
    """
    a, b = _both(scores_in, scores_out)
    lower, not_higher = _below(a, b)
    return float((not_higher - lower).sum() / (a.size * b.size))


def roc(
    scores_in: Scores, scores_out: Scores
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """The ROC curve with in-distribution positives: (FPR, TPR, thresholds), one point per distinct score.

    Thresholds decrease. The first, infinity, accepts nothing; the last accepts everything.
    """
    a, b = _both(scores_in, scores_out)
    levels = np.unique(np.concatenate([a, b]))[::-1]
    fpr, tpr = (1 - np.searchsorted(np.sort(s), levels) / s.size for s in (b, a))
    return np.append(0, fpr), np.append(0, tpr), np.append(np.inf, levels)


def threshold_at_tpr(scores_in: Scores, tpr: float = 0.95) -> float:
    """The highest threshold that still accepts a share ``tpr`` of these scores.

    This is the threshold of a deployed detector: it is calibrated on in-distribution scores before
    any outlier is seen. Apply it to other scores with :func:`acceptance`.

    >>> threshold_at_tpr([0.1, 0.4, 0.6, 0.9], tpr=0.75)
    0.4
    """
    a = _values(scores_in, "scores_in")
    fix = "a share of the positives; write 0.95 for 95 %"
    check_number(tpr, "tpr", np.nextafter(0, 1), 1, fix)
    if isinstance(tpr, np.floating):  # a float32 of 0.8 is a little more, but it stands for 0.8
        tpr = float(str(tpr))
    kept = int(np.ceil(tpr * a.size))  # the smallest count with kept / n >= tpr, despite rounding:
    kept += int(kept / a.size < tpr) - int((kept - 1) / a.size >= tpr)
    return float(np.partition(a, a.size - kept)[a.size - kept])


def acceptance(scores: Scores, threshold: float, confidence: float = 0.95) -> Estimate:
    """Share of scores at or above a *fixed* threshold, with the exact binomial interval.

    Fixed means chosen without these scores. Then each is an independent trial, and the binomial
    interval is exact. On outliers the share is the false positive rate, on in-distribution inputs the
    true positive rate.

    >>> print(acceptance([0.2, 0.5, 0.7, 0.9], threshold=0.5))
    0.750 [0.194, 0.994]
    """
    s = _values(scores, "scores")
    fix = "a score, such as threshold_at_tpr returns"
    check_number(threshold, "threshold", -np.inf, np.inf, fix)
    return proportion(int(np.count_nonzero(s >= threshold)), s.size, confidence)


def fpr_at_tpr(
    scores_in: Scores, scores_out: Scores, tpr: float = 0.95, *, positive: Side
) -> float:
    """False positive rate at the strictest threshold that detects a share ``tpr`` of the positives.

    ``positive="in"``: the highest t with P(in >= t) >= tpr; the result is P(out >= t), the share of
    outliers that are accepted. ``positive="out"``: the lowest t with P(out <= t) >= tpr; the result is
    P(in <= t), the share of in-distribution inputs that are rejected. The two can differ widely.

    >>> fpr_at_tpr([2, 3, 4, 5], [0, 1, 2, 9], tpr=0.75, positive="in")
    0.25
    >>> fpr_at_tpr([2, 3, 4, 5], [0, 1, 2, 9], tpr=0.75, positive="out")
    0.25
    """
    wanted, other = _oriented(scores_in, scores_out, positive)
    return float(np.count_nonzero(other >= threshold_at_tpr(wanted, tpr)) / other.size)


def aupr(scores_in: Scores, scores_out: Scores, *, positive: Side) -> float:
    """Average precision: the mean over the positives of the precision at each one's score.

    It is the area under the steps of the precision-recall curve, not under straight lines between
    its points, which no threshold attains (Davis and Goadrich 2006). An uninformative score
    gets the share of positives, so the value depends on the base rate.

    >>> aupr([2, 3, 4], [1, 2.5], positive="in")
    0.9166666666666666
    """
    wanted, other = (np.sort(s) for s in _oriented(scores_in, scores_out, positive))
    hits = wanted.size - np.searchsorted(wanted, wanted)
    alarms = other.size - np.searchsorted(other, wanted)
    return float(np.mean(hits / (hits + alarms)))


def detection_error(
    scores_in: Scores, scores_out: Scores, *, prior: float | Literal["empirical"] = 0.5
) -> float:
    """Smallest probability of a wrong decision over all thresholds: prior FNR + (1 - prior) FPR.

    ``prior`` is the probability that an input is in-distribution. One half balances the two errors,
    as in the tables of ALOE (Chen et al. 2020). ``"empirical"`` is the share n_in / (n_in + n_out)
    of the samples, as in those of ATOM (Chen et al. 2021). The threshold is tuned on the same scores
    that it is judged on, so the result is optimistic.

    >>> detection_error([2, 3, 4, 5], [0, 1, 2, 9])
    0.25
    """
    a, b = _both(scores_in, scores_out)
    if isinstance(prior, str) and prior == "empirical":
        prior = a.size / (a.size + b.size)
    check_number(prior, "prior", 0, 1, "or write prior='empirical'")
    # A threshold between two in-distribution scores can be raised to the higher one at no loss.
    errors = prior * np.arange(a.size) / a.size + (1 - prior) * (1 - _below(a, b)[0] / b.size)
    return float(min(errors.min(), prior))  # prior: accept nothing


def confidence_interval(
    metric: Metric,
    scores_in: Scores,
    scores_out: Scores,
    *,
    confidence: float = 0.95,
    method: Literal["auto", "delong", "bootstrap"] = "auto",
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A metric with the interval due to the sampling of the test scores.

    ``"delong"``, for :func:`auroc` alone: the variance of DeLong et al. (1988), normal on the logit
    scale, hence inside [0, 1]. ``"bootstrap"``, for any metric: each side is resampled with
    replacement on its own, and the interval runs between percentiles. ``"auto"`` uses the
    first where it can. A rate whose threshold came from the same scores, such as :func:`fpr_at_tpr`,
    needs the bootstrap, since the threshold varies from sample to sample; for a threshold that was
    fixed beforehand, :func:`acceptance` is exact.

    Where the sample has no variation (AUROC 1, FPR 0), both would return an interval of zero
    width. Then min(n_in, n_out) disjoint pairs serve as independent trials with the same outcome,
    which is exact for AUROC. No interval accounts for the variation between training runs.

    Args:
        metric: ``metric(scores_in, scores_out)``; set options with ``functools.partial``.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        Value, interval, and the total number of scores.

    >>> print(confidence_interval(auroc, range(10, 60), range(40)))
    0.775 [0.668, 0.855]
    """
    a, b = _both(scores_in, scores_out)
    check_choice(method, "method", ("auto", "delong", "bootstrap"))
    if method == "delong" and metric is not auroc:
        raise ValueError("method 'delong' is for auroc only; use method='bootstrap'")
    _check_interval(metric, a, b, confidence, resamples, seed)
    if metric is auroc and method != "bootstrap":
        return _delong(a, b, confidence)
    value = float(metric(a, b))
    pull = np.random.default_rng(seed)
    draws = np.array(
        [metric(*(s[pull.integers(s.size, size=s.size)] for s in (a, b))) for _ in range(resamples)]
    )
    if 0 <= value <= 1 and (draws == value).all():
        return _unanimous(value, a, b, confidence)
    return _percentiles(value, draws, confidence, a.size + b.size)


def paired_difference(
    metric: Metric,
    first: tuple[Scores, Scores],
    second: tuple[Scores, Scores],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """``metric(*first) - metric(*second)`` for two detectors, or two attacks, on the same inputs.

    Each argument is a pair (scores_in, scores_out), in the same order of inputs. The bootstrap
    resamples inputs, so that what is hard for both cancels: the interval is usually much narrower than
    two separate ones suggest. The value may be negative. Where the samples have no variation, disjoint pairs give
    the interval a width, as in :func:`confidence_interval`, unless both arguments hold the same scores.
    """
    for name, given in (("first", first), ("second", second)):
        check_several(given, name, "the scores of the two sides")
        if len(given) != 2:
            raise ValueError(f"{name} must be (scores_in, scores_out), got {len(given)} parts")
    (a, b), (c, d) = _both(*first, "first: "), _both(*second, "second: ")
    if (a.size, b.size) != (c.size, d.size):
        raise ValueError(
            f"first and second must hold scores of the same inputs, got {a.size} in and {b.size} "
            f"out against {c.size} and {d.size}; compare detectors on one test set"
        )
    _check_interval(metric, a, b, confidence, resamples, seed)
    pull = np.random.default_rng(seed)

    def draw() -> float:
        i, j = pull.integers(a.size, size=a.size), pull.integers(b.size, size=b.size)
        return metric(a[i], b[j]) - metric(c[i], d[j])

    value, draws = metric(a, b) - metric(c, d), np.array([draw() for _ in range(resamples)])
    same = np.array_equal(a, c) and np.array_equal(b, d)
    if -1 <= value <= 1 and (draws == value).all() and not same:
        return _unanimous(value, a, b, confidence, low=-1)
    return _percentiles(value, draws, confidence, a.size + b.size)


def as_printed(
    scores_in: Scores, scores_out: Scores, code: Literal["aloe", "atom"]
) -> dict[str, float]:
    """What the papers' own programs print for these scores, to compare with the functions above.

    Both remove the scores one by one, lowest first, and join the points by straight lines.

    ``"aloe"`` (Chen et al. 2020): of equal scores the in-distribution one is removed first, so a tie counts
    as lost. FPR is read at the first point whose TPR is nearest to 0.95. The detection error is
    balanced. ``"atom"`` (Chen et al. 2021): equal scores are removed together, so a tie counts one half. The
    threshold is the sorted in-distribution score at index round(0.05 n), and only scores *strictly*
    above it are accepted: with saturated scores nothing is, FPR is 0 and FNR is 1. The detection
    error uses empirical priors. In both, precision-recall curves start at recall 0, precision 0.

    Returns:
        ``fpr``, ``fnr`` (at the same threshold), ``auroc``, ``detection_error``, ``aupr_in``,
        ``aupr_out``, as fractions; the programs print per cent.

    >>> as_printed([1.0] * 10, [1.0] * 10, "aloe")["auroc"]
    0.0
    >>> [as_printed([1.0] * 10, [1.0] * 10, "atom")[name] for name in ("auroc", "fpr", "fnr")]
    [0.5, 0.0, 1.0]
    """
    check_choice(code, "code", ("aloe", "atom"))
    a, b = _both(scores_in, scores_out)
    tp, fp = _sweep(a, b, ties_together=code == "atom")
    tpr, fpr = tp / a.size, fp / b.size
    if code == "aloe":
        at = np.abs(tpr - 0.95).argmin()
        rates, prior = (fpr[at], 1 - tpr[at]), 0.5
    else:
        threshold = np.sort(a)[round(0.05 * a.size)]
        rates = np.mean(b > threshold), np.mean(a <= threshold)
        prior = a.size / (a.size + b.size)
    return {
        "fpr": float(rates[0]),
        "fnr": float(rates[1]),
        "auroc": _area(tpr, fpr),
        "detection_error": float((prior * (1 - tpr) + (1 - prior) * fpr).min()),
        "aupr_in": _joined(tp, fp),
        "aupr_out": _joined((b.size - fp)[::-1], (a.size - tp)[::-1]),
    }


def _values(scores: Scores, name: str) -> Float[np.ndarray, " n"]:
    """Scores as float64, checked."""
    values = numbers(scores, name)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {values.shape}; use .ravel()")
    if values.size == 0:
        raise ValueError(f"{name} is empty; pass at least one score for each side")
    if np.isnan(values).any():
        bad = int(np.isnan(values).sum())
        raise ValueError(
            f"{name} holds {bad} NaN among {values.size} scores; find out where they arise"
        )
    return values


def _both(scores_in: Scores, scores_out: Scores, of: str = "") -> tuple[np.ndarray, np.ndarray]:
    return _values(scores_in, f"{of}scores_in"), _values(scores_out, f"{of}scores_out")


def _oriented(
    scores_in: Scores, scores_out: Scores, positive: Side
) -> tuple[np.ndarray, np.ndarray]:
    """(positives, negatives), with higher scores for positives."""
    check_choice(positive, "positive", ("in", "out"))
    a, b = _both(scores_in, scores_out)
    return (a, b) if positive == "in" else (-b, -a)


def _below(a: np.ndarray, b: np.ndarray) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """For each of a in ascending order: how many of b are lower, and how many are not higher."""
    a, b = np.sort(a), np.sort(b)  # sorted queries read memory in order
    return np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")


def _check_interval(
    metric: Metric, a: np.ndarray, b: np.ndarray, confidence: float, resamples: int, seed: int
) -> None:
    check_callable(metric, "metric", "metric(scores_in, scores_out)")
    check_seed(seed)
    check_confidence(confidence)
    check_count(resamples, "resamples", low=1)
    if min(a.size, b.size) < 2:
        raise ValueError(
            f"an interval needs at least 2 scores per side, got {a.size} in and {b.size} out; pass more"
        )


def _percentiles(value: float, draws: np.ndarray, confidence: float, n: int) -> Estimate:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(min(low, value)), float(max(high, value)), n)


def _delong(a: np.ndarray, b: np.ndarray, confidence: float) -> Estimate:
    """Interval from each score's share of pairs won (DeLong et al. 1988), on the logit scale."""
    won, lost = (np.add(*_below(*pair)) / (2 * pair[1].size) for pair in ((a, b), (b, a)))
    value, n = auroc(a, b), a.size + b.size
    if np.ptp(won) == np.ptp(lost) == 0:
        return _unanimous(value, a, b, confidence)
    error = np.sqrt(won.var(ddof=1) / a.size + lost.var(ddof=1) / b.size)
    reach = ndtri((1 + confidence) / 2) * error / (value * (1 - value))
    low, high = expit(logit(value) + np.array([-reach, reach]))
    return Estimate(value, float(low), float(high), n)


def _unanimous(
    value: float, a: np.ndarray, b: np.ndarray, confidence: float, low: float = 0
) -> Estimate:
    """Interval where all pairs have the same value, such as 0, 1/2 (all tied) or 1.

    min(n, m) disjoint pairs are independent, so a pair has this value with a probability of at
    least ``sure``, and any value between ``low`` and 1 otherwise.
    """
    pairs = min(a.size, b.size)
    sure = proportion(pairs, pairs, confidence).low
    left, right = (value * sure + end * (1 - sure) for end in (low, 1))
    return Estimate(value, left, right, a.size + b.size)


def _sweep(a: np.ndarray, b: np.ndarray, ties_together: bool) -> tuple[np.ndarray, np.ndarray]:
    """(accepted in, accepted out) as scores are removed, lowest first, of equal ones in-distribution first."""
    scores = np.concatenate([a, b])
    order = np.argsort(scores, kind="stable")
    gone = np.concatenate([[0], np.cumsum(order < a.size)])
    tp, fp = a.size - gone, b.size - np.arange(gone.size) + gone
    if ties_together:
        ranked = scores[order]
        last = np.concatenate([[True], ranked[1:] > ranked[:-1], [True]])
        tp, fp = tp[last], fp[last]
    return tp, fp


def _joined(hits: np.ndarray, alarms: np.ndarray) -> float:
    """Area under the precision-recall points in order of decreasing recall, joined by lines down to (0, 0)."""
    shown = hits + alarms > 0
    recall = hits[shown] / hits[0]
    precision = hits[shown] / (hits + alarms)[shown]
    return _area(np.append(precision, 0), np.append(recall, 0))


def _area(y: np.ndarray, x: np.ndarray) -> float:
    """Area under points in order of decreasing x, joined by lines."""
    return float(-np.diff(x) @ (y[1:] + y[:-1]) / 2)
