"""Training rules: reductions, closed forms and the price of a step."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.flop_counter import FlopCounterMode

from robustood.attacks import pgd
from robustood.data import Batch, digits
from robustood.models import mlp, small_cnn
from robustood.objectives import TRADES, Adversarial, Objective, Standard
from robustood.perturbations import L2, Corruption, Linf, Spatial, Then
from robustood.training import fit


@pytest.fixture(scope="module")
def data():
    return digits(train=320)


@pytest.fixture
def batch(data):
    return Batch(data.train.x[:32], data.train.y[:32], None, torch.Generator().manual_seed(1))


def trained(objective, data, model=None):
    model = model or small_cnn()
    fit(model, objective, data, epochs=2, batch_size=64)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("objective", [Standard(), Adversarial(0.1), TRADES(0.1)], ids=repr)
def test_keeps_the_protocol(objective, batch):
    assert isinstance(objective, Objective)
    assert objective(small_cnn(), batch).shape == ()


@pytest.mark.parametrize("within", [0.0, L2(0.0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_at_radius_zero_is_standard_bit_for_bit(data, within, steps):
    standard = trained(Standard(), data)
    assert torch.equal(trained(Adversarial(within, steps=steps), data), standard)
    assert not torch.equal(trained(Adversarial(0.1, steps=steps), data), standard)


def test_trades_without_a_price_or_a_radius_is_standard(data):
    standard = trained(Standard(), data)
    assert torch.allclose(trained(TRADES(0.1, beta=0.0), data), standard, atol=1e-5)
    assert torch.allclose(trained(TRADES(0.0), data), standard, atol=1e-5)


def test_a_number_means_linf(data):
    assert torch.equal(trained(Adversarial(0.1), data), trained(Adversarial(Linf(0.1)), data))


def test_linear_binary_adversarial_loss_in_closed_form():
    """max CE = log(1 + exp(-(m - eps |w|_1))), reached in one full step; for l2 with |w|_2."""
    model = mlp(6, (), 2).double()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(40) % 2
    w = model.head.weight[1] - model.head.weight[0]
    gap = (x @ w + model.head.bias[1] - model.head.bias[0]) * (2 * y - 1)
    for within, dual in ((Linf(0.3, None), 1), (L2(0.3, None), 2)):
        objective = Adversarial(within, steps=1, step_size=0.3, restarts=0)
        expected = torch.nn.functional.softplus(-(gap - 0.3 * w.norm(dual))).mean()
        assert torch.allclose(objective(model, Batch(x, y)), expected, atol=1e-12)


def test_adversarial_is_the_cross_entropy_at_the_shared_attack(batch):
    model = small_cnn()
    found = pgd(
        model, batch.x, batch.y, Linf(0.1), steps=7, keep="last",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    expected = cross_entropy(model(found), batch.y)
    assert Adversarial(0.1)(model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


def test_trades_value_and_where_its_gradient_flows(batch):
    """CE on clean plus beta KL(clean || worst); both arguments of the divergence carry gradient."""
    model = small_cnn()
    objective = TRADES(0.1, beta=3.0, steps=4)
    again = Batch(batch.x, batch.y, None, torch.Generator().manual_seed(1))
    anchor = log_softmax(model(batch.x), 1).detach()
    kl = lambda q, p: kl_div(log_softmax(q, 1), p, reduction="none", log_target=True).sum(1)  # noqa: E731
    worst = objective.worst(model, again.x, lambda x: kl(model(x), anchor), again.generator)
    assert kl(model(worst), anchor).mean() > 4 * kl(model(batch.x), anchor).mean()
    clean = model(batch.x)
    expected = cross_entropy(clean, batch.y) + 3 * kl(model(worst), log_softmax(clean, 1)).mean()
    value = objective(model, batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(value, model.head.weight)[0]
    assert torch.allclose(ours, torch.autograd.grad(expected, model.head.weight)[0], atol=1e-6)


def test_trades_gradient_is_zero_at_the_clean_input(batch):
    """Why it needs a random start: the divergence has its minimum, zero, where nothing moved."""
    model = small_cnn().double()
    x = batch.x.double().requires_grad_()
    anchor = log_softmax(model(batch.x.double()), 1).detach()
    kl = kl_div(log_softmax(model(x), 1), anchor, reduction="sum", log_target=True)
    assert torch.autograd.grad(kl, x)[0].abs().max() < 1e-12


def test_ramp_grows_the_radius_linearly():
    objective = Adversarial(0.4, ramp=0.5)
    sizes = [objective.set_at(progress).eps for progress in (0, 0.125, 0.25, 0.5, 0.9)]
    assert sizes == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert Adversarial(0.4).set_at(0.0) == Linf(0.4)


def test_the_step_size_is_used(batch):
    """A step of nothing stays at the start, which for restarts=0 is the clean input."""
    still = Adversarial(0.1, steps=3, step_size=0.0, restarts=0)
    model = small_cnn()
    assert still(model, batch).item() == Standard()(model, batch).item()


def test_of_several_restarts_the_best_is_kept(batch):
    model = small_cnn()
    climbed = lambda x: cross_entropy(model(x), batch.y, reduction="none")  # noqa: E731
    worst = []
    for restarts in (1, 2, 4):
        fresh = Batch(batch.x, batch.y, None, torch.Generator().manual_seed(3))
        found = Adversarial(0.1, steps=2, restarts=restarts).worst(
            model, fresh.x, climbed, fresh.generator
        )
        worst.append(climbed(found))
    assert (worst[1] >= worst[0] - 1e-6).all() and (worst[2] >= worst[1] - 1e-6).all()
    assert (worst[2] > worst[0]).any()


def test_a_finite_first_set_is_searched_whole(batch):
    """The members' worst, not the last member."""
    model = small_cnn()
    pair = Then(Corruption(("brightness", "contrast"), (5,)), Linf(0.0))
    climbed = lambda x: cross_entropy(model(x), batch.y, reduction="none")  # noqa: E731
    found = climbed(Adversarial(pair, steps=1).worst(model, batch.x, climbed, batch.generator))
    for z in pair.starts(batch.x, 1, torch.Generator().manual_seed(1)):
        assert (found >= climbed(pair.apply(batch.x, z)) - 1e-6).all()


@pytest.mark.parametrize(
    ("objective", "mode", "forwards"),
    [
        (Adversarial, "eval", 1),
        (Adversarial, "train", 1 + 3),
        (TRADES, "eval", 2),
        (TRADES, "train", 2 + 1 + 3),  # the anchor too
    ],
)
def test_the_attack_moves_running_statistics_only_in_train_mode(batch, objective, mode, forwards):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    model.train()
    objective(0.1, steps=3, mode=mode)(model, batch)
    assert int(model[1].num_batches_tracked) == forwards
    assert model.training and all(p.requires_grad for p in model.parameters())


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_step_costs_2k_plus_3_forwards(batch, steps):
    """A step: k forwards and k input backwards, then a forward and two backwards for the weights."""
    model = small_cnn()
    with torch.no_grad():
        one = flops(partial(model, batch.x))

    def step(objective):
        objective(model, batch).backward()

    assert flops(partial(step, Standard())) <= 3 * one
    assert flops(partial(step, Adversarial(0.1, steps=steps))) <= 1.02 * (2 * steps + 3) * one
    # TRADES: one forward more for the anchor, and two passes with weights.
    assert flops(partial(step, TRADES(0.1, steps=steps))) <= 1.02 * (2 * steps + 7) * one


@pytest.mark.parametrize("within", [Spatial(20, 1), Corruption(("contrast",), (3,))], ids=repr)
def test_trains_against_any_set(data, within):
    assert not torch.equal(trained(Adversarial(within, steps=2), data), trained(Standard(), data))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adversarial(-0.1), "eps must be a number .* got -0.1"),
        (lambda: Adversarial(0.1, steps=0), "steps must be .* at least 1, got 0"),
        (lambda: Adversarial(0.1, ramp=2), "ramp must be .* got 2"),
        (lambda: Adversarial(Spatial(10), ramp=0.5), "ramp needs a norm ball .* got Spatial"),
        (lambda: Adversarial("0.1"), "within must be a number or a perturbation set .* got '0.1'"),
        (
            lambda: Adversarial(0.1, mode="evil"),
            "mode must be one of 'eval', 'train', 'batch', got 'evil'",
        ),
        (lambda: Adversarial(0.1, step_size=-1), "step_size must be .* got -1"),
        (lambda: TRADES(0.1, beta=-1), "beta must be .* got -1"),
        (lambda: TRADES(0.1, restarts=0), "restarts must be .* at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(untyped, make, words):
    with pytest.raises(ValueError, match=words):
        make()
