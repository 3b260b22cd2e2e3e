"""The toy distributions: every closed form against an oracle that does not know it."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm

from robustood.toy import (
    GaussianOutliers,
    TsiprasDistribution,
    adversarial_linear,
    adversarial_svm,
    frontier_lp,
    population_hinge,
)

PAPER = TsiprasDistribution(p=0.95, d=100, eta=0.3)
STRONG = TsiprasDistribution(p=0.95, d=100, eta=0.4)

reliability = st.floats(0.5, 0.999)
distributions = st.builds(
    TsiprasDistribution, p=reliability, d=st.integers(1, 300), eta=st.floats(0.01, 0.49)
)
budgets = st.floats(0.0, 1.5)
ratios = st.floats(0.0, 20.0)


def attacked_accuracy(w, x, y, eps, bias=0.0):
    """Move the points themselves: the worst shift of coordinate i is -eps y sign(w_i)."""
    w = torch.as_tensor(w, dtype=torch.float64)
    moved = x.double() - eps * y[:, None] * w.sign()
    return ((moved @ w + bias) * y > 0).double().mean().item()


def within_four_errors(measured, exact, n):
    assert abs(measured - exact) <= 4 * np.sqrt(exact * (1 - exact) / n) + 4 / n


# ---- the sample -------------------------------------------------------------------------------


def test_the_sample_has_the_stated_law():
    n = 40_000
    x, y = PAPER.sample(n, seed=0)
    assert x.shape == (n, 101) and x.dtype == torch.float32
    assert set(y.tolist()) == {-1, 1} and set(x[:, 0].tolist()) == {-1.0, 1.0}
    within_four_errors((y == 1).double().mean().item(), 0.5, n)
    within_four_errors((x[:, 0] == y).double().mean().item(), 0.95, n)
    weak = x[:, 1:].double() * y[:, None]
    assert weak.mean().item() == pytest.approx(0.3, abs=4 / np.sqrt(100 * n))
    assert weak.var().item() == pytest.approx(1.0, abs=4 * np.sqrt(2 / (100 * n)))
    centred = weak - weak.mean(0)
    covariance = centred.T @ centred / n
    assert (covariance - torch.eye(100)).abs().max().item() < 6 / np.sqrt(n) * np.sqrt(2)


def test_the_seed_decides_and_the_global_state_is_untouched():
    state = torch.get_rng_state()
    first, again, other = (PAPER.sample(50, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# ---- linear classifiers -----------------------------------------------------------------------

rng = np.random.default_rng(0)
WEIGHTS = {
    "equal": np.concatenate([[0.5], np.full(100, 0.1)]),
    "random": rng.normal(size=101),
    "positive": np.abs(rng.normal(size=101)),
    "random signs": np.concatenate([[2.0], 0.3 * rng.choice([-1.0, 1.0], 100)]),
    "against x1": np.concatenate([[-0.7], np.full(100, 0.05)]),
    "all negative": -np.abs(rng.normal(size=101)),
    "one weak": np.eye(101)[0] + 0.5 * np.eye(101)[7],
}


@cache
def draw(eta, n):
    return TsiprasDistribution(0.95, 100, eta).sample(n, seed=1)


@pytest.mark.parametrize("eta", [0.3, 0.4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_linear_accuracy_is_what_attacked_samples_show(name, eta):
    dist, n = TsiprasDistribution(0.95, 100, eta), 20_000
    x, y = draw(eta, n)
    for eps in (0, eta / 2, eta, 2 * eta):
        for bias in (0.0, 0.8):
            exact = dist.linear_accuracy(WEIGHTS[name], eps, bias)
            within_four_errors(attacked_accuracy(WEIGHTS[name], x, y, eps, bias), exact, n)


def test_without_weak_weights_the_accuracy_is_an_indicator():
    plain = np.eye(101)[0]
    for eps in (0, 0.5, 0.999):
        assert PAPER.linear_accuracy(plain, eps) == 0.95
        assert PAPER.linear_accuracy(-plain, eps) == pytest.approx(0.05)
    assert PAPER.linear_accuracy(plain, 1.0) == 0  # the margin is zero: the adversary wins ties
    assert PAPER.linear_accuracy(plain, 1.5) == 0
    assert PAPER.linear_accuracy(0 * plain, 0) == 0
    assert PAPER.linear_accuracy(0 * plain, 0, bias=1.0) == 0.5  # a constant answer
    assert PAPER.linear_accuracy(plain, 0.5, bias=2.0) == 0.5
    assert PAPER.linear_accuracy(plain, 0.5, bias=0.2) == pytest.approx(0.95)


@given(distributions, st.integers(0, 10_000), budgets, budgets)
def test_linear_accuracy_never_rises_with_the_budget(dist, seed, a, b):
    w = np.random.default_rng(seed).normal(size=dist.d + 1)
    low, high = sorted((a, b))
    assert dist.linear_accuracy(w, high) <= dist.linear_accuracy(w, low) + 1e-12


@given(distributions, st.integers(0, 10_000), budgets, st.floats(0.01, 100))
def test_scale_permutation_and_the_flip_of_everything_change_nothing(dist, seed, eps, scale):
    generator = np.random.default_rng(seed)
    w, c = generator.normal(size=dist.d + 1), generator.normal()
    accuracy = dist.linear_accuracy(w, eps, c)
    shuffled = np.concatenate([w[:1], generator.permutation(w[1:])])
    assert dist.linear_accuracy(scale * w, eps, scale * c) == pytest.approx(accuracy, abs=1e-9)
    assert dist.linear_accuracy(shuffled, eps, c) == pytest.approx(accuracy, abs=1e-9)
    assert dist.linear_accuracy(w, eps, -c) == pytest.approx(accuracy, abs=1e-12)


def test_the_law_is_unchanged_by_flipping_x_and_y():
    x, y = PAPER.sample(20_000, seed=2)
    for w in WEIGHTS.values():
        for eps in (0, 0.3):
            assert attacked_accuracy(w, -x, -y, eps) == attacked_accuracy(w, x, y, eps)


@given(distributions, ratios, budgets)
def test_the_symmetric_family_is_a_special_case(dist, t, eps):
    w = np.concatenate([[t], np.full(dist.d, 1 / np.sqrt(dist.d))])
    assert dist.symmetric_accuracy(t, eps) == pytest.approx(dist.linear_accuracy(w, eps), abs=1e-10)


@given(distributions, budgets)
def test_limits_of_the_symmetric_family(dist, eps):
    assert dist.symmetric_accuracy(0.0, eps) == pytest.approx(dist.averaging_accuracy(eps))
    expected = norm.cdf(np.sqrt(dist.d) * (dist.eta - eps))
    assert dist.averaging_accuracy(eps) == pytest.approx(expected, abs=1e-14)
    if eps < 0.9:
        assert dist.symmetric_accuracy(1e4, eps) == pytest.approx(dist.p, abs=1e-12)
        assert dist.symmetric_accuracy(np.inf, eps) == dist.p
    assert dist.symmetric_accuracy(np.inf, max(eps, 1.0)) == 0


@given(distributions)
def test_averaging_standard_and_robust_accuracy_add_to_one(dist):
    total = dist.averaging_accuracy() + dist.averaging_accuracy(2 * dist.eta)
    assert total == pytest.approx(1.0, abs=1e-14)


def test_averaging_is_above_99_percent_from_three_over_root_d():
    assert PAPER.averaging_accuracy() == pytest.approx(0.99865, abs=1e-5)
    assert PAPER.averaging_accuracy(0.6) == pytest.approx(0.00135, abs=1e-5)


def test_the_best_linear_classifier():
    table = {0: 1.0, 0.05: 0.9999, 0.1: 0.9994, 0.2: 0.9889, 0.3: 0.95, 0.35: 0.95, 0.8: 0.95}
    grid = np.linspace(0, 12, 4001)
    for eps, expected in table.items():
        t, accuracy = STRONG.best_linear(eps)
        assert accuracy == pytest.approx(expected, abs=6e-5)
        assert accuracy == pytest.approx(STRONG.symmetric_accuracy(t, eps), abs=1e-12)
        assert accuracy >= STRONG.symmetric_accuracy(grid, eps).max() - 1e-9


@given(distributions, st.integers(0, 10_000), budgets)
def test_optimum_above_best_linear_above_any_linear(dist, seed, eps):
    w = np.random.default_rng(seed).normal(size=dist.d + 1)
    best = dist.best_linear(eps)[1]
    assert dist.optimal_robust_accuracy(eps) >= best - 1e-12
    if eps < 1:  # from 1 on the best linear one needs a bias
        assert best >= dist.linear_accuracy(w, eps) - 1e-9


# ---- every classifier -------------------------------------------------------------------------

RATIOS = np.array([0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 8])
STD = [0.99930, 0.99883, 0.99666, 0.99207, 0.98457, 0.97500, 0.96543, 0.95793, 0.95114, 0.95000]
ROB = [0.01162, 0.02161, 0.06347, 0.15072, 0.29311, 0.47500, 0.65689, 0.79928, 0.92839, 0.95000]
BOUND = [0.01321, 0.02218, 0.06353, 0.15073, 0.29311, 0.47500, 0.65689, 0.79928, 0.92839, 0.95000]


def test_the_frontier_table():
    assert PAPER.threshold() == pytest.approx(0.4907, abs=1e-4)
    standard, robust = PAPER.frontier(np.append(PAPER.threshold(), RATIOS))
    np.testing.assert_allclose(standard, [0.99947, *STD], atol=1e-5)
    np.testing.assert_allclose(robust, [0.00576, *ROB], atol=1e-5)
    np.testing.assert_allclose(PAPER.bound(1 - standard), [0.01009, *BOUND], atol=1e-5)
    assert PAPER.frontier(np.inf) == (0.95, 0.95)


@given(distributions, ratios)
def test_the_gap_identity(dist, t):
    standard, robust = dist.frontier(t)
    scale = 1 / (1 - dist.p)  # rounding of 1 - standard is multiplied by the odds
    assert dist.bound(1 - standard) - robust == pytest.approx(dist.gap(t), abs=1e-12 * scale)
    assert dist.gap(t) >= 0


def test_the_gap_identity_to_twelve_digits():
    standard, robust = PAPER.frontier(RATIOS)
    np.testing.assert_allclose(PAPER.bound(1 - standard) - robust, PAPER.gap(RATIOS), atol=1e-12)


def test_the_linear_program_finds_the_same_frontier():
    deltas = np.array([0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1])
    program = frontier_lp(PAPER, 0.6, deltas)
    np.testing.assert_allclose(program, [0.095, 0.19, 0.38, 0.57, 0.76, 0.95, 0.95], atol=1e-4)
    standard, robust = PAPER.frontier(np.linspace(PAPER.threshold(), 12, 4001))
    closed = np.interp(1 - deltas, standard[::-1], robust[::-1])
    width = 16 / 129
    assert np.abs(program - np.minimum(closed, 0.95)).max() < width / 100
    assert np.isnan(frontier_lp(PAPER, 0.6, 0.0)).all()  # nobody is always right


@pytest.mark.parametrize(("p", "d", "eta"), [(0.7, 25, 0.4), (0.9, 400, 0.1)])
def test_the_linear_program_elsewhere(p, d, eta):
    dist = TsiprasDistribution(p, d, eta)
    standard, robust = dist.frontier(np.array([1.0, 2.0, 3.0]))
    program = frontier_lp(dist, 2 * eta, 1 - standard, bins=101)
    np.testing.assert_allclose(program, robust, atol=0.01)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.2, 0.5])
def test_the_linear_program_finds_the_optimal_robust_accuracy(eps):
    best = frontier_lp(STRONG, eps, 0.5, bins=101)[0]
    assert best == pytest.approx(STRONG.optimal_robust_accuracy(eps), abs=0.002)


def test_the_optimal_robust_accuracy():
    table = {0: 1.0, 0.05: 0.9999, 0.1: 0.9995, 0.2: 0.9919, 0.3: 0.9595, 0.35: 0.9501, 0.4: 0.95}
    for eps, expected in table.items():
        assert STRONG.optimal_robust_accuracy(eps) == pytest.approx(expected, abs=6e-5)
    assert STRONG.optimal_robust_accuracy(0.99) == 0.95
    assert STRONG.optimal_robust_accuracy(1.0) == STRONG.optimal_robust_accuracy(3.0) == 0.5


@given(distributions, st.floats(0.0, 0.999))
def test_the_threshold_is_the_best_point_of_the_family(dist, eps):
    best = dist.optimal_robust_accuracy(eps)
    assert best >= dist.frontier(np.linspace(0, 15, 301), eps)[1].max() - 1e-12
    t = dist.threshold(eps)
    assert best == pytest.approx(dist.frontier(t, eps)[1], abs=1e-12)
    assert best >= dist.optimal_robust_accuracy(min(1.2, eps + 0.1)) - 1e-12


@pytest.mark.parametrize("t", [0.0, 0.49, 2.0, np.inf])
def test_answers_on_attacked_points_have_the_stated_accuracy(t):
    n, eps = 20_000, 0.6
    x, y = PAPER.sample(n, seed=5)
    standard, robust = PAPER.frontier(t, eps)
    moved = x - eps * y[:, None]  # every feature against the label, x1 included
    within_four_errors((PAPER.answer(x, t) == y).double().mean().item(), standard, n)
    within_four_errors((PAPER.answer(moved, t) == y).double().mean().item(), robust, n)


@given(reliability, st.integers(1, 300), st.floats(0.01, 0.45), st.integers(0, 10_000))
def test_no_linear_classifier_violates_the_bound(p, d, eta, seed):
    dist, generator = TsiprasDistribution(p, d, eta), np.random.default_rng(seed)
    w = np.concatenate([[generator.exponential(3)], generator.normal(1, 0.5, d) / np.sqrt(d)])
    bias = generator.normal() * generator.integers(2)
    for eps in (2 * eta, 3 * eta):
        delta = 1 - dist.linear_accuracy(w, 0, bias)
        assert dist.linear_accuracy(w, eps, bias) <= dist.bound(delta) + 1e-9


# ---- support vector machines ------------------------------------------------------------------

SVM_TABLE = {  # eps: (w1, standard, robust)
    0: (0.351, 1, 1),
    0.05: (0.386, 1, 0.9999),
    0.1: (0.430, 1, 0.9994),
    0.2: (0.582, 1, 0.9889),
    0.3: (0.914, 0.998, 0.9466),
    0.35: (0.957, 0.9877, 0.9462),
    0.4: (1, 0.95, 0.95),
    0.5: (1, 0.95, 0.95),
    0.8: (1, 0.95, 0.95),
}


@pytest.mark.parametrize("eps", SVM_TABLE)
def test_the_adversarial_svm_table(eps):
    w1, standard, robust = SVM_TABLE[eps]
    w = adversarial_svm(STRONG, eps)
    assert np.linalg.norm(w) == pytest.approx(1)
    assert w[0] == pytest.approx(w1, abs=0.002)
    assert STRONG.linear_accuracy(w, 0) == pytest.approx(standard, abs=1e-4)
    assert STRONG.linear_accuracy(w, eps) == pytest.approx(robust, abs=1e-4)
    assert STRONG.linear_accuracy(w, eps) <= STRONG.best_linear(eps)[1] + 1e-12


@pytest.mark.parametrize("d", [100, 1000])
@pytest.mark.parametrize(
    ("p", "w1"), [(0.7, 0.106), (0.95, 0.351), (0.975, 0.427), (0.99, 0.516), (0.999, 0.695)]
)
def test_theorem_two_for_the_standard_svm(p, w1, d):
    dist = TsiprasDistribution(p, d, 4 / np.sqrt(d))
    w = adversarial_svm(dist)
    assert w[0] == pytest.approx(w1, abs=0.002)
    assert dist.linear_accuracy(w, 0) > 0.99
    assert dist.linear_accuracy(w, 2 * dist.eta) < 0.01


@given(reliability, st.integers(16, 400), st.floats(1, 3))
@settings(max_examples=12)
def test_theorem_two_for_the_adversarial_svm(p, d, factor):
    dist = TsiprasDistribution(p, d, 1.5 / np.sqrt(d))
    assume(dist.eta <= 2 * p - 1)  # else the unit norm may cost more than x1 is worth
    eps = min(0.99, factor * dist.eta)
    w = adversarial_svm(dist, eps)
    assert w[0] == 1 and (w[1:] == 0).all()
    assert dist.linear_accuracy(w, 0) == dist.linear_accuracy(w, eps) == p


def test_the_population_hinge_is_the_expected_hinge():
    for w1, s, eps in [(0.4, 0.9, 0.0), (0.4, 0.9, 0.3), (-0.5, 0.2, 0.1), (1.0, 0.0, 0.5)]:
        total = 0.0
        for b, weight in ((1, 0.95), (-1, 0.05)):
            m = b * w1 - eps * abs(w1) + s * 10 * (0.4 - eps)

            def hinge(xi, m=m, s=s):
                return max(0.0, 1 - m - s * xi) * norm.pdf(xi)

            total += weight * quad(hinge, -12, 12, limit=400, points=[(1 - m) / max(s, 1e-9)])[0]
        assert population_hinge(STRONG, w1, s, eps) == pytest.approx(total, abs=1e-7)


def test_equal_weights_are_a_lemma_and_not_an_assumption():
    """Minimise the regularised hinge over all weights, without symmetry, in few dimensions."""
    dist = TsiprasDistribution(0.9, 4, 1.0)

    def objective(w, eps=0.2, decay=0.05):
        noise = np.linalg.norm(w[1:])
        loss = 0.0
        for b, weight in ((1, dist.p), (-1, 1 - dist.p)):
            short = 1 - (b * w[0] + dist.eta * w[1:].sum() - eps * np.abs(w).sum())
            loss += weight * (short * norm.cdf(short / noise) + noise * norm.pdf(short / noise))
        return loss + decay / 2 * (w @ w)

    start = np.array([0.5, 0.9, 0.1, 0.4, 0.2])
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-7, "fatol": 1e-13}
    found = minimize(objective, start, method="Nelder-Mead", options=options).x
    assert np.ptp(found[1:]) < 1e-3


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_finite_samples_tell_the_same_story(loss):
    x, y = STRONG.sample(2000, seed=0)
    standard, robust = (
        adversarial_linear(x, y, eps, loss=loss, steps=200, lr=0.02) for eps in (0, 0.8)
    )
    assert STRONG.linear_accuracy(standard, 0) > 0.999
    assert STRONG.linear_accuracy(standard, 0.8) < 0.01
    assert STRONG.linear_accuracy(robust, 0) == pytest.approx(0.95, abs=0.002)
    assert STRONG.linear_accuracy(robust, 0.8) == pytest.approx(0.95, abs=0.002)
    for w in (standard, robust):
        for eps in (0, 0.2, 0.4, 0.8):
            assert STRONG.linear_accuracy(w, eps) <= STRONG.optimal_robust_accuracy(eps) + 1e-12


def test_the_closed_form_objective_is_the_attacked_loss():
    """One step of training sees the loss of the points moved by hand."""
    x, y = STRONG.sample(200, seed=1)
    w = torch.linspace(-1, 1, 101)
    moved = x - 0.3 * y[:, None] * w.sign()
    by_hand = (moved @ w * y).double()
    closed = (x @ w * y - 0.3 * w.abs().sum()).double()
    torch.testing.assert_close(by_hand, closed, atol=1e-4, rtol=0)


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.4, 10, 0.3), r"p must .* got 0\.4.*flip"),
        ((1.0, 10, 0.3), r"p must .* got 1\.0"),
        ((float("nan"), 10, 0.3), "p must .* got nan"),
        ((0.9, 0, 0.3), "d must .* at least 1, got 0"),
        ((0.9, 10, 0.0), r"eta must .* got 0\.0.*sqrt"),
        ((0.9, 10, float("inf")), "eta must .* got inf"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TsiprasDistribution(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PAPER.sample(0, seed=0), "n must .* got 0"),
        (lambda: PAPER.linear_accuracy(np.ones(100), 0.1), r"w must be d \+ 1 = 101.*\(100,\)"),
        (lambda: PAPER.linear_accuracy(np.full(101, np.nan), 0.1), "w must be .*finite"),
        (lambda: PAPER.linear_accuracy(np.ones(101), -0.1), r"eps must .* got -0\.1"),
        (lambda: PAPER.averaging_accuracy(float("nan")), "eps must .* got nan"),
        (lambda: PAPER.bound(1.5), r"delta must .* got 1\.5"),
        (lambda: PAPER.frontier(-1.0), r"t must .* got -1\.0"),
        (lambda: TsiprasDistribution(0.9, 4, 0.7).frontier(1.0), r"eps must .* got 1\.4.*erased"),
        (lambda: frontier_lp(PAPER, 1.2, 0.01), r"eps must .* got 1\.2"),
        (lambda: frontier_lp(PAPER, 0.6, -0.01), r"deltas must .* got -0\.01"),
        (lambda: frontier_lp(PAPER, 0.6, 0.01, bins=2), "bins must .* got 2"),
        (lambda: adversarial_svm(PAPER, -1.0), r"eps must .* got -1\.0"),
        (lambda: adversarial_linear(*PAPER.sample(9, 0), 0.1, loss="zero"), "hinge"),
        (lambda: adversarial_linear(*PAPER.sample(9, 0), -0.1), r"eps must .* got -0\.1"),
        (
            lambda: adversarial_linear(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), 0.1),
            r"y must .* \[0, 1\]; map classes",
        ),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- which outliers a linear detector should learn from ---------------------------------------

OUTLIERS = GaussianOutliers()
SMALL = GaussianOutliers(d=20, sigma=2.0, eps=0.3, nu=1.0, rho=0.3, a=2.0, b=6.0)
directions = st.lists(st.floats(1e-3, 3) | st.floats(-3, -1e-3), min_size=20, max_size=20).map(
    np.array
)


def test_the_two_directions_of_the_pool_are_orthogonal():
    for world in (OUTLIERS, SMALL):
        assert world.mu @ world.mu == world.d
        assert world.u @ world.u == pytest.approx(1)
        assert world.mu @ world.u == pytest.approx(0, abs=1e-10)
        assert np.array_equal(world.u, world.u)


def test_the_pool_has_the_stated_kinds_and_centres():
    n = 40_000
    x, kind = SMALL.pool(n, np.random.default_rng(0), contamination=0.1)
    assert x.shape == (n, 20) and set(kind) == {0, 1, 2}
    centres = [-SMALL.mu, -2.0 * SMALL.mu + 6.0 * SMALL.u, SMALL.mu]
    for each, share, centre in zip(range(3), (0.3, 0.6, 0.1), centres, strict=True):
        rows = x[kind == each]
        within_four_errors(len(rows) / n, share, n)
        assert np.abs(rows.mean(0) - centre).max() < 5 * 2.0 / np.sqrt(len(rows))
        assert (rows - centre).std() == pytest.approx(2.0, rel=0.02)
    inside = SMALL.inside(n, np.random.default_rng(1))
    assert np.abs(inside.mean(0) - SMALL.mu).max() < 5 * 2.0 / np.sqrt(n)
    assert set(SMALL.pool(500, np.random.default_rng(2))[1]) == {0, 1}


@given(directions, st.floats(0.01, 100))
def test_the_rates_depend_on_the_direction_alone(theta, factor):
    for rate in (SMALL.fnr, SMALL.robust_fpr):
        assert rate(factor * theta) == pytest.approx(rate(theta), abs=1e-12)
    assert SMALL.fnr(-theta) == pytest.approx(1 - SMALL.fnr(theta), abs=1e-12)
    still = replace(SMALL, eps=0.0, nu=0.0)
    assert still.robust_fpr(theta) == pytest.approx(still.fnr(theta), abs=1e-12)  # mirror images
    assert SMALL.robust_fpr(theta) >= replace(SMALL, eps=0.1).robust_fpr(theta)
    assert SMALL.robust_fpr(theta) >= replace(SMALL, nu=0.5).robust_fpr(theta)


def test_the_rates_are_those_of_points_that_are_drawn_and_moved():
    n, rng = 60_000, np.random.default_rng(0)
    theta = SMALL.mu + 0.8 * rng.standard_normal(20)
    within_four_errors((SMALL.inside(n, rng) @ theta <= 0).mean(), SMALL.fnr(theta), n)
    v = SMALL.nu * theta / np.linalg.norm(theta)
    outliers = -SMALL.mu + v + SMALL.sigma * rng.standard_normal((n, 20))
    accepted = ((outliers + SMALL.eps * np.sign(theta)) @ theta > 0).mean()
    within_four_errors(accepted, SMALL.robust_fpr(theta), n)


def test_no_other_adversary_does_better():
    """Random shifts of the mean and of each outlier; for given ones the rate is elementary."""
    rng = np.random.default_rng(0)
    theta = SMALL.mu + rng.standard_normal(20)
    spread = SMALL.sigma * np.linalg.norm(theta)
    worst = 0.0
    for _ in range(2000):
        v = rng.standard_normal(20) + rng.uniform(0, 3) * theta
        v *= SMALL.nu / np.linalg.norm(v)
        delta = SMALL.eps * np.where(rng.random(20) < 0.9, 1, -1) * np.sign(theta)
        worst = max(worst, norm.cdf(theta @ (v + delta - SMALL.mu) / spread))
    assert worst <= SMALL.robust_fpr(theta) + 1e-12
    assert worst > SMALL.robust_fpr(theta) - 0.05


def test_the_pooled_estimate_is_a_mean_of_signed_samples():
    inside, outliers = np.array([[1.0, 2.0]]), np.array([[-1.0, 0.0], [-4.0, 3.0]])
    assert SMALL.estimate(inside, outliers).tolist() == [2.0, -1 / 3]
    signed = np.concatenate([inside, -outliers])
    assert np.allclose(SMALL.estimate(inside, outliers), signed.mean(0))


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 5), st.floats(0, 20))
def test_random_outliers_arrive_at_the_limit(rho, a, b):
    world = replace(SMALL, rho=rho, a=a, b=b)
    rng = np.random.default_rng(0)
    theta = world.estimate(world.inside(10, rng), world.pool(40_000, rng)[0])
    cosine = theta @ world.mu / np.linalg.norm(theta) / np.sqrt(world.d)
    assert cosine == pytest.approx(world.limit_cosine(), abs=0.03)
    assert world.fnr(theta) == pytest.approx(world.limit_fnr(), abs=0.02)


def test_the_limit_is_one_without_far_outliers_or_without_their_transverse_part():
    for world in (replace(OUTLIERS, rho=1.0), replace(OUTLIERS, b=0.0)):
        assert world.limit_cosine() == pytest.approx(1)
        assert world.limit_fnr() == pytest.approx(norm.cdf(-np.sqrt(1000) / 10))
    assert replace(OUTLIERS, a=30.0).limit_cosine() > 0.99
    assert OUTLIERS.limit_cosine() == pytest.approx(0.7255, abs=1e-4)
    assert OUTLIERS.limit_fnr() == pytest.approx(0.01089, abs=1e-5)


def test_hardest_takes_the_ranks_after_the_share_left_out():
    inside = np.array([[1.0, 0.0], [3.0, 0.0]])
    pool = np.array([[0.0, 9.0], [5.0, 0.0], [-1.0, 4.0], [5.0, 1.0], [2.0, 0.0]])
    assert SMALL.hardest(inside, pool, 3, 0.0).tolist() == [1, 3, 4]  # a tie keeps the pool's order
    assert SMALL.hardest(inside, pool, 2, 0.4).tolist() == [4, 0]
    assert SMALL.hardest(inside, pool, 5, 0.0).tolist() == [1, 3, 4, 0, 2]


def test_mining_helps_and_q_guards_against_contamination():
    """One pool of each kind; the chapter repeats it over ten seeds."""
    found = {}
    for c in (0.0, 0.15):
        rng = np.random.default_rng(3)
        inside = OUTLIERS.inside(10, rng)
        pool, kind = OUTLIERS.pool(8000, rng, c)
        found[c, "random"] = OUTLIERS.robust_fpr(OUTLIERS.estimate(inside, pool[:2000]))
        for q in (0.0, 0.125):
            kept = OUTLIERS.hardest(inside, pool, 2000, q)
            found[c, q] = OUTLIERS.robust_fpr(OUTLIERS.estimate(inside, pool[kept]))
            if (c, q) == (0.15, 0.0):
                assert (kind[kept] == 2).mean() > 2 * 0.15
    assert found[0.0, 0.0] < found[0.0, "random"] - 0.02
    assert found[0.15, 0.125] < found[0.15, "random"] - 0.02
    assert found[0.15, 0.0] > found[0.15, "random"] + 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianOutliers(d=1), "d must .* got 1"),
        (lambda: GaussianOutliers(sigma=0.0), "sigma must .* got 0"),
        (lambda: GaussianOutliers(rho=1.2), "rho must .* got 1.2"),
        (lambda: GaussianOutliers(eps=-0.1), "eps must .* got -0.1"),
        (lambda: GaussianOutliers(nu=float("nan")), "nu must .* got nan"),
        (lambda: GaussianOutliers(b=-1.0), "b must .* got -1"),
        (
            lambda: SMALL.pool(9, np.random.default_rng(0), 0.8),
            r"contamination must .* got 0\.8",
        ),
    ],
)
def test_bad_worlds_of_outliers_are_refused(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()
