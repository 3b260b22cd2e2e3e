"""Metrics against scikit-learn, their definitions and closed forms; intervals against their coverage."""

import itertools
import math
import re
from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom, norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from robustood.metrics import (
    Estimate,
    acceptance,
    as_printed,
    aupr,
    auroc,
    confidence_interval,
    detection_error,
    fpr_at_tpr,
    paired_difference,
    proportion,
    roc,
    threshold_at_tpr,
    tie_rate,
)

NAN, INF = float("nan"), float("inf")


@st.composite
def outcomes(draw):
    """(successes, n, confidence)"""
    n = draw(st.integers(1, 400))
    return draw(st.integers(0, n)), n, draw(st.floats(0.5, 0.999))


@given(outcomes())
def test_the_ends_solve_the_defining_equations(outcome):
    k, n, confidence = outcome
    estimate, tail = proportion(k, n, confidence), (1 - confidence) / 2
    assert estimate.value == k / n and estimate.n == n
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    if k > 0:  # P(X >= k) at the lower end
        assert binom.sf(k - 1, n, estimate.low) == pytest.approx(tail, rel=1e-6)
    else:
        assert estimate.low == 0
    if k < n:  # P(X <= k) at the upper end
        assert binom.cdf(k, n, estimate.high) == pytest.approx(tail, rel=1e-6)
    else:
        assert estimate.high == 1


@given(st.integers(1, 2000), st.floats(0.5, 0.999))
def test_no_and_only_successes_have_a_closed_form(n, confidence):
    end = ((1 - confidence) / 2) ** (1 / n)
    none, all_ = proportion(0, n, confidence), proportion(n, n, confidence)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - end, abs=1e-9)
    assert (all_.value, all_.high) == (1, 1)
    assert all_.low == pytest.approx(end, abs=1e-9)


@given(outcomes())
def test_the_ends_are_quantiles_of_beta_distributions(outcome):
    k, n, confidence = outcome
    estimate, tail = proportion(k, n, confidence), (1 - confidence) / 2
    if 0 < k < n:
        assert estimate.low == pytest.approx(beta.ppf(tail, k, n - k + 1), abs=1e-9)
        assert estimate.high == pytest.approx(beta.isf(tail, k + 1, n - k), abs=1e-9)


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95])
@pytest.mark.parametrize("n", [1, 7, 30])
def test_coverage_by_enumeration_never_falls_below_the_confidence(n, confidence):
    ends = [proportion(k, n, confidence) for k in range(n + 1)]
    low, high = np.array([(e.low, e.high) for e in ends]).T
    rates = np.concatenate(
        [[0.001, 0.03, 0.1, 0.37, 0.5, 0.8, 0.95, 0.999], np.linspace(0, 1, 101)]
    )
    for rate in rates:
        covered = (low <= rate) & (rate <= high)
        assert binom.pmf(np.arange(n + 1), n, rate)[covered].sum() >= confidence - 1e-9, rate


def test_the_interval_is_not_wider_than_it_must_be():
    """Just inside an end the tail is larger than the nominal one: a narrower interval would not do."""
    estimate = proportion(30, 100)
    assert binom.sf(29, 100, estimate.low + 1e-4) > 0.025
    assert binom.cdf(30, 100, estimate.high - 1e-4) > 0.025
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * (0.21 / 100) ** 0.5, rel=0.08)


@given(outcomes())
def test_failures_mirror_successes_and_confidence_widens(outcome):
    k, n, confidence = outcome
    one, other = proportion(k, n, confidence), proportion(n - k, n, confidence)
    assert other.low == pytest.approx(1 - one.high, abs=1e-9)
    assert other.high == pytest.approx(1 - one.low, abs=1e-9)
    wider = proportion(k, n, (1 + confidence) / 2)
    assert wider.low <= one.low and wider.high >= one.high


def test_more_data_narrow_the_interval():
    widths = [proportion(n // 4, n) for n in (8, 40, 200, 1000)]
    sizes = [e.high - e.low for e in widths]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.06


def test_an_estimate_writes_itself_with_its_interval():
    estimate = Estimate(0.93125, 0.9, 1.0, 160)
    assert str(estimate) == f"{estimate}" == "0.931 [0.900, 1.000]"
    assert f"{estimate:.1f}" == "0.9 [0.9, 1.0]"
    assert f"{estimate:.1%}" == "93.1 [90.0, 100.0]"


def test_an_estimate_prints_and_converts_and_cannot_change():
    estimate = proportion(95, 100)
    assert str(estimate) == f"{estimate}" == "0.950 [0.887, 0.984]"
    assert float(estimate) == 0.95
    assert estimate == Estimate(0.95, estimate.low, estimate.high, 100)
    with pytest.raises(FrozenInstanceError):
        estimate.value = 1.0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((1, 0), ("n must", "at least 1", "0")),
        ((0, -5), ("n must", "-5")),
        ((-1, 5), ("successes", "-1")),
        ((6, 5), ("successes", "at most n = 5", "6")),
        ((2.0, 5), ("successes", "2.0", "whole")),
        ((2, 5.0), ("n must", "5.0", "whole")),
        ((True, 5), ("successes", "True")),
        ((2, 5, 95), ("confidence", "95", "write 0.95")),
        ((2, 5, 1.0), ("confidence", "1.0", "write 0.95")),
        ((2, 5, 0.05), ("confidence", "0.05", "write 0.95")),
        ((2, 5, NAN), ("confidence", "nan", "write 0.95")),
        ((2, 5, "95%"), ("confidence", "'95%'", "write 0.95")),
    ],
)
def test_bad_input_is_refused_with_name_value_and_fix(untyped, arguments, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        proportion(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


# ---------------------------------------------------------------------------------------------
# Scores: continuous, heavily tied, constant, infinite, tiny.

RNG = np.random.default_rng(6)
CASES = {
    "random": (RNG.normal(1, 1, 300), RNG.normal(0, 2, 170)),
    "tied": (RNG.integers(2, 6, 200) / 4, RNG.integers(0, 5, 90) / 4),
    "saturated": (np.minimum(RNG.normal(1, 1, 150), 1), np.minimum(RNG.normal(0, 1, 150), 1)),
    "constant": (np.ones(7), np.ones(5)),
    "infinite": (np.array([INF, INF, 1.0, 0.3, -INF]), np.array([-INF, 0.3, INF, -INF])),
    "one each": (np.array([0.2]), np.array([0.1])),
    "perfect": (np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0])),
    "backwards": (np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])),
    "close": (np.array([1 + 2**-52, 1.0, 1e-320]), np.array([1.0, 0.0, 1 - 2**-53])),
}
each_case = pytest.mark.parametrize("pair", CASES.values(), ids=CASES)
sides = st.lists(
    st.one_of(st.integers(-4, 4).map(float), st.floats(allow_nan=False)), min_size=1, max_size=40
).map(np.array)
shares = st.one_of(st.sampled_from([0.05, 0.5, 0.95, 1.0]), st.floats(1e-6, 1))
SYMMETRIC = (auroc, tie_rate, detection_error, partial(detection_error, prior="empirical"))
SIDED = [partial(metric, positive=side) for metric in (fpr_at_tpr, aupr) for side in ("in", "out")]


def labelled(a, b):
    """Labels and finite scores of the same order, as scikit-learn wants them."""
    ranks = np.unique(np.concatenate([a, b]), return_inverse=True)[1]
    return np.repeat([1, 0], [len(a), len(b)]), ranks.astype(float)


def agrees_with_sklearn(a, b, tpr):
    y, s = labelled(a, b)
    close = partial(pytest.approx, rel=0, abs=1e-12)
    assert auroc(a, b) == close(roc_auc_score(y, s))
    for side, truth, score in (("in", y, s), ("out", 1 - y, -s)):
        assert aupr(a, b, positive=side) == close(average_precision_score(truth, score))
        false, true, _ = roc_curve(truth, score, drop_intermediate=False)
        assert fpr_at_tpr(a, b, tpr, positive=side) == close(false[true >= tpr][0])
    false, true, _ = roc_curve(y, s, drop_intermediate=False)
    fpr, hit, thresholds = roc(a, b)
    assert np.allclose([fpr, hit], [false, true], rtol=0, atol=1e-12)
    assert np.array_equal(thresholds[1:], np.unique(np.concatenate([a, b]))[::-1])
    assert thresholds[0] == INF and (fpr[0], hit[0], fpr[-1], hit[-1]) == (0, 0, 1, 1)


@each_case
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.95, 1.0])
def test_agreement_with_sklearn(pair, tpr):
    agrees_with_sklearn(*pair, tpr)


@given(sides, sides, shares)
def test_agreement_with_sklearn_on_anything(a, b, tpr):
    agrees_with_sklearn(a, b, tpr)


@given(sides, sides, st.floats(0, 1))
def test_the_metrics_are_what_their_definitions_say(a, b, prior):
    won = [0.5 * (x == y) + (x > y) for x, y in itertools.product(a, b)]
    assert auroc(a, b) == pytest.approx(np.mean(won), abs=1e-12)
    assert tie_rate(a, b) == pytest.approx(np.mean(np.equal(won, 0.5)), abs=1e-12)
    for side, positive, negative in (("in", a, b), ("out", -b, -a)):
        precision = [
            (positive >= t).sum() / ((positive >= t).sum() + (negative >= t).sum())
            for t in positive
        ]
        assert aupr(a, b, positive=side) == pytest.approx(np.mean(precision), abs=1e-12)
    for weight, given_ in ((prior, prior), (len(a) / (len(a) + len(b)), "empirical")):
        errors = [weight]  # accept nothing
        for t in np.concatenate([a, b]):
            errors.append(weight * np.mean(a < t) + (1 - weight) * np.mean(b >= t))
        assert detection_error(a, b, prior=given_) == pytest.approx(min(errors), abs=1e-12)


@given(sides, shares)
def test_the_threshold_is_the_highest_that_accepts_enough(a, tpr):
    t = threshold_at_tpr(a, tpr)
    assert t in a and np.mean(a >= t) >= tpr
    assert np.mean(a > t) < tpr  # any higher threshold accepts at most these


def test_the_two_sides_of_fpr_by_their_definitions():
    for a, b in CASES.values():
        t = max(t for t in a if np.mean(a >= t) >= 0.8)
        assert fpr_at_tpr(a, b, 0.8, positive="in") == np.mean(b >= t)
        t = min(t for t in b if np.mean(b <= t) >= 0.8)
        assert fpr_at_tpr(a, b, 0.8, positive="out") == np.mean(a <= t)


@pytest.mark.parametrize(("share", "n"), [(0.07, 100), (0.95, 20), (0.29, 100), (0.57, 100)])
def test_a_share_that_floats_cannot_write_keeps_the_right_count(share, n):
    """0.07 * 100 is 7.000000000000001: one score too many if taken at its word."""
    assert threshold_at_tpr(np.arange(n), share) == n - round(share * n)


# ---------------------------------------------------------------------------------------------
# Invariants


@given(sides, sides, st.data())
def test_strictly_increasing_maps_change_nothing(a, b, data):
    levels = np.unique(np.concatenate([a, b]))
    steps = data.draw(st.lists(st.integers(1, 9), min_size=len(levels), max_size=len(levels)))
    image = np.cumsum(steps) - 20.0
    c, d = (image[np.searchsorted(levels, side)] for side in (a, b))
    for metric in (*SYMMETRIC, *SIDED):
        assert metric(a, b) == metric(c, d)
    for code in ("aloe", "atom"):
        assert as_printed(a, b, code) == as_printed(c, d, code)


@given(sides, sides)
def test_swapping_and_negating_the_sides(a, b):
    assert auroc(a, b) == pytest.approx(1 - auroc(b, a), abs=1e-12)
    assert auroc(a, b) == pytest.approx(auroc(-b, -a), abs=1e-12)
    assert detection_error(a, b, prior=0.3) == pytest.approx(detection_error(-b, -a, prior=0.7))
    for metric in (fpr_at_tpr, aupr):
        assert metric(a, b, positive="out") == metric(-b, -a, positive="in")


@given(sides, sides, st.data())
def test_order_of_samples_and_kind_of_container_do_not_matter(a, b, data):
    c = data.draw(st.permutations(list(a)))
    for metric in (*SYMMETRIC, *SIDED):
        value = metric(a, b)
        assert metric(c, list(b)) == metric(torch.tensor(a), torch.tensor(b)) == value
        assert type(value) is float


@given(sides, sides)
def test_more_is_asked_more_is_paid(a, b):
    paid = [fpr_at_tpr(a, b, tpr, positive="in") for tpr in (0.1, 0.5, 0.9, 1.0)]
    assert paid == sorted(paid)
    assert detection_error(a, b) <= 0.5
    better = a + 1  # higher in-distribution scores never hurt
    assert auroc(better, b) >= auroc(a, b)
    assert aupr(better, b, positive="in") >= aupr(a, b, positive="in") - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_any_type_and_with_gradients(dtype):
    a, b = torch.tensor([3, 2, 2]).to(dtype), torch.tensor([1, 2]).to(dtype)
    if dtype.is_floating_point:
        a.requires_grad_()
    assert auroc(a, b) == pytest.approx(5 / 6)
    assert aupr(a, b, positive="in") == pytest.approx((1 + 2 * 3 / 4) / 3)


def test_no_information_gives_the_base_rate():
    a, b = np.zeros(30), np.zeros(10)
    assert auroc(a, b) == 0.5 and tie_rate(a, b) == 1
    assert aupr(a, b, positive="in") == 0.75 and aupr(a, b, positive="out") == 0.25
    assert fpr_at_tpr(a, b, positive="in") == fpr_at_tpr(a, b, positive="out") == 1
    assert detection_error(a, b) == 0.5 and detection_error(a, b, prior="empirical") == 0.25


def test_inputs_are_left_as_they_were():
    a, b = RNG.normal(size=50), RNG.normal(size=40)
    before = a.copy(), b.copy()
    for metric in (*SYMMETRIC, *SIDED, roc, partial(as_printed, code="aloe")):
        metric(a, b)
    threshold_at_tpr(a)
    assert np.array_equal(a, before[0]) and np.array_equal(b, before[1])


# ---------------------------------------------------------------------------------------------
# Closed forms: scores at the quantiles of two normal laws

GRID = norm.ppf((np.arange(20_000) + 0.5) / 20_000)


@pytest.mark.parametrize(("mean", "deviation"), [(1.0, 1.0), (7.13, 4.34), (-0.5, 0.3)])
def test_gaussian_scores_have_closed_forms(mean, deviation):
    a, b = mean + deviation * GRID, GRID
    assert auroc(a, b) == pytest.approx(norm.cdf(mean / np.hypot(deviation, 1)), abs=1e-4)
    z = norm.ppf(0.95)
    accepted_out = norm.sf(mean - deviation * z)
    rejected_in = norm.cdf((z - mean) / deviation)
    assert fpr_at_tpr(a, b, positive="in") == pytest.approx(accepted_out, abs=1e-3)
    assert fpr_at_tpr(a, b, positive="out") == pytest.approx(rejected_in, abs=1e-3)

    def precision(t):
        hits = norm.sf(t, mean, deviation)
        return hits / (hits + norm.sf(t)) * norm.pdf(t, mean, deviation)

    area = quad(precision, mean - 9 * deviation, mean + 9 * deviation, points=[mean], limit=200)[0]
    assert aupr(a, b, positive="in") == pytest.approx(area, abs=3e-4)
    grid = np.linspace(-40, 40, 400_001)
    error = (norm.cdf(grid, mean, deviation) + norm.sf(grid)) / 2
    assert detection_error(a, b) == pytest.approx(error.min(), abs=2e-4)


def test_one_pair_of_laws_two_false_positive_rates():
    a, b = 7.13 + 4.34 * GRID, GRID
    assert fpr_at_tpr(a, b, positive="in") == pytest.approx(0.503, abs=1e-3)
    assert fpr_at_tpr(a, b, positive="out") == pytest.approx(0.103, abs=1e-3)


def test_equal_variances_balance_at_the_middle():
    assert detection_error(2 + GRID, GRID) == pytest.approx(norm.sf(1), abs=2e-4)


# ---------------------------------------------------------------------------------------------
# Intervals


def test_acceptance_is_a_binomial_rate():
    scores = [0.1, 0.5, 0.5, 0.9, INF]
    assert acceptance(scores, 0.5) == proportion(4, 5)
    assert acceptance(scores, np.nextafter(0.5, 1), 0.9) == proportion(2, 5, 0.9)
    assert acceptance(scores, -INF).value == 1 and acceptance(scores[:4], INF).value == 0


def test_calibrating_on_one_set_and_applying_to_another_is_fpr_at_tpr():
    for a, b in CASES.values():
        share = acceptance(b, threshold_at_tpr(a, 0.7)).value
        assert share == fpr_at_tpr(a, b, 0.7, positive="in")


def test_delong_equals_its_definition():
    a, b = CASES["tied"]
    won = np.greater.outer(a, b) + 0.5 * np.equal.outer(a, b)
    error = np.sqrt(won.mean(1).var(ddof=1) / len(a) + won.mean(0).var(ddof=1) / len(b))
    value = won.mean()
    estimate = confidence_interval(auroc, a, b, method="delong")
    middle, reach = np.log(value / (1 - value)), 1.959964 * error / (value * (1 - value))
    ends = 1 / (1 + np.exp(-(middle + np.array([-reach, reach]))))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(ends), abs=1e-7)
    assert (estimate.value, estimate.n) == (pytest.approx(value), len(a) + len(b))
    assert confidence_interval(auroc, a, b) == estimate


@pytest.mark.parametrize(("value", "n", "m"), [(0.7, 40, 40), (0.9, 60, 30), (0.97, 100, 100)])
def test_delong_covers_the_true_auroc(value, n, m):
    rng, shift, hits = np.random.default_rng(1), norm.ppf(value) * 2**0.5, 0
    for _ in range(400):
        found = confidence_interval(auroc, rng.normal(shift, 1, n), rng.normal(0, 1, m))
        hits += found.low <= value <= found.high
    assert 0.90 <= hits / 400 <= 0.985


def test_delong_and_the_bootstrap_agree():
    rng = np.random.default_rng(2)
    a, b = rng.normal(1.2, 1, 400), rng.normal(0, 1, 300)
    one = confidence_interval(auroc, a, b)
    other = confidence_interval(auroc, a, b, method="bootstrap", resamples=1500)
    assert one.value == other.value
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.006)


def test_the_bootstrap_covers_a_rate_at_an_estimated_threshold(untyped):
    """The binomial interval at that threshold forgets that the threshold moves, and covers less."""
    rng, true = np.random.default_rng(3), norm.sf(2 - norm.ppf(0.95))
    metric, covered = partial(fpr_at_tpr, positive="in"), np.zeros(2)
    for _ in range(80):
        a, b = rng.normal(2, 1, 150), rng.normal(0, 1, 600)
        naive = acceptance(b, threshold_at_tpr(a))
        boot = confidence_interval(metric, a, b, resamples=120)
        covered += [e.low <= true <= e.high for e in (naive, boot)]
    assert covered[1] / 80 > 0.85 and covered[0] / 80 < 0.75


def end(k, confidence=0.95):
    return ((1 - confidence) / 2) ** (1 / k)


@pytest.mark.parametrize(
    ("a", "b", "value", "low", "high"),
    [
        ([2, 3, 4, 5], [0, 1, 1], 1, end(3), 1),
        ([0, 1, 1], [2, 3, 4, 5], 0, 0, 1 - end(3)),
        ([7, 7, 7], [7, 7, 7, 7], 0.5, end(3) / 2, 1 - end(3) / 2),
    ],
)
def test_where_the_sample_holds_no_variation_the_interval_still_has_width(a, b, value, low, high):
    found = confidence_interval(auroc, a, b)
    assert found.value == value
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_a_rate_of_zero_gets_the_interval_of_no_successes():
    a, b = np.arange(50) + 100.0, np.arange(80.0)
    found = confidence_interval(partial(fpr_at_tpr, positive="in"), a, b, resamples=50)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(proportion(0, 50).high, abs=1e-9)
    bootstrap = partial(confidence_interval, auroc, method="bootstrap", resamples=50)
    assert bootstrap(a, b) == confidence_interval(auroc, a, b)
    assert bootstrap([7.0] * 50, [7.0] * 80) == confidence_interval(auroc, [7.0] * 50, [7.0] * 80)


def test_the_interval_for_perfect_separation_covers():
    """P(all pairs right) is at most AUROC^min(n, m): below the lower end it is under 2.5 %."""
    rng, low = np.random.default_rng(4), end(8)
    shift = norm.ppf(low) * 2**0.5
    perfect = [rng.normal(shift, 1, 8).min() > rng.normal(0, 1, 8).max() for _ in range(4000)]
    assert np.mean(perfect) <= 0.03


@given(sides, sides, st.floats(0.5, 0.99))
def test_every_interval_holds_its_value_and_stays_inside(a, b, confidence):
    if min(len(a), len(b)) < 2:
        return
    options = {"confidence": confidence, "resamples": 20}
    for metric in (auroc, partial(aupr, positive="out"), detection_error):
        found = confidence_interval(metric, a, b, **options)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.value == metric(a, b) and found.n == len(a) + len(b)


def test_the_bootstrap_repeats_with_its_seed_and_narrows_with_data():
    rng = np.random.default_rng(5)
    a, b = rng.normal(1, 1, 900), rng.normal(0, 1, 900)
    interval = partial(confidence_interval, detection_error, resamples=200)
    assert interval(a, b) == interval(a, b) != interval(a, b, seed=1)
    few, many = interval(a[:100], b[:100]), interval(a, b)
    assert 2 < (few.high - few.low) / (many.high - many.low) < 4.5
    assert interval(a, b, confidence=0.5).low > many.low


def test_a_pair_of_detectors_on_the_same_inputs():
    rng = np.random.default_rng(7)
    a, b = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
    c, d = a + rng.normal(0, 0.3, 300), b + rng.normal(0, 0.3, 300)
    difference = paired_difference(auroc, (a, b), (c, d), resamples=400)
    assert difference.value == pytest.approx(auroc(a, b) - auroc(c, d))
    assert difference.n == 600
    alone = [confidence_interval(auroc, *pair) for pair in ((a, b), (c, d))]
    apart = math.hypot(*(e.high - e.low for e in alone))  # what independent samples would give
    assert difference.high - difference.low < 0.6 * apart
    back = paired_difference(auroc, (c, d), (a, b), resamples=400)
    assert (back.value, back.low) == pytest.approx((-difference.value, -difference.high))
    same = paired_difference(auroc, (a, b), (a, b), resamples=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_pair_of_perfect_detectors_may_still_differ():
    """Five disjoint pairs, all alike in both: another outcome has a probability of at most 1 - end(5)."""
    up, down = [7.0, 8, 9, 10, 11], [1.0, 2, 3, 4, 5]
    first = up, down
    other = [20.0, 30, 40, 50, 60], down
    rest = 1 - end(5)
    for second, wanted in ((other, (0, -rest, rest)), ((down, up), (1, 1 - 2 * rest, 1))):
        found = paired_difference(auroc, first, second, resamples=20)
        assert (found.value, found.low, found.high) == pytest.approx(wanted, abs=1e-9)


# ---------------------------------------------------------------------------------------------
# What the papers' programs print


def printed_by_hand(a, b, ties_together):
    """The sweep step by step: (TPR, FPR, precision in, precision out) with empty ones as None."""
    events = sorted([(s, 0) for s in a] + [(s, 1) for s in b])
    tp, fp, points = len(a), len(b), []
    for position in range(len(events) + 1):
        tied = 0 < position < len(events) and events[position][0] == events[position - 1][0]
        if not (ties_together and tied):
            points.append((tp, fp))
        if position < len(events):
            tp, fp = (tp - 1, fp) if events[position][1] == 0 else (tp, fp - 1)
    return points


def under(points):
    """Trapezoids under (x, y), x not falling."""
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


@given(sides, sides, st.sampled_from(["aloe", "atom"]))
def test_the_printed_numbers_follow_the_sweep(a, b, code):
    points = printed_by_hand(a, b, ties_together=code == "atom")
    n, m = len(a), len(b)
    found = as_printed(a, b, code)
    assert found["auroc"] == pytest.approx(under([(f / m, t / n) for t, f in points][::-1]))
    inside = [(0, 0)] + [(t / n, t / (t + f)) for t, f in points[::-1] if t + f]
    outside = [(0, 0)]
    outside += [(1 - f / m, (m - f) / (n + m - t - f)) for t, f in points if t + f < n + m]
    assert found["aupr_in"] == pytest.approx(under(inside), abs=1e-12)
    assert found["aupr_out"] == pytest.approx(under(outside), abs=1e-12)
    if code == "aloe":
        t, f = min(points, key=lambda point: abs(point[0] / n - 0.95))  # the first of the nearest
        assert (found["fpr"], found["fnr"]) == pytest.approx((f / m, 1 - t / n))
        assert found["detection_error"] == pytest.approx(detection_error(a, b))
        assert found["auroc"] == pytest.approx(np.greater.outer(a, b).mean(), abs=1e-12)
    else:
        threshold = sorted(a)[round(0.05 * n)]
        assert (found["fpr"], found["fnr"]) == (np.mean(b > threshold), np.mean(a <= threshold))
        assert found["detection_error"] == pytest.approx(detection_error(a, b, prior="empirical"))
        assert found["auroc"] == pytest.approx(auroc(a, b), abs=1e-12)


def test_without_ties_and_with_many_scores_the_printed_numbers_are_the_metrics():
    a, b = 1 + GRID[::4], GRID[1::4]
    assert tie_rate(a, b) == 0
    for code in ("aloe", "atom"):
        found = as_printed(a, b, code)
        assert found["auroc"] == pytest.approx(auroc(a, b), abs=1e-12)
        assert found["fpr"] == pytest.approx(fpr_at_tpr(a, b, positive="in"), abs=1e-3)
        assert found["detection_error"] == pytest.approx(detection_error(a, b), abs=1e-12)
        assert found["aupr_in"] == pytest.approx(aupr(a, b, positive="in"), abs=2e-3)
        assert found["aupr_out"] == pytest.approx(aupr(a, b, positive="out"), abs=2e-3)


def test_all_tied_is_nothing_for_one_program_and_perfect_for_the_other():
    one, other = (as_printed(np.ones(100), np.ones(100), code) for code in ("aloe", "atom"))
    assert (one["auroc"], one["fpr"]) == (0, 1)
    assert (other["auroc"], other["fpr"], other["fnr"]) == (0.5, 0, 1)
    assert auroc(np.ones(100), np.ones(100)) == 0.5


def test_a_perfect_detector_is_not_printed_as_perfect():
    a, b = np.arange(1000) + 1000.0, np.arange(1000.0)
    found = as_printed(a, b, "aloe")
    assert found["aupr_in"] == found["aupr_out"] == pytest.approx(0.9995, abs=1e-12)
    assert aupr(a, b, positive="in") == aupr(a, b, positive="out") == 1


def test_strictly_greater_loses_one_of_ten_thousand():
    assert 1 - as_printed(np.arange(10_000), [0.5], "atom")["fnr"] == pytest.approx(0.9499)


def test_straight_lines_halve_the_aupr_of_a_detector_that_says_only_yes_or_no():
    """Accepts 97.5 % of one side and 20 % of the other: two points, and a line down to (0, 0)."""
    a, b = np.repeat([1.0, 0.0], [975, 25]), np.repeat([1.0, 0.0], [200, 800])
    precision = 975 / 1175
    line = 0.975 * precision / 2 + 0.025 * (precision + 0.5) / 2
    assert as_printed(a, b, "atom")["aupr_in"] == pytest.approx(line, abs=1e-12)
    assert round(line, 2) == 0.42 and round(aupr(a, b, positive="in"), 2) == 0.82


# ---------------------------------------------------------------------------------------------
# Bad input

PAIR = ([1.0, 2.0, 3.0], [0.0, 1.0])


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: auroc([], [1.0]), ("scores_in is empty", "each side")),
        (lambda: auroc([1.0], []), ("scores_out is empty", "each side")),
        (lambda: auroc([1.0, NAN], [1.0]), ("scores_in holds 1 NaN among 2",)),
        (lambda: aupr([1.0], [NAN], positive="in"), ("scores_out holds 1 NaN",)),
        (lambda: tie_rate(np.ones((2, 3)), [1.0]), ("scores_in", "(2, 3)", "ravel")),
        (lambda: roc([1.0], 3.0), ("scores_out", "one axis", "()")),
        (lambda: auroc(["a"], [1.0]), ("scores_in must be numbers", "'a'")),
        (lambda: auroc(torch.ones(2, 1), [1.0]), ("scores_in", "(2, 1)")),
        (lambda: fpr_at_tpr(*PAIR, 95, positive="in"), ("tpr", "95", "write 0.95")),
        (lambda: fpr_at_tpr(*PAIR, 0.0, positive="in"), ("tpr", "0.0", "write 0.95")),
        (lambda: threshold_at_tpr([1.0], NAN), ("tpr", "nan")),
        (lambda: fpr_at_tpr(*PAIR, positive="ood"), ("positive", "'in', 'out'", "'ood'")),
        (lambda: aupr(*PAIR, positive=1), ("positive", "'in', 'out'", "1")),
        (lambda: detection_error(*PAIR, prior=50), ("prior", "50", "empirical")),
        (lambda: detection_error(*PAIR, prior="half"), ("prior", "'half'", "empirical")),
        (lambda: acceptance([], 0.5), ("scores is empty",)),
        (lambda: acceptance([1.0], NAN), ("threshold", "nan", "threshold_at_tpr")),
        (lambda: acceptance([1.0], 0.5, 95), ("confidence", "95", "0.95")),
        (lambda: confidence_interval(auroc, *PAIR, method="exact"), ("method", "'delong'")),
        (
            lambda: confidence_interval(detection_error, *PAIR, method="delong"),
            ("delong", "auroc only", "bootstrap"),
        ),
        (lambda: confidence_interval(auroc, *PAIR, confidence=2), ("confidence", "2")),
        (lambda: confidence_interval(detection_error, *PAIR, resamples=0), ("resamples", "0")),
        (lambda: confidence_interval(auroc, [1.0], [1.0, 2.0]), ("at least 2", "1 in and 2 out")),
        (
            lambda: paired_difference(auroc, PAIR, (PAIR[0], [1.0])),
            ("same inputs", "3 in and 2 out against 3 and 1"),
        ),
        (lambda: paired_difference(auroc, PAIR, (PAIR[0],)), ("second must be", "1 parts")),
        (lambda: as_printed(*PAIR, "odin"), ("code", "'aloe', 'atom'", "'odin'")),
    ],
)
def test_bad_scores_and_options_are_refused_with_name_value_and_fix(untyped, call, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("metric", [fpr_at_tpr, aupr])
def test_the_positive_side_has_to_be_said(metric):
    with pytest.raises(TypeError, match="positive"):
        metric(*PAIR)
