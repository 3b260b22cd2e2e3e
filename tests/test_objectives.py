"""Training rules: reductions, closed forms and the price of a step."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.flop_counter import FlopCounterMode

from robustood.attacks import pgd
from robustood.data import Batch, digits
from robustood.losses import to_reject, to_uniform
from robustood.models import ccu_model, mlp, small_cnn
from robustood.objectives import (
    ACET,
    ADV,
    ALOE,
    AOE,
    ATOM,
    CCU,
    NTOM,
    ROWL,
    SOFL,
    TRADES,
    Adversarial,
    InnerMax,
    MinedALOE,
    Objective,
    OutlierExposure,
    OutlierTraining,
    Standard,
)
from robustood.perturbations import L2, Compose, Corruption, Linf, Spatial
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
    kl = lambda q, p: kl_div(log_softmax(q, 1), p, reduction="none", log_target=True).sum(1)
    worst = objective.worst(model, again.x, lambda x: kl(model(x), anchor), again)
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
    climbed = lambda x: cross_entropy(model(x), batch.y, reduction="none")
    worst = []
    for restarts in (1, 2, 4):
        fresh = Batch(batch.x, batch.y, None, torch.Generator().manual_seed(3))
        found = Adversarial(0.1, steps=2, restarts=restarts).worst(model, fresh.x, climbed, fresh)
        worst.append(climbed(found))
    assert (worst[1] >= worst[0] - 1e-6).all() and (worst[2] >= worst[1] - 1e-6).all()
    assert (worst[2] > worst[0]).any()


def test_a_finite_first_set_is_searched_whole(batch):
    """The members' worst, not the last member."""
    model = small_cnn()
    pair = Compose(Corruption(("brightness", "contrast"), (5,)), Linf(0.0))
    climbed = lambda x: cross_entropy(model(x), batch.y, reduction="none")
    found = climbed(Adversarial(pair, steps=1).worst(model, batch.x, climbed, batch))
    for z in pair.initial_points(batch.x, 1, torch.Generator().manual_seed(1)):
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
        (lambda: Adversarial(Spatial(10), ramp=0.5), "ramp needs a ball .* got Spatial"),
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


# --- outliers -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A small network with batch normalisation and a reject output."""

    classes, reject = 10, 1

    def __init__(self, outputs: int = 11):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, outputs)
        )

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def mixed(data):
    return Batch(
        data.train.x[:32], data.train.y[:32], data.outliers[:64], torch.Generator().manual_seed(1)
    )


def run(objective, data, model):
    fit(model, objective, data, epochs=2, batch_size=64)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("net", [lambda: small_cnn(reject=1), Normed], ids=["plain", "batch norm"])
@pytest.mark.parametrize(
    ("at_zero", "limit"),
    [
        (ALOE(0.0), OutlierExposure()),
        (AOE(0.0), OutlierExposure()),
        (ADV(0.0), Standard()),
        (ATOM(0.0), NTOM()),
        (MinedALOE(0.0), NTOM()),
        (ACET(0.0), OutlierExposure(weight=1.0)),
    ],
    ids=["ALOE", "AOE", "ADV", "ATOM", "MinedALOE", "ACET"],
)
def test_radius_zero_is_the_clean_method_bit_for_bit(data, net, at_zero, limit):
    one, other = run(at_zero, data, net()), run(limit, data, net())
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_train_mode_attacks_move_the_running_statistics_and_nothing_else_at_radius_zero(data):
    one = run(ALOE(0.0, bn="train"), data, Normed())
    other = run(OutlierExposure(), data, Normed())
    moved = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert moved == ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]


def test_weight_zero_skips_the_outliers_and_is_adversarial_training(data, mixed):
    assert torch.equal(trained(ADV(0.1), data), trained(Adversarial(0.1, steps=2), data))
    model = small_cnn()
    with torch.no_grad():
        one = flops(partial(model, mixed.x))
    assert flops(partial(ALOE(0.1, weight=0.0), model, mixed)) == pytest.approx(5 * one, rel=0.03)

    def gradient(weight):
        fresh = replace(mixed, generator=torch.Generator().manual_seed(1))
        loss = ALOE(0.1, weight=weight)(model, fresh)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

    assert torch.allclose(gradient(0.0), gradient(1e-12), atol=1e-6)


def test_the_formula_by_hand(mixed):
    """Both inner maxima, the shares and the weight, term by term."""
    model = small_cnn(reject=1)
    objective = OutlierTraining(
        inside=InnerMax(0.1, steps=3, restarts=0), outside=InnerMax(0.05, steps=2, restarts=0),
        outlier_loss=to_reject, weight=0.7, attacked_share=0.25,
    )  # fmt: skip
    x = pgd(model, mixed.x, mixed.y, Linf(0.1), steps=3, restarts=0, keep="last")
    u, hard = mixed.outliers[:48], mixed.outliers[48:]
    reject = torch.full((64,), 10)
    v = pgd(model, hard, reject[48:], Linf(0.05), steps=2, restarts=0, keep="last")
    expected = cross_entropy(model(x), mixed.y) + 0.7 * (
        0.75 * cross_entropy(model(u), reject[:48]) + 0.25 * cross_entropy(model(v), reject[48:])
    )
    assert objective(model, mixed).item() == pytest.approx(expected.item(), rel=1e-5)


def test_outlier_losses_are_cross_entropies():
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    uniform = torch.full((20, 6), 1 / 6, dtype=torch.float64)
    expected = cross_entropy(z, uniform, reduction="none")
    assert torch.allclose(to_uniform(z), expected)
    assert torch.allclose(to_reject(z), cross_entropy(z, torch.full((20,), 5), reduction="none"))


def test_an_attacked_outlier_is_worse_and_the_first_ones_stay_clean(mixed):
    model = small_cnn(reject=1)
    objective = ATOM(0.1)
    u = objective.worst(model, mixed)[1]
    assert torch.equal(u[:32], mixed.outliers[:32])
    with torch.no_grad():
        gain = to_reject(model(u[32:])) - to_reject(model(mixed.outliers[32:]))
    assert (gain > 0).all() and (u - mixed.outliers).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_both_sides_are_attacked_in_one_batch_as_they_would_be_apart(mixed, share):
    model, calls = small_cnn().eval(), []
    objective = OutlierTraining(inside=0.1, outside=0.1, attacked_share=share, steps=3)
    hook = model.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    mixed.generator.manual_seed(7)
    x, u = objective.worst(model, mixed)
    hook.remove()
    attacked = round(share * len(mixed.outliers))
    assert calls == [len(mixed.x) + attacked] * 3
    mixed.generator.manual_seed(7)
    inner, clean = InnerMax(0.1, steps=3), len(mixed.outliers) - attacked

    def on_labels(v):
        return cross_entropy(model(v), mixed.y, reduction="none")

    def on_outliers(v):
        return to_uniform(model(v))

    x_apart = inner.worst(model, mixed.x, on_labels, mixed)
    u_apart = inner.worst(model, mixed.outliers[clean:], on_outliers, mixed)
    assert torch.equal(u[:clean], mixed.outliers[:clean])
    # A sign may turn where a gradient is zero up to rounding.
    for found, apart in ((x, x_apart), (u[clean:], u_apart)):
        assert ((found - apart).abs() > 1e-6).float().mean() < 1e-3


def test_sides_that_are_attacked_differently_or_with_batch_statistics_stay_apart(mixed):
    for objective in (ALOE(0.1, bn="train"), OutlierTraining(inside=0.1, outside=0.05)):
        model, calls = small_cnn(), []
        model.register_forward_hook(lambda _, inputs, out, c=calls: c.append(len(inputs[0])))
        objective.worst(model, mixed)
        assert calls == [len(mixed.x)] * 2 + [len(mixed.outliers)] * 2


def test_separate_statistics_come_from_the_inputs_alone(mixed):
    model, alone = Normed(), Normed()
    OutlierTraining(bn="separate")(model.train(), mixed)
    alone.train()(mixed.x)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(model.body[1], name), getattr(alone.body[1], name))
    together = Normed()
    OutlierTraining()(together.train(), mixed)
    assert not torch.equal(together.body[1].running_mean, alone.body[1].running_mean)
    attacked = Normed()
    ALOE(0.1, bn="separate")(attacked.train(), mixed)
    assert attacked.body[1].num_batches_tracked == 1


def test_lean_costs_of_a_step(data):
    """ALOE at 64 + 128 images and two steps: 1344 forwards; ATOM adds one forward for its best-of."""
    model = small_cnn(reject=1)
    batch = Batch(
        data.train.x[:64], data.train.y[:64], data.outliers[:128], torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        one = flops(partial(model, batch.x[:1]))

    def step(objective):
        return flops(lambda: objective(model, batch).backward()) / one

    assert step(OutlierExposure()) <= 1.02 * 576
    assert step(ADV(0.1)) <= 1.02 * 448
    assert step(AOE(0.1)) <= 1.02 * 832
    assert 0.9 * 1344 <= step(ALOE(0.1)) <= 1.02 * 1344
    assert step(ATOM(0.1)) <= 1.02 * (576 + 2 * 5 * 64 + 64)
    assert step(MinedALOE(0.1)) <= 1.02 * (576 + 2 * 5 * 64 + 2 * 5 * 64 + 64)


def test_sofl_waits_then_answers_itself_or_at_random(mixed):
    model = small_cnn(reject=2)
    early = replace(mixed, progress=0.2)
    plain = cross_entropy(model(mixed.x), mixed.y).item()
    assert SOFL()(model, early).item() == plain
    with torch.no_grad():
        model.head.bias[11] += 50  # every answer is the second reject output
    expected = cross_entropy(model(mixed.x), mixed.y) + 5 * cross_entropy(
        model(mixed.outliers), torch.full((64,), 11)
    )
    assert SOFL()(model, mixed).item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        model.head.bias[10:] -= 100  # no answer rejects: the labels are drawn
    z = model(mixed.outliers)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(10, 12, (64,), generator=generator)
    expected = cross_entropy(model(mixed.x), mixed.y) + 5 * cross_entropy(z, drawn)
    fresh = replace(mixed, generator=torch.Generator().manual_seed(1))
    assert SOFL()(model, fresh).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sofl_with_one_reject_class_trains_the_k_plus_1_score(mixed):
    model = small_cnn(reject=1)
    expected = cross_entropy(model(mixed.x), mixed.y) + 5 * to_reject(model(mixed.outliers)).mean()
    assert SOFL()(model, mixed).item() == pytest.approx(expected.item(), rel=1e-6)


def test_rowl_at_radius_zero_is_k_plus_1_training(mixed):
    model = small_cnn(reject=1)
    everything = torch.cat([mixed.x, mixed.outliers])
    labels = torch.cat([mixed.y, torch.full((64,), 10)])
    expected = cross_entropy(model(everything), labels)
    assert ROWL(0.0)(model, mixed).item() == pytest.approx(expected.item(), rel=1e-6)
    assert ROWL(0.1)(model, mixed) > expected


def test_the_guarded_posterior_in_closed_form(data, mixed):
    base = small_cnn()
    model = ccu_model(base, data.train.x, data.outliers, components=5)
    x = mixed.outliers[:6]
    p_in, p_out = model.inside(x).double().exp(), model.outside(x).double().exp()
    f = base(x).softmax(1).double()
    expected = (f * p_in[:, None] + p_out[:, None] / 10) / (p_in + p_out)[:, None]
    assert torch.allclose(model(x).exp().double(), expected, atol=1e-5)
    assert torch.allclose(model(x).exp().sum(1), torch.ones(6), atol=1e-5)
    far = torch.full((2, 1, 8, 8), 30.0)
    assert torch.isfinite(model(far)).all()


def test_ccu_raises_both_densities_and_trains_them_slowly(data, mixed):
    model = ccu_model(small_cnn(), data.train.x, data.outliers, components=5)
    start = [p.detach().clone() for p in model.inside.parameters()]

    def densities():
        with torch.no_grad():
            return float(model.inside(data.val.x).mean()), float(
                model.outside(data.outliers).mean()
            )

    before = densities()
    fit(model, CCU(), data, epochs=6, batch_size=64)
    after = densities()
    assert after[0] > before[0] and after[1] > before[1]
    moved = max(
        float((p.detach() - q).abs().max()) for p, q in zip(model.inside.parameters(), start)
    )
    assert 0 < moved < 0.02  # a hundredth of the network's rate
    with torch.no_grad():
        assert cross_entropy(model(data.train.x), data.train.y) < 1.2  # log 10 = 2.3 before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: NTOM()(small_cnn(), b), "model has no reject output"),
        (lambda b: SOFL()(small_cnn(), b), "model has no reject output"),
        (lambda b: ROWL(0.1)(small_cnn(), b), "model has no reject output"),
        (lambda b: CCU()(small_cnn(), b), "model must be a CCUModel"),
        (lambda b: ALOE(0.1)(small_cnn(), replace(b, outliers=None)), "data.outliers is empty"),
        (lambda b: OutlierExposure(weight=-1.0), "weight must be .* got -1"),
        (lambda b: OutlierTraining(attacked_share=1.5), "attacked_share must be .* got 1.5"),
        (lambda b: OutlierTraining(bn="off"), "bn must be one of 'eval', 'train', 'separate'"),
        (lambda b: ALOE(-0.1), "eps must be .* got -0.1"),
        (lambda b: ATOM(0.1, q=0.9), r"q \+ share must be at most 1"),
        (lambda b: SOFL(start=2.0), "start must be .* got 2"),
    ],
)
def test_bad_outlier_training_is_refused(untyped, mixed, call, words):
    with pytest.raises(ValueError, match=words):
        call(mixed)


def test_the_clean_input_can_count_as_a_member(net, book):
    """With it, the larger of the two losses of each sample counts; at radius 0 nothing changes."""
    x, y = book.train.x[:32], book.train.y[:32]
    batch = lambda: Batch(x, y, generator=torch.Generator().manual_seed(1))
    plain, with_clean = (Adversarial(0.1, steps=1, step_size=0.3, clean=c) for c in (False, True))
    loss = lambda v: cross_entropy(net(v), y, reduction="none")
    worst = loss(plain.worst(net, x, loss, batch()))
    assert torch.allclose(with_clean(net, batch()), torch.maximum(loss(x), worst).mean())
    assert with_clean(net, batch()) >= plain(net, batch()) - 1e-6
    still = [Adversarial(0.0, steps=1, clean=c)(net, batch()) for c in (False, True)]
    assert torch.allclose(*still)
