"""The attacks against pyautoattack, the maintained AutoAttack: the same rule, the same points, as little left.

From shared starts APGD arrives at the same points in double precision for most samples. Two things part the others:
at the first checkpoint ours counts the start as a rise and theirs compares with zero there, and where two losses are
nearly equal the order of a sum decides which is higher. The comparison takes 100 steps, for which both reconsider the
step size at the same ones; in general theirs rounds down and ours up, as the paper does.

From starts of their own the robust accuracies agree, and :func:`robustood.attacks.worst_case` leaves at most what the
standard version does, plus half a point, in no more passes.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import photographs
import pytest
import torch
from torch import Tensor

from robustood import artefacts, data, losses
from robustood.attacks import APGD, Square, maximise, pgd, robust_accuracy, worst_case
from robustood.inputs import pixels
from robustood.models import frozen, small_cnn
from robustood.objectives import Adversarial
from robustood.perturbations import L2, Linf
from robustood.recipes import read
from robustood.recipes.runs import trained
from robustood.training import fit

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*points with zero gradient"),  # theirs says how many
]
HALF_A_POINT = 0.005 + 1e-6


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip(
        "pyautoattack", reason="pyautoattack is not installed: pip install --no-deps pyautoattack"
    )


@pytest.fixture(scope="module")
def robust(book):
    """Trained against eps = 0.1, so that neither everything nor nothing holds."""
    model = small_cnn()
    fit(model, Adversarial(0.1, steps=5), book, epochs=15)
    return model.eval()


@pytest.fixture(scope="module")
def double(robust):
    """The same network in double precision."""
    model = small_cnn()
    model.load_state_dict(robust.state_dict())
    return model.double().eval()


def norm_of(within) -> str:
    return type(within).__name__.removeprefix("Noisy")


def left(model, x: Tensor, y: Tensor) -> float:
    """The share that is still classified correctly."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


# --- APGD ---------------------------------------------------------------------------------------


class NoisyLinf(Linf):
    """The cube, started where theirs starts after ``torch.manual_seed(7)``: on its surface."""

    def uniform(self, x, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            noise = 2 * torch.rand(x.shape) - 1
            return self.eps * (noise / noise.flatten(1).abs().amax(1).view(-1, 1, 1, 1)).to(x)


class NoisyL2(L2):
    """The ball, likewise: theirs draws a point of the sphere."""

    def uniform(self, x, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            noise = torch.randn(x.shape)
            return self.eps * (noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).to(x)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("within", [NoisyLinf(0.1), NoisyL2(0.5)], ids=str)
def test_apgd_from_shared_starts_ends_at_the_same_points(peer, double, book, within, loss):
    from pyautoattack.autopgd_base import APGDAttack

    x, y, norm = book.test.x.double(), book.test.y, norm_of(within)
    other = APGDAttack(double, n_iter=100, norm=norm, eps=within.eps, loss=loss, device="cpu")
    other.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs, _, theirs_loss, _ = other.attack_single_run(x, y)
    objective = lambda moved: losses.LOSSES[loss](double(moved), y)
    with frozen(double):
        ours = maximise(objective, x, within, steps=100, rule=APGD())
    with torch.no_grad():
        apart = objective(ours) - theirs_loss
    same = ((ours - theirs).flatten(1).abs().amax(1) < 1e-5).double().mean().item()
    print(f"{within} {loss}: {same:.1%} end at the same point")
    assert same > 0.75
    assert (apart.abs() < 1e-4).double().mean() > 0.9
    assert apart.abs().quantile(0.8) < 1e-6


@pytest.mark.parametrize("within", [Linf(0.15), L2(0.5)], ids=str)
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_robust_accuracy_agrees_within_a_point_and_a_half(peer, robust, book, within, attack):
    """One start of 100 steps each, of their own laws; towards nine targets theirs climbs another ratio."""
    x, y = book.test.x, book.test.y
    other = peer.AutoAttack(
        robust, norm=norm_of(within), eps=within.eps, version="custom", attacks=[attack], seed=0
    )
    other.apgd.n_restarts = 1
    theirs = left(robust, other.run_standard_evaluation(x, y, batch_size=len(x))[0], y)
    loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "targets"}[attack]
    ours = robust_accuracy(
        robust, x, y, partial(pgd, within=within, steps=100, rule=APGD(), loss=loss)
    ).value
    print(f"{attack} {within}: robustood {100 * ours:.1f} %, pyautoattack {100 * theirs:.1f} %")
    assert 0.05 < ours < 0.95
    assert abs(ours - theirs) <= 0.015 + 1e-6


# --- random search ------------------------------------------------------------------------------


def whole_range(low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
    """Integers from low to high; theirs leaves out high, so that no square reaches the last row and column."""
    return (low + (high - low + 1) * torch.rand(*shape)).long()


@pytest.mark.parametrize("within", [Linf(0.15), L2(0.5)], ids=str)
def test_random_search_finds_as_much(peer, robust, book, within):
    """As many queries, and squares that reach the border in both. In L2 the moves differ."""
    x, y = book.test.x[:250], book.test.y[:250]
    other = peer.AutoAttack(
        robust, norm=norm_of(within), eps=within.eps, version="custom", attacks=["square"], seed=0
    )
    other.square.n_queries, other.square.rescale_schedule = 1000, True
    other.square.random_int = whole_range
    theirs = left(robust, other.run_standard_evaluation(x, y)[0], y)
    ours = left(robust, pgd(robust, x, y, within, steps=1000, loss="margin", rule=Square()), y)
    print(f"square {within}: robustood {100 * ours:.1f} %, pyautoattack {100 * theirs:.1f} %")
    assert ours < left(robust, x, y) - 0.02
    assert ours <= theirs + 0.02


# --- the whole of it ----------------------------------------------------------------------------


@dataclass
class Passes:
    """Samples that went through a network, forwards and backwards."""

    forwards: int = 0
    backwards: int = 0


@contextlib.contextmanager
def counted(model) -> Generator[Passes]:
    passes = Passes()

    def backward(grad: Tensor) -> None:
        passes.backwards += len(grad)

    def forward(module, given, outputs: Tensor) -> None:
        passes.forwards += len(outputs)
        if outputs.requires_grad:
            outputs.register_hook(backward)

    hook = model.register_forward_hook(forward)
    try:
        yield passes
    finally:
        hook.remove()


def compare(peer, model, x: Tensor, y: Tensor, within) -> None:
    """Ours leaves at most half a point more than theirs, in no more passes of either kind."""
    with counted(model) as ours:
        moved = worst_case(model, x, y, within)
    assert within.contains(x, moved - x).all()
    with counted(model) as theirs:
        other = peer.AutoAttack(model, norm=norm_of(within), eps=within.eps, seed=0)
        found, _ = other.run_standard_evaluation(x, y, batch_size=len(x))
    own, peers = left(model, moved, y), left(model, found, y)
    print(
        f"{within}: robustood leaves {own:.1%} after {ours}, pyautoattack {peers:.1%} after {theirs}"
    )
    assert own <= peers + HALF_A_POINT
    assert ours.forwards <= theirs.forwards
    assert ours.backwards <= theirs.backwards


@pytest.mark.slow
@pytest.mark.parametrize("within", [Linf(0.05), Linf(0.1)], ids=str)
def test_worst_case_leaves_no_more_on_the_standard_network(peer, net, book, within):
    compare(peer, net, book.test.x, book.test.y, within)


@pytest.mark.slow
@pytest.mark.parametrize("within", [Linf(0.1), Linf(0.15), L2(0.5)], ids=str)
def test_worst_case_leaves_no_more_on_the_robust_network(peer, robust, book, within):
    compare(peer, robust, book.test.x, book.test.y, within)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["standard_cifar10_cpu", "atom_cifar10_cpu", "adv_cifar10_cpu_8"])
def test_worst_case_leaves_no_more_on_photographs(peer, run, tmp_path):
    """500 images at 8/255: minutes for a network of which nothing is left, tens of them for one that holds."""
    photographs.need("cifar10:test")
    test = data.load("cifar10:test")
    folder = artefacts.restore(run, tmp_path)
    model, *_ = trained(read(folder / "recipe.json"), folder, "cpu")
    compare(peer, model, pixels(test.x[:500]), test.y[:500], Linf(8 / 255))
