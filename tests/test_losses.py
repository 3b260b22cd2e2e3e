"""Losses against numbers by hand, invariances and the definitions that they shorten."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from robustood import losses
from robustood.losses import cross_entropy, divergence, dlr, log_odds, margin, to_reject, to_uniform

seeds = given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 50))


def some(seed: int, scale: float = 1.0, batch: int = 5, classes: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, dtype=torch.float64, generator=generator)


def test_losses_by_hand():
    z, y = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0])
    wrong = torch.tensor([2])
    assert margin(z, y).item() == -2 and margin(z, wrong).item() == 3
    assert dlr(z, y).item() == pytest.approx(-2 / 3)
    assert dlr(z, wrong).item() == pytest.approx(1.0)
    assert cross_entropy(z, y).item() == pytest.approx(-math.log(0.8437947), abs=1e-6)
    assert to_uniform(z).item() == pytest.approx(1.836513, abs=1e-6)
    assert to_reject(z).item() == pytest.approx(3.169846, abs=1e-6)
    assert log_odds(z)[0, 0].item() == pytest.approx(3 - math.log(math.e + 1), abs=1e-6)


@given(scale=st.floats(1e-2, 1e3), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_dlr_is_affine_invariant(scale, shift, seed):
    z, y = some(seed), torch.arange(5)
    assert torch.allclose(dlr(scale * z + shift, y), dlr(z, y), atol=1e-6)


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match='"dlr" needs at least 3 classes, got 2; use "margin"'):
        dlr(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


@seeds
def test_the_margin_tells_right_from_wrong(seed, scale):
    z, y = some(seed, scale), torch.arange(5)
    assert torch.equal(margin(z, y) < 0, z.argmax(1) == y)


@seeds
def test_log_odds_are_those_of_the_softmax(seed, scale):
    z = some(seed, scale=min(scale, 5))
    p = z.softmax(1)
    rest = torch.stack([torch.cat([p[:, :t], p[:, t + 1 :]], 1).sum(1) for t in range(6)], 1)
    assert torch.allclose(log_odds(z), p.log() - rest.log(), atol=1e-9)


def test_log_odds_compare_at_least_two_classes():
    with pytest.raises(ValueError, match="the model has only one"):
        log_odds(torch.zeros(3, 1))


@seeds
def test_cross_entropy_to_uniform_is_a_divergence(seed, scale):
    """The distance from the uniform distribution plus log K; its gradient is softmax minus uniform."""
    z = some(seed, scale=scale).requires_grad_()
    p = z.softmax(1)
    by_hand = -(z.log_softmax(1)).mean(1)
    assert torch.allclose(to_uniform(z), by_hand, atol=1e-10)
    assert (to_uniform(z) >= math.log(6) - 1e-12).all()
    (grad,) = torch.autograd.grad(to_uniform(z).sum(), z)
    assert torch.allclose(grad, p - 1 / 6, atol=1e-12)
    assert to_uniform(torch.zeros(1, 6)).item() == pytest.approx(math.log(6))


@seeds
def test_divergence_is_that_of_two_softmaxes(seed, scale):
    z, other = some(seed, min(scale, 5)), some(seed + 1, min(scale, 5))
    terms = divergence(z.log_softmax(1), other)
    p, q = z.softmax(1), other.softmax(1)
    assert torch.allclose(terms, p * (p / q).log(), atol=1e-10)
    assert (terms.sum(1) >= -1e-12).all()
    assert divergence(z.log_softmax(1), z).abs().max() < 1e-12


@seeds
def test_to_reject_is_the_cross_entropy_of_the_last_output(seed, scale):
    z = some(seed, scale)
    last = torch.full((5,), 5)
    assert torch.allclose(to_reject(z), cross_entropy(z, last), atol=1e-10)


def test_names_that_attacks_take():
    assert {"ce": cross_entropy, "margin": margin, "dlr": dlr} == losses.LOSSES
