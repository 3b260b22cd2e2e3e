"""The attack loop against closed forms, invariants and counted work."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robustood import attacks
from robustood.attacks import APGD, Square, fgsm, maximise, pgd, robust_accuracy
from robustood.losses import cross_entropy, margin
from robustood.metrics import proportion
from robustood.models import frozen, small_cnn
from robustood.perturbations import L2, Linf, Spatial

SETS = [Linf(0.1), L2(0.7)]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(24, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (24,), generator=generator)


@pytest.fixture(scope="module")
def net():
    """A network with batch normalisation and dropout: whatever an attack may disturb."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(8 * 64, 10),
    )  # fmt: skip
    model(torch.rand(64, 1, 8, 8))  # moves the running statistics
    return model


class Linear(nn.Module):
    """Logits W x + b on flattened inputs."""

    def __init__(self, classes: int, inputs: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(classes, inputs, generator=generator))
        self.b = nn.Parameter(torch.randn(classes, generator=generator))

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


# --- what comes back, and what stays as it was --------------------------------------------------


@pytest.mark.parametrize("within", SETS, ids=str)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "targets"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_feasible_and_shaped_like_x(net, batch, within, loss, keep):
    x, y = batch
    moved = pgd(net, x, y, within, steps=4, restarts=2, loss=loss, keep=keep)
    assert moved.shape == x.shape and moved.dtype == x.dtype and not moved.requires_grad
    assert moved.min() >= 0 and moved.max() <= 1
    assert within.norm(moved - x).max() <= within.eps + 1e-6
    assert within.norm(moved - x).max() > 0.5 * within.eps


@pytest.mark.parametrize("within", SETS, ids=str)
def test_parts_of_a_batch_start_as_if_each_came_alone(net, batch, within):
    x, y = batch
    how = {"steps": 2, "keep": "best"}

    def objective(a, b):
        return lambda v: cross_entropy(net(v), y[a:b])

    with frozen(net):
        noise = torch.Generator().manual_seed(5)
        together = attacks.search(
            objective(0, 24), x, within, generator=noise, parts=[16, 8], **how
        )
        noise = torch.Generator().manual_seed(5)
        first = maximise(objective(0, 16), x[:16], within, generator=noise, **how)
        second = maximise(objective(16, 24), x[16:], within, generator=noise, **how)
    assert torch.allclose(together, torch.cat([first, second]), atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "targets"])
def test_nothing_else_moves(net, batch, loss):
    x, y = batch
    net.train()
    net[0].eval()  # a mixed mode has to come back as it was
    net[0].weight.requires_grad_(False)
    net.zero_grad()
    net[-1].weight.grad = torch.full_like(net[-1].weight, 7.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    torch.manual_seed(123)  # not a seed that somebody may set in passing
    torch.rand(5)
    rng, before = torch.get_rng_state(), x.clone()
    pgd(net, x, y, Linf(0.1), steps=3, loss=loss)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert net[-1].weight.grad.eq(7).all() and net[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, before)
    net[0].weight.requires_grad_(True)
    net[-1].weight.grad = None


def test_frozen_restores_after_an_error(net):
    net.train()
    with pytest.raises(RuntimeError, match="inside"), frozen(net):  # noqa: PT012
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        raise RuntimeError("inside")
    assert net.training and all(p.requires_grad for p in net.parameters())
    with frozen(net, "train"):
        assert net[1].training
    with frozen(net, "keep"), frozen(len):
        assert net[1].training


def test_works_where_gradients_are_off(batch):
    x, y = batch
    model = small_cnn()
    expected = pgd(model, x, y, Linf(0.1), steps=3)
    with torch.no_grad():
        assert torch.equal(pgd(model, x, y, Linf(0.1), steps=3), expected)
    with torch.inference_mode():
        inner, labels = x.clone(), y.clone()  # inference tensors, which autograd refuses
        assert torch.equal(pgd(model, inner, labels, Linf(0.1), steps=3), expected)
        pgd(model, inner, labels, Linf(0.1), steps=2, loss="targets")


# --- counted work -------------------------------------------------------------------------------


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("restarts", [1, 3])
def test_costs_exactly_its_forwards_and_input_backwards(batch, steps, restarts):
    x, y = batch
    model = small_cnn()

    def forward():
        with torch.no_grad():
            model(x)

    def forward_and_backward():  # the input's gradient alone, to a non-leaf
        moved = x.clone().requires_grad_() + 0
        with frozen(model):
            torch.autograd.grad(cross_entropy(model(moved), y).sum(), moved)

    one, both = flops(forward), flops(forward_and_backward)
    assert both == 2 * one  # an input backward costs a forward
    run = partial(pgd, model, x, y, Linf(0.1), steps=steps, restarts=restarts)
    assert flops(partial(run, keep="last")) == restarts * steps * both
    assert flops(partial(run, keep="best")) == restarts * (steps * both + one)


def test_unfrozen_parameters_cost_nothing_more(batch):
    x, y = batch
    model = small_cnn()
    objective = lambda x: cross_entropy(model(x), y)
    run = partial(maximise, objective, x, Linf(0.1), steps=2, keep="last")
    with frozen(model):
        expected = flops(run)
    assert flops(run) == expected


# --- reductions and orders ----------------------------------------------------------------------


@pytest.mark.parametrize("ball", [Linf, L2])
@pytest.mark.parametrize("loss", ["ce", "targets"])
def test_radius_zero_is_the_identity(net, batch, ball, loss):
    x, y = batch
    assert torch.equal(pgd(net, x, y, ball(0), steps=3, loss=loss), x)
    clean = robust_accuracy(net, x, y)
    assert robust_accuracy(net, x, y, partial(pgd, within=ball(0.0), steps=3)) == clean


def test_no_steps_and_no_restarts_is_the_identity(net, batch):
    x, y = batch
    assert torch.equal(pgd(net, x, y, Linf(0.1), steps=0, restarts=0), x)


@pytest.mark.parametrize("within", SETS, ids=str)
def test_more_search_never_lowers_the_kept_value(batch, within):
    """Shared starts and best-so-far: more steps (same step size) and more restarts only add."""
    x, y = batch
    model = small_cnn()
    kept = lambda moved: margin(model(moved), y)
    size = within.eps / 3
    by_steps = [maximise(kept, x, within, steps=k, step_size=size) for k in (0, 1, 3, 9)]
    by_restarts = [maximise(kept, x, within, steps=3, restarts=r) for r in (1, 2, 5)]
    for ladder in (by_steps, by_restarts):
        for less, more in itertools.pairwise(ladder):
            assert (kept(more) >= kept(less)).all()
    assert (kept(by_steps[-1]) > kept(by_steps[0])).all()


def test_larger_ball_never_helps_the_defender(batch):
    x, y = batch
    model = small_cnn()
    smaller = pgd(model, x, y, Linf(0.05), steps=5)
    larger = Started(0.1, z=smaller - x)
    kept = lambda moved: margin(model(moved), y)
    assert (kept(maximise(kept, x, larger, steps=5)) >= kept(smaller)).all()


class Started(Linf):
    """The cube with one given start."""

    def __init__(self, eps, z):
        super().__init__(eps)
        object.__setattr__(self, "z", z)

    def initial_points(self, x, restarts, generator=None):
        yield self.z[: len(x)].clone()


@pytest.mark.parametrize("steps", [1, 6])
def test_a_sample_does_not_depend_on_its_companions(net, batch, steps):
    x, y = batch
    start = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) * 0.2 - 0.1
    start = Linf(0.1).project(x, start)
    net.double()
    try:
        x, start = x.double(), start.double()
        whole = pgd(net, x, y, Started(0.1, start), steps=steps)
        for i in (0, 7, 23):
            part = slice(i, i + 1)
            alone = pgd(net, x[part], y[part], Started(0.1, start[part]), steps=steps)
            assert torch.allclose(alone, whole[part], atol=1e-12)
    finally:
        net.float()


@pytest.mark.parametrize("factor", [1e-6, 0.3, 1e4])
@pytest.mark.parametrize("within", SETS, ids=str)
def test_scaling_the_loss_changes_nothing(batch, within, factor):
    x, y = batch
    model = small_cnn().double()
    x = x.double()
    plain = maximise(lambda m: cross_entropy(model(m), y), x, within, steps=5)
    scaled = maximise(lambda m: factor * cross_entropy(model(m), y), x, within, steps=5)
    assert torch.allclose(plain, scaled, atol=1e-9)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "targets"])
def test_shifting_the_logits_changes_nothing(batch, loss):
    x, y = batch
    model = small_cnn().double()
    x = x.double()
    shifted = lambda x: model(x) + 40.0 * x.flatten(1).sum(1, keepdim=True)
    one = pgd(model, x, y, Linf(0.1), steps=5, loss=loss)
    assert torch.allclose(one, pgd(shifted, x, y, Linf(0.1), steps=5, loss=loss), atol=1e-9)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(("within", "dual"), [(Linf(0.3, None), 1), (L2(0.3, None), 2)])
def test_linear_binary_margin_falls_by_the_dual_norm(within, dual):
    model = Linear(2, 20).double()
    x = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.arange(9) % 2
    w = model.w[1] - model.w[0]
    # Steps much longer than the radius slide along the ball: the angle shrinks tenfold each.
    for moved in (fgsm(model, x, y, within), pgd(model, x, y, within, steps=20, step_size=3.0)):
        risen = margin(model(moved), y) - margin(model(x), y)
        assert torch.allclose(risen, within.eps * w.norm(dual).expand(9), atol=1e-9)


def test_linear_binary_in_the_box_coordinate_by_coordinate():
    model = Linear(2, 30)
    x = torch.rand(8, 1, 5, 6, generator=torch.Generator().manual_seed(4))
    y, eps = torch.arange(8) % 2, 0.4
    w = (model.w[1] - model.w[0]) * (1 - 2 * y[:, None])  # uphill for the attacker
    flat = x.flatten(1)
    best = torch.where(w > 0, (flat + eps).clamp(max=1), (flat - eps).clamp(min=0))
    assert torch.allclose(fgsm(model, x, y, Linf(eps)).flatten(1), best, atol=1e-6)


@pytest.mark.parametrize("box", [None, (0, 1)])
def test_multiclass_linear_targets_are_exact_and_cross_entropy_is_not(box):
    """min over classes of the worst margin; the cross-entropy mixes the classes' directions."""
    model = Linear(10, 64, seed=1).double()
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    y = model(x).argmax(1)
    eps = 0.03
    low = torch.full_like(x, -eps) if box is None else (-x).clamp(min=-eps)
    high = torch.full_like(x, eps) if box is None else (1 - x).clamp(max=eps)
    w = model.w[None] - model.w[y][:, None]  # (samples, classes, pixels), uphill
    rise = torch.where(w > 0, w * high.flatten(1)[:, None], w * low.flatten(1)[:, None]).sum(2)
    worst = model(x) - model(x).gather(1, y[:, None]) + rise
    worst = worst.scatter(1, y[:, None], -torch.inf).amax(1)
    within = Linf(eps, box)
    found = margin(model(pgd(model, x, y, within, steps=10, loss="targets")), y)
    assert torch.allclose(found, worst, atol=1e-9)
    by_ce = margin(model(pgd(model, x, y, within, steps=40, restarts=2)), y)
    assert (by_ce <= worst + 1e-9).all() and (by_ce < worst - 1e-3).float().mean() > 0.2


@pytest.mark.parametrize("eps", [0.3, 2.0])
def test_quadratic_bowl(eps):
    """-|x - c|^2 over the l2 ball: c itself if inside, else the boundary point towards it."""
    c = torch.tensor([[0.6, -0.8, 0.0]], dtype=torch.float64)
    x = torch.zeros(1, 3, dtype=torch.float64)
    bowl = lambda moved: -(moved - c).square().sum(1)
    found = maximise(bowl, x, L2(eps, None), steps=400, step_size=0.01)
    assert torch.allclose(found, c * min(1.0, eps), atol=1e-2)
    assert bowl(found).item() == pytest.approx(-(max(0.0, 1 - eps) ** 2), abs=1e-3)


def test_kept_probability_of_a_target_never_falls(batch):
    x, _ = batch
    model, target = small_cnn(), torch.full((24,), 3)
    towards = lambda m: -cross_entropy(model(m), target)
    kept = [towards(maximise(towards, x, Linf(0.1), steps=k, step_size=0.02)) for k in range(6)]
    assert all((b >= a).all() for a, b in itertools.pairwise(kept))
    assert (kept[-1] > towards(x)).all()


def test_several_objectives_are_judged_together():
    """Two hills of which only the judge knows the higher one."""
    x = torch.zeros(5, 2)
    judge = lambda m: m[:, 1] - m[:, 0]
    hills = [lambda m, k=k: (m[:, k], judge(m)) for k in (0, 1)]
    run = partial(maximise, x=x, within=Linf(1.0, None), steps=8, restarts=0)
    assert torch.equal(run(hills), torch.tensor([[0.0, 1.0]]).expand(5, 2))
    assert torch.equal(run(hills[0]), x) and torch.equal(run(hills[::-1]), run(hills))


def test_success_is_kept_although_another_iterate_has_more_loss():
    """Judged by the margin: the cross-entropy peaks elsewhere than where the label flips."""

    # Class 0 is right. Along x the loss of class 0 rises; only near x = 0.5 does class 1 win.
    def model(x):
        v = x.flatten(1)
        spread = torch.cat([0 * v, 1 - 8 * (v - 0.5) ** 2, *[3 * v - 3.2] * 9], 1)
        return torch.cat([spread[:, :1], spread[:, 1:]], 1)

    x, y = torch.full((1, 1, 1, 1), 0.3), torch.tensor([0])
    last = pgd(model, x, y, Linf(0.7), steps=20, step_size=0.1, keep="last", restarts=0)
    best = pgd(model, x, y, Linf(0.7), steps=20, step_size=0.1, keep="best", restarts=0)
    assert cross_entropy(model(last), y) > cross_entropy(model(best), y)
    assert margin(model(last), y) < 0 < margin(model(best), y)


@pytest.mark.parametrize("within", [Linf(0.1, None), L2(0.1, None), Linf(0.1), L2(0.1)], ids=str)
def test_a_plain_sum_is_an_objective(within):
    """Its gradient is one number, expanded; nothing may be written into it."""
    x = torch.full((2, 3), 0.5)
    found = maximise(lambda m: m.sum(1), x, within, steps=5, restarts=0)
    rise = 0.3 if isinstance(within, Linf) else 0.1 * 3**0.5
    assert torch.allclose(found.sum(1) - x.sum(1), torch.full((2,), rise), atol=1e-5)


@pytest.mark.parametrize("ball", [Linf, L2])
def test_a_gradient_that_is_not_a_number_moves_nothing(ball):
    """A root at zero: its gradient there is 0/0."""
    x = torch.zeros(2, 3)
    rooted = lambda m: m.square().sum(1).sqrt()
    found = maximise(rooted, x, ball(1.0, None), steps=3, restarts=0, keep="last")
    assert torch.equal(found, x)


@pytest.mark.parametrize("values", [lambda m: m.mean(), lambda m: m.sum(1, keepdim=True)])
def test_objectives_are_per_sample(values):
    with pytest.raises(
        ValueError, match=r"one value per sample, shape \(2,\), got .*do not average"
    ):
        maximise(values, torch.zeros(2, 3), Linf(0.1, None), steps=1)


def test_nan_never_wins():
    x = torch.full((3, 1), 0.5)
    broken = lambda m: torch.where(m[:, 0] > 0.55, torch.nan, m[:, 0])
    found = maximise(broken, x, Linf(0.1), steps=4, step_size=0.02, restarts=0)
    assert found.isfinite().all() and (found[:, 0] <= 0.55).all() and (found[:, 0] > 0.53).all()


# --- robust accuracy ----------------------------------------------------------------------------


def test_robust_accuracy_counts_all_samples_and_gives_the_exact_interval():
    model = Linear(2, 4)
    x = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 2
    right = model(x).argmax(1) == y
    # An "attack" that repairs every mistake and spoils sample 0 or 1, whichever was right.
    fixed = {0: x[model(x).argmax(1) == 0][:1], 1: x[model(x).argmax(1) == 1][:1]}
    healing = lambda model, x, y: torch.cat([fixed[int(label)] for label in y])
    assert robust_accuracy(model, x, y, batch_size=7) == proportion(int(right.sum()), 50)
    assert robust_accuracy(model, x, y, healing, batch_size=7) == proportion(int(right.sum()), 50)
    spoiling = lambda model, x, y: healing(model, x, 1 - y)
    assert robust_accuracy(model, x, y, spoiling).value == 0


def test_a_wide_ball_breaks_everything(batch):
    x, y = batch
    assert robust_accuracy(small_cnn(), x, y, partial(pgd, within=Linf(1.0), steps=20)).value == 0


def test_an_attack_that_needs_backward_is_welcome(batch):
    """Somebody else's attack may call backward; it is not run where gradients are off."""
    x, y = batch

    def theirs(model, x, y):
        x = x.clone().requires_grad_()
        cross_entropy(model(x), y).sum().backward()
        return (x + 0.1 * x.grad.sign()).clamp(0, 1).detach()

    model = small_cnn()
    ours = robust_accuracy(model, x, y, partial(fgsm, within=Linf(0.1)))
    assert robust_accuracy(model, x, y, theirs) == ours


def test_an_attack_of_the_user_meets_the_model_in_eval_mode(batch):
    x, y = batch
    model = small_cnn(batch_norm=True)  # never set to eval mode
    kept = {k: v.clone() for k, v in model.state_dict().items()}

    def theirs(model, x, y):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(x), y).sum(), x)
        return (x + 0.1 * grad.sign()).clamp(0, 1).detach()

    found = robust_accuracy(model, x, y, theirs, batch_size=8)
    assert model.training and all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    assert robust_accuracy(model.eval(), x, y, theirs, batch_size=8) == found


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda m, x, y: x[:1], "shaped like x"),
        (lambda m, x, y: (x, y), "what attack returns must be a torch.Tensor, got tuple"),
        (lambda m, x, y: x * torch.nan, "what attack returns contains NaN"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_an_attack_returns_is_checked(net, batch, attack, words):
    with pytest.raises(ValueError, match=words):
        robust_accuracy(net, *batch, attack)


# --- bad input ----------------------------------------------------------------------------------


GOOD = torch.full((2, 1, 8, 8), 0.5)
LABELS = torch.tensor([0, 1])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (GOOD + 0.6, LABELS, ["x", "1.1", "[0, 1]", "normalisation inside the model"]),
        (GOOD - 0.6, LABELS, ["x", "-0.1", "[0, 1]"]),
        (GOOD[0], LABELS, ["x", "4 axes", "(1, 8, 8)", "x[None]"]),
        (GOOD * torch.nan, LABELS, ["x", "NaN"]),
        (GOOD * torch.inf, LABELS, ["x", "infinity"]),
        (GOOD[:0], LABELS[:0], ["x", "empty"]),
        ((GOOD * 255).short(), LABELS, ["x", "int16", "255"]),
        (GOOD, torch.tensor([0, 10]), ["y", "10", "(2, 10)"]),
        (GOOD, torch.tensor([0, -1]), ["y", "-1"]),
        (GOOD, torch.tensor([0, 1, 2]), ["y", "(2,)", "(3,)"]),
        (GOOD, torch.tensor([0.0, 1.0]), ["y", "float32", "y.long()"]),
    ],
)
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_bad_batches_are_refused_with_the_fix(attack, x, y, words):
    with pytest.raises(ValueError) as refused:
        attack(small_cnn(), x, y, Linf(0.1))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": -1}, ["steps", "-1", "at least 0"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"restarts": -2}, ["restarts", "-2"]),
        ({"step_size": -0.1}, ["step_size", "-0.1"]),
        ({"keep": "worst"}, ["keep", "'worst'", "'best'", "'last'"]),
        ({"loss": "hinge"}, ["loss", "'hinge'", "'margin'"]),
    ],
)
def test_bad_settings_are_refused_with_the_fix(changed, words):
    with pytest.raises(ValueError) as refused:
        pgd(small_cnn(), GOOD, LABELS, Linf(0.1), **changed)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.usefixtures("untyped")
def test_other_doors_are_watched():
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        pgd(small_cnn(classes=2), GOOD, LABELS, Linf(0.1), loss="dlr")
    with pytest.raises(ValueError, match="must be one of 'eval'"), frozen(None, "evil"):
        pass
    with pytest.raises(ValueError, match="x is empty"):
        robust_accuracy(small_cnn(), GOOD[:0], LABELS[:0])
    with pytest.raises(ValueError, match="y must have shape"):
        robust_accuracy(small_cnn(), GOOD, LABELS[:1])
    with pytest.raises(ValueError, match="y holds label 91"):
        robust_accuracy(small_cnn(), GOOD, LABELS + 90)
    with pytest.raises(ValueError, match=r"x lies in \[127.5"):
        robust_accuracy(small_cnn(), GOOD * 255, LABELS)
    with pytest.raises(ValueError, match=r"confidence must be .* got 95; write 0\.95"):
        robust_accuracy(small_cnn(), GOOD, LABELS, confidence=95)
    with pytest.raises(ValueError, match=r"batch_size must be .* got 0"):
        robust_accuracy(small_cnn(), GOOD, LABELS, batch_size=0)
    with pytest.raises(ValueError, match="outside"):
        maximise(lambda x: x.sum((1, 2, 3)), GOOD + 1, Linf(0.1), steps=1)


# --- APGD ---------------------------------------------------------------------------------------


def test_apgd_reconsiders_its_step_where_the_paper_does():
    assert sorted(APGD().checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert max(APGD().checkpoints(10)) <= 10


@pytest.mark.parametrize("within", [Linf(0.2), L2(0.5)], ids=str)
def test_apgd_finds_a_maximum_inside_the_set_that_a_fixed_step_jumps_over(within):
    x = torch.full((5, 1, 4, 4), 0.5)
    centre = x + within.project(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    centre = x + 0.5 * (centre - x)
    bowl = lambda v: -(v - centre).square().flatten(1).sum(1)
    search = partial(maximise, bowl, x, within, steps=100, restarts=0)
    found, fixed = bowl(search(rule=APGD())), bowl(search(step_size=2 * within.radius))
    assert (found > -1e-4).all()
    assert (found > fixed + 1e-3).all()


@pytest.mark.parametrize(
    "within", [Linf(0.1), L2(0.7), Spatial(20, 1)], ids=lambda w: type(w).__name__
)
def test_apgd_stays_inside_and_keeps_the_best(net, batch, within):
    x, y = batch
    with frozen(net):
        objective = lambda v: margin(net(v), y)
        values = [
            objective(maximise(objective, x, within, steps=steps, rule=APGD()))
            for steps in (0, 5, 25)
        ]
    moved = pgd(net, x, y, within, steps=7, rule=APGD())
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    assert (values[2] >= values[0] - 1e-6).all() and (values[1] >= values[0] - 1e-6).all()
    assert values[2].mean() > values[0].mean() + 0.05
    if isinstance(within, (Linf, L2)):
        assert within.norm(moved - x).max() <= within.eps + 1e-6


def test_apgd_at_radius_zero_is_the_identity(net, batch):
    x, y = batch
    assert torch.equal(pgd(net, x, y, Linf(0.0), steps=5, rule=APGD()), x)


def test_apgd_halves_for_each_sample_by_itself(net, batch):
    x, y = batch
    whole = pgd(net, x, y, L2(0.7), steps=12, restarts=0, rule=APGD())
    parts = [
        pgd(net, v[None], c[None], L2(0.7), steps=12, restarts=0, rule=APGD()) for v, c in zip(x, y)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_apgd_reaches_the_optimum_of_a_linear_model(batch):
    x, y = batch
    model, within = Linear(10, 64), Linf(0.05, box=None)
    moved = pgd(model, x, y, within, steps=5, loss="targets", rule=APGD())
    w, z = model.w.detach(), model(x).detach()
    own = w[y]
    gain = 0.05 * (w[None] - own[:, None]).abs().sum(2)
    exact = (z - z.gather(1, y[:, None]) + gain).scatter(1, y[:, None], -torch.inf).amax(1)
    assert torch.allclose(margin(model(moved), y), exact, atol=1e-4)


@pytest.mark.parametrize(
    "within", [Linf(0.1), L2(0.7), Spatial(20, 1)], ids=lambda w: type(w).__name__
)
def test_a_step_may_differ_from_sample_to_sample(batch, within):
    x, _ = batch
    z = next(within.initial_points(x, 1, torch.Generator().manual_seed(1)))
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    sizes = torch.linspace(0, 0.1, len(x))
    together = within.ascend(x, z.clone(), grad.clone(), sizes)
    alone = [
        within.ascend(x[i : i + 1], z[i : i + 1].clone(), grad[i : i + 1].clone(), float(sizes[i]))
        for i in range(len(x))
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert torch.allclose(together[0], z[0], atol=1e-6)  # a step of 0 only projects


# --- random search, and the strongest attack ----------------------------------------------------


@pytest.mark.parametrize(
    ("within", "reached"), [(Linf(0.1), 0.99), (L2(0.5), 0.97)], ids=["Linf", "L2"]
)
@pytest.mark.parametrize("shape", [(8, 1, 8, 8), (8, 40)], ids=["images", "vectors"])
def test_square_reaches_the_optimum_of_a_linear_objective_by_values_alone(within, reached, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    asked = []

    def objective(v):
        asked.append(v.requires_grad)
        return (v.detach() * w).flatten(1).sum(1)  # nothing to differentiate

    x = torch.full(shape, 0.5)
    moved = maximise(objective, x, within, steps=2000, restarts=0, rule=Square())
    dual = w.flatten(1).abs().sum(1) if isinstance(within, Linf) else w.flatten(1).norm(dim=1)
    gained = (objective(moved) - objective(x)) / (within.eps * dual)
    assert len(asked) == 2003 and not any(asked)
    assert (gained <= 1 + 1e-4).all() and gained.mean() > reached
    assert within.contains(x, moved - x).all()


def test_square_finds_what_rounding_hides_from_the_gradient(batch):
    """The gradient of a rounded margin is zero everywhere; random search still misclassifies."""
    x, _ = batch
    model = Linear(10, 64)
    coarse = lambda v: (8 * model(v)).detach().round() / 8 + 0 * v.flatten(1).sum(1)[:, None]
    y = coarse(x).argmax(1)
    with pytest.warns(UserWarning, match="gradient is exactly zero"):
        blind = pgd(coarse, x, y, Linf(0.1), steps=50, restarts=0, loss="margin")
    found = pgd(coarse, x, y, Linf(0.1), steps=500, restarts=0, loss="margin", rule=Square())
    smooth = pgd(model, x, y, Linf(0.1), steps=50, restarts=0, loss="margin")
    wrong = [int((coarse(v).argmax(1) != y).sum()) for v in (blind, found, smooth)]
    assert wrong[0] == 0 and wrong[1] >= wrong[2] - 2 > 10


def test_square_needs_a_ball_and_a_share(batch):
    x, _ = batch
    with pytest.raises(ValueError, match=r"Square searches norm balls.*Spatial"):
        maximise(lambda v: v.flatten(1).sum(1), x, Spatial(20, 1), steps=1, rule=Square())
    with pytest.raises(ValueError, match="share must be a number"):
        Square(share=0.0)


@pytest.mark.parametrize("within", SETS, ids=str)
def test_the_worst_case_is_at_least_as_bad_as_each_of_its_attacks(batch, within):
    x, _ = batch
    model = Linear(10, 64, seed=2)
    y = model(x).argmax(1)
    worst = margin(model(attacks.worst_case(model, x, y, within)), y)
    for how in ({"loss": "ce"}, {"loss": "dlr"}, {"loss": "targets"}):
        single = pgd(model, x, y, within, steps=20, rule=APGD(), **how)
        # of a sample that an earlier attack broke, later attacks ask no more
        assert (torch.minimum(margin(model(single), y), torch.zeros(len(x))) <= worst + 1e-4).all()


def test_the_worst_case_spends_later_attacks_on_samples_that_hold():
    """Two samples sit on the boundary, one can never be moved: only that one costs the whole sequence."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]]))
    x = torch.tensor([[0.5, 0.49, 0, 0], [0.5, 0.48, 0, 0], [1.0, 0, 0, 0]]).view(3, 1, 2, 2)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    moved = attacks.worst_case(model, x, torch.zeros(3, dtype=torch.int64), Linf(0.05))
    handle.remove()
    assert (model(moved).argmax(1) == 0).tolist() == [False, False, True]
    assert seen.count(3) <= 104 and seen.count(1) > 1200


def test_the_worst_case_of_a_finite_set_is_its_worst_member(batch):
    x, _ = batch
    model, grid = Linear(10, 64), Spatial(10, 0.3).grid(3)
    y = model(x).argmax(1)
    broken = [
        model(found).argmax(1) != y
        for found in (attacks.worst_case(model, x, y, grid), pgd(model, x, y, grid, steps=0))
    ]
    assert torch.equal(*broken) and 0 < broken[0].sum() < len(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_because_rounding_leaves_the_set(net, book, dtype):
    x, y = torch.full((4, 1, 8, 8), 0.49), book.test.y[:4]
    moved = x.to(dtype) + torch.full_like(x, 8 / 255).to(dtype)
    assert (moved.double() - x.to(dtype).double()).abs().max() > 8 / 255 + 1e-4
    with pytest.raises(ValueError, match=r"x must be float32 .*cast inside the model"):
        pgd(net, x.to(dtype), y, Linf(8 / 255), steps=1)
    inside = lambda v: net(v.to(dtype).float())
    assert Linf(8 / 255).contains(x, pgd(inside, x, y, Linf(8 / 255), steps=2) - x).all()
