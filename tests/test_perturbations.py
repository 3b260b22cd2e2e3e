"""Properties that every perturbation set shares, and the closed forms of each."""

import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from hypothesis import given
from scipy.stats import kstest

from robustood.perturbations import L2, Linf, PerturbationSet, norms


def images(seed: int, n: int = 3, size: int = 6) -> torch.Tensor:
    """Random images, some pixels at the ends of the box."""
    x = torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (x * 1.4 - 0.2).clamp(0, 1)


BALLS = [Linf(0.0), Linf(8 / 255), Linf(0.4), Linf(0.4, None), L2(0.0), L2(1.0), L2(1.0, None)]
EVERY_SET = pytest.mark.parametrize("within", BALLS, ids=str)


@EVERY_SET
def test_keeps_the_protocol(within):
    assert isinstance(within, PerturbationSet)


@EVERY_SET
@given(seed=st.integers(0, 10_000), size=st.floats(0, 3))
def test_starts_and_steps_stay_in_the_set(within, seed, size):
    x = images(seed)
    generator = torch.Generator().manual_seed(seed)
    for z in within.starts(x, 2, generator):
        assert within.contains(x, z).all()
        moved = within.apply(x, z)
        assert moved.shape == x.shape and moved.isfinite().all()
        if getattr(within, "box", (0, 1)) is not None:
            assert moved.min() >= 0 and moved.max() <= 1
        grad = torch.randn(z.shape, generator=generator)
        grad[0] = 0  # a dead gradient moves nothing, and makes no NaN
        stepped = within.ascend(x, z.clone(), grad, size * within.radius)
        assert within.contains(x, stepped).all() and torch.allclose(stepped[0], z[0], atol=1e-6)


@EVERY_SET
def test_the_null_parameter_is_the_identity(within):
    x = images(0)
    assert torch.equal(within.apply(x, within.null(x)), x)
    assert within.contains(x, within.null(x)).all()
    (only,) = within.starts(x, 0, None)
    assert torch.equal(only, within.null(x))


@EVERY_SET
def test_starts_come_from_the_generator_alone(within):
    x, state = images(0), torch.get_rng_state()
    draws = [
        torch.cat(list(within.starts(x, 3, torch.Generator().manual_seed(s)))) for s in (7, 7, 8)
    ]
    assert torch.equal(draws[0], draws[1])
    assert within.radius == 0 or not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


@EVERY_SET
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 5))
def test_projection_is_idempotent_and_lands_in_the_set(within, seed, scale):
    x = images(seed)
    z = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    once = within.project(x, z.clone())
    assert within.contains(x, once).all()
    assert torch.allclose(within.project(x, once.clone()), once, atol=2e-7)


@EVERY_SET
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
    (z,) = L2(2.0, None).starts(x, 1, generator)
    assert kstest((norms(z) / 2).pow(5).numpy(), "uniform").pvalue > 0.01
    assert z.mean(0).abs().max() < 0.1
    (z,) = Linf(2.0, None).starts(x, 1, generator)
    assert kstest((z.flatten() / 4 + 0.5).numpy(), "uniform").pvalue > 0.01


def test_scaled_keeps_the_rest():
    assert Linf(0.2, None).scaled(0.5) == Linf(0.1, None)
    assert L2(1.0).scaled(0) == L2(0.0)


@pytest.mark.parametrize("ball", [Linf, L2])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), True, "8/255"])
def test_bad_radius_is_refused(ball, eps):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"eps must be a number .* got .*8/255"):
            ball(eps)
        with pytest.raises(ValueError, match="box must be"):
            ball(0.1, (1, 0))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
