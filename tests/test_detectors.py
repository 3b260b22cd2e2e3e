"""Each score against numbers by hand, its identities, its gradient, and what it must leave alone."""

import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sklearn.ensemble import IsolationForest
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from robustood import detectors
from robustood.attacks import Square
from robustood.detectors import (
    KNN,
    MSP,
    ODIN,
    PRO,
    Energy,
    Entropy,
    GradNorm,
    Mahalanobis,
    MaxLogit,
    ReAct,
    RejectClass,
    ViM,
    post_hoc,
    wrap,
)
from robustood.detectors import (
    _base as base,
)
from robustood.detectors import (
    _features as features,
)
from robustood.detectors import (
    _gaussian as gaussian,
)
from robustood.evaluate import attack_score, standard
from robustood.identity import identity as fingerprint
from robustood.losses import log_odds, to_uniform
from robustood.metrics import auroc
from robustood.models import adapt, frozen, mlp, readout, small_cnn

DIRECTIONS = ("raise", "lower")


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def raw() -> nn.Module:
    """Its inputs are its outputs: the class outputs are given by hand."""
    return nn.Identity()


def identity(width: int, reject: int = 0) -> nn.Module:
    """Inputs are features and outputs."""
    return readout(torch.eye(width).double(), reject=reject)


def number(detector: nn.Module, row) -> float:
    return detector.paper_score(double([row])).item()


@pytest.fixture(scope="module")
def inputs(book):
    """Digits and everything that is none."""
    return torch.cat([book.test.x[:150], *(x[:50] for x in book.ood.values())])


def combined(model, x, y):
    return Mahalanobis(model, "all").fit(x, y).combine(x[:40], 1 - x[:40])


BUILD = {
    "MSP": lambda m, x, y: MSP(m),
    "MaxLogit": lambda m, x, y: MaxLogit(m),
    "Energy": lambda m, x, y: Energy(m, 2.0),
    "Entropy": lambda m, x, y: Entropy(m),
    "ODIN": lambda m, x, y: ODIN(m, step=0.01),
    "Mahalanobis": lambda m, x, y: Mahalanobis(m).fit(x, y),
    "Mahalanobis, step": lambda m, x, y: Mahalanobis(m, step=0.01).fit(x, y),
    "Mahalanobis, all": lambda m, x, y: Mahalanobis(m, "all", step=0.01).fit(x, y),
    "Mahalanobis, combined": combined,
    "KNN": lambda m, x, y: KNN(m, 5).fit(x, y),
    "ViM": lambda m, x, y: ViM(m, 16).fit(x, y),
    "ReAct": lambda m, x, y: ReAct(m).fit(x, y),
    "GradNorm": lambda m, x, y: GradNorm(m),
    "RejectClass": lambda m, x, y: RejectClass(rejecting(m)),
    "PRO": lambda m, x, y: PRO(MSP(m), 3, 0.01),
    "PRO, neighbours": lambda m, x, y: PRO(KNN(m, 5), 2, 0.01).fit(x, y),
}


def rejecting(model: nn.Module) -> nn.Module:
    """A network with reject outputs in the model's type and mode."""
    dtype = next(model.parameters()).dtype
    return small_cnn(classes=7, reject=3, seed=3).to(dtype).train(model.training)


@pytest.fixture(scope="module", params=BUILD)
def detector(request, net, book):
    """Every detector in double precision, so that an order is an order and not a rounding."""
    model = copy.deepcopy(net).double()
    return BUILD[request.param](model, book.train.x.double()[:400], book.train.y[:400])


# --- numbers by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "row", "wanted"),
    [
        (MSP, (3, 1, 0), 0.843795),
        (MaxLogit, (3, 1, 0), 3.0),
        (lambda m: ODIN(m, step=0), (2, 1, 0), 0.3336667),
        (lambda m: ODIN(m, 10, 0), (2, 1, 0), 0.367165),
        (Energy, (3, 1, 0), 3.169846),
        (lambda m: Energy(m, 2), (3, 1, 0), 3.928738),
        (Entropy, (3, 1, 0), -0.524267),
    ],
)
def test_published_numbers_of_the_outputs(build, row, wanted):
    assert number(build(raw()), row) == pytest.approx(wanted, abs=1e-6)


def test_deployed_numbers_of_the_outputs():
    z = double([(3, 1, 0)])
    assert MSP(raw()).score(z).item() == pytest.approx(1.686738, abs=1e-6)
    assert Entropy(raw()).score(z).item() == pytest.approx(-math.log(0.524267), abs=1e-5)
    assert to_uniform(z).item() == pytest.approx(1.836513, abs=1e-6)
    assert to_uniform(z).item() - math.log(3) == pytest.approx(0.737900, abs=2e-6)
    # ODIN at T = 1000 without a step: the lead over the mean of the others, 5/3 of K / (K - 1).
    assert ODIN(raw(), 1e6, 0).score(z).item() == pytest.approx(5 / 3 * 3 / 2, abs=1e-5)


def test_entropy_and_confidence_rank_differently():
    """Closeness to uniform and confidence are not the deployed score."""
    two, one = double([5, 5, *[-5] * 8]), double([4, *[0] * 9])
    z = torch.stack([two, one])
    assert to_uniform(z).tolist() == pytest.approx([8.693, 3.753], abs=1e-3)
    assert MSP(raw()).paper_score(z).tolist() == pytest.approx([0.4999, 0.8585], abs=1e-4)
    p = torch.stack([double([0.5, 0.5, *[1e-300] * 8]), double([0.6, *[0.4 / 9] * 9])]).log()
    assert Entropy(raw()).paper_score(p).tolist() == pytest.approx([-0.693, -1.552], abs=1e-3)


def test_numbers_of_odin_with_a_step():
    head = readout(double([(1, 0), (0, 1), (0, 0)]))
    x = double([(2, 1)])
    odin = ODIN(head, 10, 0.1)
    assert odin.paper_score(x).item() == pytest.approx(0.370713, abs=1e-6)
    assert odin.stepped(x).tolist()[0] == pytest.approx([2.1, 0.9])
    probe = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(head(probe) / 10, torch.tensor([0])), probe)
    assert grad[0].tolist() == pytest.approx([-0.06328, 0.03322], abs=1e-5)


def test_numbers_of_mahalanobis():
    tied = features.Gaussian(double([(0, 0), (4, 0)]), double([(2, 0), (0, 0.5)]))
    assert tied(double([(1, 1)]))[0].tolist() == pytest.approx([-1.25, -3.25], abs=1e-6)


class GivenLayers(Mahalanobis):
    """The layers' scores are the inputs."""

    def layer_scores(self, x):
        return x


def test_numbers_of_weighted_layers():
    by_layer = GivenLayers(raw())
    by_layer.weight, by_layer.bias = double([-0.8, -0.3]), double(-1.0)
    x = double([(-1.25, -6)])
    assert by_layer.score(x).item() == pytest.approx(-1.8, abs=1e-6)
    assert by_layer.paper_score(x).item() == pytest.approx(-0.858149, abs=1e-6)
    # Where the published score rounds to -1 or to 0, the deployed one goes on.
    far = torch.tensor([(-200.0, -200.0), (-300.0, -300.0)])
    by_layer.float()
    assert by_layer.paper_score(far).tolist() == [-1, -1]
    assert by_layer.score(far)[0] > by_layer.score(far)[1]


@pytest.mark.parametrize(("k", "wanted"), [(1, -0.005952), (2, -0.626806), (3, -0.899747)])
def test_numbers_of_the_neighbours(k, wanted):
    bank = double([(3, 4), (1, 0), (0, 2)])
    knn = KNN(identity(2), k).fit(bank, torch.tensor([0, 1, 1]))
    assert number(knn, (6, 8.1)) == pytest.approx(wanted, abs=1e-6)


def test_numbers_of_vim():
    head = readout(torch.eye(2, 3).double(), double([0.5, -0.5]))
    origin = double([-0.5, 0.5, 0])
    h = origin + double([(3, 0, 0.1), (-3, 0, 0.1), (0, 2, -0.1), (0, -2, -0.1)])
    vim = ViM(head, 2).fit(h)
    assert torch.allclose(vim.origin, origin)
    assert vim.alpha.item() == pytest.approx(12.5, abs=1e-6)
    query = double([(2, 1, 0.5)])
    assert vim.residual(query).item() == pytest.approx(0.5, abs=1e-6)
    assert vim.paper_score(query).item() == pytest.approx(-3.623072, abs=1e-6)
    z, virtual = vim.of(query)
    assert z.logsumexp(1).item() == pytest.approx(2.626928, abs=1e-6)
    chance = torch.cat([z, virtual[:, None]], 1).softmax(1)[0, -1].item()
    assert chance == pytest.approx(0.973994, abs=1e-6)


def test_numbers_of_react_and_gradnorm():
    head = readout(double([(1, 1, 0), (0, 1, 1)]))
    row = (0.5, 4, 1)
    assert number(ReAct(head, math.inf).double(), row) == pytest.approx(5.474077, abs=1e-6)
    assert number(ReAct(head, 1.0).double(), row) == pytest.approx(2.474077, abs=1e-6)
    assert number(GradNorm(head), row) == pytest.approx(1.347053, abs=1e-6)
    z = head(double([row]))
    loss = -z.log_softmax(1).mean()  # against its definition, an explicit gradient
    (grad,) = torch.autograd.grad(loss, head.head.weight)
    assert grad.abs().sum().item() == pytest.approx(1.347053, abs=1e-6)
    assert 2 * grad.abs().sum().item() == pytest.approx(2.694105, abs=2e-6)  # summed, not averaged


def test_numbers_of_the_reject_class():
    reject = RejectClass(identity(4, reject=1))
    z = double([(3, 1, 0, 2)])
    assert number(reject, (3, 1, 0, 2)) == pytest.approx(-0.236883, abs=1e-6)
    assert reject.score(z).item() == pytest.approx(1.169846, abs=1e-6)
    assert reject.score(z).item() == pytest.approx(math.log((1 - 0.236883) / 0.236883), abs=1e-5)
    wanted = (0.643914, 0.087144, 0.032059, 0.236883)
    assert reject.model(z).softmax(1)[0].tolist() == pytest.approx(wanted, abs=1e-6)


# --- identities -----------------------------------------------------------------------------------


def some(seed: int, n: int = 12, classes: int = 6, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)


seeds = given(seed=st.integers(0, 9999), scale=st.floats(0.01, 30))


@seeds
def test_bounds_of_the_scores_of_the_outputs(seed, scale):
    z, classes = some(seed, scale=scale), 6
    gap = Energy(raw()).paper_score(z) - MaxLogit(raw()).paper_score(z)
    assert (gap >= 0).all() and (gap <= math.log(classes) + 1e-12).all()
    msp = MSP(raw()).paper_score(z)
    assert (msp >= 1 / classes).all() and (msp <= 1).all()
    entropy = -Entropy(raw()).paper_score(z)
    assert (entropy >= 0).all() and (entropy <= math.log(classes) + 1e-12).all()
    # MSP and energy differ by the largest output alone.
    apart = MaxLogit(raw()).paper_score(z) - Energy(raw()).paper_score(z)
    assert torch.allclose(msp.log(), apart, atol=1e-12)


@seeds
def test_gradients_of_entropy_and_energy(seed, scale):
    probe = some(seed, scale=scale).requires_grad_()
    p, log_p = probe.detach().softmax(1), probe.detach().log_softmax(1)
    entropy = -(p * log_p).sum(1, keepdim=True)
    of = lambda score: torch.autograd.grad(score(probe).sum(), probe)[0]
    by_hand = p * (log_p + entropy)
    assert torch.allclose(of(Entropy(raw()).paper_score), by_hand, atol=1e-12)
    assert torch.allclose(of(Entropy(raw()).score) * entropy, by_hand, atol=1e-12)
    assert torch.allclose(of(Energy(raw()).score), p, atol=1e-12)
    tempered = (probe.detach() / 4).softmax(1)
    assert torch.allclose(of(Energy(raw(), 4).score), tempered, atol=1e-12)


def test_entropy_has_no_gradient_at_uniform_and_at_one_class():
    probe = double([[1.0] * 5, [900, 0, 0, 0, 0]]).requires_grad_()
    (grad,) = torch.autograd.grad(Entropy(raw()).paper_score(probe).sum(), probe)
    assert grad.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(Entropy(raw()).score(probe).sum(), probe)
    assert grad[0].abs().max() < 1e-12 and grad[1, 0] > 0.9  # the deployed one has one left


@seeds
def test_the_limit_of_odin_is_the_lead_over_the_mean(seed, scale):
    z = some(seed, scale=min(scale, 10))
    lead = z.amax(1) - z.mean(1)
    odin = ODIN(raw(), 1e6, 0)
    assert torch.allclose(odin.paper_score(z), 1 / 6 + lead / 6e6, atol=1e-9)
    assert torch.allclose(odin.score(z), lead * 6 / 5, rtol=1e-3, atol=1e-4)
    assert torch.allclose(ODIN(raw(), 1.0, 0).paper_score(z), MSP(raw()).paper_score(z), atol=0)


@given(seed=st.integers(0, 9999), k=st.integers(1, 12))
def test_neighbours_by_exhaustive_search(seed, k):
    bank, query = some(seed, 12), some(seed + 1, 5)
    knn = KNN(identity(6), k).fit(bank, torch.zeros(12, dtype=torch.int64))
    apart = torch.cdist(
        normalize(query), normalize(bank), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert torch.allclose(knn.score(query), -apart.sort(1).values[:, k - 1], atol=1e-12)
    assert (knn.score(query) <= 0).all() and (knn.score(query) >= -2).all()
    assert torch.allclose(knn.score(3 * query), knn.score(query), atol=1e-12)  # on the sphere


def test_a_point_of_the_bank_is_its_own_nearest_neighbour(net, book):
    x, y = book.train.x[:300], book.train.y[:300]
    assert KNN(net, 1).fit(x, y).score(x).abs().max() < 1e-3  # float32: the product rounds
    exact = copy.deepcopy(net).double()
    assert KNN(exact, 1).fit(x.double(), y).score(x.double()).abs().max() < 1e-14


@seeds
def test_identities_of_the_scores_of_the_features(seed, scale):
    h, y = some(seed, 40), torch.arange(40) % 3
    head = readout(some(seed + 1, 6, 6, 0.5), some(seed + 2, 1, 6)[0])
    energy = Energy(head).score(h)
    assert torch.allclose(ViM(head, 6).fit(h).score(h), energy, atol=1e-12)
    react = ReAct(head, math.inf).double()
    assert torch.equal(react.score(h), energy) and torch.equal(react.paper_score(h), energy)
    means = torch.stack([h[y == c].mean(0) for c in range(3)])
    plain = features.Gaussian(means, torch.eye(6).double())
    squared = (h[:, None] - means).square().sum(2)
    assert torch.allclose(plain(h), -squared / 2, atol=1e-9)
    tied = sum((h[y == c] - means[c]).T @ (h[y == c] - means[c]) for c in range(3)) / len(h)
    apart = h[:, None] - means
    by_hand = -0.5 * torch.einsum("ncd,de,nce->nc", apart, torch.linalg.inv(tied), apart)
    assert torch.allclose(Mahalanobis(identity(6)).fit(h, y).score(h), by_hand.amax(1), atol=1e-7)


def test_mahalanobis_is_linear_discriminant_analysis():
    """Under one covariance the closest class is the one that LDA names."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    y = torch.arange(300) % 3
    h = some(1, 300, 4) @ some(2, 4, 4) + 4 * some(3, 3, 4, 1.0)[y]
    lda = LinearDiscriminantAnalysis(priors=[1 / 3] * 3).fit(h.numpy(), y.numpy())
    ours = Mahalanobis(identity(4)).fit(h, y)
    query = 5 * some(4, 500, 4)
    assert np.array_equal(ours.by_class(query, 0).argmax(1).numpy(), lda.predict(query.numpy()))


def test_gradnorm_vanishes_at_uniform_and_at_no_feature_only():
    norm = GradNorm(readout(double([(1, -1), (-1, 1)])))
    h = double([(2, 2), (0, 0), (2, 1)])
    assert norm.paper_score(h)[:2].tolist() == [0, 0] and norm.paper_score(h)[2] > 0.1
    assert norm.score(h).isfinite().all()


@seeds
def test_one_reject_output_is_the_k_plus_one_class(seed, scale):
    z = some(seed, 9, 6, scale)
    one, three = RejectClass(identity(6, reject=1)), RejectClass(identity(6, reject=3))
    p = z.softmax(1)
    assert torch.allclose(one.paper_score(z), -p[:, 5], atol=1e-12)
    assert torch.allclose(three.paper_score(z), -p[:, 3:].sum(1), atol=1e-12)
    assert torch.allclose(torch.sigmoid(-three.score(z)), p[:, 3:].sum(1), atol=1e-12)


def test_only_class_outputs_count(net, inputs):
    """A detector for classes does not read reject outputs."""
    model = small_cnn(classes=7, reject=3)
    z = model(inputs)[:, :7]
    for kind in (MSP, MaxLogit, Energy, Entropy):
        assert torch.equal(kind(model).score(inputs), kind(raw()).score(z))
    assert GradNorm(model).attack_objectives(inputs).shape[1] == 3 + 7
    head = model.head
    assert torch.allclose(
        ViM(model).fit(inputs).origin,
        -torch.linalg.pinv(head.weight[:7]) @ head.bias[:7],
        atol=1e-5,
    )


# --- score and published --------------------------------------------------------------------------


def test_score_and_published_rank_alike(detector, inputs):
    x = inputs.double()
    with torch.no_grad():
        deployed, printed = detector.score(x), detector.paper_score(x)
    rise = lambda s: (s[:, None] - s).sign()
    assert (rise(deployed) * rise(printed) < 0).sum() == 0
    areas = [auroc(values[:150], values[150:]) for values in (deployed, printed)]
    assert areas[0] == pytest.approx(areas[1], abs=1e-3)  # a tie of the published one is half
    assert deployed.unique().numel() >= printed.unique().numel()


@pytest.mark.parametrize(
    ("kind", "levels"), [(MSP, 1), (lambda m: ODIN(m, 1.0, 0), 1), (Entropy, 6)]
)
def test_the_deployed_score_goes_on_where_the_published_one_is_full(kind, levels):
    lead = torch.tensor([20.0, 25, 50, 70, 90, 120, 300, 5000])
    z = torch.cat([lead[:, None], torch.zeros(8, 9)], 1)
    detector = kind(raw())
    assert detector.paper_score(z).unique().numel() == levels
    assert (detector.score(z).diff() > 0).all()
    probe = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(detector.score(probe).sum(), probe)
    assert (grad[:, 0] > 0.5).all()


def test_the_reject_score_goes_on_at_both_ends():
    z = torch.tensor([(0.0, 0, v) for v in (-300.0, -200.0, 200.0, 300.0)])
    reject = RejectClass(readout(torch.eye(3), reject=1))
    assert reject.paper_score(z).unique().numel() == 2 and (reject.score(z).diff() < 0).all()


def test_saturated_scores_tie_and_log_odds_do_not(net, book):
    """The same network, more sure of itself: the order of its log-odds is all that is left."""
    sharp = copy.deepcopy(net)
    with torch.no_grad():
        sharp.head.weight *= 12
        sharp.head.bias *= 12
    x = book.test.x
    with torch.no_grad():
        printed, deployed = MSP(sharp).paper_score(x), MSP(sharp).score(x)
    assert printed.unique().numel() < 0.5 * len(x)
    assert deployed.unique().numel() > 0.98 * len(x)


# --- what attacks use -----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_objective_is_the_score(detector, inputs, direction):
    x = inputs.double()[::5]
    columns = detector.attack_objectives(x, direction)
    wanted = detector.score(x) if direction == "raise" else -detector.score(x)
    assert columns.shape[0] == len(x) and columns.shape[1] >= detector.n_untargeted >= 1
    assert torch.allclose(columns[:, 0].to(wanted), wanted, rtol=1e-12, atol=1e-12)
    assert columns.isfinite().all()


def test_columns_after_the_general_ones_are_one_a_class(detector, inputs):
    x = inputs.double()[:3]
    classes = 7 if isinstance(detector, RejectClass) else 10
    assert detector.attack_objectives(x).shape == (3, detector.n_untargeted + classes)
    assert detector.attack_objectives(x, "lower").shape[1] < detector.n_untargeted + classes


def test_towards_each_class_by_hand():
    z = double([(3, 1, 0)])
    assert torch.allclose(MSP(raw()).attack_objectives(z)[:, 1:], log_odds(z))
    assert torch.allclose(MaxLogit(raw()).attack_objectives(z)[:, 1:], z)
    assert torch.allclose(Energy(raw()).attack_objectives(z)[:, 1:], z)
    assert torch.allclose(ODIN(raw(), step=0).attack_objectives(z)[:, 1:], z - z.mean())
    assert MSP(raw()).attack_objectives(z, "lower")[0, 1].item() == pytest.approx(
        -1.836513, abs=1e-6
    )
    assert MaxLogit(raw()).attack_objectives(z, "lower")[0, 1].item() == pytest.approx(
        -3.169846, abs=1e-6
    )
    reject = RejectClass(identity(4, reject=1))
    assert reject.attack_objectives(double([(3, 1, 0, 2)]))[0, 1:].tolist() == [1, -1, -2]


def gradient(score, x) -> torch.Tensor:
    probe = x.clone().requires_grad_()
    return torch.autograd.grad(score(probe).sum(), probe)[0]


def test_the_gradient_of_odin_is_that_at_the_stepped_point(net, inputs):
    model = copy.deepcopy(net).double()
    x = inputs.double()[::5]
    odin, plain = ODIN(model, step=0.05), ODIN(model, step=0)
    moved = odin.stepped(x)
    assert ((moved - x).abs() - 0.05).abs().max() < 1e-12
    assert torch.equal(gradient(odin.score, x), gradient(plain.score, moved))
    assert not torch.allclose(gradient(odin.score, x), gradient(plain.score, x))


@pytest.mark.parametrize("layers", ["last", "all"])
def test_the_gradient_of_mahalanobis_is_that_at_the_stepped_point(net, book, inputs, layers):
    model = copy.deepcopy(net).double()
    x, train = inputs.double()[::5], book.train.x.double()
    stepped = Mahalanobis(model, layers, step=0.03).fit(train, book.train.y)
    plain = Mahalanobis(model, layers).fit(train, book.train.y)
    total, scores = torch.zeros_like(x), []
    for layer in range(len(stepped.layer_fits)):
        mine = lambda v, i=layer: plain.layer_scores(v)[:, i]
        moved = x - 0.03 * (2 * (gradient(mine, x) <= 0).double() - 1)
        total += gradient(mine, moved)
        scores.append(mine(moved))
    assert torch.allclose(stepped.score(x), sum(scores), atol=1e-9)
    assert torch.allclose(gradient(stepped.score, x), total, atol=1e-9)
    assert (stepped.score(x) >= plain.score(x)).double().mean() > 0.9  # the step pulls inwards


def test_the_gradient_of_react_passes_the_clip():
    weight = double([(1, 1, 0), (0, 1, 1)])
    react = ReAct(readout(weight), 1.0).double()
    h = double([(0.5, 4, 1)])
    p = readout(weight)(h.clamp_max(1)).softmax(1)
    assert torch.allclose(gradient(react.score, h), p @ weight)
    clipped = gradient(react.paper_score, h)
    assert clipped[0, 1] == 0 and torch.allclose(clipped[0, 0], (p @ weight)[0, 0])
    both = react.attack_objectives(h)[0, :2]
    assert both[0] == both[1]


EXTREMES = {
    "nothing": torch.zeros(2, 6).double(),
    "equal": torch.full((2, 6), 3.0).double(),
    "two lead": double([(9, 9, 0, 0, 0, 0)]),
    "huge": double([(1e4, 0, 0, 0, 0, -1e4), (0, 0, 1e4, 1e4, 0, 0)]),
    "tiny": torch.full((2, 6), 1e-30).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_and_gradients_are_finite_everywhere(x, direction, dtype):
    h, y = some(5, 60).to(dtype), torch.arange(60) % 6
    model = readout(torch.eye(6, dtype=dtype))
    every = [
        *post_hoc(model, h, y).values(),
        RejectClass(readout(torch.eye(6, dtype=dtype), None, 2)),
    ]
    for detector in every:
        probe = x.to(dtype).clone().requires_grad_()
        columns = detector.attack_objectives(probe, direction)
        name = type(detector).__name__
        assert columns.isfinite().all() and detector.paper_score(probe).isfinite().all(), name
        for column in columns.T:
            (grad,) = torch.autograd.grad(column.sum(), probe, retain_graph=True)
            assert grad.isfinite().all(), name


def test_the_gradient_is_that_of_the_values(detector, inputs):
    """Central differences, where the score carries no stand-in gradient of its own and has no jumps nearby."""
    if isinstance(detector, (ODIN, ReAct)) or getattr(detector, "step", 0):
        return
    x = inputs.double()[[3, 160, 290]]
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for direction in DIRECTIONS:
        columns = lambda v, d=direction: detector.attack_objectives(v, d)
        _, by_graph = torch.autograd.functional.jvp(columns, x, along)
        by_values = (columns(x + 1e-6 * along) - columns(x - 1e-6 * along)) / 2e-6
        assert torch.allclose(by_graph, by_values, rtol=1e-3, atol=1e-4)


# --- what a score must not depend on, and what it must leave alone --------------------------------


def test_a_sample_does_not_depend_on_its_companions(detector, inputs):
    x = inputs.double()[:40]
    with torch.no_grad():
        together = detector.score(x)
        for i in (0, 17, 39):
            assert torch.allclose(detector.score(x[i : i + 1]), together[i], rtol=1e-9, atol=1e-9)


def test_scoring_and_fitting_leave_everything_alone(net, book):
    model = copy.deepcopy(net)
    model.head.bias.requires_grad_(False)
    model.train()
    model.head.eval()
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, x = [m.training for m in model.modules()], book.train.x[:200]
    before = x.clone()
    torch.manual_seed(123)
    torch.rand(5)
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for build in BUILD.values():
        made = build(model, x, book.train.y[:200])
        made.attack_objectives(x[:9]), made.paper_score(x[:9])
        gradient(made.score, x[:9])
        with torch.no_grad():
            made.attack_objectives(x[:9], "lower")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not model.head.bias.requires_grad and model.head.weight.requires_grad
    assert model.head.weight.grad.eq(7).all() and model.body[0][0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, before)
    assert np.array_equal(np.random.get_state()[1], numpy_rng)  # noqa: NPY002


def test_works_where_gradients_are_off(detector, inputs):
    x = inputs.double()[:9]
    wanted = detector.score(x).detach()
    with torch.no_grad():
        assert torch.equal(detector.score(x), wanted)
    with torch.inference_mode():
        inner = x.clone()
        assert torch.equal(detector.score(inner), wanted)
        assert torch.allclose(detector.attack_objectives(inner)[:, 0].to(wanted), wanted)
        assert detector.paper_score(inner).isfinite().all()


@pytest.mark.parametrize("name", [name for name in BUILD if name != "RejectClass"])
def test_what_was_fitted_in_inference_mode_can_be_attacked(net, book, name):
    x, y = book.train.x[:120], book.train.y[:120]
    with torch.inference_mode():
        made = BUILD[name](net, x, y)
    assert gradient(made.score, x[:4]).isfinite().all()


def test_forward_is_the_score_and_frozen_reaches_the_network(detector, inputs):
    x = inputs.double()[:5]
    assert torch.equal(detector(x), detector.score(x))
    with frozen(detector):
        assert not any(p.requires_grad for p in detector.model.parameters())
    assert all(p.requires_grad for p in detector.model.parameters())


# --- the lowest score near the input -------------------------------------------------------------


def slope(weight, bias: float = 0.0) -> MaxLogit:
    """The linear score w x + b, as the larger of it and an output far below."""
    rows = torch.stack([double(weight), torch.zeros(len(weight)).double()])
    return MaxLogit(readout(rows, double([bias, -1e6])))


def test_a_linear_score_falls_by_the_one_norm_at_each_step():
    weight = (2.0, -1.0, 0.0, 0.5)
    x = double([(1, 0.5, 3, -2), (0, 0, 0, 0)])
    for steps, step in ((0, 0.1), (1, 0.1), (4, 0.02)):
        pro = PRO(slope(weight), steps, step)
        wanted = x @ double(weight) - steps * step * 3.5
        assert torch.allclose(pro.score(x), wanted, atol=1e-12)
        moved = steps * step * double(weight).sign()
        assert torch.allclose(pro.rectified(x), x - moved, atol=1e-12)  # sgn(0) = 0
        assert torch.allclose(gradient(pro.score, x), double(weight).expand(2, -1), atol=1e-12)


@seeds
def test_the_lowest_score_is_that_of_the_visited_points(seed, scale):
    """Against the definition, in a plain loop; it never rises with K, and no step leaves the base."""
    x, base = some(seed, scale=scale), Entropy(raw())
    point, seen = x, [base.score(x)]
    for steps in range(6):
        pro = PRO(base, steps, 0.3)
        assert torch.equal(pro.score(x), torch.stack(seen).amin(0))
        assert torch.allclose(pro.paper_score(x), base.paper_score(pro.rectified(x)), atol=0)
        assert ((pro.rectified(x) - x).abs() <= steps * 0.3 + 1e-9).all()
        point = point - 0.3 * gradient(base.score, point).sign()
        seen.append(base.score(point))


def test_without_steps_the_base_is_left(net, inputs):
    for steps, step in ((0, 0.1), (4, 0.0)):
        pro, base = PRO(MSP(net), steps, step), MSP(net)
        assert torch.equal(pro.rectified(inputs), inputs)
        for direction in DIRECTIONS:
            columns = pro.attack_objectives(inputs, direction)
            assert torch.equal(columns, base.attack_objectives(inputs, direction))
        assert torch.equal(gradient(pro.score, inputs), gradient(base.score, inputs))


def test_it_is_the_attack_loop_run_by_the_defender(net, inputs):
    from robustood.attacks import maximise
    from robustood.perturbations import Linf

    pro = PRO(Energy(net), 5, 0.02)
    within = Linf(1.0, box=None)  # wider than five steps, so nothing is projected
    with frozen(net):
        lowest = maximise(
            lambda v: -pro.base.score(v), inputs, within, steps=5, step_size=0.02, restarts=0
        )
    assert torch.allclose(pro.rectified(inputs), lowest, atol=1e-6)


def test_the_order_is_that_of_a_descent_on_the_probability(net, inputs):
    """The paper descends the largest probability; where that does not round to 1, the signs agree."""
    model, x = copy.deepcopy(net).double(), inputs.double()
    msp = MSP(model)
    point, seen = x, [msp.paper_score(x)]
    for _ in range(3):
        point = point - 0.01 * gradient(msp.paper_score, point).sign()
        seen.append(msp.paper_score(point))
    assert torch.allclose(PRO(msp, 3, 0.01).paper_score(x), torch.stack(seen).amin(0), atol=1e-9)


@pytest.mark.parametrize("base", [MSP, Energy, lambda m: ODIN(m, 10.0, 0)])
def test_the_gradient_at_the_lowest_point_is_exact(net, inputs, base):
    """The displacement is constant nearby: central differences, but at a jump, where a sign flips."""
    pro = PRO(base(copy.deepcopy(net).double()), 3, 0.02)
    x = inputs.double()[::7]
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ahead, behind = (x + sign * 1e-7 * along for sign in (1, -1))
    apart = [pro.rectified(v) - v for v in (ahead, behind)]
    smooth = ((apart[0] - apart[1]).abs() < 1e-9).flatten(1).all(1)
    assert smooth.double().mean() > 0.9
    by_values = (pro.score(ahead) - pro.score(behind)) / 2e-7
    by_graph = (gradient(pro.score, x) * along).flatten(1).sum(1)
    assert torch.allclose(by_graph[smooth], by_values[smooth], rtol=1e-3, atol=1e-4)


def test_what_it_gains_on_one_side_it_pays_on_the_other():
    """For a linear score exactly: an attack downwards within eps is one on the base within eps + K step."""
    from robustood.evaluate import attack_score
    from robustood.perturbations import Linf

    base, x = slope((2.0, -1.0, 0.5)), double([(0.5, 0.4, 0.6)])
    pro = PRO(base, 2, 0.05)
    low = {
        eps: [
            d.score(attack_score(d, x, Linf(eps), direction="lower", steps=5)).item()
            for d in (base, pro)
        ]
        for eps in (0.1, 0.2)
    }
    assert low[0.1][1] == pytest.approx(low[0.2][0], abs=1e-6)


def test_no_gradient_is_a_clear_error():
    class Rounded(MaxLogit):
        def score(self, x):
            return super().score(x).detach()

    with pytest.raises(RuntimeError, match="there is no gradient"):
        PRO(Rounded(raw())).score(double([(3, 1, 0)]))


def test_an_unfitted_base_says_so(net, inputs):
    with pytest.raises(RuntimeError, match=r"KNN is not fitted; call fit\(x, y\)"):
        PRO(KNN(net)).score(inputs)


# --- fitting in a stream --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("name", ["Mahalanobis", "Mahalanobis, all", "KNN", "ViM", "ReAct"])
def test_the_split_into_batches_changes_nothing(net, book, inputs, monkeypatch, name, size):
    model, x, y = copy.deepcopy(net).double(), book.train.x.double()[:200], book.train.y[:200]
    whole = BUILD[name](model, x, y).score(inputs.double())
    monkeypatch.setattr(base, "FIT_BATCH", size)
    parts = BUILD[name](model, x, y).score(inputs.double())
    assert torch.allclose(parts, whole, rtol=1e-7 if name == "ReAct" else 1e-10, atol=1e-9)


@given(cuts=st.lists(st.integers(1, 59), max_size=6), mean=st.sampled_from([0.0, 3.0, 1e6]))
def test_moments_are_those_of_centred_data(cuts, mean):
    h, y = some(8, 60, 5, 1.0), torch.arange(60) % 4
    moments = features.Moments(4, h)
    for part, labels in zip(
        h.tensor_split(sorted(cuts)), y.tensor_split(sorted(cuts)), strict=True
    ):
        moments.update(part + mean, labels)
    means = np.stack([h[y == c].numpy().mean(0) for c in range(4)])
    own = h.numpy() - means[y.numpy()]
    assert torch.equal(moments.count, torch.full((4,), 15.0).double())
    assert np.abs(moments.mean.numpy() - mean - means).max() <= 1e-15 * max(mean, 10)
    # Adding 1e6 rounds each feature to 1e-10; nothing more may be lost.
    assert np.abs(moments.scatter.numpy() - own.T @ own).max() < (1e-10 if mean < 10 else 1e-7)


def test_a_large_mean_costs_single_precision_only_what_rounding_cost():
    """Sums of squares would have lost everything: 1e12 against a variance of 1."""
    h, y = some(9, 2000, 3, 1.0).float() + 1e4, torch.arange(2000) % 2
    moments = features.Moments(2, h)
    for part, labels in zip(h.split(64), y.split(64), strict=True):
        moments.update(part, labels)
    exact = h.double().numpy()
    own = exact - np.stack([exact[y.numpy() == c].mean(0) for c in (0, 1)])[y.numpy()]
    assert np.allclose(moments.scatter.numpy(), own.T @ own, rtol=1e-6, atol=1e-3)


def test_products_are_in_single_precision_only_where_torch_keeps_to_it():
    h = torch.zeros(2, 3)
    kinds = [features.Moments(1, v).sums(v.to(gaussian.precision(v)), torch.zeros(2).long()).dtype
             for v in (h, h.double(), h.half(), h.bfloat16())]  # fmt: skip
    assert kinds == [torch.float32, torch.float64, torch.float64, torch.float64]
    with torch.autocast("cpu"):
        assert gaussian.precision(h) == torch.float64
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert gaussian.precision(h) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("width", [1, 5, 86, 87, 172, 200])
def test_the_product_by_strips_is_the_product(width):
    own = some(4, 50, width)
    assert torch.allclose(gaussian.gram(own), own.T @ own, rtol=1e-12, atol=1e-12)


class Watched(nn.Module):
    """A network that remembers how many images it saw at one time."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.most, self.images = inner, 0, 0
        self.classes, self.head = inner.classes, inner.head

    def features(self, x):
        self.most, self.images = max(self.most, len(x)), self.images + len(x)
        return self.inner.features(x)

    def stages(self, x):
        self.most, self.images = max(self.most, len(x)), self.images + len(x)
        return self.inner.stages(x)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("name", "passes"),
    [("Mahalanobis", 1), ("Mahalanobis, all", 1), ("KNN", 1), ("ViM", 2), ("ReAct", 2)],
)
def test_fit_streams(net, book, name, passes):
    watched = Watched(net)
    x, y = book.train.x, book.train.y
    BUILD[name](watched, x, y)
    assert watched.most == base.FIT_BATCH < len(x)
    confirming = base.CONFIRMING if name == "ViM" else 0  # which reads the head
    assert watched.images == passes * len(x) + confirming


def test_a_fit_that_fails_leaves_no_trace(net, book):
    class Tired(Watched):
        def features(self, x):
            if self.images:
                raise RuntimeError("out of memory")
            return super().features(x)

    for name in ("Mahalanobis", "KNN", "ViM", "ReAct"):
        model = Tired(copy.deepcopy(net).train())
        with pytest.raises(RuntimeError, match="out of memory"):
            BUILD[name](model, book.train.x, book.train.y)
        assert torch.is_grad_enabled()
        assert model.inner.training and all(p.requires_grad for p in model.parameters())


def test_react_clips_at_the_quantile(net, book):
    with torch.no_grad():
        h = net.features(book.train.x)
    for share in (0.5, 0.9, 0.99, 1.0):
        clip = ReAct(net, share=share).fit(book.train.x).clip.item()
        exact = np.quantile(h.numpy(), share, method="inverted_cdf")
        assert clip == pytest.approx(float(exact), abs=2e-6 * float(h.max()))


def test_layers_are_weighed_by_outliers(net, book):
    """Larger is more in-distribution: outliers push the weights below zero; the sum comes before."""
    both = Mahalanobis(net, "all").fit(book.train.x, book.train.y)
    assert torch.allclose(both.score(book.test.x), both.layer_scores(book.test.x).sum(1), rtol=1e-5)
    weighed = copy.deepcopy(both).combine(book.val.x, book.outliers[:200])
    assert weighed.weight.shape == (3,) and weighed.weight.sum() < 0
    scores = [weighed.score(x).detach() for x in (book.test.x, book.ood["letters"])]
    assert auroc(*scores) > 0.9


# --- a known answer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """Three blobs on the plane and a network that separates them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    corners = torch.tensor([(0.2, 0.2), (0.8, 0.2), (0.5, 0.8)])
    x = corners[y] + 0.05 * torch.randn(600, 2, generator=generator)
    model = mlp(2, (64, 64), 3)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), x, y


def test_the_middle_between_three_classes_scores_below_them(toy):
    model, x, y = toy
    middle = torch.tensor([(0.5, 0.4)]) + 0.01 * torch.randn(
        100, 2, generator=torch.Generator().manual_seed(1)
    )
    for name, detector in post_hoc(model, x, y).items():
        with torch.no_grad():
            value = auroc(detector.score(x), detector.score(middle))
        assert value > (0.7 if name == "ViM" else 0.9), f"{name}: {value:.3f}"


def test_digits_score_above_noise_and_letters(net, book):
    made = post_hoc(net, book.train.x, book.train.y)
    assert list(made) == [
        *("MSP", "MaxLogit", "Energy", "Entropy", "ODIN"),
        *("Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm"),
    ]
    for name, detector in made.items():
        with torch.no_grad():
            inside, letters = detector.score(book.test.x), detector.score(book.ood["letters"])
        # GradNorm grows with the features, whatever they say: known to be weak on small images.
        assert auroc(inside, letters) > (0.5 if name == "GradNorm" else 0.7), name


def test_a_deeper_network_by_adaptation(book):
    """The parts that detectors look for, found in a network from elsewhere."""
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    model = adapt(inner, "3")
    x, y = book.train.x[:200], book.train.y[:200]
    for name, detector in post_hoc(model, x, y).items():
        assert detector.score(x[:7]).shape == (7,), name
        assert detector.paper_score(x[:7]).isfinite().all(), name
    assert torch.equal(MSP(model).paper_score(x), inner(x).softmax(1).amax(1))


# --- keeping and moving ---------------------------------------------------------------------------


FITTED = {
    "Mahalanobis": {"layer_fits.0.whiten", "layer_fits.0.means"},
    "Mahalanobis, combined": {"weight", "bias", "layer_fits.2.whiten"},
    "KNN": {"bank", "prototypes"},
    "ViM": {"origin", "outside", "alpha"},
    "ReAct": {"clip"},
}


@pytest.mark.parametrize("name", FITTED)
def test_the_state_holds_what_was_fitted(net, book, name):
    x, y = book.train.x[:200], book.train.y[:200]
    made = BUILD[name](copy.deepcopy(net), x, y)
    state = made.state_dict()
    assert FITTED[name] <= state.keys()
    precise = copy.deepcopy(made).to(torch.float64)
    for key, value in precise.state_dict().items():
        assert value.dtype in (torch.float64, torch.int64), key
    assert torch.allclose(
        precise.score(x[:20].double()).float(), made.score(x[:20]), rtol=1e-3, atol=1e-3
    )
    with torch.no_grad():
        for value in made.state_dict().values():
            value.zero_()
    made.load_state_dict(state)
    again = copy.deepcopy(made)
    assert torch.equal(again.score(x[:9]), made.score(x[:9]))


NEW = {
    "Mahalanobis": Mahalanobis,
    "Mahalanobis, combined": lambda m: Mahalanobis(m, "all"),
    "KNN": lambda m: KNN(m, 5),
    "ViM": lambda m: ViM(m, 16),
    "ReAct": ReAct,
}


@pytest.mark.parametrize("name", FITTED)
def test_a_new_object_takes_the_state_of_a_fitted_one(net, book, name):
    x, y = book.train.x[:200], book.train.y[:200]
    made, other = (copy.deepcopy(net) for _ in range(2))
    made = BUILD[name](made, x, y)
    refitted = BUILD[name](copy.deepcopy(net), x[:150], y[:150])  # a bank of another size
    for again in (NEW[name](other), refitted):
        again.load_state_dict(made.state_dict())
        assert torch.equal(again.score(x[:9]), made.score(x[:9]))
        own = {value.data_ptr() for value in made.state_dict().values()}
        assert own.isdisjoint(value.data_ptr() for value in again.state_dict().values())


def test_the_state_of_a_network_unfits_nothing(net, book):
    x, y = book.train.x[:200], book.train.y[:200]
    for name in FITTED:
        made = BUILD[name](copy.deepcopy(net), x, y)
        before = made.score(x[:9])
        alone = {f"model.{key}": value for key, value in net.state_dict().items()}
        made.load_state_dict(alone, strict=False)
        assert torch.equal(made.score(x[:9]), before), name


def test_an_output_that_is_not_finite_confirms_no_head(inputs):
    model = Normalising(inside=True)
    norm = GradNorm(model)
    norm.score(inputs[:2] * torch.nan)
    assert not norm.confirmed.done
    norm.score(inputs[:2])
    assert norm.confirmed.done


def test_fitting_again_forgets_the_first_time(net, book):
    x, y = book.train.x, book.train.y
    for name in ("Mahalanobis", "Mahalanobis, combined", "KNN", "ViM", "ReAct"):
        twice = BUILD[name](net, x[:200], y[:200])
        twice.fit(x[200:500], y[200:500])
        once = NEW[name](net).fit(x[200:500], y[200:500])
        assert torch.equal(twice.score(x[:30]), once.score(x[:30])), name


# --- networks from elsewhere ----------------------------------------------------------------------


class Normalising(nn.Module):
    """Normalises its inputs itself, so head(features(x)) is not what it returns."""

    def __init__(self, inside: bool):
        super().__init__()
        self.inside = inside
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def features(self, x):
        return self.body((x - 0.5) / 0.25 if self.inside else x)

    def forward(self, x):
        return self.head(self.body((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    "score",
    [
        lambda m, x: ReAct(m, clip=math.inf).score(x),
        lambda m, x: GradNorm(m).score(x),
        lambda m, x: ViM(m, 8).fit(x).score(x),
    ],
)
def test_a_head_and_features_that_do_not_make_the_outputs_are_refused(inputs, score):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"is not what Normalising returns.*models\.adapt"):
        score(Normalising(inside=False), inputs)
    model = Normalising(inside=True)
    assert torch.allclose(score(model, inputs), score(adapt(model), inputs), atol=1e-5)


def test_react_that_clips_nothing_is_the_energy_of_any_network(inputs):
    model = Normalising(inside=True)
    alike = ReAct(model, clip=math.inf).score(inputs), Energy(model).score(inputs)
    assert torch.allclose(*alike, atol=1e-5)


def test_features_with_pixels_left_are_refused():
    class Maps(nn.Module):
        features = staticmethod(lambda x: x)

        def forward(self, x):
            return x.flatten(1)[:, :3]

    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must return \(batch, width\), got shape \(4, 3, 8, 8\)"):
        KNN(Maps(), 1).fit(x, torch.arange(4) % 2)


def test_layers_are_weighed_in_half_precision_too(book):
    x, y = book.train.x[:100], book.train.y[:100]
    half = Mahalanobis(small_cnn().bfloat16(), "all").fit(x.bfloat16(), y)
    half.combine(x.bfloat16(), 1 - x.bfloat16())
    assert half.weight.dtype == torch.bfloat16 and half.score(x[:3].bfloat16()).isfinite().all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Mahalanobis, KNN, ViM, ReAct])
@pytest.mark.parametrize("call", ["score", "paper_score", "attack_objectives"])
def test_scoring_before_fit_is_refused(net, book, kind, call):
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} is not fitted; call fit\(x, y\)"):
        getattr(kind(net), call)(book.test.x[:2])


GOOD, LABELS = torch.rand(60, 1, 8, 8), torch.arange(60) % 10


def refused(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


# --- scores from elsewhere -------------------------------------------------------------------------


class Scorer(nn.Module):
    """A network with a method ``score``; called, it gives outputs."""

    def __init__(self):
        super().__init__()
        self.net = mlp(64, (), classes=3)

    def forward(self, x):
        return self.net(x)

    def score(self, x):
        return self.net(x).amax(1)


class Predictor:
    """In the manner of pytorch-ood: called, it predicts; its ``score`` takes outputs."""

    def __init__(self, model):
        self.model = model

    def predict(self, x):
        return -self.model(x).amax(1)

    def __call__(self, x):
        return self.predict(x)

    @staticmethod
    def score(logits):
        raise AssertionError("this is a function of outputs, not of inputs")


class Silent:
    """Has ``predict`` alone."""

    def predict(self, x):
        return x.flatten(1).mean(1)


class Estimator:
    """In the manner of scikit-learn; ``score`` and ``predict`` are other things there."""

    def __init__(self, method="decision_function"):
        setattr(self, method, self.estimate)

    def estimate(self, h):
        assert isinstance(h, np.ndarray) and h.ndim == 2
        return h.mean(1)

    def score(self, h):
        raise AssertionError("the mean log-likelihood of a data set")

    def predict(self, h):
        raise AssertionError("labels, 1 and -1")


PICTURES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
BRIGHT = PICTURES.flatten(1).mean(1)
SCORER = Scorer().eval()
ELSEWHERE = {
    "a function": (lambda x: x.flatten(1).mean(1), BRIGHT),
    "of NumPy": (lambda x: x.flatten(1).detach().numpy().mean(1), BRIGHT),
    "a list": (lambda x: x.flatten(1).mean(1).tolist(), BRIGHT),
    "whole numbers": (lambda x: (x.flatten(1).mean(1) > 0.5).int(), (BRIGHT > 0.5).double()),
    "a network with score": (SCORER, SCORER.score(PICTURES)),
    "called": (Predictor(SCORER), -SCORER.score(PICTURES)),
    "predict": (Silent(), BRIGHT),
    "decision_function": (Estimator(), BRIGHT),
    "score_samples": (Estimator("score_samples"), BRIGHT),
    "a detector of ours": (MSP(SCORER), MSP(SCORER).score(PICTURES)),
}  # fmt: skip
each_score = pytest.mark.parametrize(("score", "value"), ELSEWHERE.values(), ids=ELSEWHERE)


@each_score
def test_a_score_from_elsewhere_points_where_it_is_said_to(score, value):
    inside, outside = wrap(score, higher="in"), wrap(score, higher="out")
    torch.testing.assert_close(inside.score(PICTURES), value, check_dtype=False)
    assert torch.equal(outside.score(PICTURES), -inside.score(PICTURES))
    assert inside.score(PICTURES).is_floating_point()
    for direction, sign in (("raise", 1), ("lower", -1)):
        columns = outside.attack_objectives(PICTURES, direction)
        assert torch.equal(columns, sign * outside.score(PICTURES)[:, None])
    assert "higher='out'" in repr(outside)


@pytest.mark.parametrize("method", ["decision_function", "score_samples"])
def test_an_estimator_sees_features(method):
    found = wrap(Estimator(method), higher="in", features=lambda x: 2 * x[:, :, :2])
    expected = 2 * PICTURES[:, :, :2].flatten(1).mean(1)
    torch.testing.assert_close(found.score(PICTURES), expected, check_dtype=False)
    deep = wrap(Estimator(method), higher="in", features=SCORER)
    assert deep.score(PICTURES.requires_grad_()).requires_grad is False
    PICTURES.requires_grad_(False)


def test_an_estimator_of_scikit_learn():
    forest = IsolationForest(random_state=0).fit(PICTURES.flatten(1).numpy())
    found = wrap(forest, higher="in")
    expected = forest.decision_function(PICTURES.flatten(1).numpy())
    np.testing.assert_allclose(found.score(PICTURES), expected)
    assert found.name == "IsolationForest"


def test_a_gradient_flows_where_there_is_one():
    weight = SCORER.net.head.weight
    x = PICTURES.clone().requires_grad_()
    best = SCORER(x).argmax(1)
    for score, sign in ((SCORER, 1), (Predictor(SCORER), -1)):
        (grad,) = torch.autograd.grad(wrap(score, higher="in").score(x).sum(), x)
        torch.testing.assert_close(grad.flatten(1), sign * weight[best])
    careless = lambda x: SCORER(x).numpy().max(1)
    for score in (Estimator(), ELSEWHERE["of NumPy"][0], careless):
        with pytest.raises(RuntimeError, match="no gradient"):
            attack_score(wrap(score, higher="in"), PICTURES, 0.1, direction="raise", steps=2)


def test_a_score_with_its_network_pulls_towards_each_class():
    found = wrap(SCORER, higher="in", model=SCORER)
    columns = found.attack_objectives(PICTURES)
    torch.testing.assert_close(columns[:, 0], SCORER.score(PICTURES))
    torch.testing.assert_close(columns[:, 1:], log_odds(SCORER(PICTURES)))
    assert found.has_classes and not wrap(SCORER, higher="in").has_classes
    assert found.attack_objectives(PICTURES, "lower").shape == (6, 1)


def test_networks_inside_a_score_are_found_frozen_and_restored():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3)).train()
    for score in (lambda x: net(x).amax(1), Predictor(net)):
        found = wrap(score, higher="in")
        with frozen(found):
            assert not net[1].training and not net[2].weight.requires_grad
            assert torch.equal(found.score(PICTURES), found.score(PICTURES))
        assert net[1].training and net[2].weight.requires_grad


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_alone_are_enough_for_an_attack(direction):
    """Brightness in NumPy moves by the radius, as far as the box allows."""
    found = wrap(ELSEWHERE["of NumPy"][0], higher="out")
    moved = attack_score(found, PICTURES, 0.1, direction=direction, steps=300, rule=Square())
    change = found.score(moved) - found.score(PICTURES)
    assert ((change if direction == "raise" else -change) > 0.06).all()
    assert ((moved - PICTURES).abs() <= 0.1 + 1e-6).all() and 0 <= moved.min() <= moved.max() <= 1


def test_the_standard_evaluation_of_a_score_without_a_gradient_uses_values():
    found = wrap(ELSEWHERE["of NumPy"][0], higher="in", name="brightness")
    x_in, x_out = PICTURES[:3] / 2 + 0.5, {"dark": PICTURES[3:] / 2}
    report = standard(found, x_in, x_out, 0.1)
    assert report["both"].settings["gradient"] == "none"
    assert report["both"].settings["detector"] == "brightness"
    assert [row["attack"] for row in report.attacks] == ["clean", "Square"]
    assert all(row["backwards"] == 0 for row in report.attacks)
    assert report.attacks[1]["forwards"] >= 1000


def test_the_identity_of_a_score_covers_what_it_is_made_of():
    def scaled(factor):
        return lambda x: factor * x.flatten(1).mean(1)

    tellings = [
        fingerprint(detector=wrap(score, higher=higher, **more))
        for score, higher, more in [
            (scaled(1.0), "in", {}), (scaled(2.0), "in", {}), (scaled(1.0), "out", {}),
            (scaled(1.0), "in", {"model": SCORER}), (Estimator(), "in", {}),
            (Estimator(), "in", {"features": scaled(1.0)}), (lambda x: x.flatten(1).amax(1), "in", {}),
        ]
    ]  # fmt: skip
    assert all(a != b for i, a in enumerate(tellings) for b in tellings[:i])
    assert tellings[0] == fingerprint(detector=wrap(scaled(1.0), higher="in"))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wrap(Predictor, higher="in"), ["score must be an object", "the class Predictor"]),
        (lambda: wrap(3, higher="in"), ["score must be a function", "decision_function", "int"]),
        (lambda: wrap(SCORER, higher="up"), ["higher must be one of 'in', 'out'", "'up'"]),
        (lambda: wrap(Silent(), higher="in", features=SCORER), ["features is for estimators", "call it inside"]),
        (lambda: wrap(Estimator(), higher="in", features=3), ["features must be a function"]),
        (lambda: wrap(SCORER, higher="in", model=lambda x: x), ["model must be the network behind"]),
        (lambda: wrap(SCORER, higher="in", name=3), ["name must be a str"]),
        *[
            (lambda change=change: wrap(lambda x: change(SCORER(x)), higher="in").score(PICTURES), words)
            for change, words in [
                (lambda z: z, ["one number per input", "(6,)", "(6, 3)", "reduce"]),
                (lambda z: z.amax(), ["one number per input", "got ()"]),
                (lambda z: z[:3, 0], ["(6,)", "got (3,)"]),
                (lambda z: z[:, 0] + 0j, ["one number per input"]),
                (lambda z: z.detach().numpy()[:, 0] + 0j, ["score must be numbers"]),
                (lambda z: None, ["score must be numbers", "None"]),
            ]
        ],
    ],
)  # fmt: skip
def test_a_score_that_is_none_is_refused(call, words):
    message = refused(call)
    assert all(word in message for word in words), message


def test_a_score_needs_its_direction(untyped):
    with pytest.raises(TypeError, match="higher"):
        wrap(SCORER)  # ty: ignore[missing-argument]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: Mahalanobis(m).fit(GOOD), ["y is None", "fit(x, y)"]),
        (lambda m: KNN(m).fit(GOOD), ["y is None"]),
        (lambda m: Mahalanobis(m).fit(GOOD, LABELS[:7]), ["y", "(60,)", "(7,)"]),
        (lambda m: Mahalanobis(m).fit(GOOD, LABELS.double()), ["y", "float64", "y.long()"]),
        (lambda m: Mahalanobis(m).fit(GOOD, LABELS - 1), ["y", "-1"]),
        (lambda m: Mahalanobis(m).fit(GOOD, 2 * LABELS), ["no sample of the classes", "[1, 3, 5"]),
        (lambda m: ViM(m).fit(GOOD * torch.nan), ["x", "NaN"]),
        (lambda m: ReAct(m).fit(GOOD[:0]), ["x", "empty"]),
        (lambda m: ReAct(m).fit(GOOD.short()), ["x", "int16"]),
        (lambda m: KNN(m, 61).fit(GOOD, LABELS), ["x", "k = 61", "60"]),
        (lambda m: KNN(m, 0), ["k", "at least 1", "0"]),
        (lambda m: KNN(m, 2.5), ["k", "2.5"]),
        (lambda m: ViM(m, 65).fit(GOOD), ["dims", "64", "65"]),
        (lambda m: ViM(m, 0), ["dims", "at least 1"]),
        (lambda m: ViM(m, 63).fit(GOOD[:9]), ["dims = 63", "subspace", "fewer dims"]),
        (lambda m: RejectClass(m), ["model", "reject", "reject=1"]),
        (lambda m: RejectClass(nn.Identity()), ["reject"]),
        (lambda m: Mahalanobis(m, "first"), ["layers", "'first'", "'last'", "'all'"]),
        (lambda m: Mahalanobis(m, step=-0.1), ["step", "-0.1"]),
        (lambda m: ODIN(m, 0), ["temperature", "0"]),
        (lambda m: ODIN(m, step=math.nan), ["step", "nan"]),
        (lambda m: Energy(m, -1), ["temperature", "-1"]),
        (lambda m: PRO(m), ["base", "a detector", "Classifier"]),
        (lambda m: PRO(MSP), ["base", "the class MSP"]),
        (lambda m: PRO(MSP(m), 1.5), ["steps", "1.5"]),
        (lambda m: PRO(MSP(m), step=-0.1), ["step", "-0.1"]),
        (lambda m: PRO(MSP(m)).attack_objectives(GOOD, "up"), ["direction", "'up'"]),
        (lambda m: ReAct(m, share=1.5), ["share", "1.5"]),
        (
            lambda m: MSP(m).attack_objectives(GOOD, "up"),
            ["direction", "'up'", "'raise'", "'lower'"],
        ),
        (lambda m: GradNorm(m).attack_objectives(GOOD, "up"), ["direction", "'up'"]),
        (lambda m: Mahalanobis(m).fit(GOOD, LABELS).combine(GOOD, GOOD * math.inf), ["infinity"]),
    ],
)
def test_bad_input_is_refused_with_the_fix(net, call, words):
    message = refused(lambda: call(net))
    assert all(word in message for word in words), message


def test_a_dead_layer_is_refused():
    dead = readout(torch.ones(3, 4))
    message = refused(lambda: Mahalanobis(dead).fit(torch.full((9, 4), 0.5), torch.arange(9) % 3))
    assert "no variance" in message and "dead" in message
    refused(lambda: ViM(dead, 2).fit(torch.zeros(9, 4)))


def test_the_package_exports_every_detector():
    kinds = detectors.Detector.__subclasses__()
    own = {kind.__name__ for kind in kinds if kind.__module__.startswith(detectors.__name__)}
    assert len(own) == 13 and own | {"post_hoc", "Detector"} <= {*detectors.__all__}
