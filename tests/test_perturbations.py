"""Properties that every perturbation set shares, and the closed forms of each."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.stats import chi, kstest
from torch import nn

from robustood.attacks import maximise, pgd, robust_accuracy, search
from robustood.data import Batch, digits
from robustood.models import mlp
from robustood.objectives import Adversarial
from robustood.perturbations import (
    L2,
    Compose,
    Corruption,
    FiniteSubset,
    Latent,
    Linf,
    PerturbationSet,
    Random,
    Spatial,
    norms,
)


def images(seed: int, n: int = 3, size: int = 8) -> torch.Tensor:
    """Random images, some pixels at the ends of the box."""
    x = torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (x * 1.4 - 0.2).clamp(0, 1)


class Shades(nn.Module):
    """A generator in closed form: latent numbers change the brightness of rows; 0 changes nothing."""

    def __init__(self, latent: int = 3):
        super().__init__()
        self.latent = latent
        self.weight = nn.Parameter(torch.linspace(-0.4, 0.5, 8 * latent).view(latent, 8))
        self.layer = nn.Dropout(0.5)

    def generate(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        shade = self.layer(torch.ones_like(x)) * (u @ self.weight.to(u)).tanh()[:, None, :, None]
        return x + torch.where(shade > 0, 1 - x, x) * shade


SHADES = Shades()
BALLS = [Linf(0.0), Linf(8 / 255), Linf(0.4), Linf(0.4, None), L2(0.0), L2(1.0), L2(1.0, None)]
TURNS = [Spatial(30, 1, 0.2), Spatial(rotation=45, fill="border"), Spatial(0, 0, 0)]
FINITE = [
    Spatial(30, 1).grid(3),
    Corruption(),
    Corruption(("fog", "pixelate"), (1, 5)),
]
LEARNED = [Latent(SHADES, 2.0), Latent(SHADES, 0.0), Latent(Shades(40), 28.0)]
PAIRS = [
    Compose(Latent(SHADES, 1.0), Linf(0.1)),
    Compose(Spatial(30, 1), Linf(0.1)),
    Compose(Corruption(("contrast", "shot_noise"), (3,)), Linf(8 / 255)),
    Compose(L2(0.5), Spatial(20)),
    Compose(Corruption(("brightness",), (2,)), Spatial(10).grid(3)),
]
IDENTITY = {Linf: 0.0, L2: 0.0, Corruption: 0.0}  # exact; others resample


def tolerance(within) -> float:
    return IDENTITY.get(type(within), 1e-5)


EVERY_SET = pytest.mark.parametrize("within", BALLS + TURNS + LEARNED + FINITE + PAIRS, ids=repr)
PROJECTED = pytest.mark.parametrize("within", BALLS + TURNS + LEARNED, ids=repr)
EVERY_BALL = pytest.mark.parametrize("within", BALLS, ids=repr)


@EVERY_SET
def test_keeps_the_protocol(within):
    assert isinstance(within, PerturbationSet)


@EVERY_SET
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), size=st.floats(0, 3))
def test_starts_and_steps_stay_in_the_set(within, seed, size):
    x = images(seed)
    generator = torch.Generator().manual_seed(seed)
    for z in within.initial_points(x, 2, generator):
        assert within.contains(x, z).all()
        moved = within.apply(x, z)
        assert moved.shape == x.shape and moved.isfinite().all()
        if getattr(within, "box", (0, 1)) is not None:
            assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
        grad = torch.randn(z.shape, generator=generator)
        grad[0] = 0  # a dead gradient moves nothing, and makes no NaN
        stepped = within.ascend(x, z.clone(), grad, size * within.radius)
        assert within.contains(x, stepped).all() and torch.allclose(stepped[0], z[0], atol=1e-6)
        if not within.differentiable:
            assert torch.equal(stepped, z)


@EVERY_SET
def test_the_null_parameter_is_the_identity(within):
    x, zero = images(0), within.identity(images(0))
    assert (within.apply(x, zero) - x).abs().max() <= tolerance(within)
    assert within.contains(x, zero).all()
    assert torch.equal(next(iter(within.initial_points(x, 0, torch.Generator()))), zero)
    if not isinstance(within, Compose) and within.differentiable:  # the second start is x itself
        assert torch.equal(list(within.initial_points(x, 3, torch.Generator()))[1], zero)


@EVERY_SET
@pytest.mark.parametrize("steps", [0, 2])
def test_a_sample_does_not_depend_on_its_companions(within, steps):
    """For given starts: applied and stepped alone or in the batch, a sample fares the same."""
    x = images(3, n=4).double()
    start = list(within.initial_points(x, 2, torch.Generator().manual_seed(1)))[-1]
    grads = torch.randn(steps, *start.shape, generator=torch.Generator().manual_seed(2)).double()

    def walk(part):
        z = start[part].clone()
        for grad in grads:
            z = within.ascend(x[part], z, grad[part].clone(), 0.3 * within.radius)
        return within.apply(x[part], z)

    whole = walk(slice(None))
    for i in range(4):
        assert torch.allclose(walk(slice(i, i + 1)), whole[i : i + 1], atol=1e-6)


@EVERY_SET
def test_the_one_loop_takes_it_unchanged(within):
    """The kept value is never under that of any start, and the input is left alone."""
    x = images(5)
    before = x.clone()
    bright = lambda moved: moved.flatten(1).mean(1)
    found = search(bright, x, within, steps=3, restarts=2)
    starts = list(within.initial_points(x, 2, torch.Generator().manual_seed(0)))
    best = torch.stack([bright(within.apply(x, z)) for z in starts]).amax(0)
    assert (bright(found) >= best - 1e-6).all() and torch.equal(x, before)


@EVERY_SET
def test_starts_come_from_the_generator_alone(within):
    x, state = images(0), torch.get_rng_state()
    draws = [
        torch.cat(list(within.initial_points(x, 3, torch.Generator().manual_seed(s))))
        for s in (7, 7, 8)
    ]
    assert torch.equal(draws[0], draws[1])
    still = (within.radius == 0 and not isinstance(within, Corruption)) or within == Spatial(
        0, 0, 0
    )
    assert torch.equal(draws[0], draws[2]) == still
    assert torch.equal(torch.get_rng_state(), state)


@PROJECTED
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 5))
def test_projection_is_idempotent_and_lands_in_the_set(within, seed, scale):
    x = images(seed)
    shape = within.identity(x).shape
    z = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    once = within.project(x, z.clone())
    assert within.contains(x, once).all()
    assert torch.allclose(within.project(x, once.clone()), once, atol=2e-7)


@PROJECTED
def test_a_step_of_length_zero_is_the_projection(within):
    x = images(0)
    z = 3 * within.draw(x)
    stepped = within.ascend(x, z.clone(), torch.zeros_like(z), 0.0)
    assert torch.equal(stepped, within.project(x, z.clone()))


@EVERY_BALL
def test_contains_refuses_what_is_outside(within):
    x = images(0)
    z = torch.zeros_like(x)
    z[1, 0, 0, 0] = within.eps * 1.01 + 1e-4
    z[2, 0, 0, 0] = 1.01 - x[2, 0, 0, 0]  # out of the box, or of the ball
    expected = [True, False, within.box is None and bool(z[2].abs().max() <= within.eps)]
    assert within.contains(x, z).tolist() == expected


@given(seed=st.integers(0, 10_000))
def test_linf_projection_is_the_nearest_point(seed):
    """Ball and box are both boxes: coordinate by coordinate, a clip to the intersection."""
    x = images(seed)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    low, high = (x - 0.2).clamp(min=0), (x + 0.2).clamp(max=1)
    assert torch.allclose(x + Linf(0.2).project(x, z.clone()), (x + z).clamp(low, high), atol=1e-6)


def test_l2_projects_each_sample_on_its_own():
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4]])
    assert torch.allclose(L2(1.0, None).project(torch.zeros(2, 2), z), expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_l2_step_has_its_length_whatever_the_gradient(scale):
    x = torch.zeros(2, 3, dtype=torch.float32)
    grad = scale * torch.tensor([[0.0, 3.0, 4.0], [1.0, 0.0, 0.0]])
    stepped = L2(1.0, None).ascend(x, x.clone(), grad, 0.5)
    assert torch.allclose(stepped, torch.tensor([[0.0, 0.3, 0.4], [0.5, 0.0, 0.0]]))


def test_linf_step_is_the_sign():
    x = torch.zeros(1, 3)
    stepped = Linf(1.0, None).ascend(x, x.clone(), torch.tensor([[2e-9, -5.0, 0.0]]), 0.3)
    assert torch.allclose(stepped, torch.tensor([[0.3, -0.3, 0.0]]))


def test_starts_are_uniform_in_the_ball():
    """For l2, (|z| / eps)^n is uniform on [0, 1]; for linf each coordinate is, on [-eps, eps]."""
    x = torch.zeros(4000, 5)
    generator = torch.Generator().manual_seed(0)
    (z,) = L2(2.0, None).initial_points(x, 1, generator)
    assert kstest((norms(z) / 2).pow(5).numpy(), "uniform").pvalue > 0.01
    assert z.mean(0).abs().max() < 0.1
    (z,) = Linf(2.0, None).initial_points(x, 1, generator)
    assert kstest((z.flatten() / 4 + 0.5).numpy(), "uniform").pvalue > 0.01


def test_scaled_keeps_the_rest():
    assert Linf(0.2, None).scaled(0.5) == Linf(0.1, None)
    assert L2(1.0).scaled(0) == L2(0.0)


def test_a_radius_wider_than_the_box_is_refused():
    with pytest.raises(ValueError, match=r"eps is 8, wider than the box .* write 8/255"):
        Linf(8)
    assert Linf(8, None).radius == 8 and Linf(1).radius == 1  # the whole box is a set


@pytest.mark.parametrize("ball", [Linf, L2])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), True, "8/255"])
def test_bad_radius_is_refused(untyped, ball, eps):
    with pytest.raises(ValueError, match=r"eps must be a number .* got .*8/255"):
        ball(eps)
    with pytest.raises(ValueError, match="box must be"):
        ball(0.1, (1, 0))


# --- spatial, corruption, composition -----------------------------------------------------------


def smooth(n: int = 2, size: int = 9, width: int = 11) -> torch.Tensor:
    """Images without kinks at the scale of a pixel, and not square."""
    v, u = torch.meshgrid(torch.arange(size) / size, torch.arange(width) / width, indexing="ij")
    waves = [0.5 + 0.3 * torch.sin(3 * u + k) * torch.cos(2 * v - k) for k in range(n)]
    return torch.stack(waves)[:, None].double()


@pytest.mark.parametrize("coordinate", range(4))
@pytest.mark.parametrize("at", [0.137, -0.61])
def test_spatial_gradient_by_finite_differences(coordinate, at):
    """Central differences; bilinear interpolation has kinks, which these points avoid."""
    x, within = smooth(), Spatial(25, 1.5, 0.2, fill="border")
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).double()
    z = torch.tensor([0.2313, -0.3719, 0.1127, 0.4391]).double().repeat(2, 1)
    z[:, coordinate] = at
    z.requires_grad_()
    value = lambda z: (weights * within.apply(x, z)).sum((1, 2, 3))
    (grad,) = torch.autograd.grad(value(z).sum(), z)
    h = torch.zeros_like(z)
    h[:, coordinate] = 1e-6
    slope = (value(z + h) - value(z - h)) / 2e-6
    assert torch.allclose(grad[:, coordinate], slope.detach(), rtol=1e-5, atol=1e-7)


def test_spatial_moves_are_what_they_say():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 6] = 1.0  # two pixels to the right of the middle
    at = lambda image: divmod(int(image[0, 0].argmax()), 9)
    move = lambda within, *z: within.apply(x, torch.tensor([z]).float())
    assert at(move(Spatial(90), 1, 0, 0, 0)) == (2, 4)  # counter-clockwise: up
    assert at(move(Spatial(90), -1, 0, 0, 0)) == (6, 4)
    assert at(move(Spatial(translation=2), 0, 1, 0, 0)) == (4, 8)  # right
    assert at(move(Spatial(translation=2), 0, 0, 1, 0)) == (6, 6)  # down
    assert at(move(Spatial(scale=0.5), 0, 0, 0, 1)) == (4, 7)  # larger
    assert at(move(Spatial(scale=0.5), 0, 0, 0, -1)) == (4, 5)  # smaller
    assert move(Spatial(translation=2), 0, 1, 0, 0).sum() == pytest.approx(1, abs=1e-5)


def test_a_half_turn_is_a_flip_and_turns_compose_on_smooth_images():
    x = smooth(size=9, width=9)
    half = Spatial(180).apply(x, torch.tensor([[1.0, 0, 0, 0]] * 2).double())
    assert torch.allclose(half, x.flip(-1, -2), atol=1e-6)
    quarter = Spatial(90).apply(x, torch.tensor([[1.0, 0, 0, 0]] * 2).double())
    assert torch.allclose(quarter, x.rot90(1, (-2, -1)), atol=1e-6)


def test_a_grid_holds_its_points_and_the_finer_grid_finds_more():
    within = Spatial(30, 2)
    coarse, fine = within.grid(3), within.grid([5, 5, 5, 9])
    assert len(coarse.points) == 27 and len(fine.points) == 125  # no scale: one point there
    x = digits(train=1).test.x[:40]
    value = lambda moved: moved[:, 0, :, :3].mean((1, 2)) - moved[:, 0, :, 5:].mean((1, 2))
    by_grid = [value(maximise(value, x, s, steps=0)) for s in (coarse, fine)]
    assert (by_grid[1] >= by_grid[0] - 1e-6).all()
    by_ascent = value(maximise(value, x, within, steps=20, restarts=4))
    assert by_ascent.mean() >= by_grid[1].mean() - 0.005
    assert coarse.contains(x, coarse.points[5].expand(40, 4)).all()
    assert not coarse.contains(x, 0.9 * coarse.points[0].expand(40, 4)).any()


def test_corruption_lists_the_clean_image_and_every_member():
    within = Corruption(("fog", "jpeg_compression"), (1, 3, 5))
    x = images(0)
    members = list(within.initial_points(x, 7, torch.Generator().manual_seed(0)))
    assert [tuple(z[0, :2].tolist()) for z in members] == [
        (0, 0), (1, 1), (1, 3), (1, 5), (2, 1), (2, 3), (2, 5)
    ]  # fmt: skip
    mixed = torch.stack([members[i][i % 3] for i in (0, 4, 2)])
    alone = [within.apply(x[[i]], mixed[[i]]) for i in range(3)]
    assert torch.equal(within.apply(x, mixed), torch.cat(alone))
    assert len(list(Corruption().initial_points(x, 1, None))) == 19 * 5 + 1
    outside = torch.tensor([[3.0, 1, 0], [1, 2, 0], [0.5, 1, 0]])
    assert not within.contains(x, outside).any()


def test_worst_corruption_is_the_worst_of_all_renderings():
    within = Corruption(("gaussian_noise", "contrast", "fog"), (2, 5))
    x = images(1, n=5)
    dark = lambda moved: -moved.flatten(1).mean(1)
    found = maximise(dark, x, within, steps=9)
    renderings = [
        within.apply(x, z) for z in within.initial_points(x, 1, torch.Generator().manual_seed(0))
    ]
    assert torch.equal(dark(found), torch.stack([dark(r) for r in renderings]).amax(0))


def test_then_is_the_first_set_where_the_second_is_a_point():
    x = images(2)
    pair = Compose(Spatial(30, 1), Linf(0.0))
    z = next(iter(pair.initial_points(x, 1, torch.Generator().manual_seed(4))))
    assert torch.allclose(pair.apply(x, z), Spatial(30, 1).apply(x, z[:, :4]))
    turned = Spatial(30, 1).apply(x, z[:, :4])
    wide = Compose(Spatial(30, 1), Linf(0.1))
    found = maximise(lambda m: m.flatten(1).sum(1), x, wide, steps=5, restarts=2)
    assert found.flatten(1).sum(1).min() > turned.flatten(1).sum(1).min()
    assert found.max() <= 1 + 1e-6


def test_members_share_the_parents_images():
    x = images(0)
    few = FiniteSubset(Linf(0.2, None), torch.full((1, 1, 8, 8), 0.2))
    found = maximise(lambda m: m.flatten(1).sum(1), x, few, steps=5)
    assert torch.allclose(found, x + 0.2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Spatial(rotation=-1), "rotation must be a number .* got -1"),
        (lambda: Spatial(scale=1.0), "scale must be a number .* got 1.0"),
        (lambda: Spatial(translation=float("nan")), "translation must be a number .* got nan"),
        (lambda: Spatial(fill="wrap"), "fill must be one of .*'border'.* got 'wrap'"),
        (lambda: Spatial(10).grid(0), "each of points must be a whole number of at least 1, got 0"),
        (lambda: Corruption(("fgo",)), "each of names must be one of .*'fog'.* got 'fgo'"),
        (lambda: Corruption(severities=(0,)), "each of severities must be a whole number .* got 0"),
        (
            lambda: Corruption(severities=(2.5,)),
            "each of severities must be a whole number .* got 2.5",
        ),
        (lambda: Spatial(10).grid([3, 3]), "points must be one number or four, got 2"),
        (lambda: Corruption(()), "names must hold at least 1 .* got \\(\\)"),
    ],
)
def test_bad_sets_are_refused(untyped, make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "within",
    [Linf(0.2), L2(0.5), Spatial(30, 1), Corruption(("fog", "contrast"), (2, 5)), LEARNED[0]],
)
def test_random_members_are_members_and_come_from_the_generator(within):
    x, state = images(0, n=6), torch.get_rng_state()
    z = within.draw(x, torch.Generator().manual_seed(3))
    assert within.contains(x, z).all()
    made = [Random(within)(x, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(made[0], within.apply(x, z)) and torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2]) and not made[0].requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_corruptions_are_spread_evenly_and_never_clean():
    within = Corruption(("fog", "contrast", "snow"), (2, 5))
    z = within.draw(torch.zeros(3000, 1, 8, 8), torch.Generator().manual_seed(0))
    kinds, counts = z[:, :2].unique(dim=0, return_counts=True)
    assert kinds.tolist() == [[c, s] for c in (1, 2, 3) for s in (2, 5)]
    assert (counts - 500).abs().max() < 4 * (3000 * 5 / 36) ** 0.5


# --- learned sets -------------------------------------------------------------------------------


def test_a_latent_row_is_projected_alone():
    """Rows of length 100 come back at the radius, also a single one; short rows stay."""
    u = torch.randn(128, 40, generator=torch.Generator().manual_seed(0))
    long = 100 * u / norms(u)[:, None]
    within = Latent(Shades(40), 28.0)
    x = images(0)[:1].expand(128, -1, -1, -1)
    assert torch.allclose(norms(within.project(x, long.clone())), torch.tensor(28.0), rtol=1e-6)
    assert torch.allclose(norms(within.project(x[:1], long[:1].clone())), torch.tensor(28.0))
    assert torch.equal(within.project(x, 0.1 * u), 0.1 * u)
    wide = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    wide = 100 * wide / norms(wide)[:, None]
    columns = wide.renorm(2, 1, 28.0)  # a published slip: coordinates across the batch
    assert norms(columns).min() > 50 and torch.equal(wide[:1].renorm(2, 1, 28.0), wide[:1])


def test_latent_steps_follow_the_unit_gradient_and_a_dead_one_stays():
    within, x = Latent(SHADES, 2.0), images(0)
    grad = torch.tensor([[0.0, 3e-20, 4e-20], [0.0, 0, 0], [1.0, 0, 0]])
    stepped = within.ascend(x, within.identity(x), grad, 0.5)
    assert torch.allclose(stepped, torch.tensor([[0.0, 0.3, 0.4], [0, 0, 0], [0.5, 0, 0]]))


@pytest.mark.parametrize(("latent", "radius"), [(3, 1.5), (8, 3.0), (8, 1e3), (512, 2.7)])
def test_the_truncated_normal_has_the_law_of_its_norm(latent, radius):
    """The distribution of a chi variable below the radius; beyond all chi values it is chi itself."""
    within = Latent(Shades(latent), radius)
    u = within.truncated(images(0)[:1].expand(4000, -1, -1, -1), torch.Generator().manual_seed(1))
    length = norms(u).double().numpy()
    assert length.max() <= radius * (1 + 1e-6)
    if latent < 100:
        below = chi.cdf(length, latent) / chi.cdf(radius, latent)
    else:  # the law in closed form where the distribution function underflows: all at the surface
        assert chi.cdf(radius, latent) == 0
        depth = torch.linspace(0, 40, 200_001).double()
        density = (-depth - (radius * (-depth / latent).exp()) ** 2 / 2).exp()
        share = density.cumsum(0) / density.sum()
        depths = -latent * torch.as_tensor(length / radius).log()
        below = 1 - share[(depths / 40 * 200_000).round().long().clamp(0, 200_000)].numpy()
    assert kstest(below, "uniform").pvalue > 0.01
    direction = (u / norms(u)[:, None]).mean(0).abs().max()
    assert direction < 5 / (4000 * latent) ** 0.5


def test_latent_starts_have_uniform_length():
    x = images(0)[:1].expand(4000, -1, -1, -1)
    (u,) = Latent(SHADES, 2.0).initial_points(x, 1, torch.Generator().manual_seed(0))
    assert kstest((norms(u) / 2).numpy(), "uniform").pvalue > 0.01


def test_an_attack_leaves_the_generator_as_it_was_and_meets_it_in_eval_mode():
    within, model, x = Latent(SHADES, 2.0), mlp(64, (8,)), images(0)
    y = torch.tensor([0, 1, 2])
    SHADES.train()
    state = torch.get_rng_state()
    moved = [pgd(model, x, y, within, steps=4) for _ in range(2)]
    assert torch.equal(*moved), "dropout was on"
    assert SHADES.training and SHADES.weight.requires_grad and SHADES.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    share = robust_accuracy(model, x, y, lambda m, x, y: pgd(m, x, y, within, steps=2))
    assert share.n == 3
    loss = Adversarial(within, steps=2, ramp=0.5)(model, Batch(x, y, progress=0.25))
    loss.backward()
    assert SHADES.weight.grad is None and all(p.grad is not None for p in model.parameters())
    assert Adversarial(within, ramp=0.5).set_at(0.25) == Latent(SHADES, 1.0)
    SHADES.eval()


def test_no_latent_radius_is_the_generators_own_copy():
    x = images(0)
    found = pgd(mlp(64, (8,)), x, torch.tensor([0, 1, 2]), Latent(SHADES, 0.0), steps=3, restarts=2)
    assert torch.allclose(found, SHADES.generate(x, torch.zeros(3, 3)))


def test_a_bad_latent_set_is_refused(untyped):
    with pytest.raises(ValueError, match=r"radius must be a number .* got -1"):
        Latent(SHADES, -1)
    with pytest.raises(ValueError, match=r"generator must .* generate\(x, u\) and latent.* Linear"):
        Latent(nn.Linear(2, 2), 1.0)
