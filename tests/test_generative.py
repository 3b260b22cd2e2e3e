"""Learned sets: the autoencoder's formulas, its metrics with their order, and the theorem on samples."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import minimize
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy

from robustood.attacks import maximise, pgd, robust_accuracy
from robustood.data import Batch, Data, Pairs, Split, paired
from robustood.generative import (
    ConditionalVAE,
    Diagonal,
    Entered,
    Resampled,
    Variational,
    basis_cvae,
    distances,
    divergence,
    guarantee,
    largest_ratio,
    log_ratio_bound,
    plain_cvae,
    radii,
    residual_cvae,
    set_metrics,
    warp_cvae,
)
from robustood.generative import (
    _quality as quality,
)
from robustood.generative._networks import EDGE, LOG_VARIANCE
from robustood.models import small_cnn
from robustood.perturbations import Latent, Random, Spatial
from robustood.training import fit

TURN = Spatial(30, 1)
FAMILIES = {
    "plain": plain_cvae((1, 12, 12), latent=3, hidden=16, decoder=16),
    "plain, residual": plain_cvae((3, 8, 8), latent=3, hidden=16, decoder=16, residual=True),
    "basis": basis_cvae((3, 8, 8), latent=3, hidden=16, decoder=16, pictures=4),
    "warp": warp_cvae((1, 12, 12), latent=3, hidden=16),
    "five warps": warp_cvae((3, 12, 12), latent=3, hidden=16, warps=5),
    "residual": residual_cvae((3, 8, 8), latent=3, width=8, blocks=2, pool=2),
    "residual, from a copy": residual_cvae((3, 8, 8), 3, 8, 1, residual=True),
}
SHAPES = {"warp": (1, 12, 12), "plain": (1, 12, 12), "five warps": (3, 12, 12)}
every_family = pytest.mark.parametrize("name", FAMILIES)


def some(name: str, n: int = 4, seed: int = 0) -> torch.Tensor:
    """Random images for a family."""
    shape = SHAPES.get(name, (3, 8, 8))
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def turned(book) -> Data:
    """Few digits with turned and shifted partners."""
    few = replace(book, train=book.train[:1024], val=book.val[:100], test=book.test[:60])
    return paired(few, Random(TURN), border=2)


@pytest.fixture(scope="module")
def cvae(turned) -> ConditionalVAE:
    """An autoencoder after a short training."""
    model = warp_cvae((1, 12, 12), hidden=64, filters=4)
    fit(model, Variational(), turned, epochs=25, batch_size=64, lr=4e-3, warmup=0.1)
    return model


@pytest.fixture(scope="module")
def reader(turned) -> nn.Module:
    """A network that reads the padded digits."""
    from robustood.objectives import Standard

    model, split = small_cnn(size=12), turned.train.labelled
    fit(model, Standard(), Data(split, split[:0], split[:0], split.x[:0]), epochs=6)
    return model


# --- laws and networks


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 3))
def test_divergence_is_that_of_torch(seed, scale):
    noise = torch.Generator().manual_seed(seed)
    q, p = (Diagonal(*(scale * torch.randn(2, 5, 4, generator=noise)).double()) for _ in "qp")
    exact = kl_divergence(Normal(q.mean, q.scale), Normal(p.mean, p.scale))
    assert torch.allclose(divergence(q, p), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(divergence(p, p), torch.zeros(5, 4).double())
    u = torch.randn(5, 4, generator=noise).double()
    assert torch.allclose(p.whiten(p.at(u)), u) and torch.equal(p.at(0 * u), p.mean)


@every_family
def test_images_are_valid_and_a_sample_stands_alone(name):
    model, x, target = FAMILIES[name].eval(), some(name), some(name, seed=1)
    u = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        made, law = model.generate(x, u), model.prior(x)
        assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1
        assert torch.equal(model.generate(x, 0 * u), model.decode(x, law.mean))
        low, high = LOG_VARIANCE
        assert law.log_variance.min() >= low and law.log_variance.max() <= high
        q = model.recognition(x, target)
        assert torch.allclose(law.at(model.encode(x, target)), q.mean, atol=1e-5)
        for i in range(4):
            alone = model.generate(x[[i]], u[[i]])
            assert torch.allclose(alone, made[[i]], atol=1e-5)


@pytest.mark.parametrize("name", ["plain, residual", "warp", "residual, from a copy"])
def test_some_decoders_begin_with_a_copy(name):
    model = copy.deepcopy(FAMILIES[name]).eval()
    x = some(name)
    made = model.generate(x, torch.ones(4, 3))
    assert torch.allclose(made, x.clamp(EDGE, 1 - EDGE), atol=1e-4)


def test_a_warp_is_the_spatial_map_of_its_numbers():
    """Put the inverse of a turn by 20 degrees into the last layer: the same image as ``Spatial``."""
    model, x = warp_cvae((1, 12, 12), latent=3), some("warp")
    angle = math.radians(20)
    with torch.no_grad():
        turn = [math.cos(angle), -math.sin(angle), 0, math.sin(angle), math.cos(angle), 0]
        model.decode.maps[-1].bias.copy_(torch.tensor(turn))
        made = model.generate(x, torch.randn(4, 3))
    wanted = Spatial(20).apply(x, torch.tensor([[1.0, 0, 0, 0]] * 4))
    assert torch.allclose(made, wanted.clamp(EDGE, 1 - EDGE), atol=1e-4)


def test_a_basis_adds_a_mixture_of_grey_pictures():
    model, x = FAMILIES["basis"], some("basis").clamp(0.1, 0.9)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    added = (model.decode(x, z).logit() - x.logit()).detach()
    assert torch.allclose(added[:, 0], added[:, 2], atol=1e-4), "the first shifts of channels are 0"
    pictures, shares = model.decode.pictures(x), model.decode.shares(model.decode.mix(z))
    for i in range(4):
        wanted = sum(c * picture for c, picture in zip(shares[i], pictures[i], strict=True))
        assert torch.allclose(added[i, 1], wanted, atol=1e-4)


def test_initial_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    flat = [
        nn.utils.parameters_to_vector(warp_cvae((1, 8, 8), seed=s).parameters()) for s in (1, 1, 2)
    ]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    assert torch.equal(torch.get_rng_state(), state)


# --- learning


@pytest.mark.parametrize("distance", ["squared error", "cross-entropy"])
def test_the_objective_is_its_formula(distance):
    model, x, y = FAMILIES["plain"], some("plain"), some("plain", seed=1)
    rule = Variational(beta=0.3, schedule=((0.0, 0.0), (0.5, 1.0)), distance=distance)
    noise = torch.Generator().manual_seed(3)
    loss = rule(model, Batch(x, y, generator=noise, progress=0.25))
    noise.manual_seed(3)
    q, p = model.recognition(x, y), model.prior(x)
    made = model.decode(x, q.mean + q.scale * torch.empty(4, 3).normal_(generator=noise))
    squared = distance == "squared error"
    apart = ((made - y) ** 2).sum() if squared else binary_cross_entropy(made, y, reduction="sum")
    kl = kl_divergence(Normal(q.mean, q.scale), Normal(p.mean, p.scale)).sum()
    assert torch.allclose(loss, (apart + 0.15 * kl) / 4, rtol=1e-4)


def test_beta_follows_its_schedule():
    rule = Variational(beta=2.0)
    values = [rule.beta_at(t) for t in (0, 0.05, 0.225, 0.4, 1)]
    assert values == pytest.approx([0, 0, 1.0, 2.0, 2.0])


def test_the_shared_loop_trains_on_images_as_targets(turned):
    few = replace(turned, train=turned.train[:64])
    eight_bits = replace(few.train, y=(few.train.y * 255).round().to(torch.uint8))
    floats = replace(eight_bits, y=eight_bits.y.float() / 255)
    weights = []
    for train in (eight_bits, floats, floats):
        model = plain_cvae((1, 12, 12), hidden=16, decoder=16)
        fit(model, Variational(fresh=False), replace(few, train=train), epochs=2, batch_size=32)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    bad = replace(few, train=Split(few.train.x, 2 * few.train.x))
    with pytest.raises(ValueError, match=r"data.train.y lies in .* outside \[0, 1\]"):
        fit(plain_cvae((1, 12, 12)), Variational(), bad, epochs=1)


def test_partners_are_fresh_at_each_epoch(turned):
    rule, model = Variational(), FAMILIES["warp"]
    draws = [
        rule.prepare(model, turned, epoch, torch.Generator().manual_seed(epoch)).train
        for epoch in (0, 0, 1)
    ]
    assert torch.equal(draws[0].y, draws[1].y) and not torch.equal(draws[0].y, draws[2].y)
    assert torch.equal(draws[0].x, turned.train.x)
    assert replace(rule, fresh=False).prepare(model, turned, 0, torch.Generator()) is turned
    fixed = replace(turned, train=Pairs(turned.train.x, turned.train.y, turned.train.labels))
    assert torch.equal(rule.prepare(model, fixed, 0, torch.Generator()).train.y, turned.train.y)


def test_training_learns_the_perturbation(cvae, turned):
    x, y = turned.test.x, turned.test.y
    found = set_metrics(cvae, x, y, radii(cvae, turned.val.x, turned.val.y).maximum)
    nothing = float((x - y).square().mean())
    assert found.means()["encoder_error_per_pixel"] < 0.1 * nothing
    assert found.means()["kl_nats_per_sample"] > 3


def test_resampled_images_come_from_the_whole_normal(cvae):
    class Echo(nn.Module):
        latent = 2

        def generate(self, x, u):
            return x + u[:, :, None, None]

    x = torch.zeros(4000, 2, 1, 1)
    u = Resampled(Echo())(x, torch.Generator().manual_seed(0))[..., 0, 0]
    assert u.mean(0).abs().max() < 0.08 and (u.std(0) - 1).abs().max() < 0.05
    assert u.norm(dim=1).max() > 3  # not truncated
    images, state = some("warp"), torch.get_rng_state()
    cvae.train()
    made = [Resampled(cvae)(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert cvae.training and not made[0].requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    cvae.eval()


# --- quality


def test_radii_are_quantiles_of_whitened_lengths(cvae, turned):
    x, y = turned.val.x, turned.val.y
    with torch.no_grad():
        p, q = cvae.prior(x), cvae.recognition(x, y)
        length = (((q.mean - p.mean) / (0.5 * p.log_variance).exp()) ** 2).sum(1).sqrt()
    found = radii(cvae, x, y)
    wanted = length.double().quantile(torch.tensor([0.25, 0.5, 0.75, 1]).double())
    seen = (found.lower, found.median, found.upper, found.maximum)
    assert torch.allclose(torch.tensor(seen).double(), wanted, rtol=1e-5) and found.pairs == 100
    assert radii(cvae, x, y, batch_size=7).maximum == pytest.approx(found.maximum, rel=1e-5)


@pytest.mark.parametrize("distance", ["squared error", "cross-entropy"])
def test_metrics_keep_their_order_for_any_batch_size(cvae, turned, distance):
    x, y = turned.test.x, turned.test.y
    how: dict[str, Any] = {"radius": 2.0, "steps": 15, "distance": distance}
    found = set_metrics(cvae, x, y, **how)
    assert found.ordered()
    assert (found.pgd_error_per_pixel <= found.encoder_error_per_pixel).all()
    for name, values in set_metrics(cvae, x, y, **how, batch_size=13).values().items():
        assert torch.allclose(values, found.values()[name], rtol=2e-2, atol=1e-5), name
    wrong = replace(found, encoder_error_per_pixel=0.5 * found.pgd_error_per_pixel)
    assert not wrong.ordered()


def test_errors_are_nested_as_the_balls_are(cvae, turned):
    """With the smaller ball's answer among the starts, no search in a larger ball does worse."""
    x, y = turned.test.x[:20], turned.test.y[:20]
    off = partial(distances, target=y)
    for sign in (-1, 1):
        start, before = torch.zeros(20, cvae.latent), torch.full((20,), -torch.inf)
        for radius in (0.0, 0.5, 1.0, 2.0, 4.0):
            seen = []

            def watch(image, sign=sign):
                return sign * off(image)

            class Recorded(Entered):
                """Keeps the parameters that it makes images of."""

                def apply(self, x, z, seen=seen):
                    seen.append(z.detach().clone())
                    return super().apply(x, z)

            found = maximise(watch, x, Recorded(cvae, radius, start=start), steps=5)
            values = torch.stack([watch(cvae.generate(x, u)).detach() for u in seen])
            start = torch.stack(seen)[values.argmax(0), torch.arange(20)]
            assert torch.allclose(watch(found), values.amax(0), rtol=1e-3, atol=1e-4)
            assert (watch(found) >= before - 1e-3).all()
            before = watch(found)


def test_the_descent_starts_at_the_projected_encoding(cvae, turned):
    x, y = turned.test.x[:10], turned.test.y[:10]
    with torch.no_grad():
        code = cvae.encode(x, y)
        (start,) = Entered(cvae, 1.0, start=code).initial_points(x, 1)
        assert start.norm(dim=1).max() <= 1 + 1e-6
        assert torch.equal(start[code.norm(dim=1) < 1], code[code.norm(dim=1) < 1])
        found = set_metrics(cvae, x, y, 1.0, steps=0)
        error = (cvae.generate(x, start) - y).square().mean((1, 2, 3))
    assert torch.allclose(found.encoder_error_per_pixel, error, rtol=1e-4)
    assert torch.allclose(found.pgd_error_per_pixel, error, rtol=1e-4)


def test_whitening_by_the_log_variance_is_caught(cvae, turned):
    """A published slip: dividing by the log-variance puts the encoding elsewhere."""
    x, y = turned.test.x, turned.test.y
    with torch.no_grad():
        p, q = cvae.prior(x), cvae.recognition(x, y)
        wrong = Latent(cvae, 3.0).project(x, (q.mean - p.mean) / p.log_variance)
        error = (cvae.generate(x, wrong) - y).square().mean()
    assert error > 10 * set_metrics(cvae, x, y, 3.0, steps=0).encoder_error_per_pixel.mean()


def test_the_expected_error_is_the_importance_form(cvae, turned):
    """Draws of the truncated normal against draws of the normal that fall into the ball."""
    x, y = turned.test.x[:1].expand(4000, -1, -1, -1), turned.test.y[:1].expand(4000, -1, -1, -1)
    noise, within = torch.Generator().manual_seed(0), Latent(cvae, 2.5)
    with torch.no_grad():
        direct = distances(cvae.generate(x, within.truncated(x, noise)), y)
        u = torch.randn(4000, cvae.latent, generator=noise)
        inside = u.norm(dim=1) <= 2.5
        weighted = distances(cvae.generate(x, u), y)[inside]
    spread = (direct.var() / 4000 + weighted.var() / len(weighted)).sqrt()
    assert abs(direct.mean() - weighted.mean()) < 4 * spread


# --- attacks in the ball


def test_robust_accuracy_over_the_learned_set(cvae, reader, turned):
    x, y = turned.test.x, turned.test.labels

    def accuracy(radius, **how):
        attack = partial(pgd, within=Latent(cvae, radius), **how)
        return robust_accuracy(reader, x, y, attack).value

    centre = reader(cvae.generate(x, torch.zeros(len(x), cvae.latent))).argmax(1) == y
    both = centre & (reader(x).argmax(1) == y)
    assert accuracy(0.0, steps=0) == pytest.approx(float(both.float().mean()))
    falls = [accuracy(2.0, steps=12, restarts=n) for n in (1, 2, 4)]
    assert falls == sorted(falls, reverse=True)
    draws = [accuracy(2.0, steps=0, restarts=n) for n in (1, 4)]
    assert draws == sorted(draws, reverse=True)
    assert falls[2] < draws[1] - 0.02, "an attack finds more than chance"


def test_an_iterate_does_not_depend_on_its_companions(cvae, reader, turned):
    x, y = turned.test.x[:6], turned.test.labels[:6]
    u = Latent(cvae, 2.0).draw(x, torch.Generator().manual_seed(0))
    moved = lambda i: pgd(reader, x[i], y[i], Entered(cvae, 2.0, start=u[i]), steps=4)
    whole = moved(slice(None))
    for i in range(6):
        assert torch.allclose(moved(slice(i, i + 1)), whole[[i]], atol=1e-3)


# --- the theorem


@pytest.mark.parametrize("name", ["trained", "plain", "residual"])
def test_the_theorem_holds_for_any_autoencoder(name, cvae, turned):
    model = cvae if name == "trained" else FAMILIES[name]
    x, y = (turned.test.x, turned.test.y) if name == "trained" else (some(name), some(name, seed=1))
    for alpha in (0.1, 0.5, 0.9):
        found = guarantee(model, x, y, alpha=alpha, draws=60)
        assert not any(found.violations().values()), found.violations()
        assert len(found.bound) == len(x) and (found.bound >= found.reach * 0.9999).all()
    assert (found.reach > 0).all()


class Fixed(nn.Module):
    """An encoder that says the same of every image."""

    def __init__(self, mean: float, log_variance: float):
        super().__init__()
        self.mean, self.log_variance = mean, log_variance

    def forward(self, *images):
        blank = torch.zeros(len(images[0]), 1)
        return Diagonal(blank + self.mean, blank + self.log_variance)


class Same(nn.Module):
    """A decoder that gives the condition back."""

    def forward(self, x, z):
        return x


def test_wrong_bounds_are_caught(monkeypatch):
    """sqrt(sum K) in place of sqrt(2 sum K) is too small for some model; a halved divergence breaks item 3."""
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model = ConditionalVAE(Fixed(0.0, 0.0), Fixed(6.0, 0.0), Same(), 1)
    found = guarantee(model, x, x, alpha=0.99, draws=400)
    kl = divergence(model.recognition(x, x), model.prior(x)).sum(1)
    assert not any(found.violations().values())
    assert (found.reach > found.bound - (2 * kl).sqrt() + kl.sqrt()).any()
    monkeypatch.setattr(quality, "divergence", lambda q, p: 0.5 * divergence(q, p))
    assert guarantee(model, x, x, alpha=0.99, draws=400).violations()["3 shift"] == 40


@given(kl=st.floats(0, 400))
def test_the_largest_ratio_solves_its_equation(kl):
    w = float(largest_ratio(torch.tensor([[kl]]).double()))
    assert w >= 1 - 1e-6
    assert 0.5 * (w - 1 - math.log(w)) == pytest.approx(kl, rel=1e-5, abs=1e-6)


def test_the_largest_ratio_of_no_divergence_is_one():
    assert float(largest_ratio(torch.zeros(1, 1))) == pytest.approx(1)


@settings(max_examples=10)
@given(seed=st.integers(0, 500))
def test_the_likelihood_ratio_is_bounded_tightly(seed):
    noise = torch.Generator().manual_seed(seed)
    q, p = (Diagonal(*(0.5 * torch.randn(2, 1, 3, generator=noise)).double()) for _ in "qp")
    bound = float(log_ratio_bound(q, p, 1.5))

    def ratio(u):
        z = p.at(torch.as_tensor(u))
        p_, q_ = Normal(p.mean, p.scale), Normal(q.mean, q.scale)
        return float((p_.log_prob(z) - q_.log_prob(z)).sum())

    found = -torch.inf
    for start in itertools.product((-0.8, 0.8), repeat=3):
        ball = {"type": "ineq", "fun": lambda u: 1.5**2 - (u * u).sum()}
        got = minimize(lambda u: -ratio(u[None]), start, constraints=[ball], method="SLSQP")
        u = got.x * min(1, 1.5 / max(1e-9, (got.x**2).sum() ** 0.5))
        found = max(found, ratio(u[None]))
    assert found - 1e-6 <= bound <= found + 0.02 * max(1, abs(found))


# --- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m, x: Variational(-1), "beta must be a finite number .* got -1"),
        (
            lambda m, x: Variational(distance="l1"),
            "distance must be one of 'squared error'.* got 'l1'",
        ),
        (lambda m, x: Variational(schedule=((2, 0),)), "schedule must be a number .* got 2"),
        (lambda m, x: radii(m, x, x[:1]), "x and target must have the same length, got 4 and 1"),
        (lambda m, x: radii(m, 2 * x, x), r"x lies in .* outside \[0, 1\]"),
        (lambda m, x: set_metrics(m, x, x, -1), "radius must be a finite number .* got -1"),
        (lambda m, x: set_metrics(m, x, x[0], 1), "target must have 4 axes"),
        (lambda m, x: set_metrics(m, x, x, 1, samples=0), "samples must be a whole number"),
        (lambda m, x: guarantee(m, x, x, alpha=1.0), "alpha must be a number .* got 1.0"),
        (
            lambda m, x: residual_cvae((3, 8, 8), pool=3),
            "pool must divide 8 and 8, got .* pool = 3",
        ),
        (lambda m, x: warp_cvae((1, 8, 8), warps=0), "warps must be a whole number"),
    ],
)
def test_bad_input_is_refused(untyped, make, words):
    with pytest.raises(ValueError, match=words):
        make(FAMILIES["plain"], some("plain"))
