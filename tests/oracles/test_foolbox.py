"""The attacks against foolbox: another implementation, the same pixels from the same start.

In double precision they agree to 1e-9. In single precision a step in L2 divides by a norm that the two sum in
another order, and the network amplifies the last digit from step to step; a step in Linf takes signs, so that a
pixel is either equal to the last digit or, where rounding flips a sign, a step away.
"""

import warnings

import pytest
import torch

from robustood.attacks import fgsm, pgd
from robustood.perturbations import L2, Linf

pytestmark = pytest.mark.oracle
DOUBLE = 1e-9


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():  # it imports from an old name of scipy.ndimage
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip(
            "foolbox",
            reason="foolbox is not installed: pip install --no-deps foolbox eagerpy GitPython gitdb smmap",
        )


@pytest.fixture
def single(exact):
    """The same network in single precision, and back."""
    yield exact.float()
    exact.double()


def attacked(foolbox, model, x, y, attack, eps):
    """Their last iterate; ``attack(model, ...)`` would also clip it once more."""
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=eps)


def peer(foolbox, within, kind: str):
    """Their attack for a norm."""
    norm = "Linf" if isinstance(within, Linf) else "L2"
    return getattr(foolbox.attacks, f"{norm}{kind}Attack")


def shared(foolbox, within):
    """The set, started where theirs starts after ``torch.manual_seed(7)``: it draws for both."""
    attack = peer(foolbox, within, "ProjectedGradientDescent")()

    class Shared(type(within)):
        def uniform(self, x, generator):
            import eagerpy

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                return attack.get_random_start(eagerpy.astensor(x), self.eps).raw - x

    return Shared(within.eps)


def apart(ours, theirs) -> float:
    return (ours - theirs).abs().max().item()


each_ball = pytest.mark.parametrize("within", [Linf(8 / 255), Linf(0.1), L2(0.5), L2(2.0)], ids=str)


@each_ball
def test_fgsm_agrees(foolbox, exact, batch, within):
    x, y = batch
    theirs = attacked(foolbox, exact, x, y, peer(foolbox, within, "FastGradient")(), within.eps)
    ours = fgsm(exact, x, y, within)
    assert apart(ours, theirs) < DOUBLE
    free = type(within)(within.eps, box=None)  # no border shortens the step
    moved = within.norm(fgsm(exact, x, y, free) - x)
    assert torch.allclose(moved, torch.full_like(moved, within.eps), rtol=1e-9)


@each_ball
@pytest.mark.parametrize("steps", [1, 10, 40])
def test_pgd_from_the_clean_image_agrees(foolbox, exact, batch, within, steps):
    x, y = batch
    size = 2.5 * within.eps / steps
    attack = peer(foolbox, within, "ProjectedGradientDescent")(
        abs_stepsize=size, steps=steps, random_start=False
    )
    theirs = attacked(foolbox, exact, x, y, attack, within.eps)
    ours = pgd(exact, x, y, within, steps=steps, step_size=size, restarts=0, keep="last")
    assert apart(ours, theirs) < DOUBLE
    assert within.norm(ours - x).min() > 0.5 * within.eps  # both moved


@each_ball
def test_pgd_from_a_shared_random_start_agrees(foolbox, exact, batch, within):
    x, y = batch
    how = {"steps": 10, "step_size": within.eps / 4, "keep": "last"}
    attack = peer(foolbox, within, "ProjectedGradientDescent")(
        abs_stepsize=within.eps / 4, steps=10, random_start=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = attacked(foolbox, exact, x, y, attack, within.eps)
    assert apart(pgd(exact, x, y, shared(foolbox, within), **how), theirs) < DOUBLE
    assert apart(pgd(exact, x, y, within, **how), theirs) > 1e-3  # another start ends elsewhere


@each_ball
def test_in_single_precision_nearly_all_pixels_agree(foolbox, single, batch, within):
    x, y = batch[0].float(), batch[1]
    attack = peer(foolbox, within, "ProjectedGradientDescent")(
        abs_stepsize=within.eps / 4, steps=10, random_start=False
    )
    theirs = attacked(foolbox, single, x, y, attack, within.eps)
    ours = pgd(single, x, y, within, steps=10, step_size=within.eps / 4, restarts=0, keep="last")
    agree = ((ours - theirs).abs() < 1e-5).float().mean().item()
    print(f"{within}: {agree:.2%} of the pixels agree to 1e-5 in single precision")
    assert agree > 0.97
