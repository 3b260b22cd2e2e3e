"""The attacks against torchattacks: another implementation, the same numbers.

Where both start from the same point the adversarial examples agree pixel by pixel, in double
precision: a rounding error cannot flip the sign of a gradient there. With starts of their own
the robust accuracies agree.
"""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from robustood import attacks, losses
from robustood.attacks import fgsm, pgd, robust_accuracy
from robustood.data import digits
from robustood.models import small_cnn
from robustood.objectives import Adversarial
from robustood.perturbations import L2, Linf
from robustood.training import fit

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def torchattacks():
    return pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: pip install --no-deps torchattacks"
    )


@pytest.fixture(scope="module")
def book():
    return digits()


@pytest.fixture(scope="module")
def robust(book):
    """Trained against eps = 0.1, so that an l_2 attack is neither hopeless nor certain."""
    model = small_cnn()
    fit(model, Adversarial(0.1, steps=5), book, epochs=15)
    return model


class NoisyLinf(Linf):
    """The cube, started from the draw that torchattacks makes after ``torch.manual_seed(7)``."""

    def uniform(self, x, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return torch.empty_like(x).uniform_(-self.eps, self.eps)


class NoisyL2(L2):
    """The ball, started likewise: torchattacks draws a radius uniform in [0, eps]."""

    def uniform(self, x, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            noise = torch.empty_like(x).normal_()
            length = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            return noise * torch.empty_like(length).uniform_(0, 1) / length * self.eps


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("eps", [2 / 255, 8 / 255, 0.1])
def test_fgsm_agrees(torchattacks, exact, batch, eps):
    theirs = torchattacks.FGSM(exact, eps=eps)(*batch)
    ours = fgsm(exact, *batch, Linf(eps))
    assert difference(ours, theirs) < 1e-5
    assert difference(ours, batch[0]) == pytest.approx(eps)


@pytest.mark.parametrize(("eps", "steps", "step_size"), [(8 / 255, 10, 2 / 255), (0.1, 20, 0.02)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_from_the_clean_image_agrees(torchattacks, exact, batch, norm, eps, steps, step_size):
    peer, within = (
        (torchattacks.PGD, Linf(eps)) if norm == "linf" else (torchattacks.PGDL2, L2(10 * eps))
    )
    step_size *= within.radius / eps
    theirs = peer(exact, eps=within.radius, alpha=step_size, steps=steps, random_start=False)(
        *batch
    )
    ours = pgd(exact, *batch, within, steps=steps, step_size=step_size, restarts=0, keep="last")
    assert difference(ours, theirs) < 1e-5
    assert difference(ours, batch[0]) > 0.5 * eps  # both moved


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_from_a_shared_random_start_agrees(torchattacks, exact, batch, norm):
    peer, within, step_size = (
        (torchattacks.PGD, NoisyLinf(8 / 255), 2 / 255)
        if norm == "linf"
        else (torchattacks.PGDL2, NoisyL2(0.5), 0.1)
    )
    attack = peer(exact, eps=within.radius, alpha=step_size, steps=10, random_start=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = attack(*batch)
    call = partial(pgd, exact, *batch, steps=10, step_size=step_size, keep="last")
    assert difference(call(within), theirs) < 1e-5
    plain = Linf(8 / 255) if norm == "linf" else L2(0.5)
    assert difference(call(plain), theirs) > 1e-3  # another start ends elsewhere


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_single_precision_all_but_a_few_pixels_agree(torchattacks, robust, book, norm):
    x, y = book.test.x, book.test.y
    peer, within = (
        (torchattacks.PGD, Linf(0.1)) if norm == "linf" else (torchattacks.PGDL2, L2(0.7))
    )
    step_size = within.radius / 4
    theirs = peer(robust, eps=within.radius, alpha=step_size, random_start=False)(x, y)
    ours = pgd(robust, x, y, within, steps=10, step_size=step_size, restarts=0, keep="last")
    agree = ((ours - theirs).abs() < 1e-5).float().mean().item()
    print(f"{norm}: {agree:.2%} of the pixels agree to 1e-5 in single precision")
    assert agree > 0.97


STEPS, STARTS = 40, 5


def surviving(peer, model, book, eps):
    """Robust accuracy by torchattacks: right after every one of several random starts."""
    standing = torch.ones(len(book.test), dtype=torch.bool)
    attack = peer(model, eps=eps, alpha=2.5 * eps / STEPS, steps=STEPS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(STARTS):
            moved = attack(book.test.x, book.test.y)
            standing &= model(moved).argmax(1) == book.test.y
    return standing.float().mean().item()


@pytest.mark.parametrize("within", [Linf(0.1), L2(0.3), L2(0.5), L2(1.0)], ids=str)
def test_robust_accuracy_agrees_within_half_a_point(torchattacks, robust, book, within):
    """As many steps and starts, other laws of starts: theirs has a radius uniform in [0, eps]."""
    peer = torchattacks.PGD if isinstance(within, Linf) else torchattacks.PGDL2
    theirs = surviving(peer, robust, book, within.eps)
    attack = partial(pgd, within=within, steps=STEPS, restarts=STARTS)
    ours = robust_accuracy(robust, book.test.x, book.test.y, attack).value
    print(f"{within}: robustood {100 * ours:.1f} %, torchattacks {100 * theirs:.1f} %")
    assert 0.05 < ours < 0.95
    assert abs(ours - theirs) <= 0.005 + 1e-6


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(6)
    z = 5 * torch.randn(500, 10, generator=generator, dtype=torch.float64)
    return z, torch.randint(0, 10, (500,), generator=generator)


@pytest.mark.parametrize(("norm", "within"), [("Linf", Linf(0.1)), ("L2", L2(0.5))])
def test_apgd_agrees_with_apgd(torchattacks, robust, book, norm, within):
    """The same rule from other starts: robust accuracy within a point, and ours no weaker by more."""
    x, y = book.test.x, book.test.y
    theirs = torchattacks.APGD(robust, norm=norm, eps=within.eps, steps=40, n_restarts=2, seed=0)
    with torch.no_grad():
        left = (robust(theirs(x, y)).argmax(1) == y).float().mean().item()
    attack = partial(pgd, within=within, steps=40, restarts=2, rule=attacks.APGD())
    ours = robust_accuracy(robust, x, y, attack).value
    assert abs(ours - left) <= 0.01, (ours, left)


def test_dlr_agrees_with_apgd(torchattacks, exact, logits):
    z, y = logits
    theirs = torchattacks.APGD(exact, loss="dlr").dlr_loss(z, y)
    torch.testing.assert_close(losses.dlr(z, y), theirs, atol=1e-12, rtol=1e-9)


def test_the_margin_agrees_with_carlini_and_wagner(torchattacks, exact, logits):
    z, y = logits
    z = z - z.min() + 1  # theirs masks by multiplying with zero: right for positive logits only
    theirs = torchattacks.CW(exact, kappa=1e6).f(z, y)
    torch.testing.assert_close(losses.margin(z, y), -theirs.to(z.dtype), atol=1e-5, rtol=1e-6)


def test_cross_entropy_agrees_with_pytorch(logits):
    z, y = logits
    torch.testing.assert_close(losses.cross_entropy(z, y), cross_entropy(z, y, reduction="none"))
    by_hand = z.exp().sum(1).log() - z[torch.arange(len(y)), y]
    torch.testing.assert_close(losses.cross_entropy(z, y), by_hand, atol=1e-9, rtol=1e-9)


def test_their_margin_attack_finds_no_more_than_ours(torchattacks, robust, book):
    """APGD-DLR with restarts is a stronger peer; our targets attack must not fall behind it."""
    x, y = book.test.x, book.test.y
    moved = torchattacks.APGD(robust, norm="L2", eps=0.7, steps=50, n_restarts=3, loss="dlr")(x, y)
    with torch.no_grad():
        theirs = (robust(moved).argmax(1) == y).float().mean().item()
    ours = robust_accuracy(robust, x, y, partial(pgd, within=L2(0.7), steps=20, loss="targets"))
    print(f"l2 eps=0.7: targets {100 * ours.value:.1f} %, APGD-DLR {100 * theirs:.1f} %")
    assert ours.value <= theirs + 0.005
