"""Certificates: closed forms, coverage, soundness under attack, and that a wrong bound is caught."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import beta, binom, binomtest, norm
from torch import nn
from torch.nn.functional import cross_entropy

from robustood.attacks import maximise
from robustood.data import Batch, Data, Split, digits
from robustood.detectors import MSP, RejectClass
from robustood.engine import Engine
from robustood.evaluate import attack_score
from robustood.losses import margin, to_reject
from robustood.metrics import auroc
from robustood.models import Classifier, adapt, densenet_bc, frozen, mlp, readout, small_cnn
from robustood.objectives import OutlierTraining
from robustood.perturbations import L2, Compose, Corruption, Latent, Linf, Spatial, norms
from robustood.smoothing import (
    ABSTAIN,
    CertifiedScore,
    CertifiedVote,
    IntervalOutliers,
    Noise,
    Smoothed,
    certified_accuracy,
    certified_score,
    certify,
    guaranteed_auroc,
    interval_bounds,
    interval_score,
    lower_bound,
    margin_bounds,
    mean_bound,
    predict,
    sigma_for,
    votes,
    worst_cross_entropy,
)
from robustood.training import fit

FREE = L2(1.0, box=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def most_wrong(trials, rate):
    """As many errors as a rate explains, up to one chance in a thousand."""
    return int(binom.ppf(0.999, trials, rate))


@pytest.fixture(scope="module")
def half_space():
    """A linear classifier of the plane, and points on both sides with their distances."""
    model = readout([[0.6, 0.8], [0.0, 0.0]])
    x = torch.randn(300, 2, generator=seeded(1))
    return model, x, (x @ torch.tensor([0.6, 0.8])).abs()


# --- confidence bounds


def test_clopper_pearson_where_all_draws_agree():
    """alpha^(1/n)."""
    for n, alpha in [(10_000, 0.001), (1000, 0.001), (20, 0.05)]:
        bound = lower_bound(torch.tensor([n]), n, alpha).item()
        assert bound == pytest.approx(alpha ** (1 / n), abs=1e-10)
    assert lower_bound(torch.tensor([10_000]), 10_000, 0.001).item() == pytest.approx(
        0.99930946, abs=5e-9
    )


def test_clopper_pearson_is_the_quantile_of_a_beta_and_grows_with_the_hits():
    for n, alpha in [(50, 0.001), (400, 0.05)]:
        k = torch.arange(n + 1)
        bound = lower_bound(k, n, alpha)
        exact = torch.tensor(beta.ppf(alpha, k[1:], n - k[1:] + 1))
        assert bound[0] == 0 and torch.allclose(bound[1:], exact, atol=1e-9)
        assert (bound.diff() > 0).all() and (bound < k / n + 1e-12).all()
    again = torch.tensor([7, 3, 7])  # the order of the inputs is kept
    assert torch.equal(
        lower_bound(again, 50, 0.001), lower_bound(torch.arange(51), 50, 0.001)[again]
    )


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_the_bounds_fail_no_more_often_than_they_say(p):
    """Clopper-Pearson on hits, Chernoff on scores of three laws with the same mean."""
    alpha, n, runs = 0.05, 1000, 20_000
    k = torch.binomial(torch.full((runs,), float(n)), torch.tensor(p), generator=seeded(3)).long()
    wrong = int((lower_bound(k, n, alpha) > p).sum())
    assert 0 < wrong <= most_wrong(runs, alpha)
    # exact for the binomial law: the failures are those of one quantile
    exact = binom.sf(
        next(i for i in range(n + 1) if beta.ppf(alpha, max(i, 1), n - i + 1) > p) - 1, n, p
    )
    assert abs(wrong / runs - exact) < 4 * math.sqrt(exact / runs)
    uniform = torch.rand(1000, n, generator=seeded(4), dtype=torch.float64)
    for scores in ((uniform < p).double(), uniform ** ((1 - p) / p), p + (uniform - 0.5) * (1 - p)):
        assert scores.mean().item() == pytest.approx(p, abs=4e-3)
        wrong = int((mean_bound(scores.mean(1), n, alpha) > p).sum())
        assert wrong <= most_wrong(1000, alpha)


def test_a_bound_of_the_mean_in_closed_form():
    ones = torch.ones(1, dtype=torch.float64)
    for n, alpha in [(1000, 0.001), (30, 0.1)]:
        assert mean_bound(ones, n, alpha).item() == pytest.approx(alpha ** (1 / n), abs=1e-12)
        assert mean_bound(0 * ones, n, alpha).item() == 0
        means = torch.linspace(0, 1, 201, dtype=torch.float64)
        q = mean_bound(means, n, alpha)
        assert (q.diff() > 0).all() and (q <= means).all()
        hoeffding = means - math.sqrt(math.log(1 / alpha) / (2 * n))
        assert (q >= hoeffding - 1e-12).all()
        hits = torch.arange(n + 1)  # never better than the exact bound for hits
        gap = lower_bound(hits, n, alpha) - mean_bound(hits.double() / n, n, alpha)
        assert (gap > -1e-10).all() and gap.max() < 0.6 / math.sqrt(n)


def test_sigma_for_reproduces_the_noise_of_the_latent_certificates():
    """Wong and Kolter's sigmas follow from their radii: n = 10,000 on CIFAR, 1000 on scenes."""
    for radius, sigma in [(2.69, 0.84), (3.90, 1.22), (10.20, 3.19)]:
        assert sigma_for(radius) == pytest.approx(sigma, abs=0.005)
    assert sigma_for(17.0, n=1000) == pytest.approx(6.9, abs=0.005)
    constant = readout([[0.0, 0.0], [0.0, 0.0]], torch.tensor([1.0, 0.0]))
    found = certify(constant, torch.zeros(3, 2), FREE, sigma=sigma_for(0.7, 200), n=200)
    assert found.radius.tolist() == pytest.approx([0.7] * 3)
    with pytest.raises(ValueError, match=r"n must be at least 10 .* got 9"):
        sigma_for(1.0, n=9)
    assert sigma_for(1.0, n=10) > 0


# --- votes


def test_a_linear_classifiers_certificate_is_its_distance(half_space):
    """p_A = Phi(d / sigma), so R = d: the sampled radius is below it and comes near it as n grows."""
    model, x, distance = half_space
    sigma, alpha = 0.5, 0.001
    inside = distance < 1.2  # where n draws do not all agree
    gaps = []
    for n in (200, 2000, 20_000):
        found = certify(
            model, x, FREE, sigma=sigma, n=n, alpha=alpha, batch_size=9000, generator=seeded(2)
        )
        sure = (found.label != ABSTAIN) & inside
        wrong = int((found.radius[sure] > distance[sure]).sum())
        assert wrong <= most_wrong(int(sure.sum()), alpha)
        assert (found.label[sure] == (x[sure] @ torch.tensor([0.6, 0.8]) <= 0)).all()
        gaps.append((distance[sure] - found.radius[sure]).double())
    # the gap that bad luck explains: the bound at the hits that one run in a million falls short of
    p = norm.cdf(distance[sure].double() / sigma)
    k = binom.ppf(1e-6, n, p)
    least = sigma * torch.tensor(norm.ppf(beta.ppf(alpha, k, n - k + 1)))
    assert (found.radius[sure] >= least - 1e-6).all()
    assert gaps[0].mean() > 2 * gaps[1].mean() > 4 * gaps[2].mean() and gaps[2].mean() < 0.03


def test_the_radius_is_linear_in_sigma(half_space):
    model, x, _ = half_space
    one = certify(model, x, FREE, sigma=0.5, n=500, generator=seeded(5))
    two = certify(model, 3 * x, FREE, sigma=1.5, n=500, generator=seeded(5))
    assert torch.equal(one.label, two.label) and torch.allclose(3 * one.radius, two.radius)
    assert (one.radius > 0).sum() > 200


def test_selection_and_estimation_see_different_noise():
    seen = []

    def spy(v):
        seen.append(v)
        return torch.stack([v[:, 0], -v[:, 0]], 1)

    certify(spy, torch.zeros(2, 1), FREE, sigma=1.0, n0=30, n=50, batch_size=7)
    drawn = torch.cat(seen)
    assert len(drawn) == 2 * (30 + 50) and len(drawn.unique()) == len(drawn)
    assert max(map(len, seen)) <= 7


def test_votes_count_every_copy_once_and_leave_the_world_alone(half_space):
    model, x, distance = half_space
    model.train()
    state = torch.get_rng_state()
    for size in (7, 64, 4096):
        counts = votes(model, x[:50], FREE, sigma=0.5, n=40, batch_size=size, generator=seeded(1))
        assert counts.shape == (50, 2) and (counts.sum(1) == 40).all()
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad for p in model.parameters())
    counts = votes(model.eval(), x, FREE, sigma=0.5, n=4000)
    share = counts.gather(1, (x @ torch.tensor([0.6, 0.8]) <= 0).long()[:, None])[:, 0] / 4000
    exact = torch.tensor(norm.cdf(distance / 0.5))
    assert ((share - exact).abs() < 4.5 * (exact * (1 - exact) / 4000).sqrt() + 1e-3).all()
    again = votes(model, x, FREE, sigma=0.5, n=4000)
    assert torch.equal(counts, again), "the default noise has a fixed seed"


def test_a_coin_is_not_certified():
    """At p = 1/2 a certificate, or a significant vote, is an error: no more of them than alpha."""
    coin, x, alpha = readout([[1.0], [0.0]]), torch.zeros(3000, 1), 0.05
    found = certify(coin, x, FREE, sigma=1.0, n0=5, n=60, alpha=alpha)
    assert torch.equal(found.radius > 0, found.label != ABSTAIN)
    assert 0 < int((found.label != ABSTAIN).sum()) <= most_wrong(3000, alpha)
    answers = predict(coin, x, FREE, sigma=1.0, n=60, alpha=alpha)
    assert 0 < int((answers != ABSTAIN).sum()) <= most_wrong(3000, alpha)


def test_prediction_is_the_two_sided_binomial_test(half_space):
    model, x, _ = half_space
    x = x / 4
    counts = votes(model, x, FREE, sigma=0.5, n=41, generator=seeded(1))
    answers = predict(model, x, FREE, sigma=0.5, n=41, alpha=0.01, generator=seeded(1))
    for row, answer in zip(counts.tolist(), answers.tolist(), strict=True):
        surely = binomtest(max(row), sum(row), 0.5).pvalue <= 0.01
        assert answer == (row.index(max(row)) if surely else ABSTAIN)
    assert 20 < (answers == ABSTAIN).sum() < 280
    tie = readout([[1.0], [-1.0]])
    assert predict(tie, torch.zeros(1, 1), FREE, sigma=1.0, n=1).item() == ABSTAIN


def test_certified_accuracy_counts_right_and_farther():
    found = CertifiedVote(
        torch.tensor([0, 1, ABSTAIN, 1]), torch.tensor([0.5, 0.2, 0.0, 0.9]), torch.zeros(4)
    )
    y = torch.tensor([0, 1, 1, 0])
    curve = certified_accuracy(found, y, [0.0, 0.2, 0.4, 0.5])
    assert [e.value for e in curve] == [0.5, 0.25, 0.25, 0.0]
    assert all(e.low <= e.value <= e.high and e.n == 4 for e in curve)


class Shear:
    """A generator whose images are x plus a linear map of u."""

    latent = 3
    map = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]])

    def generate(self, x, u):
        return x + u @ self.map


def test_the_same_certificate_in_a_latent_ball(half_space):
    """g(x, u) = x + A'u: the distance in u is |w x| / |A w|."""
    model, x, distance = half_space
    within = Latent(Shear(), 1.0, box=None)
    slope = (Shear.map @ torch.tensor([0.6, 0.8])).norm()
    exact = distance / slope
    found = certify(model, x, within, sigma=0.5, n=20_000, batch_size=9000, generator=seeded(1))
    sure = (found.label != ABSTAIN) & (exact < 1.2)
    assert sure.sum() > 150 and (found.radius[sure] <= exact[sure] + 0.01).all()
    assert (exact[sure] - found.radius[sure]).mean() < 0.03
    u = torch.zeros(len(x), 3)
    u[:, 0] = 0.4  # the smoothed point may be another one of the set
    moved = (x + u @ Shear.map) @ torch.tensor([0.6, 0.8])
    off = certify(model, x, within, sigma=0.5, n=2000, at=u)
    agree = (off.label != ABSTAIN) & (moved.abs() > 0.05)
    assert ((off.label == 1) == (moved < 0))[agree].all()


def test_any_set_with_euclidean_parameters_will_do(net, book):
    found = certify(net, book.test.x[:8], Spatial(20, 1), sigma=0.3, n0=20, n=60)
    assert (found.label == book.test.y[:8]).float().mean() > 0.7 and found.radius.max() > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: certify(m, x, Linf(0.1), sigma=1.0), "Euclidean parameters.* got Linf"),
        (
            lambda m, x: certify(m, x, Corruption(("fog",), (1,)), sigma=1.0),
            "Euclidean parameters.* got Corruption",
        ),
        (
            lambda m, x: certify(m, x, Compose(Corruption(("fog",), (1,)), L2(0.1)), sigma=1.0),
            "Euclidean parameters.* got Compose",
        ),
        (lambda m, x: certify(m, x, FREE, sigma=-1.0), "sigma must be .* got -1"),
        (lambda m, x: certify(m, x, FREE, sigma=1.0, alpha=0.0), "alpha must be .* got 0.0"),
        (lambda m, x: certify(m, x, FREE, sigma=1.0, alpha=0.5), "alpha must be .* got 0.5"),
        (lambda m, x: certify(m, x, FREE, sigma=1.0, n=0), "n must be .* at least 1, got 0"),
        (lambda m, x: certify(m, x, FREE, sigma=1.0, n0=0), "n0 must be .* at least 1, got 0"),
        (lambda m, x: certify(m, 300 * x, L2(1.0), sigma=1.0), "outside \\[0, 1\\]"),
        (lambda m, x: votes(m, x[:0], FREE, sigma=1.0, n=1), "x is empty"),
        (lambda m, x: Smoothed(m, FREE, 1.0, draws=0), "draws must be .* at least 1, got 0"),
        (lambda m, x: certified_score(m, x, FREE, sigma=0.0), "sigma must be .* got 0.0"),
        (
            lambda m, x: certified_score(lambda v: 3 + v[:, 0], x, FREE, sigma=1.0),
            "score must lie in \\[0, 1\\], got values in",
        ),
    ],
)
def test_bad_settings_of_smoothing_are_refused(untyped, half_space, call, words):
    model, x, _ = half_space
    with pytest.raises(ValueError, match=words):
        call(model, x)


# --- soundness of the vote


def contradictions(model, x, within, found, factor, sigma, alpha, steps, at_least=1):
    """How many certificates an attack inside ``factor`` times the radius refutes, of how many.

    Each certified point is pushed against its own class in parameter space; a fresh, significant vote for
    another class is a contradiction.
    """
    sure = found.label != ABSTAIN
    x, label, radius = x[sure], found.label[sure], factor * 0.999 * found.radius[sure]
    z = within.identity(x)
    smooth = Smoothed(model, within, sigma, draws=32)
    unit = L2(1.0, box=None)  # a ball of radius 1 in z / radius
    size = radius.to(z).view(-1, *[1] * (z.ndim - 1))

    def away(v):
        return margin(smooth(x, v * size), label)

    with frozen(smooth):
        worst = maximise(away, z, unit, steps=steps, restarts=2)
    assert (norms(worst) <= 1 + 1e-5).all()
    answers = predict(
        model, x, within, sigma=sigma, n=1000, alpha=alpha, at=worst * size, generator=seeded(77)
    )
    refuted = (answers != label) & (answers != ABSTAIN)
    assert len(label) >= at_least
    return int(refuted.sum()), len(label)


def test_no_certificate_of_a_linear_classifier_is_refuted_and_a_doubled_sigma_is(half_space):
    model, x, _ = half_space
    alpha, sigma = 0.05, 0.5
    found = certify(model, x, FREE, sigma=sigma, n=300, alpha=alpha)
    wrong, n = contradictions(model, x, FREE, found, 1, sigma, alpha, steps=5, at_least=200)
    assert wrong <= most_wrong(n, 2 * alpha)  # either of the two tests may err
    planted = certify(model, x, FREE, sigma=sigma, n=300, alpha=alpha)
    planted = replace(planted, radius=2 * planted.radius)  # as if sigma had been doubled in R
    wrong, n = contradictions(model, x, FREE, planted, 1, sigma, alpha, steps=5)
    assert wrong > 5 * most_wrong(n, 2 * alpha)


@pytest.fixture(scope="module")
def noisy_net():
    """A reject-class network trained with noise, for a short time."""
    book = digits()
    model = small_cnn(reject=1)
    rule = OutlierTraining(outlier_loss=to_reject, weight=1.0)
    fit(model, rule, book, epochs=6, augment=Noise(FREE, 0.25))
    return model


def test_attacks_inside_the_radius_do_not_refute_the_certificates_of_a_network(noisy_net, book):
    check_network(noisy_net, book, images=60, steps=6, n=500)


@pytest.mark.slow
def test_attacks_inside_the_radius_with_many_steps(noisy_net, book):
    check_network(noisy_net, book, images=150, steps=20, n=2000)


def check_network(model, book, images, steps, n):
    x, sigma, alpha = book.test.x[:images], 0.25, 0.01
    within = L2(1.0)
    found = certify(model, x, within, sigma=sigma, n=n, alpha=alpha)
    wrong, held = contradictions(
        model, x, within, found, 1, sigma, alpha, steps, at_least=int(0.8 * images)
    )
    assert wrong <= most_wrong(held, 2 * alpha)
    wrong, held = contradictions(model, x, within, found, 2, sigma, alpha, steps)
    assert wrong > 2 * most_wrong(held, 2 * alpha), "a doubled sigma went unnoticed"


# --- scores


def test_the_bound_of_a_score_is_reached_by_a_half_space():
    """s = 1{w x > 0}: the smoothed score is Phi(d / sigma) and moves exactly as fast as allowed."""
    sigma, radii = 0.4, torch.linspace(0, 1, 11).double()
    d = torch.tensor([-0.5, 0.0, 0.3, 0.8], dtype=torch.float64)
    p = torch.special.ndtr(d / sigma)
    exact = CertifiedScore(p, p, p, sigma)
    for r in radii.tolist():
        assert torch.allclose(exact.lower(r), torch.special.ndtr((d - r) / sigma))
        assert torch.allclose(exact.upper(r), torch.special.ndtr((d + r) / sigma))


def test_sampled_bounds_of_a_score_hold_and_tighten(half_space):
    _, x, _ = half_space
    signed = x @ torch.tensor([0.6, 0.8])
    truth = torch.tensor(norm.cdf(signed / 0.5))
    widths = []
    for n in (100, 1000, 10_000):
        found = certified_score(
            lambda v: (v @ torch.tensor([0.6, 0.8]) > 0).float(),
            x,
            FREE,
            sigma=0.5,
            n=n,
            alpha=0.01,
        )
        wrong = int(((found.low > truth) | (found.high < truth)).sum())
        assert wrong <= most_wrong(len(x), 0.02)
        widths.append((found.high - found.low).mean().item())
        assert (found.low.lerp(found.high, 0.5) - truth).abs().mean() < widths[-1] / 2
    assert widths[0] > 2.5 * widths[1] > 6 * widths[2]
    low = [found.lower(r) for r in (0.0, 0.2, 0.6)]
    high = [found.upper(r) for r in (0.0, 0.2, 0.6)]
    assert torch.allclose(low[0], found.low) and torch.allclose(high[0], found.high)
    assert (low[0] >= low[1]).all() and (low[1] >= low[2]).all()
    assert (high[0] <= high[1]).all() and (high[1] <= high[2]).all()


def test_a_guaranteed_auroc_is_that_of_the_bounds_and_falls():
    inside = CertifiedScore(*3 * (torch.tensor([0.9, 0.7, 0.95]).double(),), 0.5)
    outside = CertifiedScore(*3 * (torch.tensor([0.1, 0.6, 0.2, 0.3]).double(),), 0.5)
    curve = guaranteed_auroc(inside.lower, outside.upper, [0.0, 0.1, 0.5, 2.0])
    values = [e.value for e in curve]
    assert values[0] == auroc(inside.low, outside.high) == 1.0
    assert values == sorted(values, reverse=True) and values[-1] == 0.0
    assert values[1] == auroc(inside.lower(0.1), outside.upper(0.1)) == 11 / 12


def test_the_smoothed_network_is_the_mean_over_fixed_noise(net, book):
    x = book.test.x[:5]
    smooth = Smoothed(net, L2(1.0), 0.3, draws=7, seed=4)
    noise = torch.randn(7, 1, 8, 8, generator=seeded(4))
    expected = torch.stack([net(x + 0.3 * nu).softmax(1) for nu in noise]).mean(0).log()
    assert torch.allclose(smooth(x), expected, atol=1e-5)
    # Equal up to rounding: a product of matrices may be summed in another order in a smaller batch.
    assert torch.allclose(smooth(x)[:2], smooth(x[:2]), atol=1e-5), (
        "every input meets the same noise"
    )
    other = Smoothed(net, L2(1.0), 0.3, draws=7, seed=5)
    assert (smooth(x) - other(x)).abs().amin(1).max() > 1e-3, (
        "and that rounding is far below the noise"
    )
    shift = 0.1 * torch.ones_like(x)
    assert torch.allclose(smooth(x, shift), smooth(x + shift), atol=1e-5)
    assert smooth.classes == 10 and smooth.reject == 0 and len(MSP(smooth).score(x)) == 5
    assert torch.allclose(Smoothed(net, L2(1.0), 0.0)(x), net(x).log_softmax(1), atol=1e-5)


def test_noise_is_what_the_set_makes_of_a_normal_law():
    x = torch.full((4000, 1, 2, 2), 0.5)
    moved = Noise(L2(1.0), 0.3)(x, seeded(1)) - 0.5
    assert moved.mean().abs() < 0.01 and moved.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(Noise(L2(1.0), 0.0)(x), x)
    assert torch.equal(Noise(L2(1.0), 0.3)(x, seeded(1)) - 0.5, moved)


def accepted(model):
    """The score of a reject class as a probability."""
    reject = RejectClass(model)
    return lambda v: 1 + reject.paper_score(v)


def test_attacked_scores_stay_between_the_bounds(noisy_net, book):
    check_scores(noisy_net, book, images=40, steps=5, n=400)


@pytest.mark.slow
def test_attacked_scores_stay_between_the_bounds_with_many_steps(noisy_net, book):
    check_scores(noisy_net, book, images=150, steps=20, n=2000)


def check_scores(model, book, images, steps, n):
    """The smoothed score after an attack of length r, measured anew, is within its bounds."""
    sigma, radius, alpha = 0.25, 0.25, 0.01
    score, within = accepted(model), L2(radius, box=None)
    detector = RejectClass(Smoothed(model, within, sigma, draws=16))
    sides = {"lower": book.test.x[:images], "raise": book.ood["letters"][:images]}
    for direction, x in sides.items():
        moved = attack_score(detector, x, within, direction=direction, steps=steps, targets=1)
        how = {"sigma": sigma, "n": n, "alpha": alpha}
        before = certified_score(score, x, within, **how)
        after = certified_score(score, moved, within, **how, generator=seeded(9))
        if direction == "lower":
            wrong = (after.high < before.lower(radius)).sum()
            planted = (after.high < before.lower(radius / 2)).sum()  # as if sigma were doubled
            fell = (after.low + after.high < before.low + before.high).float().mean()
            assert fell > 0.9, "the attack does nothing"
        else:
            wrong = (after.low > before.upper(radius)).sum()
            planted = (after.low > before.upper(radius / 2)).sum()
        assert int(wrong) <= most_wrong(images, 2 * alpha), direction
        assert int(planted) >= int(wrong)


def test_smoothing_guarantees_detection_of_noise(noisy_net, book):
    curve = smoothed_guarantee(noisy_net, book, images=80, n=400)
    assert curve["noise"].value > 0.9
    assert curve["noise"].value <= curve["noise, clean"].value


@pytest.mark.slow
def test_smoothing_guarantees_detection_of_noise_on_all_test_images():
    book, model = digits(), small_cnn(reject=1)
    rule = OutlierTraining(outlier_loss=to_reject, weight=1.0)
    fit(model, rule, book, epochs=20, augment=Noise(FREE, 0.25))
    curve = smoothed_guarantee(model, book, images=500, n=1000)
    assert curve["noise"].low > 0.9 and curve["patches"].low > 0.9


def smoothed_guarantee(model, book, images, n, radius=0.25, sigma=0.25):
    """AUROC at an L2 radius that holds for all images at once with probability 0.999."""
    how = {"sigma": sigma, "n": n, "alpha": 0.001 / (2 * images)}
    inside = certified_score(accepted(model), book.test.x[:images], L2(1.0), **how)
    curve = {}
    for name, x in book.ood.items():
        outside = certified_score(accepted(model), x[:images], L2(1.0), **how, generator=seeded(1))
        clean, held = guaranteed_auroc(inside.lower, outside.upper, [0.0, radius])
        curve |= {f"{name}, clean": clean, name: held}
    return curve


# --- intervals


def pooled():
    """Every layer that the bounds know, with running statistics that matter."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(4)
    stages = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU()),
        nn.Sequential(nn.MaxPool2d(2), norm, nn.Tanh(), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False), nn.AvgPool2d(1)),
    ]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
        norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    return Classifier(stages, 6, 3, pool=True).eval()


CHAINS = {
    "cnn": lambda: small_cnn(reject=1, seed=1),
    "cnn with batch norm": lambda: small_cnn(batch_norm=True, seed=1).eval(),
    "mlp": lambda: mlp(64, (20, 10), classes=4),
    "linear": lambda: mlp(64, (), classes=3),
    "pooled": pooled,
    "adapted": lambda: adapt(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3)), "3"),
}  # fmt: skip
each_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)


def around(x, eps):
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


@each_chain
def test_a_box_without_width_gives_the_outputs(make, book):
    model, x = make(), book.test.x[:20]
    low, high = interval_bounds(model, x, x)
    assert torch.allclose(low, model(x), atol=1e-5) and torch.equal(low, high)


@each_chain
def test_ten_thousand_points_and_none_outside_the_bounds(make, book):
    """Random points, corners, and points that an attack on each output has found."""
    model, x, eps = make(), book.test.x[:100], 0.1
    low, high = interval_bounds(model, *around(x, eps))
    noise, checked = seeded(5), 0
    outputs = low.shape[1]

    def check(points):
        nonlocal checked
        with torch.no_grad():
            z = model(points)
        slack = 1e-4 + 1e-5 * z.abs()
        assert ((z >= low - slack) & (z <= high + slack)).all()
        checked += len(points)

    for share in range(95):
        step = 2 * torch.rand(x.shape, generator=noise) - 1
        check((x + eps * (step.sign() if share % 2 else step)).clamp(0, 1))
    with frozen(model):
        for k in range(outputs):
            for sign in (1, -1):
                worst = maximise(lambda v, k=k, s=sign: s * model(v)[:, k], x, Linf(eps), steps=10)
                check(worst)
    assert checked >= 10_000


@each_chain
def test_a_larger_box_has_wider_bounds(make, book):
    model, x = make(), book.test.x[:20]
    before = None
    for eps in (0.0, 0.01, 0.05, 0.2):
        low, high = interval_bounds(model, *around(x, eps))
        if before is not None:
            assert (low <= before[0] + 1e-5).all() and (high >= before[1] - 1e-5).all()
            assert (high - low).mean() > (before[1] - before[0]).mean()
        before = low, high


def test_bounds_of_a_linear_layer_are_exact():
    """Those of the best corner, for the outputs and for their differences."""
    noise = seeded(2)
    model = readout(torch.randn(3, 5, generator=noise), torch.randn(3, generator=noise))
    lower = torch.randn(7, 5, generator=noise)
    upper = lower + torch.rand(7, 5, generator=noise)
    pick = torch.tensor([*itertools.product((False, True), repeat=5)])
    corners = torch.where(pick[:, None], upper, lower)
    z = model(corners.flatten(0, 1)).view(32, 7, 3)
    low, high = interval_bounds(model, lower, upper)
    assert torch.allclose(low, z.amin(0), atol=1e-5) and torch.allclose(high, z.amax(0), atol=1e-5)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    apart = z - z.gather(2, y.expand(32, 7)[..., None])
    low, high = margin_bounds(model, lower, upper, y)
    assert torch.allclose(low, apart.amin(0), atol=1e-5)
    assert torch.allclose(high, apart.amax(0), atol=1e-5)
    worst = worst_cross_entropy(model, lower, upper, y)
    each = cross_entropy(z.flatten(0, 1), y.repeat(32), reduction="none").view(32, 7).amax(0)
    assert (worst >= each - 1e-5).all()  # the worst of each class need not be one corner
    two = readout(torch.randn(2, 5, generator=noise))  # with two classes it is
    z = two(corners.flatten(0, 1)).view(32, 7, 2)
    each = cross_entropy(z.flatten(0, 1), (y % 2).repeat(32), reduction="none").view(32, 7).amax(0)
    assert torch.allclose(worst_cross_entropy(two, lower, upper, y % 2), each, atol=1e-5)


def test_a_bound_without_absolute_values_is_caught(book, monkeypatch):
    """The check of ten thousand points can fail: W r instead of |W| r does not hold."""
    from robustood.smoothing import _intervals as intervals

    def careless(layer, radius):
        return layer(radius) - layer(torch.zeros_like(radius))

    monkeypatch.setattr(intervals, "_magnitude", careless)
    with pytest.raises(AssertionError):
        test_ten_thousand_points_and_none_outside_the_bounds(CHAINS["cnn"], book)


def test_margins_are_tighter_than_differences_of_bounds(book):
    model, x = small_cnn(seed=2), book.test.x[:30]
    ends = around(x, 0.05)
    y = book.test.y[:30]
    low, high = interval_bounds(model, *ends)
    tight_low, tight = margin_bounds(model, *ends, y)
    loose = high - low.gather(1, y[:, None])
    own = nn.functional.one_hot(y, 10).bool()
    assert (tight[own] == 0).all() and (tight_low[own] == 0).all()
    assert (tight <= loose + 1e-5)[~own].all() and (tight < loose - 1e-3)[~own].any()
    clean = cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(worst_cross_entropy(model, x, x, y), clean, atol=1e-5)
    assert (worst_cross_entropy(model, *ends, y) > clean).all()


def test_the_interval_of_a_score_holds_its_attacks(book):
    model, x = small_cnn(reject=1, seed=4), book.test.x[:40]
    detector = RejectClass(model)
    low, high = interval_score(model, x, 0.05)
    same = interval_score(model, x, 0.0)
    with torch.no_grad():
        assert torch.allclose(same[0], detector.score(x), atol=1e-5) and torch.equal(*same)
        for direction, sign, end in (("lower", -1, low), ("raise", 1, high)):
            moved = attack_score(detector, x, Linf(0.05), direction=direction, steps=10, targets=1)
            assert (sign * (end - detector.score(moved)) > 0).all()


def test_a_batch_of_interval_training_by_hand(book):
    model = small_cnn(reject=1, seed=6)
    batch = Batch(book.test.x[:8], book.test.y[:8], book.outliers[:12])
    reject = torch.full((12,), 10)
    clean_in = cross_entropy(model(batch.x), batch.y)
    clean_out = cross_entropy(model(batch.outliers), reject)
    worst_in = worst_cross_entropy(model, *around(batch.x, 0.02), batch.y).mean()
    worst_out = worst_cross_entropy(model, *around(batch.outliers, 0.02), reject).mean()
    rule = IntervalOutliers(0.02, weight=0.7, share=0.25)
    expected = 0.75 * clean_in + 0.25 * worst_in + 0.7 * (0.75 * clean_out + 0.25 * worst_out)
    assert rule(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = (clean_in + 0.7 * clean_out).item()
    engine = Engine(channels_last=True).run(model)
    assert rule(engine, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    for limit in (
        IntervalOutliers(0.02, weight=0.7, share=0.0)(model, batch),
        IntervalOutliers(0.0, weight=0.7, ramp=0.0)(model, batch),
        rule(model, replace(batch, progress=0.0)),
    ):
        assert limit.item() == pytest.approx(plain, rel=1e-5)
    halfway = rule(model, replace(batch, progress=0.25)).item()  # radius 0.01, share 1/8
    assert halfway == pytest.approx(
        IntervalOutliers(0.01, weight=0.7, share=0.125)(model, batch).item(), rel=1e-5
    )
    assert plain < halfway < expected.item()
    assert rule(model, replace(batch, progress=0.6)).item() == rule(model, batch).item()


def test_a_few_epochs_of_interval_training_guarantee_detection(book):
    binary = trained_by_intervals(book, epochs=4, train=500)
    assert guaranteed(binary, book, "noise", 0.02) > 0.5
    plain = small_cnn(classes=1, reject=1)
    assert guaranteed(plain, book, "noise", 0.02) < 0.5


@pytest.mark.slow
def test_interval_training_guarantees_detection_of_every_set(book):
    binary = trained_by_intervals(book, epochs=20)
    for name in book.ood:
        assert guaranteed(binary, book, name, 0.02) > 0.9, name
        assert guaranteed(binary, book, name, 0.1) > 0.7, name


def trained_by_intervals(book, epochs, train=None):
    """A binary head: every digit has the one label 0."""
    x = book.train.x[:train]
    one = Split(x, torch.zeros(len(x), dtype=torch.int64))
    model = small_cnn(classes=1, reject=1)
    fit(model, IntervalOutliers(0.1), Data(one, one, one, book.outliers), epochs=epochs)
    return model


@torch.no_grad()
def guaranteed(model, book, name, eps):
    lower = lambda r: interval_score(model, book.test.x, r)[0]
    upper = lambda r: interval_score(model, book.ood[name], r)[1]
    return guaranteed_auroc(lower, upper, [eps])[0].value


class Odd(nn.Module):
    def forward(self, x):
        return x.flatten(1).sin()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: interval_bounds(nn.Sequential(nn.Conv2d(1, 2, 3), Odd()), x, x),
            "do not support the layer Odd; they support .*Conv2d",
        ),
        (
            lambda x: interval_bounds(densenet_bc(10, 3), *2 * [x.expand(-1, 3, -1, -1)]),
            "do not support the layer",
        ),
        (
            lambda x: interval_bounds(small_cnn(batch_norm=True).train(), x, x),
            "BatchNorm2d layer is in train mode",
        ),
        (lambda x: interval_bounds(small_cnn(), x, x - 0.1), "lower <= upper"),
        (lambda x: interval_bounds(small_cnn(), x, x[:1]), "must have the same shape"),
        (
            lambda x: margin_bounds(nn.Sequential(nn.Flatten()), x, x, torch.zeros(3).long()),
            "must end in a linear layer",
        ),
        (lambda x: interval_score(small_cnn(), x, 0.1), "one reject output, got 0"),
        (lambda x: interval_score(small_cnn(reject=2), x, 0.1), "one reject output, got 2"),
        (lambda x: IntervalOutliers(-0.1), "eps must be .* got -0.1"),
        (lambda x: IntervalOutliers(0.1, share=2.0), "share must be .* got 2.0"),
        (lambda x: IntervalOutliers(0.1, ramp=-1.0), "ramp must be .* got -1.0"),
        (lambda x: IntervalOutliers(0.1, weight=-1.0), "weight must be .* got -1.0"),
        (
            lambda x: IntervalOutliers(0.1)(small_cnn(reject=1), Batch(x, torch.zeros(3).long())),
            "data.outliers is empty",
        ),
    ],
)
def test_bad_input_of_intervals_is_refused(untyped, book, call, words):
    with pytest.raises(ValueError, match=words):
        call(book.test.x[:3])


@pytest.mark.parametrize(("alpha", "fewest"), [(0.001, 10), (0.05, 5), (0.25, 3)])
def test_too_few_draws_to_certify_anything_are_refused(alpha, fewest):
    model, x = readout(torch.tensor([[1.0], [-1.0]])), torch.full((2, 1), 0.9)
    how = {"sigma": 0.01, "n0": 1, "alpha": alpha}
    with pytest.raises(
        ValueError, match=f"n must be at least {fewest} .*alpha {alpha:g}, got {fewest - 1}"
    ):
        certify(model, x, L2(0.1), n=fewest - 1, **how)
    found = certify(model, x, L2(0.1), n=fewest, **how)  # all agree: the least number suffices
    assert (found.label == 0).all() and (found.radius > 0).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_bounds_follow_a_weight_that_is_computed_in_the_forward_pass(book):
    made = lambda: nn.Sequential(
        nn.Flatten(),
        torch.nn.utils.weight_norm(nn.Linear(64, 32)),
        nn.ReLU(),
        torch.nn.utils.weight_norm(nn.Linear(32, 10)),
    )
    trained = made()
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if name.endswith("_g"):
                value.mul_(8)
    net = made().eval()
    net.load_state_dict(trained.state_dict())  # the layers' weights are still those of before
    x = book.test.x[:8]
    low, high = interval_bounds(net, x - 0.05, x + 0.05)
    assert torch.equal(low, interval_bounds(net, x - 0.05, x + 0.05)[0])
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            z = net(x + 0.05 * torch.randn(x.shape, generator=draw).sign())
        assert (low - 1e-4 <= z).all() and (z <= high + 1e-4).all()


def test_bounds_are_of_what_an_adapted_network_returns(book):
    chain, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), book.test.x[:4]
    assert torch.allclose(interval_bounds(adapt(chain), x, x)[0], chain(x), atol=1e-5)
    with pytest.raises(ValueError, match="is not the output layer"):
        interval_bounds(adapt(chain, output=lambda z: 10 * z), x, x)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda v: v.flatten(1)[:, :3], r"one value per input, shape \(\d+,\), got \(\d+, 3\)"),
        (lambda v: v.mean(), r"got \(\)"),
        (lambda v: v.flatten(1).mean(1).tolist(), "got list"),
        (lambda v: v.flatten(1).mean(1)[:-1], "one value per input"),
        (lambda v: 3 + v.flatten(1).mean(1), r"score must lie in \[0, 1\], got values in .*sigmoid"),
        (lambda v: v.flatten(1).mean(1) * math.nan, "score must lie in"),
    ],
)  # fmt: skip
def test_a_score_that_cannot_be_certified_is_refused(book, score, said):
    with pytest.raises(ValueError, match=said):
        certified_score(score, book.test.x[:3], L2(0.1, None), sigma=0.25, n=20)
